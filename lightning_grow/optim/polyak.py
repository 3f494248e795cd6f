r"""Polyak's step: as far along the negative gradient as the loss is above its lowest value, over the squared slope."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_grow.optim.fused import Shift, shift_
from lightning_grow.optim.pieces import CHUNK, pieces
from lightning_grow.optim.tensors import SMALL, subtract_


def polyak_rate(excess: float, square: float, eps: float, cap: float) -> float:
    r"""Return :math:`\mathrm{clip}(\text{excess} / (\|g\|^2 + \epsilon), 0, \eta)`; 0 where the gradient is zero.

    Args:
        excess: Loss above its lower bound.
        square: Squared norm of the gradient of the loss, over all parameters.
        eps: Added to it, at least 0.
        cap: The maximal rate, may be infinite.

    Example:
        >>> polyak_rate(1.0, 4.0, 0.0, 1.0)
        0.25
    """
    denominator = square + eps
    return min(max(excess / denominator, 0.0), cap) if denominator > 0 else 0.0


def polyak_move_(
    group: dict[str, Any], state: Any, params: Sequence[Tensor], grads: Sequence[Tensor], rate: float
) -> None:
    r"""Take a step of length ``rate`` along negative gradients, with decoupled decay and momentum in Nesterov's form.

    With :math:`\gamma` the rate: :math:`w \leftarrow (1 - \gamma \lambda) w`, then
    :math:`v \leftarrow \mu v - \gamma g` and :math:`w \leftarrow w - \gamma g + \mu v`; adjusted momentum is
    :math:`v \leftarrow \mu v - g` and :math:`w \leftarrow w - \gamma g + \mu \gamma v`.

    Args:
        group: Options ``momentum``, ``weight_decay``, ``foreach``, ``fused`` and perhaps ``adjusted_momentum``.
        state: The state of the optimizer; ``state[p]["momentum_buffer"]`` is v.
        params: What moves.
        grads: As many.
        rate: At least 0, finite.
    """
    if not params:
        return
    momentum, adjusted = group["momentum"], group.get("adjusted_momentum", False)
    buffers = momentum_buffers(state, params) if momentum else []
    if group["foreach"] is False:
        _plain_move_(group, params, grads, buffers, rate)
        return
    if group["fused"] and (momentum or group["weight_decay"]):
        velocities: Sequence[Tensor | None] = buffers or [None] * len(params)
        steps = [1.0 if adjusted else rate]
        left = shift_(
            [Shift(p, [g], [-rate], v, steps) for p, g, v in zip(params, grads, velocities, strict=True)],
            momentum,
            push=momentum * (rate if adjusted else 1.0),
            decay=1 - rate * group["weight_decay"],
        )
        params, grads = [params[i] for i in left], [grads[i] for i in left]
        buffers = [buffers[i] for i in left] if momentum else []
    if momentum:
        rest = []
        for tensors in zip(params, grads, buffers, strict=True):
            if tensors[0].numel() >= SMALL and tensors[0].device.type == "cpu":
                _move_in_blocks(*tensors, rate, momentum, group["weight_decay"], adjusted=adjusted)
            else:
                rest.append(tensors)
        if not rest:
            return
        params, grads, buffers = (list(column) for column in zip(*rest, strict=True))
    if group["weight_decay"] and rate:
        torch._foreach_mul_(list(params), 1 - rate * group["weight_decay"])
    if rate:
        subtract_(params, grads, rate)
    if momentum:
        torch._foreach_mul_(buffers, momentum)
        if adjusted or rate:
            subtract_(buffers, grads, 1.0 if adjusted else rate)
        subtract_(params, buffers, -momentum * (rate if adjusted else 1.0))


def _move_in_blocks(
    p: Tensor, grad: Tensor, buffer: Tensor, rate: float, momentum: float, decay: float, *, adjusted: bool
) -> None:
    """Do the same for one parameter, block by block: each number is read once from memory."""
    for piece in pieces((p, grad, buffer), 1, CHUNK):
        w, g, v = piece.tensors
        if decay:
            w.mul_(1 - rate * decay)
        w.add_(g, alpha=-rate)
        v.mul_(momentum).add_(g, alpha=-1.0 if adjusted else -rate)
        w.add_(v, alpha=momentum * (rate if adjusted else 1.0))


def _plain_move_(
    group: dict[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], rate: float
) -> None:
    """Do the same tensor by tensor, as the formulas say it."""
    momentum, decay = group["momentum"], group["weight_decay"]
    for i, (w, g) in enumerate(zip(params, grads, strict=True)):
        w.mul_(1 - rate * decay)
        w.sub_(rate * g)
        if momentum and group.get("adjusted_momentum", False):
            v = buffers[i]
            v.copy_(momentum * v - g)
            w.add_(momentum * rate * v)
        elif momentum:
            v = buffers[i]
            v.copy_(momentum * v - rate * g)
            w.add_(momentum * v)


def momentum_buffers(state: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """Return the buffer of each parameter; zeros at first."""
    for p in params:
        if "momentum_buffer" not in state[p]:
            state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return [state[p]["momentum_buffer"] for p in params]
