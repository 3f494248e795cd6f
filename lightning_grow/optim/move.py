"""Steps along the direction of a base optimizer, with a rate of its own for each layer, unit or parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grow.optim.agreement import Moving, in_pieces
from lightning_grow.optim.directions import Direction, FusedDirection, Gradient
from lightning_grow.optim.fused import advance_, fits
from lightning_grow.optim.ladder import PARAMETER, Ladder
from lightning_grow.optim.pieces import of_units
from lightning_grow.optim.tensors import Rate, can_fuse, subtract_


def move(ladder: Ladder, direction: Direction, moving: Sequence[Moving]) -> None:
    """Take the step."""
    group = ladder.group
    decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
    if group["fused"] and (ladder.has_parameters or (ladder.has_units and not isinstance(direction, Gradient))):
        moving = _move_with_kernels(ladder, direction, moving, decay)
    if group["foreach"] is not False and not ladder.has_parameters:
        if isinstance(direction, Gradient):
            _move_along_gradients(ladder, moving, decay)
            return
        if isinstance(direction, FusedDirection) and not ladder.has_units and not decay:
            moving = _move_fused(ladder, direction, moving)
    for m in moving:
        common, share, own = ladder.common(m.place), ladder.share_of_parameters, None
        tensors, num_units = [m.param, m.grad], ladder.num_units(m.place)
        for piece in in_pieces(ladder, m, tensors, direction.next_needs, num_units, has_scratch=direction.has_scratch):
            p, grad, *parts = piece.tensors
            u, rate = direction.next(grad, parts, m.state), of_units(common, piece)
            if ladder.has_parameters:
                own = ladder.draw_(parts[-1], m.place, piece)
            if decay:
                p.mul_(1 - decay * (rate if own is None else rate + share * own))
            if group["foreach"] is False:
                p.sub_((rate if own is None else rate + share * own) * u)
            else:
                _subtract_(p, u, rate, own, share)


def _move_along_gradients(ladder: Ladder, moving: Sequence[Moving], decay: float) -> None:
    """Take the step of gradient descent, with few calls."""
    if not moving:
        return
    params, grads = [m.param for m in moving], [m.grad for m in moving]
    if ladder.levels == ("global",) and not decay:
        subtract_(params, grads, ladder.common(moving[0].place))
        return
    rates = ladder.factors([m.place for m in moving])
    if decay:
        torch._foreach_mul_(params, [1 - decay * rate for rate in rates])
    torch._foreach_addcmul_(params, grads, rates, value=-1)


def _move_with_kernels(
    ladder: Ladder, direction: Direction, moving: Sequence[Moving], decay: float
) -> Sequence[Moving]:
    """Take the step of the tensors that the kernels take; return the others."""
    if ladder.draws:
        return moving
    those, left, rows = [], [], []
    for m in moving:
        remembered = [m.state[name] for name in direction.next_needs]
        rates = m.state[PARAMETER] if ladder.has_parameters else None
        if fits(m.param, m.grad, *remembered, *([] if rates is None else [rates])):
            those.append(m)
            rows.append((m.param, m.grad, remembered, rates))
        else:
            left.append(m)
    advance_(
        rows,
        [ladder.num_units(m.place) for m in those],
        [direction.rule(m.state) for m in those],
        [ladder.common(m.place) for m in those],
        float(ladder.share_of_parameters),
        decay,
    )
    return left


def _move_fused(ladder: Ladder, direction: FusedDirection, moving: Sequence[Moving]) -> list[Moving]:
    """Take the step of tensors that share a rate by one kernel of torch's; return those that it cannot take."""
    lists: dict[int, list[Moving]] = {}
    for m in moving:
        lists.setdefault(0 if ladder.levels == ("global",) else ladder.layers.layer_of[m.place], []).append(m)
    left = []
    for together in lists.values():
        params, grads = [m.param for m in together], [m.grad for m in together]
        remembered = [[m.state[name] for m in together] for name in direction.next_needs]
        if can_fuse(params, grads, *remembered):
            direction.fused_(params, grads, [m.state for m in together], ladder.common(together[0].place))
        else:
            left += together
    return left


def _subtract_(p: Tensor, u: Tensor, rate: Rate, own: Tensor | None, share: Rate) -> None:
    """Subtract ``(rate + share * own) * u``, on the CPU without a temporary."""
    if own is not None and isinstance(share, Tensor):
        rate = share.to(own.dtype) * own + rate
    elif own is not None:
        p.addcmul_(u, own.to(p.dtype), value=-float(share))
    if isinstance(rate, Tensor):
        p.addcmul_(u, rate if rate.dtype == p.dtype else rate.to(p.dtype), value=-1)
    elif rate:
        p.add_(u, alpha=-rate)
