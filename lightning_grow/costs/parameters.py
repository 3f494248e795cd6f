"""What units cost in parameters: exact, from names and numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_grow.structure.axes import Layout, Structure, layout_length, layout_units, tensor_of


def count_parameters(model: nn.Module, structure: Structure, sizes: Mapping[str, int] | None = None) -> int:
    """Return how many parameters ``model`` would have with other unit counts; nothing is built.

    Args:
        model: The model as it is now. Tied parameters count once, frozen ones count, buffers do not.
        structure: Its structure.
        sizes: Units by group name; groups that are not named keep the size they have now.

    Example:
        >>> import torch
        >>> from lightning_grow.structure import trace
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> structure = trace(model, torch.zeros(1, 4))
        >>> count_parameters(model, structure), count_parameters(model, structure, {"0": 16})
        (58, 114)
    """
    layouts = {(axis.tensor, axis.dim): axis.layout for group in structure.groups.values() for axis in group.axes}
    return _count(dict(model.named_parameters()), layouts, structure.sizes_in(model) | dict(sizes or {}))


def unit_parameters(model: nn.Module, structure: Structure, group: str) -> int:
    """Return how many parameters one more unit of a group costs, at the sizes that ``model`` has now."""
    tensors = {axis.tensor: tensor_of(model, axis.tensor) for axis in structure[group].axes}
    parameters = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    axes = (axis for other in structure.groups.values() for axis in other.axes if axis.tensor in parameters)
    layouts = {(axis.tensor, axis.dim): axis.layout for axis in axes}
    units = {name: found for layout in layouts.values() for name, found in layout_units(layout).items()}
    sizes = {name: found.size_in(model) for name, found in units.items()}
    more = sizes | {group: sizes.get(group, 0) + 1}
    return _count(parameters, layouts, more) - _count(parameters, layouts, sizes)


def _count(
    parameters: Mapping[str, Tensor], layouts: Mapping[tuple[str, int], Layout], sizes: Mapping[str, int]
) -> int:
    return sum(
        math.prod(_length(layouts.get((name, dim)), size, sizes) for dim, size in enumerate(parameter.shape))
        for name, parameter in parameters.items()
    )


def _length(layout: Layout | None, size: int, sizes: Mapping[str, int]) -> int:
    return size if layout is None else layout_length(layout, sizes)
