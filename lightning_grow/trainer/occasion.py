"""What a method sees when an event begins."""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.criteria.statistics import Statistic
from lightning_grow.structure.axes import AxisGroup, Stack, Structure


@dataclass(frozen=True, eq=False)
class Occasion:
    """What a method may look at: all of it is equal on all ranks.

    Attributes:
        model: The model, to be read only.
        structure: Its structure, with the unit counts that it has now.
        groups: The groups that the user chose.
        stacks: The stacks that the user chose.
        statistics: What was observed since the trigger, summed over ranks; as the method's `statistics` named it.
        step: Optimizer steps done.
        seed: Seed of the callback.
    """

    model: nn.Module
    structure: Structure
    groups: tuple[AxisGroup, ...]
    stacks: tuple[Stack, ...]
    statistics: Mapping[str, Statistic]
    step: int
    seed: int

    def generator(self, name: str) -> torch.Generator:
        """Return a generator of its own for a group or stack: the same on all ranks, and after a resume."""
        seed = zlib.crc32(f"{self.seed} {self.step} {name}".encode())
        return torch.Generator().manual_seed(seed)


def chosen(names: Iterable[str], patterns: Sequence[str] | None) -> list[str]:
    """Return the names that glob patterns select: any pattern without ``!`` includes, any with ``!`` excludes.

    With nothing but excludes, or no patterns at all, every other name is included.

    Example:
        >>> chosen(["encoder.0", "encoder.1", "head"], ["encoder.*", "!*.1"])
        ['encoder.0']
    """
    includes = [p for p in patterns or () if not p.startswith("!")] or ["*"]
    excludes = [p[1:] for p in patterns or () if p.startswith("!")]
    return [name for name in names if _matches(name, includes) and not _matches(name, excludes)]


def chosen_groups(structure: Structure, patterns: Sequence[str] | None) -> list[AxisGroup]:
    """Return the groups that glob patterns select, without those whose units nothing consumes: they are outputs."""
    return [group for name in chosen(structure.groups, patterns) if (group := structure[name]).with_role("consumed")]


def check_choice(structure: Structure, patterns: Sequence[str] | None) -> None:
    """Raise if a pattern matches no group and no stack, or there is nothing left to change.

    Raises:
        MisconfigurationException: With the names there are.
    """
    names = [*structure.groups, *structure.stacks]
    there = f"Groups: {', '.join(structure.groups) or 'none'}. Stacks: {', '.join(structure.stacks) or 'none'}."
    for pattern in patterns or ():
        if not any(_matches(name, [pattern.removeprefix("!")]) for name in names):
            raise MisconfigurationException(
                f"`groups` names '{pattern}', but no group or stack of this model matches it. {there}"
            )
    if not chosen_groups(structure, patterns) and not chosen(structure.stacks, patterns):
        pinned = "; ".join(f"{label}: {reason}" for label, reason in structure.pinned.items())
        raise MisconfigurationException(f"Nothing in this model may change. {there} Pinned: {pinned or 'nothing'}.")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
