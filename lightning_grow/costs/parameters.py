"""What units cost in parameters: exact, from names and numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from lightning_grow.structure.axes import Layout, Structure, layout_length


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
    sizes = structure.sizes_in(model) | dict(sizes or {})
    return sum(
        math.prod(_length(layouts.get((name, dim)), size, sizes) for dim, size in enumerate(parameter.shape))
        for name, parameter in model.named_parameters()
    )


def unit_parameters(model: nn.Module, structure: Structure, group: str) -> int:
    """Return how many parameters one more unit of a group costs, at the sizes that ``model`` has now."""
    size = structure[group].units.size_in(model)
    return count_parameters(model, structure, {group: size + 1}) - count_parameters(model, structure)


def _length(layout: Layout | None, size: int, sizes: Mapping[str, int]) -> int:
    return size if layout is None else layout_length(layout, sizes)
