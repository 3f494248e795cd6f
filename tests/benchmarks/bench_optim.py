"""Time of a step of each optimizer against `torch.optim`'s, beside the memory traffic that it cannot avoid.

Run ``OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_optim``: the parameters of a ResNet-18, and with ``--large``
those of a GPT-2 small. Reads and writes of whole tensors are counted per parameter: plain SGD reads gradient and weight
and writes the weight, 3. What is measured, a step with the ``zero_grad`` after it (one of the two frees the gradients:
the step, where they were kept), shall be at most 1.25 times the ratio of the counts. All optimizers of a table take
turns, so that a busy machine is busy for all of them.
"""

# ruff: noqa: T201 (a command that prints its table)

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grow.optim import ALIG, BORAT, CAMHD, SGDHD, SGDNHD, AdamHD

Make = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """An optimizer.

    Attributes:
        make: Builds it.
        base: Name of the base that it is measured against.
        traffic: Tensor reads and writes per parameter that a step cannot avoid.
    """

    make: Make
    base: str
    traffic: int


SGD, NESTEROV, ADAM = "SGD", "SGD, Nesterov", "Adam"
BASES: Mapping[str, tuple[int, Callable[..., torch.optim.Optimizer]]] = {
    SGD: (3, lambda p, **how: torch.optim.SGD(p, 1e-6, **how)),
    NESTEROV: (5, lambda p, **how: torch.optim.SGD(p, 1e-6, momentum=0.9, nesterov=True, **how)),
    ADAM: (7, lambda p, **how: torch.optim.Adam(p, 1e-6, **how)),
}
"""Traffic of each base, and what builds it."""

CONTENDERS: Mapping[str, Contender] = {
    "SGDHD": Contender(lambda p, **how: SGDHD(p, 1e-6, 1e-12, **how), SGD, 5),
    "SGDHD, copied gradients": Contender(lambda p, **how: SGDHD(p, 1e-6, 1e-12, copy_grad=True, **how), SGD, 7),
    "SGDHD, momentum": Contender(lambda p, **how: SGDHD(p, 1e-6, 1e-12, momentum=0.9, **how), NESTEROV, 7),
    "SGDNHD": Contender(lambda p, **how: SGDNHD(p, 1e-6, 1e-12, **how), NESTEROV, 8),
    "AdamHD": Contender(lambda p, **how: AdamHD(p, 1e-6, 1e-14, **how), ADAM, 10),
    "ALIG": Contender(lambda p, **how: ALIG(p, 1e-6, **how), SGD, 4),
    "ALIG, momentum": Contender(
        lambda p, **how: ALIG(p, 1e-6, momentum=0.9, adjusted_momentum=True, **how), NESTEROV, 6
    ),
    "CAMHD, global and layer": Contender(lambda p, **how: CAMHD(p, 1e-6, **how), SGD, 5),
    "CAMHD, global and unit": Contender(lambda p, **how: CAMHD(p, 1e-6, levels=("global", "unit"), **how), SGD, 5),
    "CAMHD, global and parameter": Contender(
        lambda p, **how: CAMHD(p, 1e-6, levels=("global", "parameter"), **how), SGD, 8
    ),
    "CAMHD on SGDN, global and unit": Contender(
        lambda p, **how: CAMHD(p, 1e-6, "sgdn", levels=("global", "unit"), **how), NESTEROV, 8
    ),
    "CAMHD on SGDN, global and parameter": Contender(
        lambda p, **how: CAMHD(p, 1e-6, "sgdn", levels=("global", "parameter"), **how), NESTEROV, 11
    ),
    "CAMHD on Adam, global and layer": Contender(lambda p, **how: CAMHD(p, 1e-6, "adam", **how), ADAM, 10),
    "CAMHD on Adam, global and unit": Contender(
        lambda p, **how: CAMHD(p, 1e-6, "adam", levels=("global", "unit"), **how), ADAM, 10
    ),
    "CAMHD on Adam, global and parameter": Contender(
        lambda p, **how: CAMHD(p, 1e-6, "adam", levels=("global", "parameter"), **how), ADAM, 13
    ),
}


def resnet18() -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of a ResNet-18."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, before if block == 0 else width, 3, 3), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            if block == 0 and width != before:
                shapes += [(width, before, 1, 1), (width,), (width,)]
        before = width
    return [*shapes, (1000, 512), (1000,)]


