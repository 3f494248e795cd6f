"""Sums over lists of tensors and steps along them, with as few passes over memory as they need.

A step of an optimizer is bound by memory traffic. Nothing here writes a temporary of the size of the parameters where
torch can do without, and nothing waits for the device: sums are 0-d tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Rate = float | Tensor
"""A step size: a number on the CPU, a 0-d tensor elsewhere, where reading a number would wait for the device."""


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`\sum_i \langle x_i, y_i \rangle`, a 0-d tensor on the device of the first; 0 for empty lists.

    Half precision is added up in float32; sums over tensors in float64 where the device has it.

    Args:
        xs: Tensors.
        ys: As many, of the same shapes.

    Example:
        >>> dot([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])]).item()
        11.0
    """
    large: list[tuple[Tensor, Tensor]] = []
    small: list[tuple[Tensor, Tensor]] = []
    for pair in zip(xs, ys, strict=True):
        (small if pair[0].numel() < SMALL else large).append(pair)
    products = [product(x, y) for x, y in large]
    for device in {x.device for x, _ in small}:
        rows = zip(*(pair for pair in small if pair[0].device == device), strict=True)
        products.append(product(*(flattened(list(row)) for row in rows)))
    return total(products)


SMALL = 2**12
"""Entries below which tensors are worked on together: a call for each would take longer than what it computes."""


def flattened(xs: Sequence[Tensor]) -> Tensor:
    """Return the entries of tensors of one device in one vector, those of each in the order of its dimensions.

    Example:
        >>> flattened([torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, torch.tensor(5.0)])
        tensor([1., 3., 2., 4., 5.])
    """
    vector: Tensor = torch._C._nn.flatten_dense_tensors(list(xs))
    return vector


def squared_norm(xs: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`\sum_i \|x_i\|^2`, a 0-d tensor; 0 for an empty list.

    Example:
        >>> squared_norm([torch.tensor([3.0]), torch.tensor([4.0])]).item()
        25.0
    """
    narrow = [x for x in xs if x.dtype in _NARROW]
    wide = [x for x in xs if x.dtype not in _NARROW]
    if not narrow and all(x.device.type == "cpu" for x in wide):  # the kernel for norms has one thread
        return dot(wide, wide)
    norms = [*torch._foreach_norm(narrow, 2, dtype=torch.float32)] if narrow else []
    norms += [*torch._foreach_norm(wide, 2)] if wide else []
    return total(norms, square=True)


def total(sums: Sequence[Tensor], *, square: bool = False) -> Tensor:
    """Add up 0-d tensors, or their squares, in float64 where the device has it."""
    if not sums:
        return torch.zeros((), dtype=torch.float64)
    device = sums[0].device
    if any(s.device != device for s in sums):
        sums = [s.to(device) for s in sums]
    numbers = torch.stack(list(sums)).to(wide_dtype(device))
    return (numbers.square_() if square else numbers).sum()


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def subtract_(params: Sequence[Tensor], directions: Sequence[Tensor], rate: Rate) -> None:
    r"""Take a step: :math:`p_i \leftarrow p_i - \text{rate} \cdot d_i`, without a temporary.

    Args:
        params: What moves.
        directions: As many, of the same shapes and types.
        rate: The step size. If it is a tensor, it stays on its device.

    Example:
        >>> p = torch.ones(2)
        >>> subtract_([p], [torch.tensor([1.0, 2.0])], 0.5)
        >>> p
        tensor([0.5000, 0.0000])
    """
    if not params:
        return
    if isinstance(rate, Tensor):
        for p, d in zip(params, directions, strict=True):
            p.addcmul_(d, rate.to(p.device, p.dtype), value=-1)
    else:
        torch._foreach_add_(list(params), list(directions), alpha=-rate)


def as_rate(value: Rate, device: torch.device) -> Rate:
    """Return a step size in the form that steps on a device want it: a number, or a 0-d tensor of the widest type."""
    if device.type == "cpu":
        return float(value)
    if isinstance(value, Tensor):
        return value.to(device, wide_dtype(device))
    return torch.full((), value, dtype=wide_dtype(device), device=device)


def as_flat(x: Tensor) -> Tensor | None:
    """Return the entries of a tensor as a vector, in the order of memory; None if they do not fill a stretch of it."""
    return x.as_strided((x.numel(),), (1,)) if _is_dense(x) else None


def can_fuse(*lists: Sequence[Tensor]) -> bool:
    """Whether torch's fused kernels take these tensors: of one type, on one CPU or CUDA device, laid out alike."""
    first = lists[0][0]
    return (
        first.device.type in ("cpu", "cuda")
        and first.is_floating_point()
        and all(x.device == first.device and x.dtype == first.dtype for xs in lists for x in xs)
        and all(len({x.stride() for x in row}) == 1 and _is_dense(row[0]) for row in zip(*lists, strict=True))
    )


def clipped(value: Rate, low: float, high: float) -> Rate:
    """Return a step size within bounds."""
    if isinstance(value, Tensor):
        return value if low == -math.inf and high == math.inf else value.clamp(low, high)
    return min(max(value, low), high)


_NARROW = (torch.float16, torch.bfloat16)


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return the product of two tensors, a 0-d tensor: without a temporary where they are laid out alike."""
    if x.dtype in _NARROW or y.dtype in _NARROW:
        x, y = x.float(), y.float()
    if x.is_contiguous() and y.is_contiguous():
        return torch.dot(x.view(-1), y.view(-1))
    flat = (as_flat(x), as_flat(y)) if x.stride() == y.stride() else (None, None)
    return (x * y).sum() if flat[0] is None or flat[1] is None else torch.dot(flat[0], flat[1])


def _is_dense(x: Tensor) -> bool:
    """Whether the entries fill a stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True
