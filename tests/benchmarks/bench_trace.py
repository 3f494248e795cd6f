"""Time and memory of `lg.trace`: ``python -m tests.benchmarks.bench_trace``; prints tables.

``--tables depth``: BERT with 24 against 6 layers; ``step``: BERT-base and GPT-2 (124 million parameters) against one of
their own training steps on 8 x 128 tokens, and the memory that the trace takes above the model; ``zoo``: every model.
Each figure comes from a process of its own, in which something small has been traced before.
"""

# ruff: noqa: T201 (a command that prints its tables)

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_grow as lg
from tests.zoo import EVERYTHING
from tests.zoo_third_party import build

TABLES = ("depth", "step", "zoo")
STEPS = 3
_STATUS = Path("/proc/self/status")


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def resident(key: str) -> float:
    """Return the resident memory of this process in MB, now (``VmRSS``) or at its highest (``VmHWM``)."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1e3


def bert(layers: int) -> dict[str, float]:
    """Trace a BERT of width 64."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 100}
    model = build("BertModel", **sizes, num_hidden_layers=layers)
    return {"seconds": timed(lambda: lg.trace(model, input_ids=torch.arange(24).reshape(2, 12)))}


def real(architecture: str) -> dict[str, float]:
    """Trace a model of its real size, and let it make training steps."""
    model = build(architecture)
    batch = {"input_ids": torch.randint(1000, (8, 128))}
    batch["labels"] = batch["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    before = resident("VmRSS")
    groups = 0

    def trace() -> None:
        nonlocal groups
        groups = len(lg.trace(model, **batch))

    seconds = timed(trace)
    memory = resident("VmHWM") - before
    step()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": groups,
        "seconds": seconds,
        "step": statistics.median(timed(step) for _ in range(STEPS)),
        "memory": memory,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
    }


def zoo(name: str) -> dict[str, float]:
    """Trace a model of the zoo."""
    model = EVERYTHING[name].build()
    args, kwargs = EVERYTHING[name].inputs()
    return {"seconds": timed(lambda: lg.trace(model, *args, **kwargs))}


def measured(function: str, argument: str) -> dict[str, float]:
    """Return what a function of this file measures in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_trace", "--measure", function, argument]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Print the tables that were asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=TABLES)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tables = arguments.tables
    if arguments.measure:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        lg.trace(nn.Linear(2, 3), torch.zeros(1, 2))
        function, argument = arguments.measure
        functions: dict[str, Callable[[str], dict[str, float]]] = {
            "bert": lambda n: bert(int(n)),
            "real": real,
            "zoo": zoo,
        }
        print(json.dumps(functions[function](argument)))
        return
    if "depth" in tables:
        short, long = (measured("bert", layers)["seconds"] for layers in ("6", "24"))
        print(f"BERT, 6 layers: {short:.2f} s; 24 layers: {long:.2f} s; ratio {long / short:.2f} (bar: 5)", flush=True)
    if "step" in tables:
        print("| model | parameters | groups | trace | step | ratio (bar: 1) | memory of the trace | weights |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for architecture in ("BertForMaskedLM", "GPT2LMHeadModel"):
            r = measured("real", architecture)
            times = f"{r['seconds']:.1f} s | {r['step']:.1f} s | {r['seconds'] / r['step']:.2f}"
            memory = f"{r['memory']:.0f} MB | {r['weights']:.0f} MB"
            print(f"| {architecture} | {r['parameters']:,} | {r['groups']} | {times} | {memory} |", flush=True)
    if "zoo" in tables:
        seconds = {name: measured("zoo", name)["seconds"] for name in EVERYTHING}
        slowest = sorted(seconds, key=lambda name: -seconds[name])[:5]
        print(f"{len(seconds)} models of the zoo, {sum(seconds.values()):.0f} s together; the slowest (bar: 10 s):")
        print(", ".join(f"{name} {seconds[name]:.1f} s" for name in slowest))


if __name__ == "__main__":
    main()
