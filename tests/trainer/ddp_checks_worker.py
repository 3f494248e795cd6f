"""One rank of several small runs under DDP: ``python -m tests.trainer.ddp_checks_worker FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

import lightning_grow as lg
from lightning_grow.growth import Net2Net, net2wider
from lightning_grow.trainer import Occasion, Proposal, StructuralCallback
from tests.trainer.models import Perceptron, Residual, build, loader, state_of, trainer
from tests.trainer.test_structural_callback import Taylor

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Quarrel(StructuralCallback):
    """Asks for more units on one rank than on the other."""

    def propose(self, occasion: Occasion) -> list[Proposal]:
        return [Proposal(net2wider(occasion.groups[0], 1 + RANK))]


class Wrapped(pl.Callback):
    """Notes which wrapper the module wears at each step."""

    def __init__(self) -> None:
        self.kinds: list[bool] = []
        self.wrappers: set[int] = set()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.kinds.append(isinstance(trainer.strategy.model, DistributedDataParallel))


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    strategy = DDPStrategy(process_group_backend="gloo", **arguments.pop("ddp", {}))
    run = trainer(folder, *callbacks, devices=RANKS, strategy=strategy, **arguments)
    run.fit(module, loader(rank=RANK, ranks=RANKS), loader(rank=RANK, ranks=RANKS), ckpt_path=arguments.get("ckpt"))
    return run


def main() -> None:
    torch.set_num_threads(1)
    folder, result = Path(sys.argv[1]), {}

    module = build(Perceptron)
    try:
        fit(folder, module, Quarrel(at_steps=[2]), max_epochs=1)
    except MisconfigurationException as error:
        result["quarrel"] = str(error), module.fc1.out_features

    taylor = Taylor(at_steps=[2], num_units=2)
    module = build(Perceptron)
    run = fit(folder, module, taylor, max_epochs=2)
    result["statistics"] = taylor.seen, state_of(module, run)

    wrapped, module = Wrapped(), build(Residual)
    callbacks = (Net2Net(every_n_steps=2, num_units=1, depth=True, verify=True), EMAWeightAveraging(decay=0.5), wrapped)
    saving = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    arguments = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "ddp": {"find_unused_parameters": True}}
    run = fit(folder, module, *callbacks, saving, max_epochs=3, **arguments)
    result["everything"] = state_of(module, run)
    result["wrapped"] = wrapped.kinds
    run.test(module, loader(rank=RANK, ranks=RANKS), ckpt_path=folder / "epoch=0.ckpt", verbose=False)
    result["tested"] = module.stem.out_features

    path = folder / f"plan{RANK}.yaml"
    text = lg.plan(build(Residual), next(iter(loader()))[0]).to_yaml()
    path.write_text(text.replace("max_blocks: null", "max_blocks: 3").replace("max_units: null", "max_units: 7"))
    module, grow = build(Residual), Net2Net(every_n_steps=1, num_units=1, depth=True, groups=str(path))
    run = fit(folder, module, grow, max_epochs=1)
    result["planned"] = state_of(module, run)
    result["largest"] = max(p.shape[0] for p in module.blocks.parameters()), len(module.blocks)
    torch.save(result, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    main()
