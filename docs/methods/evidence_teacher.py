"""The tables of `teacher_student.md`: ``python docs/methods/evidence_teacher.py --seeds 20``.

A student learns from a teacher of its own kind, and grows one unit at a time, after the notebook of GradMax's authors:
the teacher has 10 inputs, 10 hidden units and 10 outputs, weights uniform in [-1, 1], no biases, and the activation
``clamp(min=0)``; 1000 normal inputs, all of which are the batch; mean squared error. The student begins with 5 hidden
units, and gets one more every 200 steps of gradient descent, five times; 500 steps follow.
"""

# ruff: noqa: T201 (a command that prints its table)

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.criteria import NewUnits, Objective, bottlenecks
from lightning_grow.structure import AxisGroup
from lightning_grow.surgery import Edit

HIDDEN, FULL = 5, 10
Grow = Callable[["Task", nn.Module, AxisGroup, torch.Generator], Edit]


class Clamp(nn.Module):
    """A ReLU whose derivative at zero is one, as in the paper's code."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the positive part."""
        return x.clamp(min=0)


class Task:
    """A teacher, its inputs and targets, and students of any width that begin the same way."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        teacher = network(FULL)
        for parameter in teacher.parameters():
            nn.init.uniform_(parameter, -1, 1)
        self.seed = seed
        self.x = torch.randn(1000, 10)
        self.y = teacher(self.x).detach()
        self.objective = Objective(lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), [(self.x, self.y)])

    def student(self, hidden: int) -> nn.Module:
        """Return a student with Glorot weights."""
        torch.manual_seed(1000 + self.seed)
        student = network(hidden)
        for parameter in student.parameters():
            nn.init.xavier_uniform_(parameter)
        return student

    def train(self, model: nn.Module, steps: int, lr: float) -> list[float]:
        """Descend; return the loss before each step."""
        parameters, losses = list(model.parameters()), []
        for _ in range(steps):
            loss = F.mse_loss(model(self.x), self.y)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient, alpha=lr)
            losses.append(loss.detach())
        return torch.stack(losses).tolist()


def network(hidden: int) -> nn.Sequential:
    """Return a perceptron without biases."""
    return nn.Sequential(nn.Linear(10, hidden, bias=False), Clamp(), nn.Linear(hidden, 10, bias=False))


def gradmax(task: Task, model: nn.Module, group: AxisGroup, generator: torch.Generator) -> Edit:
    """Fan-in zero, fan-out the leading left singular vector."""
    return lg.gradmax(model, group, task.objective, 1, generator, scale=1.0)


def fan_out_zero(task: Task, model: nn.Module, group: AxisGroup, generator: torch.Generator) -> Edit:
    """Fan-out zero, fan-in the leading right singular vector."""
    return lg.gradmax(model, group, task.objective, 1, generator, scale=1.0, zero="fan_out")


def random_fan_out(task: Task, model: nn.Module, group: AxisGroup, generator: torch.Generator) -> Edit:
    """Fan-in zero, fan-out random and positive, of the same length."""
    new = NewUnits(model, [group], task.objective)
    length = new.spaces[group.name].fan_out_norm
    drawn = torch.rand(1, 10, generator=generator, dtype=torch.float64)
    return new.edit(group.name, torch.zeros(1, 10, dtype=torch.float64), length * F.normalize(drawn, dim=1))


def net2wider_like(task: Task, model: nn.Module, group: AxisGroup, generator: torch.Generator) -> Edit:
    """Fan-out zero, fan-in random, as long as the mean of the others."""
    new = NewUnits(model, [group], task.objective)
    length = new.spaces[group.name].fan_in_norm
    drawn = torch.randn(1, 10, generator=generator, dtype=torch.float64)
    return new.edit(group.name, length * F.normalize(drawn, dim=1), torch.zeros(1, 10, dtype=torch.float64))


def tiny(task: Task, model: nn.Module, group: AxisGroup, generator: torch.Generator) -> Edit:
    """The unit that reduces the bottleneck most, as strong as the line search has it."""
    del generator
    return lg.tiny(model, group, task.objective, 1, amplitudes=[0.1, 0.3, 1.0, 3.0])


def tiny_with_update(task: Task, model: nn.Module, group: AxisGroup, generator: torch.Generator) -> Edit:
    """The same, and the best step of the present fan-out."""
    del generator
    return lg.tiny(model, group, task.objective, 1, amplitudes=[0.1, 0.3, 1.0, 3.0], update_existing=True)


METHODS: dict[str, Grow] = {
    "GradMax": gradmax,
    'fan-out zero, right singular vectors (`zero="fan_out"`)': fan_out_zero,
    "fan-in zero, random fan-out": random_fan_out,
    "fan-out zero, random fan-in": net2wider_like,
    "TINY": tiny,
    "TINY, `update_existing`": tiny_with_update,
}


def grow_once(task: Task, grow: Grow) -> tuple[float, float]:
    """Return the mean loss over 499 steps after one growth, and the gradient of the new unit's weights."""
    model = task.student(HIDDEN)
    task.train(model, 200, 0.1)
    widen(task, model, grow, 0)
    loss = F.mse_loss(model(task.x), task.y)
    rows, columns = torch.autograd.grad(loss, [model[0].weight, model[2].weight])
    gradient = float((rows[HIDDEN:].square().sum() + columns[:, HIDDEN:].square().sum()).sqrt())
    return statistics.mean(task.train(model, 499, 0.05)), gradient


