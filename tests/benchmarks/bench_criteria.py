"""Time and memory of one product with all splitting matrices against an ordinary forward and backward pass.

Run ``python -m tests.benchmarks.bench_criteria``: a small residual CNN and a small transformer, both measured in one
process, in turns. One product answers for every unit of every group; groups that share a tensor go in different lots,
and each lot takes a pass of its own. The ratio of time shall be at most 3 and that of memory at most 2.
"""

# ruff: noqa: T201 (a command that prints its table)

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grow.criteria import Objective, Splits, apart, can_split
from lightning_grow.examples import ImageClassifier
from lightning_grow.structure import trace


class Block(nn.Module):
    """A block of a transformer, before which its norms stand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.norm1(x)
        layers = (self.q, self.k, self.v)
        q, k, v = (layer(h).view(batch, length, self.heads, -1).transpose(1, 2) for layer in layers)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(width: int = 128, heads: int = 4, depth: int = 3, words: int = 64) -> nn.Module:
    """Return a language model."""
    blocks = [Block(width, heads) for _ in range(depth)]
    return nn.Sequential(nn.Embedding(words, width), *blocks, nn.LayerNorm(width), nn.Linear(width, words))


def main() -> None:
    """Print one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    images, labels = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    words = torch.randint(64, (16, 129))
    cases: list[tuple[str, nn.Module, Tensor, Tensor]] = [
        ("residual CNN", ImageClassifier(image_size=28, widths=[16, 32, 64], depth=2), images, labels),
        ("transformer", transformer(), words[:, :-1], words[:, 1:]),
    ]
    for name, model, x, y in cases:
        measure(name, model, x, y, arguments.repeats)


def measure(name: str, model: nn.Module, x: Tensor, y: Tensor, repeats: int) -> None:
    """Print what a product takes for all groups, and for the largest lot alone."""
    objective = Objective(lambda m, batch: F.cross_entropy(m(batch[0]).flatten(0, -2), batch[1].flatten()), [(x, y)])
    groups = [group for group in trace(model, x[:2]).groups.values() if can_split(model, group)]
    lots = apart(groups)
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{name}: {count:,} parameters, {sum(g.size for g in groups)} units in {len(groups)} groups, {len(lots)} lots"
    )

    def ordinary() -> None:
        model.zero_grad()
        objective.loss(model, (x, y)).backward()

    for text, chosen in (("all groups", groups), *((f"lot {i + 1} alone", lot) for i, lot in enumerate(lots))):
        splits = Splits(model, chosen, objective)
        vectors = splits.directions(torch.Generator().manual_seed(0))

        def product(splits: Splits = splits, vectors: dict[str, Tensor] = vectors) -> None:
            splits.products(vectors)

        ratios, times = [], []
        for function in (ordinary, product):
            function()  # warm; the copies are made once
        for _ in range(repeats):
            once, other = seconds(ordinary), seconds(product)
            times.append((once, other))
            ratios.append(other / once)
        once, other = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"  {text}: pass {1e3 * once:.0f} ms, product {1e3 * other:.0f} ms, ratio {statistics.median(ratios):.2f} "
            f"(from {min(ratios):.2f} to {max(ratios):.2f})"
        )
    model.zero_grad()
    standing = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    vectors = Splits(model, groups, objective).directions(torch.Generator().manual_seed(0))
    once = standing + peak(ordinary)
    model.zero_grad()
    other = standing + peak(lambda: Splits(model, groups, objective).products(vectors))
    print(f"  memory: pass {once / 2**20:.1f} MiB, product {other / 2**20:.1f} MiB, ratio {other / once:.2f}")


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    gc.collect()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak(function: Callable[[], object]) -> int:
    """Return by how many bytes tensors grow during a call, at most."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    level, highest = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


if __name__ == "__main__":
    main()
