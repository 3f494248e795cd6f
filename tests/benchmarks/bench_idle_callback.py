"""Time of a training step with an idle structural callback against one without, interleaved in one run.

Run ``python tests/benchmarks/bench_idle_callback.py``: the recipes' image classifier; the callback is in the Trainer's
list at every other step, in random order. The ratio of the medians shall be at most 1.01. Beside the clock on the wall
the first decile of this process's own time is given, which other processes disturb less.
"""

# ruff: noqa: T201 (a command that prints its table)

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_grow as lg
from lightning_grow.examples import ImageClassifier


class Alternating(ImageClassifier):
    """Puts a callback in and out of the Trainer's list between steps, and times the steps."""

    def __init__(self, callback: pl.Callback, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.callback = [callback]
        self.times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        self.present = True
        self.coin = random.Random(0)
        self.last = (0.0, 0.0)

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time since the last call; runs after all callbacks."""
        now = (time.perf_counter(), time.process_time())
        if self.trainer.global_step > 40:
            self.times[self.present].append((now[0] - self.last[0], now[1] - self.last[1]))
        self.present = self.coin.random() < 0.5
        callbacks = self.trainer.callbacks
        callbacks[:] = [c for c in callbacks if c is not self.callback[0]] + self.callback * self.present
        self.last = (time.perf_counter(), time.process_time())


def measure(steps: int, batch_size: int, widths: list[int]) -> str:
    """Return a line with the median steps with and without the callback."""
    callback = lg.Net2Net(at_steps=[10**9], verbose=False)
    module = Alternating(callback, image_size=8, widths=widths)
    images = torch.rand(batch_size * 100, 1, 8, 8)
    loader = DataLoader(TensorDataset(images, torch.randint(10, (len(images),))), batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, loader)
    line = f"{sum(p.numel() for p in module.parameters()):>7,} parameters"
    for clock, name, rank in ((0, "wall, median", 5), (1, "processor, first decile", 1)):
        deciles = {
            present: statistics.quantiles([t[clock] for t in times], n=10) for present, times in module.times.items()
        }
        on, off = (deciles[present][rank - 1] * 1e3 for present in (True, False))
        line += f"; {name}: {off:.3f} ms without, {on:.3f} ms with, ratio {on / off:.4f}"
    return line


def main() -> None:
    """Print one line for each size of model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, batches of {arguments.batch_size}")
    for widths in ([4, 8], [16, 32], [32, 64]):
        print(measure(arguments.steps, arguments.batch_size, widths))


if __name__ == "__main__":
    main()
