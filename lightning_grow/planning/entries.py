"""The entries of a plan: how far units and blocks may change, and what was found about them. Frozen plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_grow.planning.errors import PlanError
from lightning_grow.planning.files import check_type

Span = int | tuple[int, int]
"""A number; or, where an entry stands for several groups that differ in it, the least and the greatest."""


@dataclass(frozen=True)
class GroupLimits:
    """How far the units of each group of an entry may change.

    Attributes:
        grow: Whether there may be more units.
        prune: Whether there may be fewer.
        min_units: Pruning leaves at least so many units, a multiple of the group's step; 1: one step.
        max_units: Growth stops at so many units, a multiple of the group's step; None: nowhere.

    Raises:
        PlanError: If a value has the wrong type or is out of range.
    """

    grow: bool = True
    prune: bool = True
    min_units: int = 1
    max_units: int | None = None

    def __post_init__(self) -> None:
        _check_limits(self.grow, self.prune, ("min_units", self.min_units), ("max_units", self.max_units))

    @property
    def bounds(self) -> tuple[int, int | None]:
        """The smallest and the largest number of units."""
        return self.min_units, self.max_units


@dataclass(frozen=True)
class StackLimits:
    """How far the blocks of each stack of an entry may change.

    Attributes:
        grow: Whether there may be more blocks.
        prune: Whether there may be fewer.
        min_blocks: At least so many blocks stay.
        max_blocks: Growth stops at so many blocks; None: nowhere.

    Raises:
        PlanError: If a value has the wrong type or is out of range.
    """

    grow: bool = True
    prune: bool = True
    min_blocks: int = 1
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        _check_limits(self.grow, self.prune, ("min_blocks", self.min_blocks), ("max_blocks", self.max_blocks))

    @property
    def bounds(self) -> tuple[int, int | None]:
        """The smallest and the largest number of blocks."""
        return self.min_blocks, self.max_blocks


@dataclass(frozen=True)
class GroupFacts:
    """What was found about the groups of an entry.

    Attributes:
        groups: How many groups it stands for.
        units: Units of each.
        step: Units come in multiples of it.
        entries_per_unit: Entries of a weight that one unit owns: 1 for a neuron, the size of a head for a head.
        parameters_per_unit: Parameters that one unit more costs, at the sizes of the model.
        axes: Axes of tensors that each group runs through.
    """

    groups: int
    units: int
    step: int
    entries_per_unit: int
    parameters_per_unit: Span
    axes: Span

    def __post_init__(self) -> None:
        for name in ("groups", "units", "step", "entries_per_unit"):
            _check_count(name, getattr(self, name))
        for name in ("parameters_per_unit", "axes"):
            _check_span(name, getattr(self, name))


@dataclass(frozen=True)
class StackFacts:
    """What was found about the stacks of an entry.

    Attributes:
        stacks: How many stacks it stands for.
        blocks: Blocks of each.
        parameters_per_block: Parameters of a block, at the sizes of the model.
    """

    stacks: int
    blocks: int
    parameters_per_block: Span

    def __post_init__(self) -> None:
        _check_count("stacks", self.stacks)
        _check_count("blocks", self.blocks)
        _check_span("parameters_per_block", self.parameters_per_block)


@dataclass(frozen=True)
class GroupPlan:
    """One entry for groups of units.

    Attributes:
        change: How far they may change.
        found: What was found about them; None in an entry that was written by hand.
        obstacle: Why widening cannot keep the function; None if it does.

    Raises:
        PlanError: If a limit is not a multiple of the step that was found.
    """

    change: GroupLimits = field(default_factory=GroupLimits)
    found: GroupFacts | None = field(default=None, metadata={"optional": True})
    obstacle: str | None = field(default=None, metadata={"optional": True})

    def __post_init__(self) -> None:
        _check_parts(self.change, GroupLimits, self.found, GroupFacts, self.obstacle)
        if self.found is None:
            return
        step = self.found.step
        for name, value in (("min_units", self.change.min_units), ("max_units", self.change.max_units)):
            if value is not None and value % step and (name, value) != ("min_units", 1):
                below = value // step * step
                fits = f"{below} or {below + step}" if below else str(step)
                raise PlanError(f"`{name}` should be a multiple of the step of {step} units, {fits}, found {value}.")


@dataclass(frozen=True)
class StackPlan:
    """One entry for stacks of blocks.

    Attributes:
        change: How far they may change.
        found: What was found about them; None in an entry that was written by hand.
        obstacle: Why a new block cannot start as the identity; None if it can.
    """

    change: StackLimits = field(default_factory=StackLimits)
    found: StackFacts | None = field(default=None, metadata={"optional": True})
    obstacle: str | None = field(default=None, metadata={"optional": True})

    def __post_init__(self) -> None:
        _check_parts(self.change, StackLimits, self.found, StackFacts, self.obstacle)


def span(values: Iterable[int]) -> Span:
    """Return what several entries have in common: the number, or the least and the greatest.

    Example:
        >>> span([3, 3]), span([5, 3, 4])
        (3, (3, 5))
    """
    numbers = list(values)
    return numbers[0] if len(set(numbers)) == 1 else (min(numbers), max(numbers))


def _check_limits(grow: object, prune: object, least: tuple[str, object], most: tuple[str, object]) -> None:
    check_type("grow", grow, bool, "true or false")
    check_type("prune", prune, bool, "true or false")
    check_type(*least, int, "a whole number")
    check_type(*most, int | None, "a whole number or null")
    (min_name, min_size), (max_name, max_size) = least, most
    if isinstance(min_size, int) and min_size < 1:
        raise PlanError(f"`{min_name}` should be at least 1, found {min_size}.")
    if isinstance(max_size, int) and isinstance(min_size, int) and max_size < min_size:
        raise PlanError(
            f"`{max_name}` should be at least `{min_name}`, found {max_name}: {max_size} and {min_name}: {min_size}."
        )


def _check_count(name: str, value: object) -> None:
    check_type(name, value, int, "a whole number")


def _check_span(name: str, value: object) -> None:
    pair = isinstance(value, tuple) and len(value) == 2
    for number in value if pair and isinstance(value, tuple) else (value,):
        check_type(name, number, int, "a whole number, or the least and the greatest in a list")


def _check_parts(change: object, limits: type, found: object, facts: type, obstacle: object) -> None:
    check_type("change", change, limits, "a mapping")
    check_type("found", found, facts | None, "a mapping")
    check_type("obstacle", obstacle, str | None, "a text")
