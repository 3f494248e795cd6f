"""Change the model under a running Trainer: what is refused, and how the DDP wrapper is dropped and put back."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_grow.trainer.proposal import Change, fingerprint, name_of


def refuse_strategy(strategy: Strategy) -> None:
    """Raise a `MisconfigurationException` with the way out when a strategy cannot follow a change of shapes."""
    name = type(strategy).__name__
    supported = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(
        strategy, DeepSpeedStrategy
    )
    if not supported or strategy.root_device.type == "xla":
        raise MisconfigurationException(
            f"{name} keeps parameters in a form that cannot change its shape during training (sharded, flattened or "
            "compiled ahead). Use strategy='ddp', or a single device: Trainer(devices=1)."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            f"{name} with spawned or forked processes hands the trained weights back to a main process whose model "
            "has not grown. Use strategy='ddp', which starts a process of its own for each device."
        )


def refuse_module(module: pl.LightningModule, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Raise a `MisconfigurationException` when a module or its optimizers could not be edited later in the run."""
    if getattr(module, "_compiler_ctx", None) is not None:
        raise MisconfigurationException(
            f"{type(module).__name__} is compiled as a whole, so its steps are fixed to the shapes it has now. Compile "
            "its inner modules instead: `self.network.compile()` in `__init__` or `configure_model`."
        )
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):  # noqa: SLF001
            raise MisconfigurationException(
                f"The parameter '{name}' of shape {tuple(parameter.shape)} has a hook, which would be lost when the "
                "parameter changes its shape (`wandb.watch` with gradients and optimizers that step in the backward "
                "pass set such hooks). Remove the hook, or exclude nothing but watch modules instead."
            )
    for optimizer in optimizers:
        # by name: importing torch.distributed.optim compiles, and warns
        if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
            raise MisconfigurationException(
                "ZeroRedundancyOptimizer keeps each state on one rank only, so it cannot follow a change of shapes. "
                "Use the optimizer that it wraps."
            )


@contextlib.contextmanager
def editing(trainer: pl.Trainer) -> Iterator[pl.LightningModule]:
    """Give the bare LightningModule, free of any wrapper, to be changed; wrap it again at the end.

    Under DDP the old reducer goes, with its hooks on the parameters, and a new one is made for the new shapes; its
    constructor compares the shapes over the ranks. Programs that ``torch.compile`` specialised to the old parameters
    are dropped. Only between optimizer steps: gradients are gone afterwards.

    Raises:
        MisconfigurationException: If the module is wrapped in something other than ``DistributedDataParallel``.

    Example::

        with editing(trainer) as module:
            apply_(module, edits, trainer.optimizers)
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    wrapped = strategy.model is not module
    if wrapped:
        if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
            raise MisconfigurationException(
                f"Expected the LightningModule itself or a DistributedDataParallel around it, found "
                f"{type(strategy.model).__name__}. Use strategy='ddp', or a single device."
            )
        strategy.model = module
        gc.collect()  # the reducer lives in a reference cycle, and holds on to the parameters' gradient accumulators
    if _is_compiled(module):
        torch._dynamo.reset()  # noqa: SLF001  (guards hold weak references to the parameters)
    try:
        yield module
    finally:
        if wrapped and isinstance(strategy, DDPStrategy):
            strategy.configure_ddp()


def agree(trainer: pl.Trainer, changes: Sequence[Change], step: int) -> None:
    """Raise on all ranks if they are about to make different changes.

    Raises:
        MisconfigurationException: If the ranks disagree.
    """
    if trainer.world_size == 1:
        return
    mine = torch.tensor([fingerprint(changes), step], device=trainer.strategy.root_device)
    everyone = trainer.strategy.all_gather(mine).reshape(-1, 2)
    if bool((everyone != everyone[0]).any()):
        theirs = ", ".join(f"rank {rank}: {int(row[0]):x}" for rank, row in enumerate(everyone))
        raise MisconfigurationException(
            f"The ranks propose different changes at step {step} ({theirs}; here {_describe(changes)}). Nothing was "
            "changed. A method may look only at what is equal on all ranks: weights, reduced statistics, and its own "
            "generator, not at the batch of this rank or the global random state."
        )


def _describe(changes: Sequence[Change]) -> str:
    return ", ".join(f"'{name_of(change)}'" for change in changes) or "none"


def _is_compiled(module: nn.Module) -> bool:
    if "torch._dynamo" not in sys.modules:
        return False
    return any(
        isinstance(m, torch._dynamo.OptimizedModule)  # noqa: SLF001
        or getattr(m, "_compiled_call_impl", None) is not None
        for m in module.modules()
    )
