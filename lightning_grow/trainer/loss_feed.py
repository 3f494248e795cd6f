"""The loss, handed to optimizers whose steps depend on it, whatever the Trainer does between loss and step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grow.optim.alig_plus import ALIGPlus
from lightning_grow.optim.borat import BORAT
from lightning_grow.optim.loss import LossOptimizer

log = logging.getLogger(__name__)


class LossFeed(pl.Callback):
    """Hand each loss to the optimizers of this package that need it: `ALIG`, `ALIGPlus`, `BORAT`.

    Where lightning-grow is installed, every Trainer has one: nothing has to be done but to return the optimizer from
    ``configure_optimizers``. It does nothing where there is no such optimizer, has no state, and one added by hand
    takes its place.

    - Automatic and manual optimisation; with gradient accumulation, the losses of the window are added up.
    - ``precision="16-mixed"``: the scale of the loss is taken out; what was gathered before an overflow is forgotten.
    - Several optimizers (manual optimisation): a loss goes to those with parameters in its graph. What the graph does
      not show (reentrant checkpointing) has to be set by ``optimizer.set_loss(loss)``.
    - DDP: the optimizer itself takes the mean over processes.
    - `ALIGPlus`: its epochs are ended, ``max_epochs`` is that of the Trainer. Its examples are fed by the module.
    - `BORAT`: a bundle in the making is given up before validation and at the end of training, so that validation,
      checkpoints after it, and the final weights see the model and not an auxiliary point.

    Raises:
        MisconfigurationException: Under a strategy that shards parameters or keeps the loss to itself, with
            ``gradient_clip_val`` (a clipped gradient makes the step longer), or if `ALIGPlus` cannot know how many
            epochs there are.

    Example:
        >>> from lightning_grow.trainer import LossFeed
        >>> trainer = pl.Trainer(callbacks=[LossFeed()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        super().__init__()
        self._optimizers: Sequence[LossOptimizer] = ()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if next(c for c in trainer.callbacks if isinstance(c, LossFeed)) is not self:  # type: ignore[attr-defined]
            return
        self._optimizers = [o for o in trainer.optimizers if isinstance(o, LossOptimizer)]
        for optimizer in self._optimizers:
            _refuse(trainer, pl_module, type(optimizer).__name__)
            if isinstance(optimizer, ALIGPlus) and optimizer.max_epochs is None and optimizer.num_updates:
                optimizer.max_epochs = _epochs(trainer)
            optimizer.has_feed = True
        if self._optimizers:
            _say(self._optimizers)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not self._optimizers:
            return
        value = loss.detach()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            value = value / scaler.scale(torch.ones_like(value))  # without waiting for the device
        window = trainer.accumulate_grad_batches if pl_module.automatic_optimization else None
        for optimizer in self._concerned(loss, trainer.optimizers):
            optimizer.add_loss(value, window)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in self._optimizers:
            if isinstance(optimizer, ALIGPlus):
                optimizer.end_epoch()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._flush()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._flush()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for optimizer in self._optimizers:
            optimizer.has_feed = False
        self._optimizers = ()

    def _flush(self) -> None:
        with torch.inference_mode(False):
            for optimizer in self._optimizers:
                if isinstance(optimizer, BORAT):
                    optimizer.flush()

    def _concerned(self, loss: Tensor, optimizers: Sequence[Optimizer]) -> Sequence[LossOptimizer]:
        """Return the optimizers that a loss is for: the only one, or those with a parameter in its graph."""
        if len(optimizers) == 1:
            return self._optimizers
        leaves = _leaves(loss)
        return [o for o in self._optimizers if any(id(p) in leaves for g in o.param_groups for p in g["params"])]


class _Unannounced(list[pl.Callback]):
    """A list that says it is empty: Lightning announces others for every Trainer, though most need no loss fed."""

    def __bool__(self) -> bool:
        return False


def loss_feed() -> list[pl.Callback]:
    """Return what every Trainer gets: the factory of the entry point ``lightning.pytorch.callbacks_factory``."""
    return _Unannounced([LossFeed()])


def _refuse(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    if trainer.gradient_clip_val:
        raise MisconfigurationException(
            f"{name} does not go together with gradient_clip_val={trainer.gradient_clip_val}: its rate is the loss "
            "over the squared norm of the gradient, so that a clipped gradient makes the step longer. Remove "
            "gradient_clip_val; a maximal rate `lr` and `max_norm` limit the steps."
        )
    strategy = type(trainer.strategy).__name__
    if any(word in strategy for word in _SHARDED):
        raise MisconfigurationException(
            f"{name} cannot know the loss and the norm of the whole gradient under {strategy}, which shards parameters "
            "or steps on its own. Use strategy='ddp', or a single device."
        )
    if is_overridden("configure_gradient_clipping", module):
        log.warning(
            "%s overrides configure_gradient_clipping. If it clips, the steps of %s become longer by it.",
            type(module).__name__,
            name,
        )


_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel", "XLA")


def _epochs(trainer: pl.Trainer) -> int:
    if trainer.max_epochs is None or trainer.max_epochs < 1:
        raise MisconfigurationException(
            f"ALIGPlus updates its estimates a few times in a run, but max_epochs={trainer.max_epochs} does not say "
            "how long the run is. Pass Trainer(max_epochs=...), or ALIGPlus(max_epochs=...)."
        )
    return trainer.max_epochs


@rank_zero_only
def _say(optimizers: Sequence[LossOptimizer]) -> None:
    log.info("The loss of each batch is handed to %s.", ", ".join(type(o).__name__ for o in optimizers))


def _leaves(loss: Tensor) -> set[int]:
    """Return the identities of the tensors that a backward pass from here gives gradients to."""
    found: set[int] = set()
    seen: set[Any] = set()
    pending: list[Any] = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending += [behind for behind, _ in node.next_functions]
    return found
