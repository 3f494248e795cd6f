"""Time of `lg.trace` against depth: run ``python tests/benchmarks/bench_trace.py``; prints a table."""

# ruff: noqa: T201 (a command that prints its table)

from __future__ import annotations

import time

import torch
from torch import nn

import lightning_grow as lg


def main() -> None:
    """Trace encoders of 6 and 24 layers."""
    torch.set_num_threads(1)
    for depth in (2, 6, 24):  # the first warms up
        layer = nn.TransformerEncoderLayer(32, 4, 48, norm_first=True, batch_first=True)
        model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        start = time.perf_counter()
        structure = lg.trace(model, torch.randn(2, 12, 32))
        print(f"{depth} layers: {time.perf_counter() - start:.2f} s, {len(structure)} groups")


if __name__ == "__main__":
    main()
