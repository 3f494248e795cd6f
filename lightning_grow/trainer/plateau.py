"""Watch a logged metric for an ``on_plateau`` trigger."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_grow.trainer.triggers import Trigger


class Plateau:
    """The best value of a metric so far, and the epochs since.

    Args:
        trigger: Says which metric, and what counts as an improvement.
    """

    def __init__(self, trigger: Trigger) -> None:
        self.trigger = trigger
        self.best: float | None = None
        self.bad_epochs = 0
        self.last_epoch = -1

    def observe(self, value: float) -> None:
        """Take in the value of one epoch. A value that is not a number is no improvement."""
        sign = 1.0 if self.trigger.mode == "min" else -1.0
        if math.isfinite(value) and (self.best is None or sign * (self.best - value) > self.trigger.min_delta):
            self.best = value
            self.bad_epochs = 0
        else:
            self.bad_epochs += 1

    def reached(self, trainer: pl.Trainer, *, epoch_is_over: bool) -> bool:
        """Look at the metric once each epoch; return whether a plateau has just been reached, on any rank.

        Args:
            trainer: The trainer, after a validation or at the end of a training epoch.
            epoch_is_over: Whether the metric must be there by now.

        Raises:
            MisconfigurationException: If it is not.
        """
        name = self.trigger.on_plateau
        if name is None or self.last_epoch == trainer.current_epoch:
            return False
        value = trainer.callback_metrics.get(name)
        if value is None:
            if epoch_is_over:
                raise MisconfigurationException(
                    f"`on_plateau` names the metric '{name}', which was not logged in the first epoch. Logged are: "
                    f"{', '.join(sorted(trainer.callback_metrics)) or 'none'}."
                )
            return False
        self.last_epoch = trainer.current_epoch
        self.observe(float(value))
        due = self.trigger.after_epoch(self.bad_epochs, trainer.current_epoch + 1)
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self.bad_epochs = 0
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain data."""
        return {"best": self.best, "bad_epochs": self.bad_epochs, "last_epoch": self.last_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved memory."""
        self.best, self.bad_epochs, self.last_epoch = state["best"], state["bad_epochs"], state["last_epoch"]
