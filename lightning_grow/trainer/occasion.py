"""What a method sees when an event begins."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_grow.criteria.objective import MeasurementError, Objective
from lightning_grow.criteria.statistics import Statistic
from lightning_grow.structure.axes import AxisGroup, Stack, Structure


@dataclass(frozen=True, eq=False)
class Occasion:
    """What a method may look at: all of it is equal on all ranks.

    Attributes:
        model: The model, to be read only.
        structure: Its structure, with the unit counts that it has now.
        groups: The groups that the user chose, without those that are at a limit already.
        stacks: The stacks that the user chose, without those that are at a limit already.
        statistics: What was observed since the trigger, summed over ranks; as the method's `statistics` named it.
        objective: The training loss on the batches since the trigger, for copies of the model; for methods that set
            `measures`, otherwise None.
        step: Optimizer steps done.
        seed: Seed of the callback.
        least_units: Units that have to stay in each of the groups. Changes that go too far are shortened afterwards;
            a method that prunes need not be told twice which units it would rather keep.
    """

    model: nn.Module
    structure: Structure
    groups: tuple[AxisGroup, ...]
    stacks: tuple[Stack, ...]
    statistics: Mapping[str, Statistic]
    step: int
    seed: int
    least_units: Mapping[str, int] = field(default_factory=dict)
    objective: Objective | None = None

    @property
    def measured(self) -> Objective:
        """The objective, for a method that measures.

        Raises:
            MeasurementError: If there is none.
        """
        if self.objective is None:
            raise MeasurementError("No batch was kept to measure the loss on: the method should set `measures`.")
        return self.objective

    def generator(self, name: str) -> torch.Generator:
        """Return a generator of its own for a group or stack: the same on all ranks, and after a resume."""
        seed = zlib.crc32(f"{self.seed} {self.step} {name}".encode())
        return torch.Generator().manual_seed(seed)
