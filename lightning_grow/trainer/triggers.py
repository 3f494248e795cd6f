"""When an event begins: every n steps or epochs, at given steps, or on a plateau of a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException


@dataclass(frozen=True)
class Trigger:
    """Says, after an optimizer step, whether an event begins now. Exactly one of the four conditions is set.

    Attributes:
        every_n_steps: An event each time so many optimizer steps are done.
        every_n_epochs: An event at the end of every n-th epoch, unless no epoch follows.
        at_steps: An event at each of these optimizer steps.
        on_plateau: Name of a logged metric; an event when it has not improved for ``patience`` epochs.
        start: No event before so many steps (with epochs or a plateau: epochs) are done.
        stop: No event after so many steps (epochs) are done.
        patience: Epochs without improvement that make a plateau.
        min_delta: Smallest change of the metric that counts as an improvement.
        mode: Whether the metric should fall or rise.
    """

    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    at_steps: Sequence[int] | None = None
    on_plateau: str | None = None
    start: int = 0
    stop: int | None = None
    patience: int = 3
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        conditions = ("every_n_steps", "every_n_epochs", "at_steps", "on_plateau")
        given = [name for name in conditions if getattr(self, name) is not None]
        if len(given) != 1:
            raise MisconfigurationException(
                "Expected exactly one of `every_n_steps`, `every_n_epochs`, `at_steps` and `on_plateau`, found "
                f"{' and '.join(f'`{n}={getattr(self, n)!r}`' for n in given) or 'none'}. Use one callback for each."
            )
        for name in ("every_n_steps", "every_n_epochs", "patience"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise MisconfigurationException(f"`{name}` should be an integer of at least 1, found {value!r}.")
        if self.at_steps is not None and (not self.at_steps or any(step < 1 for step in self.at_steps)):
            raise MisconfigurationException(
                f"`at_steps` should list numbers of optimizer steps, each at least 1, found {self.at_steps!r}."
            )
        if self.start < 0 or (self.stop is not None and self.stop < self.start):
            raise MisconfigurationException(
                f"Expected 0 <= `start` <= `stop`, found start={self.start!r} and stop={self.stop!r}."
            )
        if self.mode not in {"min", "max"}:
            raise MisconfigurationException(f"`mode` should be 'min' or 'max', found {self.mode!r}.")
        if self.min_delta < 0:
            raise MisconfigurationException(f"`min_delta` should be at least 0, found {self.min_delta!r}.")

    def after_step(self, before: int, now: int, finished_epochs: int | None) -> bool:
        """Return whether an event begins after these optimizer steps.

        Args:
            before: Optimizer steps done when this was last asked.
            now: Optimizer steps done now, more than ``before`` (several optimizers step more than once in a batch).
            finished_epochs: Epochs done, when this step ended one that is not the last; None in mid-epoch.
        """
        if self.every_n_steps is not None:
            return now // self.every_n_steps > before // self.every_n_steps and self._open(now)
        if self.at_steps is not None:
            return any(before < step <= now for step in self.at_steps) and self._open(now)
        if self.every_n_epochs is not None and finished_epochs is not None:
            return finished_epochs % self.every_n_epochs == 0 and self._open(finished_epochs)
        return False

    def after_epoch(self, bad_epochs: int, finished_epochs: int) -> bool:
        """Return whether so many epochs without improvement make an event begin at the next optimizer step."""
        return bad_epochs >= self.patience and self._open(finished_epochs)

    def _open(self, count: int) -> bool:
        return self.start <= count and (self.stop is None or count <= self.stop)


def finished_epochs(trainer: pl.Trainer) -> int | None:
    """Return the number of epochs done if the current batch ends one, and another follows."""
    finished, limit = trainer.current_epoch + 1, trainer.max_epochs
    followed = limit is None or limit == -1 or finished < limit
    return finished if trainer.is_last_batch and followed else None
