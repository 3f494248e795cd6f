"""Edits as pure data: which units of a group stay, double or appear."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_grow.structure.axes import AxisGroup, Padding
from lightning_grow.structure.errors import StructureError

_SMALLER_SHARE = (0.3, 0.45)
"""Range of the smaller fan-out share after a split: never one half, because exact twins never part again."""


@dataclass(frozen=True, eq=False)
class Edit:
    """A planned resize of one group. Nothing is changed until `apply_`.

    Attributes:
        group: The group as it is before the edit.
        index: For each unit after the edit, the unit that it copies, or -1 for a new one.
        share: For each unit after the edit, the share of the fan-out of the unit it copies (1 for units that stay
            whole, and the default). Fan-out weights are multiplied by it; where all copies of a unit have shares that
            add up to 1, the function is preserved.
        values: New entries by axis label (``"fc1.weight[0]"``): the shape of the tensor before the edit, with the
            length of that axis replaced by the number of its new entries, in the order of the axis. Axes that are
            not named get default values.
        shifts: What is added to the entries of an axis, copied ones too, by axis label: the shape of the tensor before
            the edit, with the length that the axis has after it. A copy that is moved is an offspring of a split.
        seed: Seeds the default values of new entries: equal on all ranks, and independent of torch's global state.
        parents: For each unit after the edit, the unit from whose fan-out a new one was given its share, or -1; empty
            where no new unit was given any. It tells what is handed back when the edit is shortened.
        padding: How norms that average over the units are kept from showing the new ones; None: they are not.

    Raises:
        ValueError: If the edit copies a unit that does not exist, leaves no unit, violates ``group.step``, has not as
            many shares as units, or names an axis that the group does not have.

    Example:
        A permutation of the units is an edit, too:

        >>> from lightning_grow.structure.axes import Axis, AxisGroup, Block, Units
        >>> layout = (Block((Units("fc1", "fc1.weight", 0, 1),)),)
        >>> group = AxisGroup("fc1", 3, 1, (Axis("fc1.weight", 0, "produced", layout),))
        >>> Edit(group, (2, 0, 1)).share
        (1.0, 1.0, 1.0)
    """

    group: AxisGroup
    index: tuple[int, ...]
    share: tuple[float, ...] = ()
    values: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    parents: tuple[int, ...] = ()
    padding: Padding | None = None

    def __post_init__(self) -> None:
        name, size = self.group.name, self.group.size
        index = tuple(_whole_number(u, "unit", name) for u in self.index)
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "share", tuple(float(s) for s in self.share) or (1.0,) * len(index))
        if not index:
            raise ValueError(f"An edit of group '{name}' must leave at least one of its {size} units.")
        if min(index) < -1 or max(index) >= size:
            wrong = sorted({u for u in index if not -1 <= u < size})
            raise ValueError(
                f"An edit of group '{name}' copies units {_listed(wrong)}, but its units are 0 to {size - 1} (-1: new)."
            )
        if len(self.share) != len(index):
            raise ValueError(
                f"An edit of group '{name}' has {len(index)} units after it, but {len(self.share)} shares; "
                "give one share for each unit."
            )
        _check_step(self.group, len(index))
        self._check_values()

    def _check_values(self) -> None:
        labels = [axis.label for axis in self.group.axes]
        unknown = [label for label in (*self.values, *self.shifts) if label not in labels]
        if unknown:
            raise ValueError(
                f"Values or shifts are given for {_listed(unknown)}, but the axes of group '{self.group.name}' are "
                f"{_listed(labels)}."
            )
        if self.values and not self.num_new:
            raise ValueError(f"Values are given for group '{self.group.name}', but the edit adds no new unit to it.")

    @property
    def ratio(self) -> float:
        """Units before the edit over units after it."""
        return self.group.size / len(self.index)

    @property
    def new_size(self) -> int:
        """The number of units after the edit."""
        return len(self.index)

    @property
    def num_new(self) -> int:
        """The number of new units: those that copy no unit."""
        return self.index.count(-1)

    @property
    def is_identity(self) -> bool:
        """Whether the edit leaves everything as it is."""
        return not self.shifts and self.index == tuple(range(self.group.size)) and set(self.share) <= {1.0}

    def __str__(self) -> str:
        return f"{self.group.name}: {self.group.size} -> {self.new_size} units"


def widen(
    group: AxisGroup,
    num_units: int,
    generator: torch.Generator | None = None,
    *,
    values: Mapping[str, Tensor] | None = None,
    preserve: bool = False,
) -> Edit:
    """Append new units, silent at first: their fan-out weights are zero.

    The function is preserved exactly where ``group.obstacle`` is None. Fan-in weights are random, so that the units
    differ and learn as soon as their fan-out has moved.

    Where a norm averages over the units, silent ones change what it returns. Whole multiples of the units are then
    added as copies, if that keeps the function (``group.copies``); and with ``preserve`` any number is added by
    ``group.padding``: the new units are zero, or the mean of the others, and the norms' gains and eps make up for it.
    The present gains and eps change then, so that pruning the new units is not the exact inverse.

    Args:
        group: The group to widen.
        num_units: Units to append, at least 1; the size afterwards must be a multiple of ``group.step``.
        generator: Draws the seed of the new entries; by default it follows from the group's name and sizes. The
            global random state is never touched.
        values: New entries by axis label, see `Edit.values`; default values for axes that are not named.
        preserve: Refuse what does not keep the function, and use ``group.padding`` where that does.

    Returns:
        An edit which appends ``num_units`` units.

    Raises:
        ValueError: If ``num_units`` is below 1 or violates ``group.step``, or ``values`` names an unknown axis.
        StructureError: If ``preserve`` is asked for and not possible.
        TypeError: If ``num_units`` is not a whole number.

    Example:
        >>> from lightning_grow.structure.axes import Axis, AxisGroup, Block, Units
        >>> layout = (Block((Units("fc1", "fc1.weight", 0, 1),)),)
        >>> group = AxisGroup("fc1", 3, 1, (Axis("fc1.weight", 0, "produced", layout),))
        >>> widen(group, 2).index
        (0, 1, 2, -1, -1)
    """
    num_units = _whole_number(num_units, "num_units", group.name)
    if num_units < 1:
        raise ValueError(f"num_units must be at least 1 to widen group '{group.name}', but is {num_units}.")
    index = (*range(group.size), *(-1,) * num_units)
    seed = _seed("widen", group, len(index), generator)
    if group.obstacle is None or values:
        return Edit(group, index, values=dict(values or {}), seed=seed)
    if group.copies and num_units % group.size == 0:
        times = num_units // group.size
        share = (1.0,) * group.size + (0.0,) * num_units
        return Edit(group, tuple(range(group.size)) * (times + 1), share, seed=seed)
    if preserve and group.padding is None:
        hint = f" Whole multiples of {group.size} units do." if group.copies else ""
        raise StructureError(
            f"Adding {num_units} units to '{group.name}' does not keep the function: {group.obstacle}.{hint} Pass "
            "preserve=False to allow it, or exclude the group."
        )
    return Edit(group, index, seed=seed, padding=group.padding if preserve else None)


def split(group: AxisGroup, units: Iterable[int], generator: torch.Generator | None = None) -> Edit:
    """Let each listed unit become two that add up to it.

    Both copies keep the fan-in of the unit; its fan-out is shared between them unequally (0.3 to 0.45 and the rest),
    since exact twins never part under gradient descent. The copies are appended at the end, in the order of
    ``units``. The function is preserved exactly where ``group.obstacle`` is None.

    Args:
        group: The group to widen.
        units: Units to split, each once; the size afterwards must be a multiple of ``group.step``.
        generator: Draws the shares; by default they follow from the group's name and sizes. The global random state
            is never touched.

    Returns:
        An edit which doubles the listed units.

    Raises:
        ValueError: If a unit does not exist or is listed twice, or ``group.step`` is violated.
        TypeError: If a unit is not a whole number.

    Example:
        >>> from lightning_grow.structure.axes import Axis, AxisGroup, Block, Units
        >>> layout = (Block((Units("fc1", "fc1.weight", 0, 1),)),)
        >>> group = AxisGroup("fc1", 3, 1, (Axis("fc1.weight", 0, "produced", layout),))
        >>> edit = split(group, [1])
        >>> edit.index
        (0, 1, 2, 1)
        >>> edit.share[1] + edit.share[3]
        1.0
    """
    chosen = _chosen_units(group, units, "split")
    seed = _seed("split", group, group.size + len(chosen), generator)
    low, high = _SMALLER_SHARE
    random = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(chosen), dtype=torch.float64, generator=random) * (high - low) + low
    share = [1.0] * group.size
    for unit, kept in zip(chosen, draws.tolist(), strict=True):
        share[unit] = kept
    share += [1.0 - share[unit] for unit in chosen]
    return Edit(group, (*range(group.size), *chosen), tuple(share), seed=seed)


def prune(group: AxisGroup, units: Iterable[int]) -> Edit:
    """Remove the listed units; the others keep their order.

    Args:
        group: The group to prune.
        units: Units to remove, each once; at least one unit must stay, and the size afterwards must be a multiple of
            ``group.step``.

    Returns:
        An edit which removes the listed units.

    Raises:
        ValueError: If a unit does not exist or is listed twice, no unit would stay, or ``group.step`` is violated.
        TypeError: If a unit is not a whole number.

    Example:
        >>> from lightning_grow.structure.axes import Axis, AxisGroup, Block, Units
        >>> layout = (Block((Units("fc1", "fc1.weight", 0, 1),)),)
        >>> group = AxisGroup("fc1", 3, 1, (Axis("fc1.weight", 0, "produced", layout),))
        >>> prune(group, [1]).index
        (0, 2)
    """
    chosen = set(_chosen_units(group, units, "prune"))
    if len(chosen) == group.size:
        raise ValueError(
            f"Cannot prune all {group.size} units of group '{group.name}': at least one must stay"
            f"{'' if group.step == 1 else f', in steps of {group.step}'}."
        )
    index = tuple(u for u in range(group.size) if u not in chosen)
    return Edit(group, index, seed=_seed("prune", group, len(index), None))


def _chosen_units(group: AxisGroup, units: Iterable[int], verb: str) -> list[int]:
    chosen = [_whole_number(u, "unit", group.name) for u in units]
    if len(chosen) > group.size:
        raise ValueError(f"Cannot {verb} {len(chosen)} units of group '{group.name}': it has {group.size}.")
    unknown = [u for u in chosen if not 0 <= u < group.size]
    if unknown:
        raise ValueError(
            f"Cannot {verb} units {_listed(unknown)} of group '{group.name}': its units are 0 to {group.size - 1}."
        )
    twice = sorted({u for u in chosen if chosen.count(u) > 1}) if len(set(chosen)) < len(chosen) else []
    if twice:
        raise ValueError(f"Cannot {verb} units of group '{group.name}' twice: {_listed(twice)}. List each unit once.")
    return chosen


def _check_step(group: AxisGroup, new_size: int) -> None:
    if new_size % group.step:
        below = new_size // group.step * group.step
        fits = f"{below} or {below + group.step}" if below else f"{group.step}"
        raise ValueError(
            f"Group '{group.name}' comes in steps of {group.step} units, but the edit takes it from {group.size} to "
            f"{new_size}; choose {fits}."
        )


def _seed(verb: str, group: AxisGroup, new_size: int, generator: torch.Generator | None) -> int:
    """Return a seed that is equal on all ranks, without touching the global random state."""
    if generator is not None:
        return int(torch.randint(2**31 - 1, (1,), generator=generator, device=generator.device))
    return zlib.crc32(f"{verb} {group.name} {group.size} {new_size}".encode())


def _whole_number(value: object, what: str, group: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{what} of group '{group}' must be a whole number, but is {value}.")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{what} of group '{group}' must be a whole number, but is {value!r} ({type(value).__name__})."
        ) from None


def _listed(items: Iterable[object], limit: int = 8) -> str:
    texts = [str(item) for item in items]
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")
