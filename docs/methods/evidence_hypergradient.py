"""Tables and picture of `hypergradient.md`: ``python docs/methods/evidence_hypergradient.py --data data/mnist``.

Logistic regression and a perceptron on MNIST, from learning rates that span six orders of magnitude: SGD, SGD with
Nesterov's momentum and Adam, each with and without hypergradient descent; beside them Schedule-Free AdamW over the same
rates, and Prodigy and D-Adaptation, which have none to choose. ``--published`` repeats the authors' setting instead.
Every run is one row of a CSV file, and is not repeated while its row is there; the
curves are of 20,000 of the training images.
"""

# ruff: noqa: T201, PLC0415 (a command that says what it does; peers are optional)

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import append, read, write_table
from torch import Tensor, nn

from lightning_grow.data import read_idx
from lightning_grow.optim import SGDHD, SGDNHD, AdamHD

HERE = Path(__file__).parent
BATCH, VALIDATION, TRAINING = 128, 10_000, 20_000
RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def logistic() -> nn.Module:
    """Return logistic regression."""
    return nn.Linear(784, 10)


def perceptron() -> nn.Module:
    """Return a perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


TASKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "logistic regression": (logistic, 3),
    "perceptron": (perceptron, 3),
}
"""Networks, and epochs."""

Make = Callable[[Any, float], torch.optim.Optimizer]
SWEPT: dict[str, Make] = {
    "SGD": torch.optim.SGD,
    "SGD-HD": lambda p, lr: SGDHD(p, lr, 1e-3),
    "SGDN": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    "SGDN-HD": lambda p, lr: SGDNHD(p, lr, 1e-3),
    "Adam": torch.optim.Adam,
    "Adam-HD": lambda p, lr: AdamHD(p, lr, 1e-7),
    "Adam-HD, multiplicative": lambda p, lr: AdamHD(p, lr, 0.02, rule="multiplicative"),
    "Schedule-Free AdamW": lambda p, lr: _peer("schedulefree", "AdamWScheduleFree")(p, lr=lr),
}
"""Optimizers that get each rate; the step of the rate is that of the paper, nowhere tuned."""
FREE: dict[str, Make] = {
    "Prodigy": lambda p, _: _peer("prodigyopt", "Prodigy")(p),
    "D-Adaptation (Adam)": lambda p, _: _peer("dadaptation", "DAdaptAdam")(p),
    "D-Adaptation (SGD)": lambda p, _: _peer("dadaptation", "DAdaptSGD")(p),
}
"""Optimizers without a rate to choose."""


def _peer(module: str, name: str) -> Any:
    try:
        return getattr(__import__(module), name)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'lightning-grow[evidence]', or leave it out by --methods.") from error


@dataclass
class Row:
    """One run."""

    task: str
    method: str
    lr: float
    seed: int
    train_loss: float
    val_loss: float
    final_lr: float
    max_lr: float


def images(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, and those of the last 10,000, for validation. The test set is not read."""
    x = read_idx(folder / "train-images-idx3-ubyte.gz").flatten(1).float().div_(255).sub_(0.1307).div_(0.3081)
    y = read_idx(folder / "train-labels-idx1-ubyte.gz").long()
    return x[:-VALIDATION], y[:-VALIDATION], x[-VALIDATION:], y[-VALIDATION:]


def train(
    network: nn.Module, optimizer: torch.optim.Optimizer, data: Sequence[Tensor], epochs: int, decay: float, seed: int
) -> tuple[float, float, float]:
    """Train; return the mean loss of the last epoch, and the last and the largest rate."""
    x, y = data[:2]
    generator, losses, rate, highest = torch.Generator().manual_seed(seed), [], 0.0, 0.0
    schedule_free = hasattr(optimizer, "train")
    if schedule_free:
        optimizer.train()  # type: ignore[attr-defined]
    for _ in range(epochs):
        losses = []
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x[chosen]), y[chosen])
            total = loss + decay / 2 * sum(p.square().sum() for p in network.parameters()) if decay else loss
            total.backward()
            optimizer.step()
            losses.append(loss.detach())
            rate = float(optimizer.param_groups[0]["lr"])
            highest = max(highest, rate)
    if schedule_free:
        optimizer.eval()  # type: ignore[attr-defined]
    return float(torch.stack(losses).mean()), rate, highest


def run(task: str, method: str, lr: float, seed: int, data: Sequence[Tensor], epochs: int, decay: float = 0.0) -> Row:
    """Do one run."""
    torch.manual_seed(seed)
    network = TASKS[task][0]()
    optimizer = {**SWEPT, **FREE}[method](network.parameters(), lr)
    train_loss, rate, highest = train(network, optimizer, data, epochs, decay, seed)
    with torch.no_grad():
        val_loss = float(F.cross_entropy(network(data[2]), data[3]))
    return Row(task, method, lr, seed, train_loss, val_loss, rate, highest)


