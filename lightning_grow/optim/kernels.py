"""Loops over arrays that read each number from memory once, compiled by Numba. Imported by `fused` when it needs them.

Arrays are ``(rows, columns)`` of float32 or float64, contiguous, all of one type and shape. Sums are taken over blocks
in the type of the arrays, in an order that the compiler is free to choose, and over blocks in float64.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.floating]

BLOCK = 2**12
"""Entries that stay in the innermost cache while several loops pass over them."""

# Sums may be reordered, products and sums joined; NaN and infinity keep their meaning.
_compiled = njit(fastmath={"reassoc", "nsz", "contract"}, nogil=True, cache=True)


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
def descend(
    grad: Array, last: Array, rates: Array, numbers: Array, sums: NDArray[np.float64], others: NDArray[np.float64]
) -> None:
    """Let a rate for each entry descend along ``grad * last``, within bounds.

    Writes the sums of the products in each row, ``sums[row]``, and the sums of products times old rates and of new
    rates, ``others[0]`` and ``others[1]``. ``numbers`` are the factor of the products and the bounds.
    """
    factor, low, high = numbers[0], numbers[1], numbers[2]
    others[:] = 0.0
    for row in range(grad.shape[0]):
        sums[row] = 0.0
        for begin in range(0, grad.shape[1], BLOCK):
            end = min(begin + BLOCK, grad.shape[1])
            g, u, r = grad[row, begin:end], last[row, begin:end], rates[row, begin:end]
            zero = g.dtype.type(0)
            along, weighted, total = zero, zero, zero
            for i in range(g.shape[0]):
                h = g[i] * u[i]
                along += h
                weighted += h * r[i]
                new = r[i] + factor * h
                new = max(new, low)
                r[i] = min(new, high)
            for i in range(g.shape[0]):
                total += r[i]
            sums[row] += along
            others[0] += weighted
            others[1] += total


@_compiled
def step(param: Array, direction: Array, rates: Array, common: Array, share: Array) -> None:
    """Do ``param -= (common[row] + share[0] * rates) * direction``."""
    for row in range(param.shape[0]):
        p, u, r = param[row], direction[row], rates[row]
        rate, part = common[row], share[0]
        for i in range(p.shape[0]):
            p[i] -= (rate + part * r[i]) * u[i]
