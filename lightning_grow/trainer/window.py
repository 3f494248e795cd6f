"""The batches between a trigger and its event, in which statistics look on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_grow.criteria.statistics import Statistic


class Window:
    """Statistics that observe ordinary batches: no second loader, no extra pass.

    Args:
        statistics: What observes, by name.
    """

    def __init__(self, statistics: Mapping[str, Statistic]) -> None:
        self.statistics = statistics
        self.batches = 0

    def attach(self, module: nn.Module) -> None:
        """Begin to observe."""
        for statistic in self.statistics.values():
            statistic.attach(module)

    def detach(self) -> None:
        """Stop observing."""
        for statistic in self.statistics.values():
            statistic.detach()

    def reduced(self, trainer: pl.Trainer) -> Mapping[str, Statistic]:
        """Return the statistics with their sums added up over all ranks."""
        for name in sorted(self.statistics):
            self.statistics[name].reduce_(lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"))
        return self.statistics

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, of this rank."""
        sums = {name: statistic.state_dict() for name, statistic in self.statistics.items()}
        return {"batches": self.batches, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from saved sums."""
        self.batches = state["batches"]
        for name, sums in state["sums"].items():
            self.statistics[name].load_state_dict(sums, device)