def table(rows: Sequence[Row], task: str) -> str:
    """Return a table: median validation loss over seeds, for each rate."""
    lines = [
        "| | " + " | ".join(f"{lr:g}" for lr in RATES) + " | rates within 10 % of the best of its kind |",
        "| --- " * (len(RATES) + 2) + "|",
    ]
    known = [m for m in SWEPT if any(r.method == m and r.task == task for r in rows)]
    medians = {m: {lr: _median(rows, task, m, lr) for lr in RATES} for m in known}
    free = {m: _median(rows, task, m, 1.0) for m in FREE if any(r.method == m and r.task == task for r in rows)}
    best: dict[str, float] = {}
    for method, line in medians.items():
        lowest = min(v for v in line.values() if v is not None)
        best[_kind(method)] = min(lowest, best.get(_kind(method), lowest))
    for method, line in medians.items():
        near = sum(v is not None and v <= 1.1 * best[_kind(method)] for v in line.values())
        lines.append(f"| {method} | " + " | ".join(_number(v) for v in line.values()) + f" | {near} of {len(RATES)} |")
    lines += [f"| {m} | " + " | " * (len(RATES) - 1) + f"{_number(v)} | no rate to choose |" for m, v in free.items()]
    return "\n".join(lines)


def _kind(method: str) -> str:
    return method.partition("-HD")[0]


def _median(rows: Sequence[Row], task: str, method: str, lr: float) -> float | None:
    found = [r.val_loss for r in rows if (r.task, r.method) == (task, method) and abs(r.lr / lr - 1) < 1e-6]
    return statistics.median(found) if found else None


def _number(value: float | None) -> str:
    return "" if value is None else "diverged" if not value < 10 else f"{value:.3f}"


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw validation loss over the rate to begin with: median, and the range of the seeds."""
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if any(r.task == task for r in rows)]
    pairs = (
        ("SGD", "SGD-HD"),
        ("SGDN", "SGDN-HD"),
        ("Adam", "Adam-HD", "Adam-HD, multiplicative", "Schedule-Free AdamW"),
    )
    figure = Figure(figsize=(12, 3.8 * len(tasks)), layout="constrained")
    for line, task in enumerate(tasks):
        for place, names in enumerate(pairs):
            axes = figure.add_subplot(len(tasks), 3, 3 * line + place + 1)
            for name in names:
                found = [[r.val_loss for r in rows if (r.task, r.method, r.lr) == (task, name, lr)] for lr in RATES]
                middle = [statistics.median(v) if v else float("nan") for v in found]
                axes.plot(RATES, middle, ".-" if "HD" in name else ".--", label=name)
                axes.fill_between(
                    RATES, [min(v, default=0) for v in found], [max(v, default=0) for v in found], alpha=0.2
                )
            for name, color in (("Prodigy", "grey"), ("D-Adaptation (SGD)", "tan")):
                value = _median(rows, task, name, 1.0)
                if value is not None:
                    axes.axhline(value, color=color, linestyle=":", label=f"{name} (no rate)")
            axes.set(xscale="log", yscale="log", xlabel="learning rate to begin with", ylim=(0.03, 3))
            axes.set_title(task)
            axes.legend(fontsize=7, loc="lower left")
            if not place:
                axes.set_ylabel("validation loss")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def page(rows: Sequence[Row], path: Path) -> None:
    """Write the tables between the marks of the page; what stands around them is kept."""
    parts = [
        f"**{task.capitalize()}**, {TASKS[task][1]} epochs\n\n{table(rows, task)}"
        for task in TASKS
        if any(r.task == task for r in rows)
    ]
    write_table(path, "\n\n".join(parts))


def published(data: Sequence[Tensor], seeds: int) -> None:
    """Print the authors' setting: logistic regression, ten epochs from 1e-3, L2 of 1e-4."""
    print(
        "| | validation loss | training loss, last epoch | highest rate | last rate |\n| --- | --- | --- | --- | --- |"
    )
    for method in ("SGD", "SGD-HD", "SGDN", "SGDN-HD", "Adam", "Adam-HD"):
        rows = [run("logistic regression", method, 1e-3, seed, data, 10, 1e-4) for seed in range(seeds)]
        mean = {
            n: statistics.mean(getattr(r, n) for r in rows) for n in ("val_loss", "train_loss", "max_lr", "final_lr")
        }
        spread = statistics.stdev(r.val_loss for r in rows) if seeds > 1 else 0.0
        print(
            f"| {method} | {mean['val_loss']:.3f} ± {spread:.3f} | {mean['train_loss']:.3f} | {mean['max_lr']:.2g} "
            f"| {mean['final_lr']:.2g} |",
            flush=True,
        )


def main() -> None:
    """Do the runs that are missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four files of MNIST")
    parser.add_argument("--methods", nargs="+", choices=[*SWEPT, *FREE], default=[*SWEPT, *FREE])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=HERE / "hypergradient.csv")
    parser.add_argument("--published", action="store_true", help="print the table of the authors' setting, and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = images(arguments.data)
    if arguments.published:
        published(data, arguments.seeds)
        return
    data = (data[0][:TRAINING], data[1][:TRAINING], *data[2:])
    done = {(r.task, r.method, r.lr, r.seed) for r in read(arguments.csv, Row)}
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            begin = time.perf_counter()
            for method in arguments.methods:
                for lr in RATES if method in SWEPT else (1.0,):
                    if (task, method, lr, seed) not in done:
                        append(arguments.csv, run(task, method, lr, seed, data, TASKS[task][1]))
            print(f"{task}, seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)
    rows = read(arguments.csv, Row)
    picture(rows, HERE.parent / "images" / "hypergradient.png")
    page(rows, HERE / "hypergradient.md")


if __name__ == "__main__":
    main()
