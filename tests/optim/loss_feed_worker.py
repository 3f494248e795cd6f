"""One rank of runs whose steps need the loss: ``python -m tests.optim.loss_feed_worker FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

from tests.optim.test_loss_feed import OPTIMIZERS, indexed_loader, module_of, weights
from tests.trainer.models import trainer


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in OPTIMIZERS:
        strategy = DDPStrategy(process_group_backend="gloo")
        run = trainer(folder, devices=ranks, strategy=strategy, max_epochs=2)
        module = module_of(name)
        run.fit(module, indexed_loader(rank, ranks))
        optimal = getattr(run.optimizers[0], "optimal_values", torch.zeros(0))
        torch.save({"weights": weights(module), "optimal": optimal}, folder / f"{name}{rank}.pt")


if __name__ == "__main__":
    main()
