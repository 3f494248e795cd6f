"""The table of `camhd.md`: ``python docs/methods/evidence_camhd.py --data data/fashion_mnist``.

LeNet-5 on 5,000 images of Fashion-MNIST, from a learning rate that is too small: each base optimizer alone, with
hypergradient descent of one rate, and with rates on several levels. Every method has the hypergradient step that is
published for its base, nowhere tuned. Validation is on 5,000 other training images; the test set is not read.
"""

# ruff: noqa: T201 (a command that prints its table)

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grow.data import FashionMNIST
from lightning_grow.optim.camhd import CAMHD
from lightning_grow.optim.hypergradient import SGDHD, AdamHD

TRAINING, VALIDATION, BATCH = 5_000, 5_000, 32
BETA = {"sgd": 1e-4, "sgdn": 1e-4, "adam": 1e-7}

Make = Callable[[nn.Module, float], torch.optim.Optimizer]


def camhd(base: Any, *levels: Any, **options: Any) -> Make:
    """Return what makes the optimizer with these levels."""
    return lambda m, lr: CAMHD(m.named_parameters(), lr, base, levels, hypergrad_lr=BETA[base], **options)


METHODS: dict[str, Make] = {
    "SGD": lambda m, lr: torch.optim.SGD(m.parameters(), lr),
    "SGD-HD": lambda m, lr: SGDHD(m.parameters(), lr, BETA["sgd"]),
    "CAM-HD, layer": camhd("sgd", "layer"),
    "CAM-HD, unit": camhd("sgd", "unit"),
    "CAM-HD, parameter": camhd("sgd", "parameter"),
    "CAM-HD, global + layer": camhd("sgd", "global", "layer"),
    "CAM-HD, global + layer, unchained": camhd("sgd", "global", "layer", chain_weights=False),
    "CAM-HD, all four": camhd("sgd", "global", "layer", "unit", "parameter"),
    "SGDN": lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9, nesterov=True),
    "SGDN-HD": lambda m, lr: SGDHD(m.parameters(), lr, BETA["sgdn"], momentum=0.9, nesterov=True),
    "CAM-HD on SGDN, global + layer": camhd("sgdn", "global", "layer"),
    "Adam": lambda m, lr: torch.optim.Adam(m.parameters(), lr),
    "Adam-HD": lambda m, lr: AdamHD(m.parameters(), lr, BETA["adam"]),
    "CAM-HD on Adam, global + layer": camhd("adam", "global", "layer"),
}


def lenet() -> nn.Sequential:
    """Return LeNet-5 with ReLU and max pooling."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class Result(NamedTuple):
    """What a run came to."""

    train_loss: float
    val_loss: float
    val_acc: float
    lr: float


def images(folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels for training and for validation."""
    (x, y), _ = FashionMNIST(folder, num_train=TRAINING + VALIDATION).load()
    x = x.float() / 255
    x = (x - x[:TRAINING].mean()) / x[:TRAINING].std()
    return x[:TRAINING], y[:TRAINING], x[TRAINING:], y[TRAINING:]


def run(method: str, lr: float, seed: int, data: Sequence[Tensor], epochs: int) -> Result:
    """Train once."""
    torch.manual_seed(seed)
    model = lenet()
    optimizer = METHODS[method](model, lr)
    x, y, val_x, val_y = data
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        losses = []
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    with torch.no_grad():
        logits = torch.cat([model(part) for part in val_x.split(500)])
    accuracy = float((logits.argmax(dim=1) == val_y).float().mean())
    lr = float(optimizer.param_groups[0]["lr"])
    return Result(statistics.mean(losses), float(F.cross_entropy(logits, val_y)), accuracy, lr)


def cell(values: Sequence[float], form: str) -> str:
    """Return mean and standard deviation of what did not diverge."""
    finite = [value for value in values if math.isfinite(value)]
    spread = statistics.stdev(finite) if len(finite) > 1 else 0.0
    return f"{format(statistics.mean(finite), form)} ± {format(spread, form)}" if finite else "diverged"


def main() -> None:
    """Do all runs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/fashion_mnist", help="folder of the four files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-2, help="the rate to begin with")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    data, start, table = images(options.data), time.perf_counter(), []
    for number, method in enumerate(options.methods):
        results = []
        for seed in range(options.seeds):
            done = number * options.seeds + seed
            print(
                f"\r{done}/{len(options.methods) * options.seeds}  {method}, seed {seed}".ljust(78), end="", flush=True
            )
            results.append(run(method, options.lr, seed, data, options.epochs))
        left = [r for r in results if math.isfinite(r.val_loss)]
        name = method if len(left) == len(results) else f"{method} ({len(results) - len(left)} diverged)"
        accuracy = cell([100 * r.val_acc for r in left], ".1f")
        losses = [cell([getattr(r, loss) for r in left], ".3f") for loss in ("train_loss", "val_loss")]
        rate = cell([r.lr for r in left], ".2g").split()[0]
        table.append(f"| {name} | {losses[0]} | {losses[1]} | {accuracy} | {rate} |")
    took = time.perf_counter() - start
    print(f"\r{options.epochs} epochs, {options.seeds} seeds, from {options.lr:g}; {took:.0f} s".ljust(78))
    print("\n| method | training loss | validation loss | validation accuracy, % | `lr` at the end |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
