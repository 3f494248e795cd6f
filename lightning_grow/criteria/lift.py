"""From the vectors of a model's units to those of an over-grown copy, and back for gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_grow.criteria.units import UnitVectors
from lightning_grow.structure.layout import entry_index, entry_share
from lightning_grow.surgery.edit import Edit

_ROUND_OFF = 64
"""Twins whose gradients differ by less than so many times the machine precision have no curvature that can be seen."""


class Lift:
    """Between vectors of the model and those of its over-grown copy, which differ where units read their own group.

    In a recurrent layer a row has one column for each unit that it reads: in the copy there are those of the twins,
    which share the weight, and those of new units, which nothing reads yet.
    """

    def __init__(self, vectors: UnitVectors, edit: Edit) -> None:
        self.length = vectors.length
        name = edit.group.name
        index, share = {name: torch.tensor(edit.index)}, {name: torch.tensor(edit.share, dtype=torch.float64)}
        sources, shares, start, changed = [], [], 0, False
        for axis, length in zip(vectors.axes, vectors.lengths, strict=True):
            rest = [n for dim, n in enumerate(vectors.shapes[axis.label]) if dim != axis.dim]
            source = torch.arange(start, start + length).reshape(-1, *rest).movedim(0, axis.dim)
            part = torch.ones((), dtype=torch.float64)
            for other in edit.group.axes:
                if other.tensor == axis.tensor and other.dim != axis.dim:
                    changed = True
                    entries = entry_index(other.layout, vectors.sizes, index)
                    factor = (entries >= 0).double()
                    if other.role == "consumed":
                        factor *= entry_share(other.layout, vectors.sizes, share)
                    source = source.index_select(other.dim, entries.clamp(min=0))
                    part = part * factor.reshape([-1 if dim == other.dim else 1 for dim in range(source.ndim)])
            sources.append(source.movedim(axis.dim, 0).reshape(-1))
            shares.append(part.expand(source.shape).movedim(axis.dim, 0).reshape(-1))
            start += length
        self._map = (torch.cat(sources), torch.cat(shares)) if changed else None

    def up(self, vectors: Tensor) -> Tensor:
        """Return vectors as they are in the copy."""
        if self._map is None:
            return vectors
        source, share = self._map
        return vectors[:, source.to(vectors.device)] * share.to(vectors)

    def down(self, gradients: Tensor) -> Tensor:
        """Return gradients in the copy as gradients of the vectors: the transpose of `up`."""
        if self._map is None:
            return gradients
        source, share = self._map
        lowered = gradients.new_zeros(len(gradients), self.length)
        return lowered.index_add_(1, source.to(gradients.device), gradients * share.to(gradients))


def difference(one: Tensor, other: Tensor) -> Tensor:
    """Return the difference of two gradients of the same units; 0 where it is nothing but round-off."""
    left = one - other
    least = _ROUND_OFF * torch.finfo(one.dtype).eps * (one.norm(dim=1) + other.norm(dim=1))
    seen: Tensor = left * (left.norm(dim=1) > least)[:, None]
    return seen
