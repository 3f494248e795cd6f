"""Steps that read each number from memory once: loops compiled by Numba, for large tensors on the CPU.

They are used with the option ``fused=True``. All cores that torch uses work on them: tensors are cut into slices,
always the same ones, so that results do not depend on how many cores there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version  # torch does not see what is written through arrays

from lightning_grow.optim.tensors import SMALL, as_flat, dot, flattened, product, total

SLICE = 2**20
"""Entries of a slice: a call costs little beside it, and there are enough of them for all cores."""

GRADIENT, NESTEROV, ADAM = 0, 1, 2
"""Kinds of directions, with what they remember: nothing or the last gradient; the momentum, too; both moments."""

Task = Callable[[], None]


def check_fused(group: dict[str, Any]) -> None:
    """Check the option ``fused`` of a param group, where it is True.

    Raises:
        ValueError: If ``foreach`` is set, too, or parameters are not float32 or float64 on the CPU.
        ModuleNotFoundError: If Numba is not there.
    """
    if not group.get("fused"):
        return
    if group.get("foreach") is not None:
        raise ValueError(f"Expected only one of `foreach` and `fused`, found {group['foreach']!r} and True.")
    for p in group["params"]:
        if p.device.type != "cpu" or p.dtype not in _TYPES:
            raise ValueError(
                f"Expected parameters of float32 or float64 on the CPU with `fused=True`, found {p.dtype} on "
                f"{p.device}. Leave `fused` out: torch's own kernels are used then."
            )
    try:
        _kernels()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`fused=True` needs Numba, which is not installed: pip install 'lightning-grow[fused]'."
        ) from error


def fits(*tensors: Tensor) -> bool:
    """Return whether the kernels take these tensors together, and are worth a call.

    They are laid out alike, and what belongs to one index along dim 0 lies together (``channels_last`` does).
    """
    x = tensors[0]
    if x.numel() < SMALL or x.dtype not in _TYPES:
        return False
    if not x.is_contiguous() and (x.stride(0) * x.shape[0] != x.numel() or as_flat(x) is None):
        return False
    return all(y.is_cpu and y.dtype == x.dtype and y.stride() == x.stride() for y in tensors)


def products(newest: Sequence[Tensor], others: Sequence[Sequence[Tensor]]) -> Tensor:
    r"""Return :math:`\sum_i \langle x_i, y_{ki} \rangle` for each list of tensors, ``(lists,)``.

    Args:
        newest: Tensors.
        others: Lists with as many tensors, of the same shapes.

    Example:
        >>> x = [torch.ones(5000), torch.ones(2)]
        >>> products(x, [x, [2 * each for each in x]])
        tensor([ 5002., 10004.], dtype=torch.float64)
    """
    small: list[int] = []
    parts: list[tuple[NDArray[Any], ...]] = []
    found: list[list[Tensor]] = [[] for _ in others]
    for place, (x, *ys) in enumerate(zip(newest, *others, strict=True)):
        if fits(x, *ys):
            parts += _slices((x, *ys), 1)
        elif x.numel() < SMALL and x.device.type == "cpu":
            small.append(place)
        else:
            for row, y in zip(found, ys, strict=True):
                row.append(product(x, y))
    sums = np.empty((len(parts), len(others), 1))
    _run([_task(_kernels().products, part[0], part[1:], s) for part, s in zip(parts, sums, strict=True)])
    if small:
        x = flattened([newest[place] for place in small])
        for row, other in zip(found, others, strict=True):
            row.append(product(x, flattened([other[place] for place in small])))
    together = torch.from_numpy(sums.sum(axis=(0, 2)))
    return torch.stack([s + total(row).to(s) for s, row in zip(together, found, strict=True)])


def dots(xs: Sequence[Tensor], others: Sequence[Sequence[Tensor]], *, fused: bool | None) -> list[Tensor]:
    """Return the same as 0-d tensors: by the kernels, or by `tensors.dot`."""
    return list(products(xs, others).unbind()) if fused else [dot(xs, ys) for ys in others]


def adam_products(rows: Sequence[tuple[Tensor, Tensor, Tensor]], scales: Sequence[tuple[float, float]]) -> list[Tensor]:
    """Return the products of gradients with Adam's directions, and the squared lengths of those: ``(2,)`` for each.

    Args:
        rows: Gradient, first and second moment, which fit.
        scales: What the root of the second moment is multiplied by in the denominator, and what is added to it.
    """
    tasks, found = [], []
    for row, scale in zip(rows, scales, strict=True):
        sums = []
        for part in _slices(row, 1):
            sums.append(np.empty((2, 1)))
            tasks.append(_task(_kernels().adam_product, *part, _array(scale, _TYPES[row[0].dtype]), sums[-1]))
        found.append(sums)
    _run(tasks)
    return [torch.from_numpy(np.sum(sums, axis=0)[:, 0]) for sums in found]


class Shift(NamedTuple):
    """How a parameter and its momentum move along gradients; see `shift_`.

    Attributes:
        param: The parameter.
        grads: Gradients.
        shares: What each is multiplied by when it is added to the parameter.
        buffer: Momentum, if any.
        steps: What each is multiplied by when it is subtracted from momentum.
    """

    param: Tensor
    grads: Sequence[Tensor]
    shares: Sequence[float]
    buffer: Tensor | None = None
    steps: Sequence[float] = ()


def shift_(shifts: Sequence[Shift], momentum: float = 0.0, push: float = 1.0, decay: float = 1.0) -> list[int]:
    r"""Move parameters along gradients: :math:`w \leftarrow \text{decay} \cdot w + \sum_k c_k g_k`.

    With momentum, then :math:`v \leftarrow \mu v - \sum_k d_k g_k` and :math:`w \leftarrow w + \text{push} \cdot v`.

    Args:
        shifts: The parameters.
        momentum: :math:`\mu`.
        push: Of the momentum.
        decay: Of the parameter.

    Returns:
        The places of those that the kernels do not take, which have not moved.
    """
    written: list[Tensor] = []
    tasks, left = [], []
    for place, (p, grads, shares, buffer, steps) in enumerate(shifts):
        kept = [p, buffer] if buffer is not None and momentum else [p, p]
        if not grads or not fits(*kept, *grads):
            left.append(place)
            continue
        dtype = _TYPES[p.dtype]
        c, d = _array(tuple(shares), dtype), _array(tuple(steps or [0.0] * len(grads)), dtype)
        numbers = _array((momentum if buffer is not None else 0.0, push, decay), dtype)
        tasks += [
            _task(_kernels().shift, part[0], part[2:], c, part[1], d, numbers) for part in _slices((*kept, *grads), 1)
        ]
        written += kept
    _run(tasks)
    increment_version(written)
    return left


class Rule(NamedTuple):
    """How the kernels compute a direction; see `kernels.agree` and `kernels.advance`.

    Attributes:
        kind: `GRADIENT`, `NESTEROV` or `ADAM`.
        numbers: That it needs.
    """

    kind: int
    numbers: tuple[float, ...] = ()


def agree(
    rows: Sequence[tuple[Tensor, list[Tensor], Tensor | None]],
    num_units: Sequence[int],
    rules: Sequence[Rule],
    bounds: tuple[float, float, float],
) -> tuple[list[Tensor], Tensor]:
    """Return the products of gradients with the last direction, unit by unit; rates for each entry descend along them.

    Args:
        rows: Gradient, what the last direction is computed from, and rates, if any, which change; they fit.
        num_units: How many units each has; 1 where they are not told apart, and what is returned are parts of the sum.
        rules: How the last direction is computed.
        bounds: What products are multiplied by before they are added to rates, and the bounds of those.

    Returns:
        For each row ``(units,)`` or ``(parts,)``, float64; and ``(rows, 2)``: sums of products times old rates, and of
        new rates.
    """
    tasks, found, pairs = [], [], []
    for (grad, remembered, rates), n, rule in zip(rows, num_units, rules, strict=True):
        parts = list(_slices((grad, *remembered, *([] if rates is None else [rates])), n))
        sums, others = np.empty(n if n > 1 else len(parts)), np.empty((len(parts), 2))
        dtype, begin = _TYPES[grad.dtype], 0
        numbers, limits = _array(rule.numbers or (0.0,), dtype), _array(bounds, dtype)
        for part, pair in zip(parts, others, strict=True):
            end = begin + part[0].shape[0]
            some, r = (part[1:], _none(dtype)) if rates is None else (part[1:-1], part[-1])
            tasks.append(_task(_kernels().agree, part[0], some, rule.kind, numbers, r, limits, sums[begin:end], pair))
            begin = end
        found.append(torch.from_numpy(sums))
        pairs.append(others)
    _run(tasks)
    increment_version([rates for *_, rates in rows if rates is not None])
    if rows[0][2] is None:
        return found, torch.zeros(len(rows), 2, dtype=torch.float64)
    return found, torch.from_numpy(np.array([others.sum(axis=0) for others in pairs]))


def advance_(
    rows: Sequence[tuple[Tensor, Tensor, list[Tensor], Tensor | None]],
    num_units: Sequence[int],
    rules: Sequence[Rule],
    common: Sequence[Any],
    share: float,
    decay: float,
) -> None:
    """Take steps ``param -= (common + share * rates) * direction``.

    Args:
        rows: Parameter, gradient, what the direction is computed from, which takes in the gradient, and rates for each
            entry, if any; they fit.
        num_units: How many units each has; 1 where they are not told apart.
        rules: How the direction is computed.
        common: For each a number, or one for each unit.
        share: Of the rates.
        decay: Decoupled weight decay.
    """
    tasks = []
    for (param, grad, remembered, rates), n, rule, rate in zip(rows, num_units, rules, common, strict=True):
        dtype = _TYPES[param.dtype]
        each = np.broadcast_to(np.asarray(rate, dtype=dtype).reshape(-1), (n,))
        numbers, shares = _array(rule.numbers or (0.0,), dtype), _array((share, decay), dtype)
        begin = 0
        kept = remembered or [grad]
        for part in _slices((param, grad, *kept, *([] if rates is None else [rates])), n):
            end = begin + part[0].shape[0]
            own = np.ascontiguousarray(each[begin:end] if n > 1 else each)
            begin = end
            some, r = (part[2:], _none(dtype)) if rates is None else (part[2:-1], part[-1])
            tasks.append(_task(_kernels().advance, *part[:2], some, rule.kind, numbers, r, own, shares))
    _run(tasks)
    increment_version([x for param, _, remembered, _ in rows for x in (param, *remembered)])


_TYPES = {torch.float32: np.float32, torch.float64: np.float64}


@cache
def _kernels() -> Any:
    from lightning_grow.optim import kernels  # noqa: PLC0415 (Numba takes seconds to import)

    return kernels


@lru_cache(maxsize=64)
def _array(numbers: tuple[float, ...], dtype: type) -> NDArray[Any]:
    return np.array(numbers, dtype=dtype)


@cache
def _none(dtype: type) -> NDArray[Any]:
    return np.empty((0, 0), dtype=dtype)


def _task(kernel: Any, *arguments: Any) -> Task:
    return lambda: kernel(*arguments)


def _entries(x: Tensor) -> NDArray[Any]:
    """Return a tensor that fits as an array, in the order of memory."""
    x = x.detach() if x.requires_grad else x
    array: NDArray[Any] = (x if x.is_contiguous() else x.as_strided((x.numel(),), (1,))).numpy()
    return array


def _slices(tensors: Sequence[Tensor], num_units: int) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield matching slices of tensors as arrays, a row for each unit."""
    arrays = [_entries(x).reshape(num_units, -1) for x in tensors]
    size = arrays[0].shape[1]
    if arrays[0].size <= SLICE:
        yield tuple(arrays)
        return
    if num_units == 1:
        for begin in range(0, size, SLICE):
            yield tuple(a[:, begin : begin + SLICE] for a in arrays)
        return
    length = max(1, SLICE // max(1, size))
    for begin in range(0, num_units, length):
        yield tuple(a[begin : begin + length] for a in arrays)


def _run(tasks: Sequence[Task]) -> None:
    """Run tasks on as many cores as torch uses."""
    workers = min(torch.get_num_threads(), len(tasks))
    if workers <= 1:
        for task in tasks:
            task()
        return
    pool = _pool(workers)
    rest = [pool.submit(_all, tasks[number::workers]) for number in range(1, workers)]
    _all(tasks[::workers])
    for future in rest:
        future.result()


def _all(tasks: Sequence[Task]) -> None:
    for task in tasks:
        task()


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers - 1, thread_name_prefix="lightning_grow_fused")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in the child
