"""The batches between a trigger and its event, in which statistics look on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_grow.criteria.statistics import Statistic


class Window:
    """Statistics that observe ordinary batches, and the batches themselves: no second loader.

    Args:
        statistics: What observes, by name.
        keeps: Whether the batches are kept, for a method that measures the loss on them at the event.
    """

    def __init__(self, statistics: Mapping[str, Statistic], *, keeps: bool = False) -> None:
        self.statistics = statistics
        self.keeps = keeps
        self.batches = 0
        self.kept: list[tuple[Any, int]] = []

    def saw(self, batch: Any, batch_idx: int) -> None:
        """Count a batch, and keep it if it will be needed."""
        self.batches += 1
        if self.keeps:
            batch = pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, batch)
            self.kept.append((batch, batch_idx))

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

    def state_dict(self) -> dict[str, Any] | None:
        """Return the sums and batches so far, of this rank.

        None if a batch is of a class that a checkpoint could not be loaded with (``weights_only``): a resumed run then
        observes anew.
        """
        if not _is_plain(self.kept):
            return None
        sums = {name: statistic.state_dict() for name, statistic in self.statistics.items()}
        kept = pytree.tree_map_only(Tensor, lambda leaf: leaf.cpu(), self.kept)
        return {"batches": self.batches, "sums": sums, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from saved sums and batches."""
        self.batches = state["batches"]
        self.kept = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), list(state.get("kept", [])))
        for name, sums in state["sums"].items():
            self.statistics[name].load_state_dict(sums, device)


def _is_plain(value: Any) -> bool:
    """Return whether a value is made of tensors, numbers and strings in dicts, lists and tuples, and nothing else."""
    if type(value) is dict:
        return all(_is_plain(inner) for pair in value.items() for inner in pair)
    if type(value) in (list, tuple):
        return all(_is_plain(inner) for inner in value)
    return value is None or type(value) in (Tensor, bool, int, float, str)
