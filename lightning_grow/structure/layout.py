"""Which entry of a composite axis belongs to which unit, in closed form.

An axis is an ordered sum of blocks, a block an ordered product of factors; one reshape of ``arange`` gives the entries
of a unit, and one ``index_select`` for each factor gives the map from the entries after an edit to those before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_grow.structure.axes import Layout, Units


def entry_index(layout: Layout, sizes: Mapping[str, int], index: Mapping[str, Tensor]) -> Tensor:
    """Return, for each entry of an axis after an edit, the entry that it copies, or -1 for a new one.

    Args:
        layout: The blocks of the axis.
        sizes: Units of each group before the edit.
        index: For the edited groups, for each unit after the edit the unit it copies or -1: int64 ``(new_size,)``.

    Returns:
        int64 ``(new_length,)``.
    """
    parts = []
    offset = 0
    for block in layout:
        shape = [f if isinstance(f, int) else sizes[f.group] for f in block.factors]
        length = block.length(sizes)
        entries = torch.arange(offset, offset + length).reshape(shape)
        for dim, factor in enumerate(block.factors):
            if isinstance(factor, Units) and factor.group in index:
                chosen = index[factor.group]
                entries = entries.index_select(dim, chosen.clamp(min=0))
                entries = entries.movedim(dim, -1).masked_fill(chosen < 0, -1).movedim(-1, dim)
        parts.append(entries.reshape(-1))
        offset += length
    return torch.cat(parts)


def entry_share(layout: Layout, sizes: Mapping[str, int], share: Mapping[str, Tensor]) -> Tensor:
    """Return the fan-out share of each entry of an axis after an edit: float64 ``(new_length,)``.

    Args:
        layout: The blocks of the axis.
        sizes: Units of each group before the edit.
        share: For the edited groups, the share of each unit after the edit: float64 ``(new_size,)``.
    """
    parts = []
    for block in layout:
        factors = [
            share[f.group]
            if isinstance(f, Units) and f.group in share
            else torch.ones(f if isinstance(f, int) else sizes[f.group], dtype=torch.float64)
            for f in block.factors
        ]
        value = torch.ones((), dtype=torch.float64)
        for factor in factors:
            value = value.unsqueeze(-1) * factor
        parts.append(value.reshape(-1))
    return torch.cat(parts)


def entry_owner(layout: Layout, sizes: Mapping[str, int], group: str) -> Tensor:
    """Return, for each entry of an axis, the unit of a group that it belongs to, or -1: int64 ``(length,)``.

    Args:
        layout: The blocks of the axis.
        sizes: Units of each group.
        group: The group.
    """
    position = torch.arange(sizes[group], dtype=torch.float64) + 2  # from 2: the other blocks of the axis read 1
    return entry_share(layout, sizes, {group: position}).long() - 2


def unit_entries(layout: Layout, sizes: Mapping[str, int], group: str) -> Tensor:
    """Return the entries of each unit of a group along an axis, in order: int64 ``(size, entries of a unit)``."""
    owner = entry_owner(layout, sizes, group)
    mine = torch.nonzero(owner >= 0).flatten()
    return mine[owner[mine].argsort(stable=True)].reshape(sizes[group], -1)
