"""What a view of a fake tensor looks like: shape and strides, with few questions to the symbolic-shape engine.

The engine's own way asks it about each dimension many times over, which takes most of a trace of attention. Here the
present sizes tell which runs of old and new dimensions hold the same entries, and one equation is noted for each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Viewed(NamedTuple):
    """Shape and strides of a view."""

    shape: list[Any]
    stride: list[Any]


class _Run(NamedTuple):
    """Old and new dimensions that hold the same entries."""

    old: range
    new: range


def viewed(shape: Sequence[Any], stride: Sequence[Any], new: Sequence[Any], now: Callable[[Any], int]) -> Viewed | None:
    """Return shape and strides of a view, or None if the sizes do not say which dimensions go together.

    Sizes that must be equal are compared, so that the engine writes it down.

    Args:
        shape: Sizes of the tensor.
        stride: Its strides.
        new: Sizes that are asked for; one may be -1.
        now: Returns the number that a size is at present.

    Example:
        >>> viewed([2, 12, 5], [60, 5, 1], [2, -1, 4, 5], int)
        Viewed(shape=[2, 3, 4, 5], stride=[60, 20, 5, 1])
    """
    old_now, new_now = [now(size) for size in shape], [now(size) for size in new]
    total, others = math.prod(old_now), math.prod(size for size in new_now if size != -1)
    if total == 0 or others <= 0 or total % others or new_now.count(-1) > 1:
        return None
    left = new_now.index(-1) if -1 in new_now else None
    new_now = [total // others if size == -1 else size for size in new_now]
    runs = _runs(old_now, new_now)
    if runs is None:
        return None
    sizes, strides = list(new), []
    for run in runs:
        entries = math.prod(shape[dim] for dim in run.old)
        if left is not None and left in run.new:
            known = math.prod(new[dim] for dim in run.new if dim != left)
            sizes[left] = entries // known if now(known) > 1 else entries
        same = entries == math.prod(sizes[dim] for dim in run.new)  # written down
        if not same:
            return None
        inner = [stride[dim] for dim in run.old if old_now[dim] > 1]
        widths = [sizes[dim] for dim in reversed(run.new)][:-1]
        steps = list(itertools.accumulate(widths, lambda step, size: step * size, initial=inner[-1] if inner else 1))
        strides += reversed(steps[: len(run.new)])
    return Viewed(sizes, strides)


def _runs(old: Sequence[int], new: Sequence[int]) -> list[_Run] | None:
    """Return the shortest runs of dimensions with as many entries on both sides, in order; sizes of 1 go along.

    Example:
        >>> _runs([2, 12, 1], [2, 3, 4])
        [_Run(old=range(0, 1), new=range(0, 1)), _Run(old=range(1, 3), new=range(1, 3))]
    """
    runs: list[_Run] = []
    i = k = 0
    while i < len(old) and k < len(new):
        start, first, a, b = i, k, old[i], new[k]
        i, k = i + 1, k + 1
        while a != b:
            if a < b and i < len(old):
                a, i = a * old[i], i + 1
            elif b < a and k < len(new):
                b, k = b * new[k], k + 1
            else:
                return None
        runs.append(_Run(range(start, i), range(first, k)))
    if any(size != 1 for size in (*old[i:], *new[k:])):
        return None
    if not runs:
        return [_Run(range(len(old)), range(len(new)))]
    runs[-1] = _Run(range(runs[-1].old.start, len(old)), range(runs[-1].new.start, len(new)))
    return runs