def grow_fully(task: Task, grow: Grow | None, hidden: int = HIDDEN) -> float:
    """Return the loss at the end: five growths, or none."""
    model = task.student(hidden)
    for event in range(FULL - HIDDEN):
        task.train(model, 200, 0.1)
        if grow is not None:
            widen(task, model, grow, event)
    return task.train(model, 500, 0.1)[-1]


def widen(task: Task, model: nn.Module, grow: Grow, event: int) -> None:
    """Add one unit."""
    group = lg.trace(model, task.x[:4])["0"]
    lg.apply_(model, [grow(task, model, group, torch.Generator().manual_seed(100 * task.seed + event))])


def compare_with_gromo(seeds: int) -> None:
    """Print how far our bottlenecks are from those of GroMo, an independent implementation, where it is installed."""
    try:
        from gromo.modules.linear_growing_module import LinearGrowingModule  # noqa: PLC0415 (an independent peer)
    except ImportError:
        print("\nGroMo is not installed: no comparison with it.")
        return
    worst = {"singular values": 0.0, "fan-in": 0.0, "fan-out": 0.0, "step of present weights": 0.0}
    for seed in range(seeds):
        torch.manual_seed(seed)
        first = LinearGrowingModule(6, 4, use_bias=True, post_layer_function=nn.Identity())
        second = LinearGrowingModule(4, 5, use_bias=True, previous_module=first)
        ours = nn.Sequential(copy.deepcopy(first.layer), nn.Identity(), copy.deepcopy(second.layer)).double()
        first, second = first.double(), second.double()
        x, y = torch.randn(50, 6).double(), torch.randn(50, 5).double()
        first.store_input = second.store_input = second.store_pre_activity = first.store_pre_activity = True
        first.init_computation()
        second.init_computation()
        loss = (second(first(x)) - y).square().sum()
        loss.backward()
        first.update_computation()
        second.update_computation()
        second.compute_optimal_updates(maximum_added_neurons=2, numerical_threshold=1e-12, statistical_threshold=1e-6)
        objective = Objective(lambda model, b: (model(b[0]) - b[1]).square().sum(dim=1).mean(), [(x, y)])
        _, found = bottlenecks(ours, [lg.trace(ours, x)["0"]], objective, eigenvalue_threshold=1e-12)
        mine = found["0"]
        pairs = {
            "singular values": (second.eigenvalues_extension[:2], mine.values[:2]),
            "fan-in": (first.extended_output_layer.weight.abs(), mine.fan_in[:2, :6].abs()),
            "fan-out": (second.extended_input_layer.weight.T.abs(), mine.fan_out[:2].abs()),
            "step of present weights": (second.optimal_delta_layer.weight, -mine.update),
        }
        for name, (theirs, own) in pairs.items():
            worst[name] = max(worst[name], float((theirs - own).abs().max() / own.abs().max()))
    print(f"\nLargest relative difference from GroMo, {seeds} seeds:")
    for name, difference in worst.items():
        print(f"- {name}: {difference:.1e}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    tasks = [Task(seed) for seed in range(seeds)]
    final = {name: [grow_fully(task, grow) for task in tasks] for name, grow in METHODS.items()}
    once = {name: [grow_once(task, grow) for task in tasks] for name, grow in METHODS.items()}
    final["small: never grown"] = [grow_fully(task, None) for task in tasks]
    final["big: ten units from the start"] = [grow_fully(task, None, FULL) for task in tasks]
    reference = final["fan-in zero, random fan-out"]
    print(
        "| | final loss | median | better than random fan-out | mean loss after one growth | gradient of the new unit |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, losses in final.items():
        wins = sum(a < b for a, b in zip(losses, reference, strict=True))
        cells = [f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}", f"{statistics.median(losses):.3f}"]
        cells.append("" if losses is reference else f"{wins} of {seeds}")
        if name in once:
            cells += [f"{statistics.mean(pair[i] for pair in once[name]):.3f}" for i in (0, 1)]
        print(f"| {name} | {' | '.join(cells + [''] * (5 - len(cells)))} |")
    print(f"({seeds} seeds)", flush=True)
    compare_with_gromo(seeds)


if __name__ == "__main__":
    main()
