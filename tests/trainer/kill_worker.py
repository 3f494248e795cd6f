"""A run that is killed between two epochs: ``python -m tests.trainer.kill_worker FOLDER KILL_AFTER_EPOCH [CKPT]``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grow.growth import Net2Net
from lightning_grow.pruning import MagnitudePruning
from tests.trainer.models import Residual, build, loader, state_of, trainer


class Killer(pl.Callback):
    """Ends the process as a scheduler would, right before an epoch begins."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, epoch: int, checkpoint: Any = None) -> None:
    """Train for four epochs, or until the given one begins; write the weights and states that the run ends with."""
    grow = Net2Net(every_n_steps=5, num_units=2, depth=True)
    shrink = MagnitudePruning(every_n_steps=9, num_units=2, min_size=2)
    saving = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    fit = trainer(folder, grow, shrink, saving, Killer(epoch), max_epochs=4, enable_checkpointing=True)
    module = build(Residual)
    fit.fit(module, loader(), loader(), ckpt_path=checkpoint, weights_only=True)
    torch.save({"state": state_of(module, fit), "record": grow.record.to_dict()}, folder / "end.pt")


def main() -> None:
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])


if __name__ == "__main__":
    main()
