"""One rank of a run of every method on several processes: ``python -m tests.trainer.ddp_worker FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

from tests.contract import CONTRACT
from tests.trainer.models import build, loader, state_of, trainer


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, method in CONTRACT.items():
        callback = method.make()
        strategy = DDPStrategy(process_group_backend="gloo")
        run = trainer(folder, callback, devices=ranks, strategy=strategy, max_epochs=2)
        module = build(method.module, **method.module_arguments).double()
        run.fit(module, loader(dtype=torch.float64, rank=rank, ranks=ranks))
        result = {"state": state_of(module, run), "record": callback.record.to_dict()}
        torch.save(result, folder / f"{name}{rank}.pt")


if __name__ == "__main__":
    main()