def gpt2() -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of a GPT-2 small."""
    block: list[tuple[int, ...]] = [
        *((768,), (768,), (768, 2304), (2304,), (768, 768), (768,)),
        *((768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)),
    ]
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


class Run:
    """Parameters of its own, an optimizer, and the times of its steps; gradients are new tensors at each step."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], make: Make, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter((torch.randn(s, generator=generator) / 100).to(device)) for s in shapes]
        self.optimizer = make(self.params)
        self.times: list[float] = []

    def step(self, grads: Sequence[Tensor], timed: bool) -> None:
        """Take a step and let go of the gradients, and note how long it took."""
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.clone()  # torch's foreach form of Nesterov's momentum writes into it
        _wait(self.params[0])
        begin = time.perf_counter()
        loss = torch.ones((), device=self.params[0].device)
        self.optimizer.step(lambda: loss)
        self.optimizer.zero_grad()
        _wait(self.params[0])
        if timed:
            self.times.append(time.perf_counter() - begin)

    @property
    def bytes_per_parameter(self) -> float:
        """What the optimizer holds on to between steps, gradients that it keeps by reference among it."""
        tensors = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        return size / sum(p.numel() for p in self.params)


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


def measure(shapes: Sequence[tuple[int, ...]], repeats: int, device: str, chosen: Sequence[str]) -> None:
    """Print a table."""
    generator = torch.Generator().manual_seed(1)
    grads = [[(torch.randn(s, generator=generator) / 100).to(device) for s in shapes] for _ in range(2)]
    print(f"{sum(g.numel() for g in grads[0]):,} parameters in {len(shapes)} tensors, {device}\n")
    print(
        "| | traffic, over its base's | bar | step over the foreach base | with `fused=True` "
        "| that over the fused base | bytes per parameter |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in chosen:
        contender = CONTENDERS[name]
        traffic, base = BASES[contender.base]
        runs = {
            how: Run(shapes, make, device)
            for how, make in {
                "foreach": lambda p, base=base: base(p, foreach=True),
                "fused": lambda p, base=base: base(p, fused=True),
                "mine": contender.make,
                "mine, fused": lambda p, make=contender.make: make(p, fused=True),
            }.items()
            if device == "cpu" or how != "mine, fused"  # the kernels are for the CPU
        }
        for number in range(repeats + 3):
            for run in runs.values():
                run.step(grads[number % 2], timed=number >= 3)
        times = {how: statistics.median(run.times) for how, run in runs.items()}
        ratio = contender.traffic / traffic
        fastest = times.get("mine, fused", times["mine"])
        print(
            f"| {name} | {contender.traffic} / {traffic} = {ratio:.2f} | {1.25 * ratio:.2f} "
            f"| {times['mine'] / times['foreach']:.2f} | {fastest / times['foreach']:.2f} "
            f"| {fastest / times['fused']:.2f} | {runs['mine'].bytes_per_parameter:.1f} |",
            flush=True,
        )


def bundles(shapes: Sequence[tuple[int, ...]], repeats: int, device: str) -> None:
    """Print what a mini-batch costs in a bundle of three pieces, over a step of ALI-G: means over whole bundles."""
    hows: list[dict[str, Any]] = [{}, {"fused": True}] if device == "cpu" else [{}]
    for momentum, how in itertools.product((0.0, 0.9), hows):
        runs = [
            Run(shapes, lambda p, cls=cls, m=momentum, how=how: cls(p, 1e-6, momentum=m, **how), device)
            for cls in (ALIG, BORAT)
        ]
        grads = [(torch.randn(s) / 100).to(device) for s in shapes]
        for number in range(2 * repeats + 2):
            for run in runs:
                run.step(grads, timed=number >= 2)
        single, bundle = (statistics.mean(run.times) for run in runs)
        name = f"BORAT, 3 pieces, momentum {momentum:g}{', fused' if how else ''}"
        print(f"{name}: {bundle / single:.2f} steps of ALIG; the bar is 1.3", flush=True)


def main() -> None:
    """Print a table for each set of parameters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true", help="the parameters of a GPT-2 small, too")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    arguments: Any = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    for shapes in [resnet18(), *([gpt2()] if arguments.large else [])]:
        measure(shapes, arguments.repeats, arguments.device, arguments.only)
        print()
        bundles(shapes, arguments.repeats, arguments.device)


if __name__ == "__main__":
    main()
