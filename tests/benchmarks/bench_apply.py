"""Time of one growth event against the time of cloning the tensors that it changes.

Run ``python tests/benchmarks/bench_apply.py``: a transformer of 100 million parameters under AdamW, every feed-forward
layer widened in one `apply_`. The ratio shall be at most 4.
"""

# ruff: noqa: T201 (a command that prints its table)

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Attribute, Axis, AxisGroup, Block, Units
from lightning_grow.surgery import apply_, prune, widen


def main() -> None:
    """Print the ratio for several amounts of growth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.05, 0.25, 1.0])
    arguments = parser.parse_args()
    layer = nn.TransformerEncoderLayer(arguments.width, 12, 4 * arguments.width, batch_first=True)
    model = nn.TransformerEncoder(layer, arguments.depth, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    optimizer.zero_grad()
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f} million parameters, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for fraction in arguments.fractions:
        ratios, clones, events = [], [], []
        for _ in range(arguments.repeats):
            groups = [_group(model, i) for i in range(arguments.depth)]
            changed = _changed(model, optimizer, groups)
            clones.append(_seconds(lambda tensors=changed: [t.clone() for t in tensors]))
            del changed
            edits = [widen(group, int(group.size * fraction)) for group in groups]
            events.append(_seconds(lambda edits=edits: apply_(model, edits, [optimizer])))
            ratios.append(events[-1] / clones[-1])
            grown = [_group(model, i) for i in range(arguments.depth)]
            added = [range(old.size, new.size) for old, new in zip(groups, grown, strict=True)]
            apply_(model, [prune(group, units) for group, units in zip(grown, added, strict=True)], [optimizer])
        print(
            f"every feed-forward width +{fraction:.0%}: clone {statistics.median(clones):.3f} s, "
            f"apply_ {statistics.median(events):.3f} s, ratio {statistics.median(ratios):.2f} "
            f"(from {min(ratios):.2f} to {max(ratios):.2f})"
        )


def _group(model: nn.Module, i: int) -> AxisGroup:
    first, second = f"layers.{i}.linear1", f"layers.{i}.linear2"
    layout = (Block((Units(first, f"{first}.weight", 0, 1),)),)
    axes = (
        Axis(f"{first}.weight", 0, "produced", layout),
        Axis(f"{first}.bias", 0, "produced", layout),
        Axis(f"{second}.weight", 1, "consumed", layout),
    )
    attributes = (Attribute(first, "out_features", None, layout), Attribute(second, "in_features", None, layout))
    return AxisGroup(first, model.get_submodule(first).out_features, 1, axes, attributes)


def _changed(model: nn.Module, optimizer: torch.optim.Optimizer, groups: list[AxisGroup]) -> list[Tensor]:
    parameters = [model.get_parameter(axis.tensor) for group in groups for axis in group.axes]
    moments = [optimizer.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")]
    return [*(p.detach() for p in parameters), *moments]


def _seconds(function) -> float:
    gc.collect()
    start = time.perf_counter()
    result = function()
    stop = time.perf_counter()
    del result
    return stop - start


if __name__ == "__main__":
    main()
