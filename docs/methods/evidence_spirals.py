"""The table and the picture of `spirals.md`: ``python docs/methods/evidence_spirals.py``.

Small perceptrons learn to tell two spirals apart. Then each of their hidden units is split as `GaussNewton` would, on
a copy, one at a time: how well does the predicted gain rank the true one? All nets are shown.
"""

# ruff: noqa: T201 (a command that prints its table)

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.criteria import GaussNewtonModel, Objective, Splits
from lightning_grow.criteria.curvature import lanczos
from lightning_grow.criteria.likelihood import Labels
from lightning_grow.criteria.overgrown import Overgrown
from lightning_grow.growth.gauss_newton import (
    gauss_newton_splits,
    split_edit,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

CURVATURES: dict[str, tuple[Labels, int]] = {
    "exact": ("exact", 1),
    "signs, 1 draw": ("signs", 1),
    "sampled labels, 1 draw": ("sampled", 1),
    "sampled labels, 10 draws": ("sampled", 10),
    "labels of the data": ("true", 1),
}
Points = list[tuple[float, float]]
Nets = dict[tuple[str, int], dict[str, Points]]


def spirals(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points of two arms of one and a half turns, with a little noise, and which arm they are of."""
    generator = torch.Generator().manual_seed(seed)
    angle = 3 * math.pi * torch.rand(samples, dtype=torch.float64, generator=generator)
    arm = torch.arange(samples) % 2
    radius, turn = 0.1 + angle / (3 * math.pi), angle + math.pi * arm
    points = torch.stack([radius * turn.cos(), radius * turn.sin()], dim=1)
    return points + 0.02 * torch.randn(samples, 2, dtype=torch.float64, generator=generator), arm


def trained(activation: str, width: int, seed: int, steps: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a perceptron of two hidden layers after some steps, and its data."""
    x, y = spirals(400, seed)
    torch.manual_seed(seed)
    act = {"ReLU": nn.ReLU, "tanh": nn.Tanh}[activation]
    model = nn.Sequential(
        nn.Linear(2, width), act(), nn.Linear(width, width), act(), nn.Linear(width, 2)
    ).double()  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def measured(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> dict[str, Points]:
    """Return predicted and true gain of the split of each unit, for each curvature; and of removing each unit."""
    structure = lg.trace(model, x)
    groups = list(structure.groups.values())
    objective = Objective(lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), [(x, y)])
    ends = lanczos(Splits(model, groups, objective), torch.Generator().manual_seed(seed), 5)
    start = {name: end.lowest_vectors for name, end in ends.items()}
    base = objective.value(Overgrown(model, []).model)
    found: dict[str, Points] = {}
    for name, (labels, draws) in CURVATURES.items():
        generator = torch.Generator().manual_seed(seed)
        approximation = GaussNewtonModel(model, groups, objective, generator, labels=labels, num_draws=draws)
        splits = gauss_newton_splits(approximation, generator, start=start)
        found[name] = []
        for group in groups:
            for unit in range(group.size):
                edit = split_edit(model, group, {unit: splits[group.name].offsets[unit]})
                gain = base - objective.value(Overgrown(model, [edit]).model)
                found[name].append((float(splits[group.name].gains[unit]), gain if abs(gain) > 1e-14 else 0.0))
        if labels == "exact":
            found["removal"] = [
                (rise, objective.value(Overgrown(model, [lg.prune(group, [unit])]).model) - base)
                for group in groups
                for unit, rise in enumerate(approximation.removals()[group.name].change.tolist())
            ]
    return found


def ranks(values: Sequence[float]) -> Tensor:
    """Return ranks; equal values share the mean of theirs."""
    v = torch.tensor(values, dtype=torch.float64)
    below, equal = v[:, None] > v[None], v[:, None] == v[None]
    return below.sum(dim=1) + (equal.sum(dim=1) - 1) / 2.0


def spearman(points: Points) -> float:
    """Return the rank correlation of predicted and true."""
    pair = torch.stack([ranks([p for p, _ in points]), ranks([t for _, t in points])])
    return float(torch.corrcoef(pair)[0, 1])


def active(points: Points) -> Points:
    """Return those for which any gain was predicted: the others are not split at all."""
    return [point for point in points if point[0] > 0]


def table(nets: Nets) -> str:
    """Return the table, as Markdown."""
    head = ["net", "exact", "exact, active units alone", *list(CURVATURES)[1:], "removal, exact"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    rows = []
    for (activation, seed), found in nets.items():
        some = active(found["exact"])
        row = [spearman(found["exact"]), spearman(some) if len(some) > 2 else math.nan]
        row += [spearman(found[name]) for name in list(CURVATURES)[1:]] + [spearman(found["removal"])]
        rows.append(row)
        cells = [f"{value:.2f}" for value in row]
        cells[1] += f" ({len(some)} of {len(found['exact'])})"
        lines.append(f"| {activation}, seed {seed} | " + " | ".join(cells) + " |")
    for activation in dict.fromkeys(name for name, _ in nets):
        chosen = [row for row, (name, _) in zip(rows, nets, strict=True) if name == activation]
        medians = [statistics.median(v for v in column if not math.isnan(v)) for column in zip(*chosen, strict=True)]
        lines.append(f"| **median, {activation}** | " + " | ".join(f"**{value:.2f}**" for value in medians) + " |")
    return "\n".join(lines)


def picture(nets: Nets, path: Path) -> None:
    """Draw predicted against true gain, a panel for each net."""
    columns = max(sum(name == activation for name, _ in nets) for activation, _ in nets)
    activations = list(dict.fromkeys(name for name, _ in nets))
    figure, panels = plt.subplots(
        len(activations), columns, figsize=(2.4 * columns, 2.7 * len(activations)), squeeze=False
    )
    for ((activation, seed), found), panel in zip(nets.items(), panels.flat, strict=True):
        points = found["exact"]
        largest = max(1e-12, *(abs(v) for point in points for v in point))
        unit = 10.0 ** math.floor(math.log10(largest))
        panel.axline((0, 0), slope=1, color="0.7", linewidth=1, zorder=0)
        panel.axhline(0, color="0.85", linewidth=1, zorder=0)
        panel.scatter([p / unit for p, _ in points], [t / unit for _, t in points], s=14, color="tab:blue")
        panel.set_title(f"{activation}, seed {seed}: {spearman(points):.2f}", fontsize=9)
        panel.tick_params(labelsize=7)
        panel.set_xlabel(f"predicted gain / {unit:.0e}", fontsize=8)
    for row in panels:
        row[0].set_ylabel("true gain, same unit", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the table, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--picture", type=Path, default=Path(__file__).parents[1] / "images" / "gauss_newton.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    nets: Nets = {}
    for activation in ("ReLU", "tanh"):
        for seed in range(arguments.seeds):
            model, x, y = trained(activation, arguments.width, seed, arguments.steps)
            nets[activation, seed] = measured(model, x, y, seed)
    print(table(nets))
    picture(nets, arguments.picture)


if __name__ == "__main__":
    main()
