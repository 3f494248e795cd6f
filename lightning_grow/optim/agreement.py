"""How far the gradient of each parameter agrees with its last direction: the sums that rates on several levels need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_grow.optim.directions import Direction
from lightning_grow.optim.fused import agree, fits
from lightning_grow.optim.ladder import PARAMETER, Ladder
from lightning_grow.optim.pieces import CHUNK, Piece, pieces, unit_products, unit_sums
from lightning_grow.optim.tensors import SMALL, flattened, product, wide_dtype


class Moving(NamedTuple):
    """A tensor that takes part in a step.

    Attributes:
        place: Its number in the param group.
        param: The tensor.
        grad: Its gradient.
        state: Its state.
    """

    place: int
    param: Tensor
    grad: Tensor
    state: dict[str, Any]


class Agreement:
    """Sums of H = g u, with u the direction of the last step; rates of parameters descend while they are taken.

    On the CPU, small tensors are worked on together, and large ones in pieces, or by the kernels of `fused`.

    Args:
        ladder: The rates.
        direction: How the base goes.
        moving: The tensors of which the last direction is known.

    Attributes:
        sums: A number for each unit if units have rates, else for each layer; float64 where the device has it.
        weighted: Rates of parameters times H, in parts of the sum.
    """

    def __init__(self, ladder: Ladder, direction: Direction, moving: Sequence[Moving]) -> None:
        self._ladder, self._direction = ladder, direction
        self._dtype = wide_dtype(ladder.device)
        self.weighted: list[Tensor] = []
        self.sums = torch.zeros(ladder.num_sums, dtype=self._dtype, device=ladder.device)
        if ladder.in_pieces:
            moving, small = _parted(moving)
            if small:
                self._of_small(small)
        if ladder.group["fused"]:
            moving = self._by_kernels(moving)
        if moving:
            found = {m.place: self._of_tensor(m) for m in moving}
            self.sums += ladder.sums_of_tensors(found)

    def _of_small(self, small: Sequence[Moving]) -> None:
        """Take small tensors together, with few calls for all of them."""
        ladder = self._ladder
        remembered = [flattened([m.state[name] for m in small]) for name in self._direction.last_needs]
        products = _wide(flattened([m.grad for m in small])) * _wide(self._direction.last(remembered, small[0].state))
        if ladder.has_parameters:
            rates = [m.state[PARAMETER] for m in small]
            if ladder.learns_weights:
                self.weighted.append(product(flattened(rates).to(products), products).to(self._dtype))
            parts = torch.split(products, [r.numel() for r in rates])
            for m, r, h in zip(small, rates, parts, strict=True):
                ladder.descend_parameters_(m.place, r, h.view(r.shape))
        self._add([m.place for m in small], [m.param.numel() for m in small], products)

    def _by_kernels(self, moving: Sequence[Moving]) -> Sequence[Moving]:
        """Take the tensors that the kernels take; return the others."""
        ladder = self._ladder
        if ladder.has_parameters and ladder.group["max_change"] is not None:
            return moving
        those, left, rows = [], [], []
        for m in moving:
            remembered = [m.state[name] for name in self._direction.last_needs]
            rates = m.state[PARAMETER] if ladder.has_parameters else None
            if fits(m.grad, *remembered, *([] if rates is None else [rates])):
                those.append(m)
                rows.append((m.grad, remembered, rates))
            else:
                left.append(m)
        if not those:
            return moving
        places = [m.place for m in those]
        sums, others = agree(
            rows,
            [ladder.num_units(place) for place in places],
            [self._direction.rule(m.state) for m in those],
            (ladder.factor_of_parameters, ladder.group["lr_min"], ladder.group["lr_max"]),
        )
        if ladder.has_parameters:
            self.weighted.append(others[:, 0].sum())
            for place, total in zip(places, others[:, 1], strict=True):
                ladder.note_rates(place, total)
        self._add(places, [len(s) for s in sums], torch.cat(sums))
        return left

    def _of_tensor(self, m: Moving) -> Tensor:
        """Return the sum of one tensor, or one for each of its units."""
        ladder, direction = self._ladder, self._direction
        num_units = ladder.num_units(m.place)
        found: list[Tensor] = []
        scratch = direction.has_scratch or num_units > 1
        for piece in in_pieces(ladder, m, [m.grad], direction.last_needs, num_units, has_scratch=scratch):
            grad, *parts = piece.tensors
            u, grad = _wide(direction.last(parts, m.state)), _wide(grad)
            if not ladder.has_parameters:
                found.append(unit_products(grad, u, num_units))
                continue
            products, rates = grad * u, parts[-1]
            found.append(unit_sums(products, num_units))
            if ladder.learns_weights:
                self.weighted.append(unit_products(rates, products, 1).to(ladder.device, self._dtype))
            ladder.descend_parameters_(m.place, rates, products)
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if num_units > 1 else torch.stack(found).sum()

    def _add(self, places: Sequence[int], lengths: Sequence[int], values: Tensor) -> None:
        """Add numbers, of which each tensor has so many, for the entries or rows of its units one after the other."""
        where = self._ladder.places_of_sums(tuple(places), tuple(lengths))
        self.sums.index_add_(0, where, values.to(self._dtype))


def _parted(moving: Sequence[Moving]) -> tuple[list[Moving], list[Moving]]:
    """Return large tensors, and small ones that can be worked on as one: of one device, and as old as each other."""
    large: list[Moving] = []
    small: list[Moving] = []
    for m in moving:
        (small if m.param.numel() < SMALL else large).append(m)
    if len({m.state.get("step") for m in small}) > 1 or len({m.param.device for m in small}) > 1:
        return list(moving), []
    return large, small


def in_pieces(
    ladder: Ladder, m: Moving, tensors: list[Tensor], names: Sequence[str], num_units: int, *, has_scratch: bool
) -> list[Piece]:
    """Return tensors, state, and rates of parameters if there are any, in pieces where that keeps them in the cache."""
    tensors = [*tensors, *(m.state[name] for name in names)]
    if ladder.has_parameters:
        tensors.append(m.state[PARAMETER])
    is_worth_it = ladder.in_pieces and (has_scratch or ladder.has_parameters)
    return pieces(tensors, num_units, CHUNK if is_worth_it else None)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
