"""Write down what a network looked like over time, and its losses: enough to draw the run, while it lives or later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_grow.trainer.run import run_of

HISTORY_FILE = "growth.json"
"""Name of the file in the folder of a run."""


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Return the folder of a run, the one that also holds its checkpoints; None where the run has no logger."""
    logger = trainer.logger
    if logger is None:
        return None
    if logger.log_dir is not None:
        return Path(logger.log_dir)
    name, version = logger.name or "", logger.version
    version = version if isinstance(version, str) else f"version_{version}"
    return Path(logger.save_dir or trainer.default_root_dir, name, version)


@dataclass
class LossCurve:
    """A loss over optimizer steps in bounded memory: neighbours are averaged once there are too many points.

    Attributes:
        steps: Optimizer steps done.
        values: Means of the losses seen since the point before.
        stride: Losses in each mean.
        most: Points at most, an even number.

    Example:
        >>> curve = LossCurve(most=4)
        >>> for step in range(1, 9):
        ...     curve.add(step, float(step))
        >>> curve.steps, curve.values, curve.stride
        ([2, 4, 6, 8], [1.5, 3.5, 5.5, 7.5], 2)
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    stride: int = 1
    most: int = 2000
    waiting: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Append a loss."""
        self.waiting.append(value)
        if len(self.waiting) < self.stride:
            return
        if len(self.steps) == self.most:
            self.steps = self.steps[1::2]
            self.values = [(a + b) / 2 for a, b in zip(self.values[::2], self.values[1::2], strict=True)]
            self.stride *= 2
            return
        self.steps.append(step)
        self.values.append(sum(self.waiting) / len(self.waiting))
        self.waiting = []


class History(pl.Callback):
    """Keep units per group, blocks per stack, parameters and losses over the steps, in ``growth.json``.

    ``lightning-grow plot FOLDER`` draws the file; ``lightning-grow fit`` adds this callback by itself. It belongs
    after the structural callbacks in the list. The history is kept in checkpoints, so a resumed run continues it.

    Args:
        dirpath: Folder of the file; default: the folder of the run, by its logger. Without either, nothing is written.
        monitor: Name of a logged metric that is drawn beside the training loss, once after each validation.

    Attributes:
        snapshots: What the network looked like from each step on, as plain data.
        train: Losses that the training steps returned.
        val: Values of the monitored metric.
    """

    def __init__(self, dirpath: str | None = None, monitor: str = "val_loss") -> None:
        super().__init__()
        self.dirpath = dirpath
        self.monitor = monitor
        self.snapshots: list[dict[str, Any]] = []
        self.train = LossCurve()
        self.val = LossCurve()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take down the loss, and the network where it has changed."""
        del batch, batch_idx
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self.train.add(trainer.global_step, loss.item())
        self._look(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take down the monitored metric."""
        del pl_module
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and not trainer.sanity_checking:
            self.val.add(trainer.global_step, float(value))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, so that a running training can be drawn."""
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file for good."""
        self._write(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the history so far, for a checkpoint."""
        return {"snapshots": self.snapshots, "train": asdict(self.train), "val": asdict(self.val)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a history."""
        self.snapshots = list(state_dict["snapshots"])
        self.train, self.val = LossCurve(**state_dict["train"]), LossCurve(**state_dict["val"])

    def to_dict(self, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what the file holds, as plain data."""
        train = {"name": "training loss", "steps": self.train.steps, "values": self.train.values, "held_out": False}
        val = {"name": self.monitor, "steps": self.val.steps, "values": self.val.values, "held_out": True}
        return {
            "version": 1,
            "snapshots": self.snapshots,
            "curves": [curve for curve in (train, val) if curve["steps"]],
            **run_of(pl_module).record.to_dict(),
        }

    def _look(self, pl_module: pl.LightningModule) -> None:
        run = run_of(pl_module)
        if run.structure is None:
            return
        events = len(run.record)
        if not self.snapshots:
            sizes, stacks = run.record.sizes, run.structure.stacks
            self.snapshots.append(
                {
                    "step": 0,
                    "events": 0,
                    "units": {name: size for name, size in sizes.items() if name not in stacks},
                    "depth": {name: size for name, size in sizes.items() if name in stacks},
                    "parameters": run.record.parameters,
                }
            )
        if events > self.snapshots[-1]["events"]:
            structure = run.live_structure(pl_module)
            self.snapshots.append(
                {
                    "step": run.record.events[-1].step,
                    "events": events,
                    "units": {name: group.size for name, group in structure.groups.items()},
                    "depth": {name: len(stack.blocks) for name, stack in structure.stacks.items()},
                    "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
                }
            )

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(self.dirpath) if self.dirpath is not None else run_folder(trainer)
        if folder is None or not trainer.is_global_zero or not self.snapshots:
            return
        write_history(folder, self.to_dict(pl_module))


def write_history(folder: Path, history: Mapping[str, Any]) -> Path:
    """Write a history into a folder, all or nothing, and return the path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / HISTORY_FILE
    part = path.with_suffix(".part")
    part.write_text(json.dumps(history))
    part.replace(path)
    return path
