"""Loops over arrays that read each number from memory once, compiled by Numba. Imported by `fused` when it needs them.

Arrays are ``(rows, columns)`` of float32 or float64, contiguous, all of one type and shape. Sums are taken over blocks
in the type of the arrays, in an order that the compiler is free to choose, and over blocks in float64.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lightning_grow.optim.fused import GRADIENT, NESTEROV

Array = NDArray[np.floating]

BLOCK = 2**12
"""Entries that stay in the innermost cache while several loops pass over them."""

# Sums may be reordered, products and sums joined; NaN and infinity keep their meaning.
_compiled = njit(fastmath={"reassoc", "nsz", "contract"}, error_model="numpy", nogil=True, cache=True)


@_compiled
def products(newest: Array, others: tuple[Array, ...], sums: NDArray[np.float64]) -> None:
    """Write the products of each row of an array with those of others: ``sums[k, row]``."""
    for row in range(newest.shape[0]):
        for k in range(len(others)):
            sums[k, row] = 0.0
        for begin in range(0, newest.shape[1], BLOCK):
            end = min(begin + BLOCK, newest.shape[1])
            x = newest[row, begin:end]
            for k in range(len(others)):
                y = others[k][row, begin:end]
                part = x.dtype.type(0)
                for i in range(x.shape[0]):
                    part += x[i] * y[i]
                sums[k, row] += part


@_compiled
def adam_product(grad: Array, first: Array, second: Array, corrections: Array, sums: NDArray[np.float64]) -> None:
    """Write the product of gradients with Adam's direction: ``sums[0, 0]``; its squared length: ``sums[1, 0]``.

    The direction is ``first / (sqrt(second) * corrections[0] + corrections[1])``.
    """
    sums[:, 0] = 0.0
    scale, eps = corrections[0], corrections[1]
    for row in range(grad.shape[0]):
        for begin in range(0, grad.shape[1], BLOCK):
            end = min(begin + BLOCK, grad.shape[1])
            g, m, s = grad[row, begin:end], first[row, begin:end], second[row, begin:end]
            along, length = g.dtype.type(0), g.dtype.type(0)
            for i in range(g.shape[0]):
                u = m[i] / (np.sqrt(s[i]) * scale + eps)
                along += g[i] * u
                length += u * u
            sums[0, 0] += along
            sums[1, 0] += length


@_compiled
def shift(param: Array, grads: tuple[Array, ...], shares: Array, buffer: Array, steps: Array, numbers: Array) -> None:
    """Do ``param = decay * param + shares @ grads``; with momentum, the buffer follows, and is added.

    That is ``buffer = momentum * buffer - steps @ grads`` and ``param += push * buffer``. Numbers are momentum, push
    and decay. Without momentum, the buffer is not looked at.
    """
    momentum, push, decay = numbers[0], numbers[1], numbers[2]
    for row in range(param.shape[0]):
        for begin in range(0, param.shape[1], BLOCK):
            end = min(begin + BLOCK, param.shape[1])
            p = param[row, begin:end]
            if decay != 1:
                for i in range(p.shape[0]):
                    p[i] *= decay
            for k in range(len(grads)):
                g, share = grads[k][row, begin:end], shares[k]
                for i in range(p.shape[0]):
                    p[i] += share * g[i]
            if momentum != 0:
                v = buffer[row, begin:end]
                for i in range(p.shape[0]):
                    v[i] *= momentum
                for k in range(len(grads)):
                    g, step = grads[k][row, begin:end], steps[k]
                    for i in range(p.shape[0]):
                        v[i] -= step * g[i]
                for i in range(p.shape[0]):
                    p[i] += push * v[i]


@_compiled
def _within(x: float, low: float, high: float) -> float:
    """Return a number within bounds; `min` and `max` would not become vector instructions."""
    x = low if x < low else x  # noqa: FURB136
    return high if x > high else x  # noqa: FURB136


@_compiled
def agree(  # noqa: C901 (one pass, with a loop for each kind)
    grad: Array,
    remembered: tuple[Array, ...],
    kind: int,
    numbers: Array,
    rates: Array,
    bounds: Array,
    sums: NDArray[np.float64],
    others: NDArray[np.float64],
) -> None:
    """Sum up H, gradient times last direction; where there are rates for each entry, let them descend along it.

    The last direction is ``prev`` (`GRADIENT`), ``prev + numbers[0] * buffer`` (`NESTEROV`), or Adam's,
    ``first / (sqrt(second) * numbers[0] + numbers[1])``. Writes the sum of each row, ``sums[row]``. Rates, if
    they have rows, change by ``bounds[0]`` times H, between ``bounds[1]`` and ``bounds[2]``; ``others`` are the sums of
    H times old rates, and of new rates.
    """
    has_rates = rates.shape[0] > 0
    factor, low, high = bounds[0], bounds[1], bounds[2]
    others[:] = 0.0
    h = np.empty(BLOCK, dtype=grad.dtype)
    for row in range(grad.shape[0]):
        sums[row] = 0.0
        for begin in range(0, grad.shape[1], BLOCK):
            end = min(begin + BLOCK, grad.shape[1])
            g, a = grad[row, begin:end], remembered[0][row, begin:end]
            b = remembered[len(remembered) - 1][row, begin:end]
            zero = g.dtype.type(0)
            along, weighted, total = zero, zero, zero
            if not has_rates:  # then nothing has to be written down
                if kind == GRADIENT:
                    for i in range(g.shape[0]):
                        along += g[i] * a[i]
                elif kind == NESTEROV:
                    for i in range(g.shape[0]):
                        along += g[i] * (a[i] + numbers[0] * b[i])
                else:
                    for i in range(g.shape[0]):
                        along += g[i] * a[i] / (np.sqrt(b[i]) * numbers[0] + numbers[1])
                sums[row] += along
                continue
            r = rates[row, begin:end]
            if kind == GRADIENT:
                for i in range(g.shape[0]):
                    x = g[i] * a[i]
                    along += x
                    weighted += x * r[i]
                    r[i] = _within(r[i] + factor * x, low, high)
                    total += r[i]
            else:
                if kind == NESTEROV:
                    for i in range(g.shape[0]):
                        h[i] = g[i] * (a[i] + numbers[0] * b[i])
                else:
                    for i in range(g.shape[0]):
                        h[i] = g[i] * a[i] / (np.sqrt(b[i]) * numbers[0] + numbers[1])
                for i in range(g.shape[0]):
                    along += h[i]
                    weighted += h[i] * r[i]
                    r[i] = _within(r[i] + factor * h[i], low, high)
                    total += r[i]
            sums[row] += along
            others[0] += weighted
            others[1] += total


@_compiled
def advance(
    param: Array,
    grad: Array,
    remembered: tuple[Array, ...],
    kind: int,
    numbers: Array,
    rates: Array,
    common: Array,
    shares: Array,
) -> None:
    """Let what is remembered take in the gradient, and go along the direction with ``common[row] + share * rates``.

    The direction is ``grad`` (`GRADIENT`); ``grad + momentum * buffer`` with ``buffer = momentum * buffer + grad``
    (`NESTEROV`; ``numbers[0]`` is the momentum); or Adam's, as in `agree`, after the moments have moved with
    ``numbers[2]`` and ``numbers[3]``. Rates may be without rows. ``shares``: of the rates, and the weight decay.
    """
    has_rates = rates.shape[0] > 0
    share, decay = shares[0], shares[1]
    along = np.empty(BLOCK, dtype=grad.dtype)
    for row in range(grad.shape[0]):
        for begin in range(0, grad.shape[1], BLOCK):
            end = min(begin + BLOCK, grad.shape[1])
            p, g = param[row, begin:end], grad[row, begin:end]
            u = along[: g.shape[0]]
            if kind == GRADIENT:
                u = g
            elif kind == NESTEROV:
                v, momentum = remembered[0][row, begin:end], numbers[0]
                for i in range(g.shape[0]):
                    v[i] = momentum * v[i] + g[i]
                    u[i] = g[i] + momentum * v[i]
            else:
                m, s = remembered[0][row, begin:end], remembered[len(remembered) - 1][row, begin:end]
                for i in range(g.shape[0]):
                    m[i] += (1 - numbers[2]) * (g[i] - m[i])
                    s[i] = numbers[3] * s[i] + (1 - numbers[3]) * g[i] * g[i]
                    u[i] = m[i] / (np.sqrt(s[i]) * numbers[0] + numbers[1])
            own = common[row]
            if has_rates:
                r = rates[row, begin:end]
                if decay != 0:
                    for i in range(g.shape[0]):
                        p[i] *= 1 - decay * (own + share * r[i])
                for i in range(g.shape[0]):
                    p[i] -= (own + share * r[i]) * u[i]
            else:
                if decay != 0:
                    for i in range(g.shape[0]):
                        p[i] *= 1 - decay * own
                for i in range(g.shape[0]):
                    p[i] -= own * u[i]
