"""The table of `rbf.md`: ``python docs/methods/evidence_rbf.py --seeds 10``.

One-dimensional regression with radial units, from 1 to 8 of them, unit by unit: each network is trained to the end at
each size, and every method adds one unit to what it then has. All methods begin from the same trained unit.
"""

# ruff: noqa: T201 (a command that prints its table)

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.criteria import Objective, Offspring, Splits, UnitVectors, offspring_edit
from lightning_grow.criteria.curvature import exact
from lightning_grow.growth.firefly import firefly
from lightning_grow.growth.random_growth import random_new_units, random_splits
from lightning_grow.growth.signed_splitting import signed_splits
from lightning_grow.growth.splitting import steepest_splits
from lightning_grow.structure import AxisGroup

FINAL_UNITS, STEPS, LR = 8, 1500, 0.02
Grow = Callable[[nn.Module, AxisGroup, Objective, torch.Generator], list[lg.Edit]]


class Radial(nn.Module):
    """The activation exp(-z^2 / 2)."""

    def forward(self, z: Tensor) -> Tensor:
        """Return it, entry by entry."""
        return torch.exp(-z.square() / 2)


def network(w: Tensor, b: Tensor, a: Tensor) -> nn.Sequential:
    """Return the network sum_i a_i exp(-(w_i x + b_i)^2 / 2)."""
    model = nn.Sequential(nn.Linear(1, len(w)), Radial(), nn.Linear(len(w), 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(w[:, None])
        model[0].bias.copy_(b)
        model[2].weight.copy_(a[None])
    return model


def drawn(units: int, generator: torch.Generator, w: float = 1.0, b: float = 1.0) -> nn.Sequential:
    """Return a network with normal weights of given standard deviations."""
    numbers = torch.randn(3, units, dtype=torch.float64, generator=generator)
    return network(w * numbers[0], b * numbers[1], numbers[2])


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean squared error."""
    return (model(batch[0]) - batch[1]).square().mean()


def train_(models: Sequence[nn.Sequential], targets: Sequence[Tensor], x: Tensor, steps: int) -> list[float]:
    """Train networks by Adam with a cosine schedule, each for itself; return their losses at the end.

    Networks of one size are trained side by side in stacked tensors: Adam works entry by entry, so that each of them
    goes the way that it would go alone.
    """
    losses = [float("nan")] * len(models)
    for size in {model[0].out_features for model in models}:
        places = [place for place, model in enumerate(models) if model[0].out_features == size]
        w = torch.stack([models[place][0].weight.detach().reshape(1, -1) for place in places]).requires_grad_()
        b = torch.stack([models[place][0].bias.detach().reshape(1, -1) for place in places]).requires_grad_()
        a = torch.stack([models[place][2].weight.detach().reshape(-1, 1) for place in places]).requires_grad_()
        y = torch.stack([targets[place] for place in places])
        optimizer = torch.optim.Adam([w, b, a], lr=LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps + 1):
            error = (torch.exp(-(x @ w + b).square() / 2) @ a - y).square().mean(dim=(1, 2))
            if step < steps:
                optimizer.zero_grad()
                error.sum().backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            for number, place in enumerate(places):
                losses[place] = float(error[number].detach())
                models[place][0].weight.copy_(w[number].T)
                models[place][0].bias.copy_(b[number, 0])
                models[place][2].weight.copy_(a[number].T)
    return losses


def relative(model: nn.Module, group: AxisGroup, radius: float) -> float:
    """Return a radius relative to the mean length of the units' fan-in vectors, as the library has it."""
    return radius / float(UnitVectors(model, group, "produced").of(dict(model.named_parameters())).norm(dim=1).mean())


def methods(radius: float, absolute: bool) -> dict[str, Grow]:
    """Return what adds one unit, by name."""

    def of(model: nn.Module, group: AxisGroup) -> float:
        return relative(model, group, radius) if absolute else radius

    def random_split(m: nn.Module, g: AxisGroup, _: Objective, r: torch.Generator) -> list[lg.Edit]:
        return random_splits(m, [g], 1, r, radius=of(m, g))

    def random_new(m: nn.Module, g: AxisGroup, _: Objective, r: torch.Generator) -> list[lg.Edit]:
        return random_new_units(m, [g], 1, r)

    def s2d(m: nn.Module, g: AxisGroup, o: Objective, r: torch.Generator) -> list[lg.Edit]:
        found = steepest_splits(m, [g], o, 1, form="exact", radius=of(m, g), generator=r)
        return [edit for edit, _ in found]

    def s2d_always(m: nn.Module, g: AxisGroup, o: Objective, r: torch.Generator) -> list[lg.Edit]:
        edits = s2d(m, g, o, r)
        if edits:
            return edits
        splits = Splits(m, [g], o, of(m, g))
        ends = exact(splits)[g.name]
        unit = int(ends.lowest.argmin())
        offset = splits.radii[g.name][unit] * ends.lowest_vectors[unit]
        return [offspring_edit(m, g, {unit: [Offspring(0.5, offset), Offspring(0.5, -offset)]})]

    def s3d(m: nn.Module, g: AxisGroup, o: Objective, r: torch.Generator) -> list[lg.Edit]:
        found = signed_splits(m, [g], o, 1, c=3.0, ways=[2], form="exact", radius=of(m, g), generator=r)
        return [edit for edit, _ in found]

    def best_of_all(m: nn.Module, g: AxisGroup, o: Objective, r: torch.Generator) -> list[lg.Edit]:
        found = firefly(m, [g], o, 1, r, one_list=True, num_candidates=20, steps=200, radius=of(m, g))
        return [edit for edit, _ in found]

    return {
        "random split": random_split,
        "S2D": s2d,
        "S2D, splitting stable units, too": s2d_always,
        "S3D, two-way": s3d,
        "random new unit, fan-out zero": random_new,
        "Firefly": best_of_all,
    }


@dataclass
class Growing:
    """A network on its way."""

    name: str
    model: nn.Sequential
    target: Tensor
    generator: torch.Generator
    loss: float = float("nan")

    @property
    def units(self) -> int:
        """Units that it has now."""
        return int(self.model[0].out_features)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--radius", type=float, default=0.1)
    parser.add_argument("--absolute", action="store_true", help="the radius is that of a layer, not relative to it")
    parser.add_argument("--first", type=float, nargs=2, default=[1.0, 1.0], help="spread of the student's w and b")
    parser.add_argument("--only", nargs="*", help="methods to run, by name; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.linspace(-5, 5, 500, dtype=torch.float64)[:, None]
    runs: list[Growing] = []
    targets, firsts, larges = [], [], []
    for seed in range(arguments.seeds):
        generator = torch.Generator().manual_seed(seed)
        targets.append(drawn(15, generator, w=1.5, b=3.0)(x).detach())
        firsts.append(drawn(1, generator, *arguments.first))
        larges.append(drawn(FINAL_UNITS, generator, *arguments.first))
    train_(firsts, targets, x, STEPS)
    grow = methods(arguments.radius, arguments.absolute)
    grow = {name: grow[name] for name in arguments.only or grow}
    for name in grow:
        for seed, (first, target) in enumerate(zip(firsts, targets, strict=True)):
            runs.append(Growing(name, copy.deepcopy(first), target, torch.Generator().manual_seed(seed)))
    hidden = lg.trace(firsts[0], x)["0"]
    for _ in range(FINAL_UNITS - 1):
        for run in runs:
            group = replace(hidden, size=run.units)
            edits = grow[run.name](run.model, group, Objective(squared, [(x, run.target)]), run.generator)
            lg.apply_(run.model, edits)
        losses = train_([run.model for run in runs], [run.target for run in runs], x, STEPS)
        for run, loss in zip(runs, losses, strict=True):
            run.loss = loss
    name = f"{FINAL_UNITS} units from scratch, {FINAL_UNITS * STEPS:,} steps"
    for model, target, loss in zip(larges, targets, train_(larges, targets, x, FINAL_UNITS * STEPS), strict=True):
        runs.append(Growing(name, model, target, torch.Generator(), loss))
    report(runs)


def report(runs: Sequence[Growing]) -> None:
    """Print the table."""
    names = list(dict.fromkeys(run.name for run in runs))
    losses = {name: [run.loss for run in runs if run.name == name] for name in names}
    print("| | median | lowest | quartiles | highest | lower than random split | units |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        ordered = sorted(losses[name])
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
        units = sorted({run.units for run in runs if run.name == name})
        size = f"{units[0]}" if len(units) == 1 else f"{units[0]} to {units[-1]}"
        spread = f"{ordered[0]:.1e} | {low:.1e} to {high:.1e} | {ordered[-1]:.1e}"
        better = sum(loss < other for loss, other in zip(losses[name], losses[names[0]], strict=True))
        print(f"| {name} | {statistics.median(ordered):.1e} | {spread} | {better} of {len(ordered)} | {size} |")


if __name__ == "__main__":
    main()
