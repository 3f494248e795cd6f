"""What an operator that works entry by entry returns on fake tensors: shape, strides and dtype, with few questions.

The engine's own way asks about each pair of dimensions and of strides, which takes most of a trace of a transformer.
Here the operator runs on tensors of the present sizes that have no memory, and sizes that meet are compared once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Made(NamedTuple):
    """Shape, strides and dtype of a new tensor."""

    shape: list[Any]
    stride: list[Any]
    dtype: torch.dtype


def is_elementwise(func: Any) -> bool:
    """Return whether an operator makes one new tensor entry by entry, by broadcasting."""
    schema = func._schema
    one = len(schema.returns) == 1 and isinstance(schema.returns[0].type, torch.TensorType)
    return torch.Tag.pointwise in func.tags and one and not schema.is_mutable and schema.returns[0].alias_info is None


def elementwise(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], now: Callable[[Any], float]) -> Made | None:
    """Return what an operator makes of its arguments, or None if their sizes do not say which are broadcast.

    Sizes that must be equal are compared, so that the engine writes it down.

    Args:
        func: The operator, one of which `is_elementwise` is true.
        args: Its arguments, of which at least one is a tensor.
        kwargs: Its keyword arguments.
        now: Returns the number that a size is at present.

    Example:
        >>> elementwise(torch.ops.aten.add.Tensor, (torch.ones(3, 1), torch.ones(4).double()), {}, int)
        Made(shape=[3, 4], stride=[4, 1], dtype=torch.float64)
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    present = {id(t): _bare(t, now) for t in tensors}
    sizes = _broadcast(shapes, [tuple(present[id(t)].shape) for t in tensors])
    if sizes is None:
        return None

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return present[id(leaf)]
        return now(leaf) if isinstance(leaf, (torch.SymInt, torch.SymFloat)) else leaf

    out = func(*pytree.tree_map(plain, args), **pytree.tree_map(plain, dict(kwargs)))
    stride: list[Any] = [1] * out.ndim
    outer_first = sorted(range(out.ndim), key=lambda dim: (-out.stride(dim), dim))
    for outer, inner in zip(reversed(outer_first[:-1]), reversed(outer_first[1:]), strict=True):
        stride[outer] = stride[inner] * sizes[inner]
    return Made(sizes, stride, out.dtype)


def _bare(tensor: Tensor, now: Callable[[Any], float]) -> Tensor:
    """Return a tensor without memory of the present sizes."""
    size, stride = ([int(now(n)) for n in numbers] for numbers in (tensor.shape, tensor.stride()))
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta")


def _broadcast(shapes: Sequence[Sequence[Any]], present: Sequence[Sequence[int]]) -> list[Any] | None:
    """Return the common shape; None if something of several units has one at present, or sizes differ."""
    ndim = max(map(len, shapes))
    sizes: list[Any] = [1] * ndim
    for shape, numbers in zip(shapes, present, strict=True):
        for dim, (size, number) in enumerate(zip(shape, numbers, strict=True), ndim - len(shape)):
            if number == 1:
                if not isinstance(size, int):
                    return None
            elif isinstance(sizes[dim], int) and sizes[dim] == 1:
                sizes[dim] = size
            elif sizes[dim] != size:  # written down if they are equal
                return None
    return sizes
