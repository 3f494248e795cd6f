"""Tensors that modules keep beside parameters and buffers: a recurrent state between batches, a cached table.

The size of such a tensor is a size kept in Python, at the place ``state.shape[1]``: it varies with the widths that it
was made of, and the tensor follows along that axis. It may come and go while the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grow.structure.holders import OF_MODULES, contents, is_settings, read, write

_SHAPE = ".shape"
_DEEPEST = 3
_COMPUTED = ("_g", "_v", "_orig")


def is_state(name: str) -> bool:
    """Return whether a place is the shape of a tensor that a module keeps.

    Example:
        >>> is_state("states[0].shape"), is_state("config.shape_of_input")
        (True, False)
    """
    return name.endswith(_SHAPE)


def states(modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], Tensor]:
    """Return the floating-point tensors that modules keep beside parameters and buffers, by module and path to shape.

    What hooks compute from parameters (weight norm, spectral norm, pruning) is no state.
    """
    listed = {id(t) for m in modules.values() for t in (*m._parameters.values(), *m._buffers.values())}
    found: dict[tuple[str, str], Tensor] = {}
    for path, module in modules.items():
        for name, value in module.__dict__.items():
            computed = any(f"{name}{end}" in module._parameters for end in _COMPUTED)
            if name not in OF_MODULES and name != "_flat_weights" and not computed:
                for place, tensor in _inside(name, value, _DEEPEST):
                    if id(tensor) not in listed and not isinstance(tensor, nn.Parameter):
                        found[path, f"{place}{_SHAPE}"] = tensor
    return found


def _inside(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.ndim and value.is_floating_point():
            yield name, value
    elif depth and (isinstance(value, (list, tuple, dict)) or (not callable(value) and is_settings(value))):
        for step, inner in contents(value):
            if isinstance(inner, (Tensor, list, tuple, dict)) or hasattr(inner, "__dict__"):
                yield from _inside(f"{name}{step}", inner, depth - 1)


def state_at(module: nn.Module, name: str) -> Tensor | None:
    """Return the tensor whose shape is at a place; None where there is none now."""
    try:
        found = read(module, name.removesuffix(_SHAPE))
    except LookupError:
        return None
    return found if isinstance(found, Tensor) else None


def put_state(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor at the place whose shape has this name."""
    write(module, name.removesuffix(_SHAPE), None, tensor)


def resized_state(tensor: Tensor, dim: int, entries: Tensor) -> Tensor:
    """Return a tensor with other entries along one dimension: copies of old ones, or zero for -1.

    Example:
        >>> resized_state(torch.tensor([1.0, 2.0]), 0, torch.tensor([1, -1]))
        tensor([2., 0.])
    """
    entries = entries.to(tensor.device)
    taken = tensor.detach().index_select(dim, entries.clamp(min=0))
    new = (entries < 0).reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
    return taken.masked_fill(new, 0).requires_grad_(tensor.requires_grad and tensor.is_leaf)


def cut_state(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Return a tensor cut off at the end of one dimension, or filled up with zeros."""
    index = torch.arange(size)
    return resized_state(tensor, dim, torch.where(index < tensor.shape[dim], index, -1))
