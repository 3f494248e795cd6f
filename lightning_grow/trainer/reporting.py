"""Tell about events: records, one line in the log, metrics under stable keys, final sizes in the loggers' configs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from lightning_grow.structure.axes import Structure
from lightning_grow.surgery.kernels import KernelEdit
from lightning_grow.trainer.proposal import BlockEdit, Change, Proposal, name_of, size_after, size_before
from lightning_grow.trainer.record import Event, Kind, stack_to_dict

log = logging.getLogger(__name__)


def to_events(
    proposals: Iterable[Proposal],
    after: Structure,
    *,
    step: int,
    epoch: int,
    method: str,
    parameters: int,
    loss: float | None,
    difference: float | None,
) -> list[Event]:
    """Return one event for each change that was applied.

    Args:
        proposals: What was applied.
        after: The structure afterwards.
        step: Optimizer steps done.
        epoch: The epoch, from 0.
        method: Name of the method.
        parameters: Parameters of the model afterwards.
        loss: Training loss of the last batch.
        difference: Largest change of an output, if it was compared.
    """
    events = []
    for proposal in proposals:
        change = proposal.change
        event = Event(
            step,
            epoch,
            method,
            kind_of(change),
            name_of(change),
            size_before(change),
            size_after(change),
            parameters,
            loss_before=loss,
            predicted=proposal.predicted,
            difference=difference,
        )
        if isinstance(change, BlockEdit):
            now = after.stacks.get(change.stack.name)
            event.at, event.stack = change.at, stack_to_dict(change.stack)
            event.stack_after = None if now is None else stack_to_dict(now)
        events.append(event)
    return events


def kind_of(change: Change) -> Kind:
    """Return what a change is called in the record."""
    if isinstance(change, KernelEdit):
        return "enlarge"
    if isinstance(change, BlockEdit):
        return "remove" if change.remove else "insert"
    grown = size_after(change) - size_before(change)
    return "widen" if grown > 0 else "prune" if grown < 0 else "regroup"


def summary(events: Sequence[Event]) -> str:
    """Return one line about all changes of one step."""
    first = events[0]
    changes = ", ".join(f"{e.what} {e.group} {e.before} -> {e.after}" for e in events)
    line = f"step {first.step}, {first.method}: {changes}; {first.parameters:,} parameters"
    if first.difference is not None:
        line += f"; outputs moved by at most {first.difference:.2g}"
    return line


def loss_of(outputs: Any) -> float | None:
    """Return the training loss from what Lightning passes on of a training step; None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return float(loss.detach()) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def log_sizes(
    trainer: pl.Trainer, module: pl.LightningModule, sizes: Mapping[str, int], parameters: int, *, at_epoch_end: bool
) -> None:
    """Log ``grow/parameters`` and ``grow/<group>/size`` through the module, as any other metric."""
    if trainer.barebones:
        return
    metrics = {"grow/parameters": float(parameters)} | {f"grow/{name}/size": float(n) for name, n in sizes.items()}
    for key, value in metrics.items():
        module.log(
            key,
            value,
            on_step=not at_epoch_end,
            on_epoch=at_epoch_end,
            reduce_fx="max",
            sync_dist=at_epoch_end,
            batch_size=1,  # otherwise guessed from the batch, which a step on `dataloader_iter` does not show
        )


def log_final_sizes(loggers: Iterable[Logger], sizes: Mapping[str, int], parameters: int) -> None:
    """Add the sizes that the model ended with to the configuration that each logger keeps of the run.

    TensorBoard is left out: it writes hyperparameters once, together with a metric, and would overwrite that.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            continue
        try:
            logger.log_hyperparams({"grow": {"parameters": parameters, "sizes": dict(sizes)}})
        except Exception as error:  # noqa: BLE001  (some services take a parameter only once; training is done anyway)
            rank_zero_only(log.warning)("%s did not take the final sizes: %s", type(logger).__name__, error)
