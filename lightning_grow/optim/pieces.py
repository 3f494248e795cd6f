"""Tensors of one shape, looked at together in pieces that fit into the cache, and sums over them unit by unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_grow.optim.tensors import Rate, product

CHUNK = 2**17
"""Entries of a piece: what is computed from them stays in the cache of a CPU, and a call costs little beside it."""


class Piece(NamedTuple):
    """Matching pieces of several tensors.

    Attributes:
        units: Which units the piece has.
        tensors: The pieces.
    """

    units: slice
    tensors: tuple[Tensor, ...]


def pieces(tensors: Sequence[Tensor], num_units: int, chunk: int | None) -> list[Piece]:
    """Return tensors of one shape in pieces.

    Args:
        tensors: The tensors. Where one is not contiguous, they come whole.
        num_units: Number of entries along dim 0 that are told apart; 1 where they are not.
        chunk: Entries of a piece, about; None for the whole.

    Example:
        >>> [piece.tensors[0].shape for piece in pieces([torch.zeros(5, 2, 2)], num_units=5, chunk=8)]
        [torch.Size([2, 4]), torch.Size([2, 4]), torch.Size([1, 4])]
    """
    size = tensors[0].numel()
    if chunk is None or size <= chunk or not all(x.is_contiguous() for x in tensors):
        return [Piece(slice(0, num_units), tuple(tensors))]
    if num_units == 1:
        parts = zip(*(torch.split(x.view(-1), chunk) for x in tensors), strict=True)
        return [Piece(slice(0, 1), part) for part in parts]
    length = max(1, chunk // (size // num_units))
    parts = zip(*(torch.split(x.view(num_units, -1), length) for x in tensors), strict=True)
    return [Piece(slice(number * length, (number + 1) * length), part) for number, part in enumerate(parts)]


def of_units(rates: Rate, piece: Piece) -> Rate:
    """Return rates so that they can be multiplied with the tensors of a piece: a number, or one for each row."""
    if not isinstance(rates, Tensor) or rates.ndim == 0:
        return rates
    x = piece.tensors[0]
    num_units = rates.shape[0]
    if num_units == 1:
        return rates.view(())
    if num_units != x.shape[0]:
        rates = rates[piece.units]
    return rates if x.ndim == 1 else rates.view(-1, *(1,) * (x.ndim - 1))


def unit_sums(products: Tensor, num_units: int) -> Tensor:
    """Return the sums over the entries of each unit of a piece, ``(units,)``; with one unit a number."""
    if num_units == 1:
        return products.sum()
    return products if products.ndim == 1 else products.flatten(1).sum(dim=1)


def unit_products(x: Tensor, y: Tensor, num_units: int) -> Tensor:
    """Return the same of a product; with one unit, it is not written down where torch can do without."""
    return unit_sums(x * y, num_units) if num_units > 1 else product(x, y)
