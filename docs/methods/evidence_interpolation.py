"""Tables and pictures of `alig.md` and `borat.md` on real images: ``python docs/methods/evidence_interpolation.py``.

With ``--cifar ../shared/data/cifar10_jpeg --fashion ../shared/data/fashion_mnist``, say.

*Where the loss cannot reach zero*: a small convolutional network on 5,000 images of CIFAR-10, which it does not fit
within the run. Each method gets the rate that is best on validation images for a seed of its own; the test images are
looked at once by each network that is reported. *Too large a rate*: a perceptron on 5,000 images of Fashion-MNIST, for
rates over four orders of magnitude. Every run is kept in a CSV file, and is not repeated while its rows are there.
"""

# ruff: noqa: T201 (a command that says what it does)

from __future__ import annotations

import argparse
import io
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rows import append, read, write_table
from torch import Tensor, nn

from lightning_grow.data import read_idx
from lightning_grow.optim.alig import ALIG
from lightning_grow.optim.alig_plus import ALIGPlus
from lightning_grow.optim.borat import BORAT

HERE = Path(__file__).parent
IMAGES = 5_000
CHOOSING = 100
"""The seed that rates are chosen with; it is not among those reported."""
Make = Callable[[Any, float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimizer, the rates it gets, and whether they fall along a cosine to zero, step by step."""

    make: Make
    rates: tuple[float, ...]
    cosine: bool = False


@dataclass(frozen=True)
class Task:
    """A network, how it is trained, and every how many epochs its losses are noted."""

    network: Callable[[], nn.Module]
    batch: int
    epochs: int
    every: int
    methods: Mapping[str, Method]


class Data(NamedTuple):
    """Normalised images and labels; the test images where they are used."""

    x: Tensor
    y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor | None = None
    test_y: Tensor | None = None


@dataclass
class Row:
    """One run at the end of one epoch. Losses and accuracies are of whole sets, batch norm in evaluation mode."""

    task: str
    method: str
    lr: float
    seed: int
    epoch: int
    train_loss: float
    train_accuracy: float
    val_accuracy: float
    test_accuracy: float


def nesterov(params: Any, lr: float) -> torch.optim.Optimizer:
    """Return SGD with Nesterov's momentum."""
    return torch.optim.SGD(params, lr, momentum=0.9, nesterov=True)


def alig(params: Any, lr: float) -> torch.optim.Optimizer:
    """Return ALI-G with momentum."""
    return ALIG(params, lr, momentum=0.9)


def convolutional() -> nn.Module:
    """Return two convolutions, the mean over places, and a linear layer: 21,674 weights."""
    layers: list[nn.Module] = []
    for inputs, outputs, size, stride in ((3, 32, 5, 4), (32, 64, 3, 2)):
        convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def perceptron() -> nn.Module:
    """Return a perceptron with two hidden layers."""
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


EPOCHS = 25
CIFAR = Task(
    convolutional,
    128,
    EPOCHS,
    2,
    {
        "SGD": Method(nesterov, (0.003, 0.01, 0.03, 0.1)),
        "SGD, cosine": Method(nesterov, (0.01, 0.03, 0.1, 0.3), cosine=True),
        "Adam": Method(torch.optim.Adam, (0.0003, 0.001, 0.003, 0.01)),
        "ALI-G": Method(alig, (0.01, 0.1, 1.0)),
        "ALI-G+": Method(lambda p, lr: ALIGPlus(p, lr, IMAGES, EPOCHS, 5, 0.9), (0.01, 0.1, 1.0)),
    },
)
RATES = (0.001, 0.01, 0.1, 1.0, 10.0)
FASHION = Task(
    perceptron,
    64,
    20,
    20,
    {
        "SGD": Method(nesterov, RATES),
        "Adam": Method(torch.optim.Adam, RATES),
        "ALI-G": Method(alig, RATES),
        "BORAT, 3 pieces": Method(lambda p, lr: BORAT(p, lr, 3), RATES),
        "BORAT, 5 pieces": Method(lambda p, lr: BORAT(p, lr, 5), RATES),
    },
)
TASKS = {"cifar": CIFAR, "fashion": FASHION}


def cifar(folder: Path) -> Data:
    """Return the first 5,000 training images, the next 5,000, and the test images, all from a lossy JPEG copy."""
    with np.load(folder / "cifar10_jpeg.npz") as file:
        x, y = _decode(file["train_jpeg"], file["train_offset"], 2 * IMAGES), file["train_y"]
        test_x, test_y = _decode(file["test_jpeg"], file["test_offset"], 10_000), file["test_y"]
    mean, std = x[:IMAGES].mean(dim=(0, 2, 3), keepdim=True), x[:IMAGES].std(dim=(0, 2, 3), keepdim=True)
    x, test_x = (x - mean) / std, (test_x - mean) / std
    return Data(*_halves(x, torch.from_numpy(y).long()), test_x, torch.from_numpy(test_y).long())


def _decode(jpeg: Any, offset: Any, number: int) -> Tensor:
    """Return the first images of a string of JPEG files, ``(number, 3, 32, 32)``, from 0 to 1."""
    raw, bounds = jpeg.tobytes(), offset[: number + 1].tolist()
    parts = (raw[begin:end] for begin, end in itertools.pairwise(bounds))
    found = np.stack([np.asarray(Image.open(io.BytesIO(part))) for part in parts])
    return torch.from_numpy(found).permute(0, 3, 1, 2).float().div_(255).contiguous(memory_format=torch.channels_last)


def fashion(folder: Path) -> Data:
    """Return the first 5,000 training images, and the next 5,000. The test images are not read."""
    x = read_idx(folder / "train-images-idx3-ubyte.gz")[: 2 * IMAGES].flatten(1).float().div_(255)
    x = (x - x[:IMAGES].mean()) / x[:IMAGES].std()
    return Data(*_halves(x, read_idx(folder / "train-labels-idx1-ubyte.gz").long()))


def _halves(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x[:IMAGES], y[:IMAGES], x[IMAGES : 2 * IMAGES], y[IMAGES : 2 * IMAGES]


@torch.no_grad()
def measure(network: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    network.eval()
    outputs = torch.cat([network(part) for part in torch.split(x, 250)])
    network.train()
    return F.cross_entropy(outputs, y).item(), (outputs.argmax(dim=1) == y).float().mean().item()


def train(network: nn.Module, optimizer: torch.optim.Optimizer, cosine: bool, task: Task, data: Data, seed: int) -> Any:
    """Train, and yield after each epoch. The order is that of the seed; the last batch of an epoch is shorter."""
    generator = torch.Generator().manual_seed(1000 + seed)
    steps = task.epochs * math.ceil(len(data.x) / task.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    for _ in range(task.epochs):
        for chosen in torch.split(torch.randperm(len(data.x), generator=generator), task.batch):
            optimizer.zero_grad()
            losses = F.cross_entropy(network(data.x[chosen]), data.y[chosen], reduction="none")
            loss = losses.mean()
            loss.backward()  # type: ignore[no-untyped-call]
            if isinstance(optimizer, ALIGPlus):
                optimizer.feed(chosen, losses)
            if isinstance(optimizer, (ALIG, BORAT)):
                optimizer.set_loss(loss)
            optimizer.step()
            if schedule is not None:
                schedule.step()
        if isinstance(optimizer, ALIGPlus):
            optimizer.end_epoch()
        yield


def run(name: str, method: str, lr: float, seed: int, data: Data) -> list[Row]:
    """Do one run; return its rows: one for each epoch where losses are noted, the last with test accuracy.

    Where too many steps in a row were skipped, or the loss ends not finite, the last row says infinite.
    """
    task, chosen = TASKS[name], TASKS[name].methods[method]
    torch.manual_seed(seed)
    network = task.network()
    optimizer = chosen.make(network.parameters(), lr)
    rows: list[Row] = []
    diverged = Row(name, method, lr, seed, task.epochs, math.inf, math.nan, math.nan, math.nan)
    try:
        for epoch, _ in enumerate(train(network, optimizer, chosen.cosine, task, data, seed), 1):
            is_last = epoch == task.epochs
            if is_last or ((task.epochs - epoch) % task.every == 0 and seed != CHOOSING):
                if isinstance(optimizer, BORAT):
                    optimizer.flush()
                loss, accuracy = measure(network, data.x, data.y)
                _, val_accuracy = measure(network, data.val_x, data.val_y)
                test_accuracy = math.nan
                if is_last and seed != CHOOSING and data.test_x is not None and data.test_y is not None:
                    _, test_accuracy = measure(network, data.test_x, data.test_y)
                rows.append(Row(name, method, lr, seed, epoch, loss, accuracy, val_accuracy, test_accuracy))
    except RuntimeError as error:
        if "in a row" not in str(error):
            raise
        return [*rows, diverged]
    return rows if math.isfinite(rows[-1].train_loss) else [*rows[:-1], diverged]


def final(rows: Sequence[Row], name: str, method: str, lr: float) -> list[Row]:
    """Return the last rows of the runs that are reported."""
    task = TASKS[name]
    return [
        r
        for r in rows
        if (r.task, r.method, r.epoch) == (name, method, task.epochs) and r.lr == lr and r.seed != CHOOSING
    ]


def best_rate(rows: Sequence[Row], method: str) -> float:
    """Return the rate with the highest validation accuracy for the seed that is for choosing."""
    found = {r.lr: r.val_accuracy for r in rows if (r.task, r.method, r.seed) == ("cifar", method, CHOOSING)}
    return max(found, key=lambda lr: -1.0 if math.isnan(found[lr]) else found[lr])


class Runs:
    """The rows there are, and a way to get more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = read(path, Row)
        self.begin = time.perf_counter()

    def need(self, name: str, method: str, lr: float, seed: int, data: Data) -> None:
        """Do a run that is missing, and say so."""
        last = (name, method, lr, seed, TASKS[name].epochs)
        if any((r.task, r.method, r.lr, r.seed, r.epoch) == last for r in self.rows):
            return
        for row in run(name, method, lr, seed, data):
            append(self.path, row)
            self.rows.append(row)
        end = self.rows[-1]
        print(
            f"{time.perf_counter() - self.begin:5.0f} s: {name}, {method}, rate {lr:g}, seed {seed}: training loss "
            f"{end.train_loss:.4g}, accuracy {end.train_accuracy:.3f}, validation {end.val_accuracy:.3f}",
            flush=True,
        )


def cifar_table(rows: Sequence[Row]) -> str:
    """Return a table: mean and standard deviation over seeds, at the rate that was chosen."""
    lines = [
        "| | rate, of | training loss | training accuracy | validation accuracy | test accuracy |",
        "| --- " * 6 + "|",
    ]
    for name, method in CIFAR.methods.items():
        lr = best_rate(rows, name)
        found = final(rows, "cifar", name, lr)
        accuracies = [
            _spread([100 * getattr(r, f"{kind}_accuracy") for r in found], 1, " %") for kind in ("train", "val", "test")
        ]
        tried = ", ".join(f"{rate:g}" for rate in method.rates)
        loss = _spread([r.train_loss for r in found], 3)
        lines.append(f"| {name} | **{lr:g}** of {tried} | {loss} | " + " | ".join(accuracies) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    if not all(map(math.isfinite, values)):
        return f"{sum(not math.isfinite(v) for v in values)} of {len(values)} diverged"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}{unit}"


def fashion_table(rows: Sequence[Row], kind: str) -> str:
    """Return a table: the median over seeds, with the range, for each rate."""
    lines = ["| | " + " | ".join(f"{lr:g}" for lr in RATES) + " |", "| --- " * (len(RATES) + 1) + "|"]
    for method in FASHION.methods:
        cells = (_values(rows, method, lr, kind) for lr in RATES)
        lines.append(f"| {method} | " + " | ".join(_cell(values, kind) for values in cells) + " |")
    return "\n".join(lines)


def _values(rows: Sequence[Row], method: str, lr: float, kind: str) -> list[float]:
    """Return losses, or accuracies in percent, in rising order; of a run that diverged infinite, or -1."""
    found = final(rows, "fashion", method, lr)
    if kind == "train_loss":
        return sorted(r.train_loss for r in found)
    return sorted(-1.0 if math.isnan(r.val_accuracy) else 100 * r.val_accuracy for r in found)


def _cell(values: Sequence[float], kind: str) -> str:
    middle, first, last = (_number(v, kind) for v in (statistics.median(values), values[0], values[-1]))
    return middle if middle == first == last else f"{middle} ({first} to {last})"


def _number(value: float, kind: str) -> str:
    if value < 0 or not math.isfinite(value):
        return "diverged"
    if kind == "val_accuracy":
        return f"{value:.1f}"
    return "0" if value < 5e-6 else f"{value:.2g}" if value < 100 else f"{value:.0f}" if value < 1e4 else f"{value:.0e}"


def cifar_picture(rows: Sequence[Row], path: Path) -> None:
    """Draw training loss and validation accuracy over epochs: the mean of the seeds, and one standard deviation."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method in CIFAR.methods:
        lr = best_rate(rows, method)
        own = [r for r in rows if (r.task, r.method, r.lr) == ("cifar", method, lr) and r.seed != CHOOSING]
        own = [r for r in own if math.isfinite(r.train_loss)]
        epochs = sorted({r.epoch for r in own})
        for axes, kind, factor in ((left, "train_loss", 1), (right, "val_accuracy", 100)):
            found = [[factor * getattr(r, kind) for r in own if r.epoch == epoch] for epoch in epochs]
            middle, spread = [statistics.mean(v) for v in found], [statistics.pstdev(v) for v in found]
            axes.plot(epochs, middle, ".-" if "ALI" in method else ".--", label=f"{method}, {lr:g}")
            low, high = ([m + s * sign for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, alpha=0.15)
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="validation accuracy, %")
    left.legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def fashion_picture(rows: Sequence[Row], path: Path) -> None:
    """Draw training loss and validation accuracy over the rate: medians, and the range of the seeds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, kind, low, high in ((left, "train_loss", 1e-5, 1e2), (right, "val_accuracy", 0.0, 100.0)):
        for method in FASHION.methods:
            found = [[min(max(v, low), high) for v in _values(rows, method, lr, kind)] for lr in RATES]
            axes.plot(
                RATES,
                [statistics.median(v) for v in found],
                ".-" if method[:3] in ("ALI", "BOR") else ".--",
                label=method,
            )
            axes.fill_between(RATES, [min(v) for v in found], [max(v) for v in found], alpha=0.15)
    left.set(xscale="log", yscale="log", xlabel="(maximal) learning rate", ylabel="training loss")
    right.set(xscale="log", xlabel="(maximal) learning rate", ylabel="validation accuracy, %")
    right.legend(fontsize=8, loc="lower left")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Do the runs that are missing, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder of cifar10_jpeg.npz")
    parser.add_argument("--fashion", type=Path, required=True, help="folder of the four files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=HERE / "interpolation.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(arguments.csv)
    data = cifar(arguments.cifar)
    for name, method in CIFAR.methods.items():
        for lr in method.rates:
            runs.need("cifar", name, lr, CHOOSING, data)
        print(f"{name}: the rate is {best_rate(runs.rows, name):g}", flush=True)
    for seed in range(arguments.seeds):
        for name in CIFAR.methods:
            runs.need("cifar", name, best_rate(runs.rows, name), seed, data)
    data = fashion(arguments.fashion)
    for seed in range(arguments.seeds):
        for name, method in FASHION.methods.items():
            for lr in method.rates:
                runs.need("fashion", name, lr, seed, data)
    rows = read(arguments.csv, Row)
    tables = {
        "alig": cifar_table(rows),
        "borat": f"Training loss:\n\n{fashion_table(rows, 'train_loss')}\n\nValidation accuracy, in percent:\n\n"
        + fashion_table(rows, "val_accuracy"),
    }
    cifar_picture(rows, HERE.parent / "images" / "interpolation.png")
    fashion_picture(rows, HERE.parent / "images" / "borat_fashion.png")
    for name, text in tables.items():
        print(text)
        write_table(HERE / f"{name}.md", text, "table of interpolation")


if __name__ == "__main__":
    main()
