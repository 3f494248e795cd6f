"""What a method proposes: changes of width, depth and kernels as plain data, which can be shortened and compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_grow.structure.axes import Axis, AxisGroup, Stack
from lightning_grow.structure.layout import entry_owner
from lightning_grow.surgery.edit import Edit
from lightning_grow.surgery.kernels import KernelEdit

_ROUND_OFF = 1e-9


@dataclass(frozen=True)
class BlockEdit:
    """A planned change of depth: one block more, the identity at first, or one block less.

    Attributes:
        stack: The stack as it is before.
        at: Position of the new block, or of the block that goes.
        remove: Whether the block goes.
    """

    stack: Stack
    at: int
    remove: bool = False

    @property
    def size_before(self) -> int:
        """Number of blocks now."""
        return len(self.stack.blocks)

    @property
    def size_after(self) -> int:
        """Number of blocks afterwards."""
        return len(self.stack.blocks) + (-1 if self.remove else 1)


Change = Edit | BlockEdit | KernelEdit


@dataclass(frozen=True, eq=False)
class Proposal:
    """A change that a method suggests, and the gain that it expects from it, if it predicts one."""

    change: Change
    predicted: float | None = None


def trimmed(edit: Edit, size: int, sizes: Mapping[str, int]) -> Edit:
    """Return an edit that stops at ``size`` units, as if the last of its new units had never been asked for.

    Fan-out shares of the copies that remain of a unit are scaled up to what all its copies had together, so that what
    preserved the function still does.

    Args:
        edit: An edit that appends units.
        size: Units after the shorter edit, ``edit.group.size <= size <= len(edit.index)``.
        sizes: Units of all groups before the edit: other groups may share an axis with this one.
    """
    if not edit.group.size <= size <= len(edit.index):
        raise ValueError(
            f"'{edit.group.name}' goes from {edit.group.size} to {len(edit.index)}, it cannot stop at {size}."
        )
    index, share = edit.index[:size], list(edit.share[:size])
    for unit in set(index) - {-1}:
        wanted = sum(s for i, s in zip(edit.index, edit.share, strict=True) if i == unit)
        wanted = 1.0 if abs(wanted - 1) < _ROUND_OFF else wanted
        places = [place for place, source in enumerate(index) if source == unit]
        found = sum(share[place] for place in places)
        if found:
            for place in places:
                share[place] = wanted if len(places) == 1 else share[place] * wanted / found
    for parent, part in zip(edit.parents[size:], edit.share[size:], strict=False):
        if parent >= 0:
            whole = share[parent] + part
            share[parent] = 1.0 if abs(whole - 1) < _ROUND_OFF else whole
    axes = {axis.label: axis for axis in edit.group.axes}
    given = edit.values if -1 in index else {}
    values = {label: _kept_values(value, edit, axes[label], size, sizes) for label, value in given.items()}
    kept = {label: _kept_shifts(shift, edit, axes[label], size, sizes) for label, shift in edit.shifts.items()}
    shifts = {label: shift for label, shift in kept.items() if bool(shift.any())}
    return replace(edit, index=index, share=tuple(share), values=values, shifts=shifts, parents=edit.parents[:size])


def spared(edit: Edit, size: int) -> Edit:
    """Return an edit that leaves ``size`` units, as if the first of the units that go had been left where they are.

    Args:
        edit: An edit that removes units.
        size: Units after the milder edit, ``len(edit.index) <= size <= edit.group.size``.
    """
    if not len(edit.index) <= size <= edit.group.size:
        raise ValueError(
            f"'{edit.group.name}' goes from {edit.group.size} to {len(edit.index)}, it cannot stop at {size}."
        )
    gone = [unit for unit in range(edit.group.size) if unit not in edit.index]
    back = gone[: size - len(edit.index)]
    index, share = (*edit.index, *back), (*edit.share, *(1.0 for _ in back))
    order = range(size) if edit.num_new else sorted(range(size), key=lambda place: index[place])
    parents = (*edit.parents, *(-1 for _ in back)) if edit.parents else ()
    return replace(
        edit,
        index=tuple(index[place] for place in order),
        share=tuple(share[place] for place in order),
        parents=tuple(parents[place] for place in order) if parents else (),
    )


def _kept_values(value: Tensor, edit: Edit, axis: Axis, size: int, sizes: Mapping[str, int]) -> Tensor:
    """Drop the given new entries of units that are no longer made."""
    index = torch.tensor(edit.index)
    owner = entry_owner(axis.layout, {**sizes, edit.group.name: len(index)}, edit.group.name)
    new = (owner >= 0) & (index[owner.clamp(min=0)] < 0)
    return value.index_select(axis.dim, torch.nonzero(owner[new] < size).flatten().to(value.device))


def _kept_shifts(shift: Tensor, edit: Edit, axis: Axis, size: int, sizes: Mapping[str, int]) -> Tensor:
    """Drop the shifts of units that are no longer made; those of units that have lost a copy become zero."""
    group, after = edit.group.name, {**sizes, edit.group.name: len(edit.index)}
    owner = entry_owner(axis.layout, after, group)
    lost = set(edit.index[size:]) - {-1}
    moved = torch.tensor([source not in lost for source in edit.index] + [True])  # the last: other blocks' entries
    kept = shift * moved[owner].to(shift).reshape([-1 if d == axis.dim else 1 for d in range(shift.ndim)])
    return kept.index_select(axis.dim, torch.nonzero(owner < size).flatten().to(shift.device))


def size_after(change: Change) -> int:
    """Return the number of units or blocks, or the length of a kernel, after a change."""
    return len(change.index) if isinstance(change, Edit) else change.size_after


def size_before(change: Change) -> int:
    """Return the number of units or blocks, or the length of a kernel, before a change."""
    return change.group.size if isinstance(change, Edit) else change.size_before


def name_of(change: Change) -> str:
    """Return the name of the group, stack or convolution that a change is about."""
    if isinstance(change, KernelEdit):
        return f"{change.module}.kernel"  # a group of units may have the name of the convolution
    return change.group.name if isinstance(change, Edit) else change.stack.name


def is_nothing(change: Change) -> bool:
    """Return whether an edit leaves everything as it is."""
    if isinstance(change, KernelEdit):
        return change.before == change.after
    return isinstance(change, Edit) and change.is_identity


def rounded(group: AxisGroup, num_units: int | None, fraction: float | None) -> int:
    """Return how many units a group should gain or lose: a multiple of its step, at least one step.

    Args:
        group: The group.
        num_units: This many, or
        fraction: this share of the units there are now.
    """
    wanted = num_units if num_units is not None else round((fraction or 0.0) * group.size)
    return max(1, -(-wanted // group.step)) * group.step


def in_all(groups: Sequence[AxisGroup], num_units: int | None, fraction: float | None, default: float) -> int:
    """Return by how many units groups that share one list should change together: one at least.

    Args:
        groups: The groups.
        num_units: This many, or
        fraction: this share of all units that there are now.
        default: The share if neither is given.
    """
    share = default if fraction is None else fraction
    return num_units if num_units is not None else max(1, round(share * sum(group.size for group in groups)))


def fingerprint(changes: Sequence[Change]) -> int:
    """Return a number that two ranks share if, and practically only if, they propose the same changes."""
    digest = hashlib.sha256()
    for change in changes:
        if not isinstance(change, Edit):
            digest.update(repr(change).encode())
            continue
        digest.update(repr((change.group.name, change.group.size, change.index, change.share, change.seed)).encode())
        for given in (change.values, change.shifts):
            for label in sorted(given):
                value = given[label].detach().to("cpu", torch.float64).contiguous()
                digest.update(repr((label, tuple(value.shape))).encode())
                digest.update(value.numpy().tobytes())
    return int.from_bytes(digest.digest()[:7], "big")
