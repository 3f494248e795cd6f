"""Tables and pictures of `alig.md` and `borat.md`: ``python docs/methods/evidence_polyak.py``. 12 minutes when busy.

Two small tasks. *Noisy labels*: a linear softmax whose loss cannot reach zero, since 30 % of the labels are random;
what is left above the lowest loss, after 100 epochs. *Linear labels*: a perceptron that can fit all samples; its
training loss after 40 epochs. Each for a range of rates, each seed with data, weights and order of its own.
"""

# ruff: noqa: T201 (a command that says what it does)

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rows import write_table
from torch import Tensor, nn

from lightning_grow.optim.alig import ALIG
from lightning_grow.optim.alig_plus import ALIGPlus
from lightning_grow.optim.borat import BORAT

HERE = Path(__file__).parent
SAMPLES, INPUTS, CLASSES, BATCH, NOISE = 512, 20, 5, 32, 0.3
Make = Callable[[Any, float], torch.optim.Optimizer]
Results = Mapping[tuple[str, float], list[float]]

NOISY: dict[str, Make] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "ALI-G": ALIG,
    "ALI-G+": lambda p, lr: ALIGPlus(p, lr, SAMPLES, 100, momentum=0.0),
}
NOISY_RATES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
LINEAR: dict[str, Make] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    "Adam": torch.optim.Adam,
    "ALI-G": lambda p, lr: ALIG(p, lr, momentum=0.9),
    "BORAT, 3 pieces": lambda p, lr: BORAT(p, lr, 3),
    "BORAT, 5 pieces": lambda p, lr: BORAT(p, lr, 5),
}
LINEAR_RATES = (0.001, 0.01, 0.1, 1.0, 10.0)


def data(seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Return normal inputs and labels: the largest of some random linear functions, or random ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, INPUTS, generator=generator)
    y = (x @ torch.randn(INPUTS, CLASSES, generator=generator)).argmax(dim=1)
    random = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return x, torch.where(torch.rand(SAMPLES, generator=generator) < noise, random, y)


def train(model: nn.Module, make: Make, lr: float, x: Tensor, y: Tensor, epochs: int, seed: int) -> float:
    """Train; return the loss over all samples, infinite where it is not a number."""
    optimizer = make(model.parameters(), lr)
    generator = torch.Generator().manual_seed(1000 + seed)
    try:
        for _ in range(epochs):
            for chosen in torch.randperm(SAMPLES, generator=generator).split(BATCH):
                optimizer.zero_grad()
                losses = F.cross_entropy(model(x[chosen]), y[chosen], reduction="none")
                loss = losses.mean()
                loss.backward()
                if isinstance(optimizer, ALIGPlus):
                    optimizer.feed(chosen, losses)
                if isinstance(optimizer, (ALIG, BORAT)):
                    optimizer.set_loss(loss)
                optimizer.step()
            if isinstance(optimizer, ALIGPlus):
                optimizer.end_epoch()
    except RuntimeError:  # too many steps in a row without a finite loss
        return math.inf
    if isinstance(optimizer, BORAT):
        optimizer.flush()
    with torch.no_grad():
        value = float(F.cross_entropy(model(x), y))
    return value if math.isfinite(value) else math.inf


@functools.cache
def lowest(seed: int) -> float:
    """Return the lowest loss of a linear softmax on noisy labels, by L-BFGS in double precision."""
    x, y = data(seed, NOISE)
    x = x.double()
    model = nn.Linear(INPUTS, CLASSES).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return closure().item()


def noisy(make: Make, lr: float, seed: int) -> float:
    """Return how far above the lowest loss a run on noisy labels ends."""
    x, y = data(seed, NOISE)
    torch.manual_seed(seed)
    model = nn.Linear(INPUTS, CLASSES)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return train(model, make, lr, x, y, 100, seed) - lowest(seed)


def linear(make: Make, lr: float, seed: int) -> float:
    """Return the training loss at the end of a run on labels that can be fitted."""
    x, y = data(seed, 0.0)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    return train(model, make, lr, x, y, 40, seed)


def table(methods: Mapping[str, Make], rates: tuple[float, ...], results: Results) -> str:
    """Return a table: the median over seeds, with the range, for each rate."""
    lines = ["| | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "| --- " * (len(rates) + 1) + "|"]
    for name in methods:
        cells = (results[name, lr] for lr in rates)
        lines.append(f"| {name} | " + " | ".join(_cell(values) for values in cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    middle = f"{_number(statistics.median(values))}"
    return middle if len(values) == 1 else f"{middle} ({_number(min(values))} to {_number(max(values))})"


def _number(value: float) -> str:
    if not value < 1e3:
        return "diverged"
    return "0" if abs(value) < 5e-5 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def picture(methods: Mapping[str, Make], rates: tuple[float, ...], results: Results, label: str, path: Path) -> None:
    """Draw the same: medians, and the range of the seeds."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    floor = 1e-4
    for name in methods:
        found = [[min(max(v, floor), 1e2) for v in results[name, lr]] for lr in rates]
        ours = "ALI" in name or "BORAT" in name
        axes.plot(rates, [statistics.median(v) for v in found], ".-" if ours else ".--", label=name)
        axes.fill_between(rates, [min(v) for v in found], [max(v) for v in found], alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel="(maximal) learning rate", ylabel=label)
    axes.legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run everything and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    claims = (
        ("alig", "loss above the lowest", noisy, NOISY, NOISY_RATES),
        ("borat", "training loss", linear, LINEAR, LINEAR_RATES),
    )
    for name, label, run, methods, rates in claims:
        results: dict[tuple[str, float], list[float]] = {}
        for method, make in methods.items():
            begin = time.perf_counter()
            for lr in rates:
                results[method, lr] = [run(make, lr, seed) for seed in range(arguments.seeds)]
            print(f"{name}: {method}, {time.perf_counter() - begin:.0f} s", flush=True)
        print(table(methods, rates, results))
        picture(methods, rates, results, label, HERE.parent / "images" / f"{name}.png")
        write_table(HERE / f"{name}.md", table(methods, rates, results))


if __name__ == "__main__":
    main()
