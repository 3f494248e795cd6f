"""Time and memory of the measurements of GradMax and TINY against ordinary forward and backward passes.

Run ``python -m tests.benchmarks.bench_new_units``: the models of ``bench_criteria.py``, eight batches, a tenth more
units in every group that can have them; in units of one ordinary pass for each of the batches.
"""

# ruff: noqa: T201 (a command that prints its table)

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grow.criteria import NewUnits, Objective, Overgrown, bottlenecks
from lightning_grow.criteria.bottleneck import with_best_signs
from lightning_grow.examples import ImageClassifier
from lightning_grow.structure import trace
from tests.benchmarks.bench_criteria import peak, seconds, transformer


def main() -> None:
    """Print some lines for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    images = [(torch.randn(64, 1, 28, 28), torch.randint(10, (64,))) for _ in range(arguments.batches)]
    words = [torch.randint(64, (16, 129)) for _ in range(arguments.batches)]
    cnn = ImageClassifier(image_size=28, widths=[16, 32, 64], depth=2)
    measure("residual CNN", cnn, images, arguments.repeats)
    measure("transformer", transformer(), [(w[:, :-1], w[:, 1:]) for w in words], arguments.repeats)


def measure(name: str, model: nn.Module, batches: list[tuple[Tensor, Tensor]], repeats: int) -> None:
    """Print what each measurement takes."""
    objective = Objective(lambda m, batch: F.cross_entropy(m(batch[0]).flatten(0, -2), batch[1].flatten()), batches)
    structure = trace(model, batches[0][0][:2])
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(structure)} groups")

    def ordinary() -> None:
        for batch in batches:
            model.zero_grad()
            objective.loss(model, batch).backward()

    def gradmax(passes: int = 2) -> str:
        refused: dict[str, str] = {}
        new = NewUnits(model, list(structure.groups.values()), objective, on_refusal=refused.__setitem__)
        new.look()
        new.leading({name: -(-space.group.size // 10) for name, space in new.spaces.items()}, passes=passes)
        return f"{len(new.spaces)} groups, {new.passes} passes"

    def tiny() -> str:
        refused: dict[str, str] = {}
        loss, found = bottlenecks(model, list(structure.groups.values()), objective, on_refusal=refused.__setitem__)
        wanted = {name: min(-(-b.group.size // 10), len(b.values)) for name, b in found.items()}
        found = with_best_signs(model, found, wanted, objective)
        edits = [b.edit(model, len(b.values)) for b in found.values()]
        for _ in range(3):
            objective.value(Overgrown(model, edits).model)
        return f"{len(found)} groups, loss {loss:.2f}"

    for text, event in (("GradMax", gradmax), ("GradMax, passes=3", lambda: gradmax(3)), ("TINY", tiny)):
        report(text, ordinary, event, repeats)
    model.zero_grad()
    standing = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    once = standing + peak(ordinary)
    model.zero_grad()
    for text, event in (("GradMax", gradmax), ("TINY", tiny)):
        print(f"  memory of {text}: ratio {(standing + peak(event)) / once:.2f}")


def report(text: str, ordinary: Callable[[], None], event: Callable[[], str], repeats: int) -> None:
    """Print a ratio of times."""
    ordinary()
    done = event()
    ratios = [seconds(event) / seconds(ordinary) for _ in range(repeats)]
    print(f"  {text} ({done}): {statistics.median(ratios):.2f} passes ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
