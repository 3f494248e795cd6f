"""What edits mean for one tensor: gather maps and new entries, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lightning_grow.structure.axes import Layout, Role, Units, layout_length
from lightning_grow.structure.layout import entry_index, entry_share
from lightning_grow.surgery.edit import Edit

_MAX_COPIES = 64
"""A gather of at most so many contiguous pieces is done by copying them; one of more pieces by an index."""


@dataclass(frozen=True, eq=False)
class Given:
    """What an edit gives for entries of an axis: values of new ones, or what is added to any.

    Attributes:
        tensor: The shape of the tensor before the edit, with the length of the axis replaced by that of what is given.
        source: For each entry of the axis after all edits the entry of ``tensor`` that it takes, or -1 for none:
            int64 ``(new_length,)``.
    """

    tensor: Tensor
    source: Tensor


@dataclass(frozen=True, eq=False)
class AxisMap:
    """The gather map of one axis of a tensor.

    Attributes:
        dim: The axis.
        role: Its role in the edited group.
        index: For each entry after the edit the entry it copies, or -1 for a new one: int64 ``(new_length,)``.
        share: Fan-out share of each entry's unit after the edit: float64 ``(new_length,)``, or None when all are 1.
        place: For each entry after the edit its place within its unit, such as the position of a flattened channel or
            the gate: int64 ``(new_length,)``, or None when all units have one entry in one block.
        seed: Seeds the default values of new entries.
        values: Given values of new entries; the others get default values.
        shifts: What is added to the entries.
        gain: What present entries are multiplied by.
        fill: What new entries are: ``"default"`` values, ``"zeros"``, the ``"mean"`` of the others, or ``"random"``.
    """

    dim: int
    role: Role
    index: Tensor
    share: Tensor | None = None
    place: Tensor | None = None
    seed: int = 0
    values: tuple[Given, ...] = ()
    shifts: tuple[Given, ...] = ()
    gain: float = 1.0
    fill: Literal["default", "zeros", "mean", "random"] = "default"

    @cached_property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """Contiguous pieces: start after the edit, start before it (-1: new), length."""
        index = self.index
        step = index[1:] - index[:-1]
        both_new = (index[1:] < 0) & (index[:-1] < 0)
        breaks = (~both_new & ((step != 1) | (index[:-1] < 0))).nonzero().flatten() + 1
        starts = [0, *breaks.tolist()]
        ends = [*starts[1:], index.numel()]
        return tuple((s, int(index[s]), e - s) for s, e in zip(starts, ends, strict=True) if e > s)

    @property
    def gains(self) -> Tensor:
        """What each entry after the edit is multiplied by: float64 ``(new_length,)``, 1 for new ones."""
        return torch.where(self.index >= 0, torch.tensor(self.gain, dtype=torch.float64), 1.0)

    @cached_property
    def new_entries(self) -> Tensor:
        """The new entries of the axis: int64 ``(num_new_entries,)``."""
        return (self.index < 0).nonzero().flatten()

    @cached_property
    def has_new(self) -> bool:
        """Whether the axis has new entries."""
        return bool(self.new_entries.numel())

    def is_identity(self, old_length: int) -> bool:
        """Return whether the axis, of this length before the edit, stays as it is."""
        return not self.shifts and self.share is None and self.gain == 1 and self.segments == ((0, 0, old_length),)

    def shaped(self, vector: Tensor, ndim: int) -> Tensor:
        """Return a vector along this axis, shaped so that it broadcasts over a tensor of ``ndim`` dimensions."""
        return vector.reshape([-1 if d == self.dim else 1 for d in range(ndim)])


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """What one parameter or buffer becomes.

    Attributes:
        name: Qualified name of the tensor.
        maps: Its edited axes, at most one for each dimension.
        old_shape: Shape before the edit.
        value: The tensor after the edit (detached; dtype and device of the old one).
    """

    name: str
    maps: tuple[AxisMap, ...]
    old_shape: torch.Size
    value: Tensor

    @cached_property
    def inverse(self) -> tuple[AxisMap, ...] | None:
        """The maps that take the edit back, bit for bit, or None where entries were dropped or multiplied."""
        inverse = []
        for m in self.maps:
            kept = (m.index >= 0).nonzero().flatten()
            back = torch.full((self.old_shape[m.dim],), -1)
            back[m.index[kept]] = kept
            if m.share is not None or m.gain != 1 or m.shifts or bool((back < 0).any()):
                return None
            inverse.append(AxisMap(m.dim, m.role, back))
        return tuple(inverse)


def axis_map(dim: int, role: Role, layout: Layout, sizes: Mapping[str, int], edits: Mapping[str, Edit]) -> AxisMap:
    """Return the map of an axis under edits of any of its groups.

    Args:
        dim: The axis.
        role: Its role.
        layout: Its blocks.
        sizes: Units of each group of the layout before the edits.
        edits: Edits of groups of the layout, by group name.

    Returns:
        The map, with default values for all new entries (see `with_values`).
    """
    index = {name: torch.tensor(edit.index, dtype=torch.int64) for name, edit in edits.items()}
    share = {name: torch.tensor(e.share, dtype=torch.float64) for name, e in edits.items() if set(e.share) != {1.0}}
    new_sizes = {**sizes, **{name: edit.new_size for name, edit in edits.items()}}
    return AxisMap(
        dim=dim,
        role=role,
        index=entry_index(layout, sizes, index),
        share=entry_share(layout, new_sizes, share) if share else None,
        place=_places(layout, new_sizes, edits),
        seed=sum(edits[name].seed for name in sorted(edits)) % 2**31,
    )


def value_source(layout: Layout, sizes: Mapping[str, int], edits: Mapping[str, Edit], group: str) -> tuple[Tensor, int]:
    """Return which entries of an axis after all edits take which of the values given by the edit of one group.

    Args:
        layout: The blocks of the axis.
        sizes: Units of each group before the edits.
        edits: Edits of groups of the layout, by group name.
        group: The group whose edit gives values.

    Returns:
        For each entry after all edits the entry of the values, or -1 (int64 ``(new_length,)``), and the length that
        the values must have along the axis.
    """
    index = {name: torch.tensor(edit.index, dtype=torch.int64) for name, edit in edits.items()}
    own = entry_index(layout, sizes, {group: index.pop(group)})
    own_new = own < 0
    rank = torch.where(own_new, own_new.cumsum(0) - 1, -1)
    others = entry_index(layout, {**sizes, group: edits[group].new_size}, index)
    return torch.where(others >= 0, rank[others.clamp(min=0)], -1), int(own_new.sum())


def shift_source(layout: Layout, sizes: Mapping[str, int], edits: Mapping[str, Edit], group: str) -> tuple[Tensor, int]:
    """Return likewise which entries take which of the shifts, which are given for all entries that there are then."""
    index = {name: torch.tensor(edit.index, dtype=torch.int64) for name, edit in edits.items() if name != group}
    own = {**sizes, group: edits[group].new_size}
    return entry_index(layout, own, index), layout_length(layout, own)


def gather(tensor: Tensor, maps: tuple[AxisMap, ...], zero_new: bool = True) -> Tensor:
    """Return ``tensor`` gathered along the mapped axes. The result shares no memory.

    Few contiguous pieces (units appended, a run removed) are copied piece by piece into one new tensor, which is
    several times faster than an index; scattered pieces go through an index.

    Args:
        tensor: Any dtype and device.
        maps: Its edited axes.
        zero_new: Whether new entries are zero; otherwise they are not written, for a caller that fills all of them.
    """
    if not maps:
        return tensor.clone(memory_format=torch.preserve_format)
    memory_format = _memory_format(tensor)
    pending = sorted(maps, key=lambda m: len(m.segments))
    while pending and math.prod(len(m.segments) for m in pending) > _MAX_COPIES:
        m = pending.pop()
        tensor = tensor.index_select(m.dim, m.index.clamp(min=0).to(tensor.device))
        if m.has_new:
            tensor.index_fill_(m.dim, m.new_entries.to(tensor.device), 0)
        if not pending:
            return tensor.contiguous(memory_format=memory_format)
    shape = list(tensor.shape)
    for m in pending:
        shape[m.dim] = m.index.numel()
    out = torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)
    _copy_segments(out, tensor, tuple(pending), zero_new)
    return out


def _copy_segments(out: Tensor, tensor: Tensor, maps: tuple[AxisMap, ...], zero_new: bool) -> None:
    if not maps:
        out.copy_(tensor)
        return
    m, rest = maps[0], maps[1:]
    for start, source, length in m.segments:
        piece = out.narrow(m.dim, start, length)
        if source >= 0:
            _copy_segments(piece, tensor.narrow(m.dim, source, length), rest, zero_new)
        elif zero_new:
            piece.zero_()


def _memory_format(tensor: Tensor) -> torch.memory_format:
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == ndim and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous():
            return layout
    return torch.contiguous_format


def _places(layout: Layout, sizes: Mapping[str, int], edits: Mapping[str, Edit]) -> Tensor | None:
    """Return for each entry its place within its unit, or None when all entries have the same place."""
    parts = []
    count = 0
    for block in layout:
        edited = [isinstance(f, Units) and f.group in edits for f in block.factors]
        lengths = [f if isinstance(f, int) else sizes[f.group] for f in block.factors]
        kept = [1 if e else n for e, n in zip(edited, lengths, strict=True)]
        places = torch.arange(count, count + math.prod(kept)).reshape(kept)
        parts.append(places.expand(lengths).reshape(-1))
        count += math.prod(kept)
    return torch.cat(parts) if count > 1 else None
