r"""The quadratic programme of a bundle step, solved exactly.

Pieces :math:`b_i + \langle g_i, w - w_0 \rangle` and a proximal term give the primal problem
:math:`\min_w \|w - w_0\|^2 / (2 \eta) + \max_i (b_i + \langle g_i, w - w_0 \rangle)`. With the Gram matrix
:math:`Q_{ij} = \eta \langle g_i, g_j \rangle`, its dual over the simplex is
:math:`\max_a b^\top a - a^\top Q a / 2`, and the step is :math:`-\eta \sum_i a_i g_i`.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor


def bundle_weights(gram: Tensor, heights: Tensor) -> Tensor:
    r"""Return the weights of the pieces: the maximiser of :math:`b^\top a - a^\top Q a / 2` over the simplex.

    With two or three pieces, one of which is constant (a zero row of ``Q``), in closed form; else by trying all sets of
    pieces that may have a weight.

    Args:
        gram: Q, symmetric and positive semidefinite, float64 ``(pieces, pieces)`` on the CPU.
        heights: b, float64 ``(pieces,)``.

    Returns:
        At least 0, adding up to 1, ``(pieces,)``.

    Example:
        >>> bundle_weights(torch.tensor([[0.0, 0.0], [0.0, 4.0]]).double(), torch.tensor([0.0, 2.0]).double())
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    pieces = len(heights)
    if 2 <= pieces <= 3 and not bool(gram[0].any()):
        return _closed_form(gram.tolist(), heights.tolist())
    return enumerated_weights(gram, heights)


def enumerated_weights(gram: Tensor, heights: Tensor) -> Tensor:
    """Return the same for any number of pieces: for each set of pieces, the best weights on it; then the best set.

    The best weights on a set solve a bordered linear system, if they come out non-negative. All systems have one size
    and are solved together: pieces outside of a set get rows of the identity.

    Args:
        gram: As in `bundle_weights`.
        heights: As in `bundle_weights`.

    Example:
        >>> enumerated_weights(torch.eye(2).double(), torch.zeros(2).double())
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    pieces = len(heights)
    scale = float(gram.diagonal().max())
    if scale == 0:
        return torch.eye(pieces, dtype=gram.dtype)[int(heights.argmax())]
    heights = heights - heights.max()  # the same maximiser; large common heights would cost digits
    q, b = gram / scale, heights / scale
    sets = _sets(pieces)
    systems = torch.zeros(len(sets), pieces + 1, pieces + 1, dtype=gram.dtype)
    systems[:, :pieces, :pieces] = sets[:, :, None] * q * sets[:, None, :] + torch.diag_embed(1 - sets)
    systems[:, :pieces, pieces] = systems[:, pieces, :pieces] = sets
    right = torch.cat([sets * b, torch.ones(len(sets), 1, dtype=gram.dtype)], dim=1)
    ridged = systems.clone()
    ridged[:, :pieces, :pieces] += _RIDGE * torch.diag_embed(sets)
    # Where gradients are linearly dependent, the exact system is singular, and the ridge chooses among its solutions.
    solved = torch.linalg.solve_ex(torch.cat([systems, ridged]), torch.cat([right, right])).result[:, :pieces]
    solved = solved[(solved.isfinite() & (solved >= 0)).all(dim=1)]
    solved = solved / solved.sum(dim=1, keepdim=True)
    values = solved @ b - ((solved @ q) * solved).sum(dim=1) / 2
    best: Tensor = solved[int(values.argmax())]
    return best


_RIDGE = 1e-12


@functools.cache
def _sets(pieces: int) -> Tensor:
    """Return all non-empty sets of pieces as rows of zeros and ones."""
    rows = [row for row in itertools.product((0.0, 1.0), repeat=pieces) if any(row)]
    return torch.tensor(rows, dtype=torch.float64)


def _closed_form(gram: list[list[float]], heights: list[float]) -> Tensor:
    """Return the weights for a constant piece and one or two others."""
    if len(heights) == 2:
        rise, curvature = heights[1] - heights[0], gram[1][1]
        one = 0.0 if rise <= 0 else 1.0 if curvature <= rise else rise / curvature
        return torch.tensor([1 - one, one], dtype=torch.float64)
    (b1, b2), (q11, q12, q22) = (h - heights[0] for h in heights[1:]), (gram[1][1], gram[1][2], gram[2][2])
    candidates = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    candidates += [(b1 / q11, 0.0)] if q11 > 0 else []
    candidates += [(0.0, b2 / q22)] if q22 > 0 else []
    if (between := q11 - 2 * q12 + q22) > 0:
        s = (b1 - b2 + q22 - q12) / between
        candidates.append((s, 1 - s))
    if (determinant := q11 * q22 - q12 * q12) > 0:
        candidates.append(((b1 * q22 - b2 * q12) / determinant, (b2 * q11 - b1 * q12) / determinant))

    def value(a: tuple[float, float]) -> float:
        return b1 * a[0] + b2 * a[1] - (q11 * a[0] ** 2 + 2 * q12 * a[0] * a[1] + q22 * a[1] ** 2) / 2

    first, second = max((a for a in candidates if min(a) >= 0 and sum(a) <= 1), key=value)
    return torch.tensor([max(1 - first - second, 0.0), first, second], dtype=torch.float64)
