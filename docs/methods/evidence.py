"""The tables of `net2net.md` and `magnitude_pruning.md`: ``python docs/methods/evidence.py net2net --seeds 5``.

Every line is a mean over seeds with its standard deviation: test accuracy on the digits that come with scikit-learn,
after the same number of epochs for all.
"""

# ruff: noqa: T201 (a command that prints its table)

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

import lightning_grow as lg
from lightning_grow.data import Digits
from lightning_grow.examples import ImageClassifier
from lightning_grow.trainer.run import run_of


@dataclass
class Result:
    """What one run ended with."""

    accuracy: float
    parameters: int
    seconds: float


def train(module: pl.LightningModule, epochs: int, *callbacks: pl.Callback) -> Result:
    """Train on the digits, and test."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        begin = time.perf_counter()
        trainer.fit(module, datamodule=Digits(batch_size=32))
        seconds = time.perf_counter() - begin
        (metrics,) = trainer.test(module, datamodule=Digits(batch_size=32), verbose=False)
    return Result(metrics["test_acc"], sum(p.numel() for p in module.parameters()), seconds)


def model(widths: list[int], seed: int) -> ImageClassifier:
    """Return the recipe's model with weights of a seed."""
    torch.manual_seed(seed)
    return ImageClassifier(image_size=8, widths=widths, lr=1e-2)


def renewed(grown: ImageClassifier, seed: int) -> ImageClassifier:
    """Return a model of the architecture of a grown one, with fresh weights."""
    fresh = model([2, 2], seed)
    lg.replay_(fresh, run_of(grown).record)
    lg.resize_like_(fresh, grown.state_dict())
    torch.manual_seed(seed)
    for module in fresh.modules():
        if isinstance(module, nn.Module) and callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
    return fresh


def net2net(seeds: int, epochs: int) -> None:
    """Growing against the seed network ungrown, and against the final architecture from scratch."""
    grow = {"every_n_epochs": 3, "stop": 27, "fraction": 0.5, "max_parameters": 30_000, "verbose": False}
    variants: dict[str, dict[str, Any]] = {
        "grown in width and depth": {"depth": True},
        "grown in width": {},
        "grown in width, equal shares (`spread=0`)": {"spread": 0.0},
        "grown in width, equal shares, `noise=0.05`": {"spread": 0.0, "noise": 0.05},
    }
    results: dict[str, list[Result]] = {}
    for seed in range(seeds):
        for name, arguments in variants.items():
            grown = model([2, 2], seed)
            result = train(grown, epochs, lg.Net2Net(**grow, **arguments))
            results.setdefault(name, []).append(result)
            if name.endswith("depth"):
                again = train(renewed(grown, seed), epochs)
                results.setdefault("its final architecture, from scratch", []).append(again)
        results.setdefault("the seed network, ungrown", []).append(train(model([2, 2], seed), epochs))
        report(results)


def magnitude_pruning(seeds: int, epochs: int) -> None:
    """Pruning against the network unpruned, and against the pruned architecture from scratch."""
    shrink = {"every_n_epochs": 1, "start": epochs // 2, "stop": epochs * 3 // 4, "fraction": 0.1, "verbose": False}
    results: dict[str, list[Result]] = {}
    for seed in range(seeds):
        for limit in (10_000, 3_000):
            pruned = model([16, 32], seed)
            result = train(pruned, epochs, lg.MagnitudePruning(**shrink, min_size=2, max_parameters=limit))
            results.setdefault(f"pruned to {limit:,} parameters", []).append(result)
            fresh = model([16, 32], seed)
            lg.resize_like_(fresh, pruned.state_dict())
            torch.manual_seed(seed)
            for module in fresh.modules():
                if callable(getattr(module, "reset_parameters", None)):
                    module.reset_parameters()
            results.setdefault(f"that architecture from scratch ({limit:,})", []).append(train(fresh, epochs))
        results.setdefault("unpruned", []).append(train(model([16, 32], seed), epochs))
        report(results)


def report(results: dict[str, list[Result]]) -> None:
    """Print the table so far."""
    print("| | test accuracy | parameters | seconds |\n| --- | --- | --- | --- |")
    for name, runs in results.items():
        accuracy = [100 * run.accuracy for run in runs]
        deviation = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        parameters = statistics.mean(run.parameters for run in runs)
        seconds = statistics.mean(run.seconds for run in runs)
        print(f"| {name} | {statistics.mean(accuracy):.1f} ± {deviation:.1f} % | {parameters:,.0f} | {seconds:.0f} |")
    print(f"({len(next(iter(results.values())))} seeds)", flush=True)


def main() -> None:
    """Print the table of a method."""
    methods: dict[str, Callable[[int, int], None]] = {"net2net": net2net, "magnitude_pruning": magnitude_pruning}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=methods)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    methods[arguments.method](arguments.seeds, arguments.epochs)


if __name__ == "__main__":
    main()
