"""From the entries of a tensor to the units that they belong to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Axis, AxisGroup, layout_units
from lightning_grow.structure.layout import entry_share


def sum_over_units(values: Tensor, group: AxisGroup, axis: Axis, sizes: Mapping[str, int]) -> Tensor:
    """Add up the values of a tensor that belong to each unit along one axis.

    Args:
        values: One value for each entry of the axis's tensor, in its shape.
        group: The group that the axis belongs to.
        axis: One of its axes, perhaps composite; entries of other groups are left out.
        sizes: Units of each group that the axis depends on.

    Returns:
        float64 ``(group.size,)``.
    """
    size = sizes[group.name]
    position = torch.arange(size, dtype=torch.float64) + 2  # from 2: the other blocks of the axis read 1
    owner = entry_share(axis.layout, sizes, {group.name: position}).long() - 2
    entries = values.detach().to("cpu", torch.float64).movedim(axis.dim, 0).reshape(len(owner), -1).sum(dim=1)
    return torch.zeros(size, dtype=torch.float64).index_add_(0, owner[owner >= 0], entries[owner >= 0])


def sizes_of(model: nn.Module, group: AxisGroup) -> dict[str, int]:
    """Return the unit counts, in the model, of every group that the axes of this group depend on."""
    units = {name: u for axis in group.axes for name, u in layout_units(axis.layout).items()}
    return {name: u.size_in(model) for name, u in units.items()}
