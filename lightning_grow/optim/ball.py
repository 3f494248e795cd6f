r"""The ball :math:`\|w\| \le r` of a param group: how methods that need zero loss regularise.

When the network grows or shrinks, :math:`r \leftarrow r \|w_\text{new}\| / \|w_\text{old}\|`: a function-preserving
change stays one, and a ball that was not reached is as far away as before. Nobody has to tell: a change is seen by the
shapes of the parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_grow.optim.tensors import Rate, as_rate, squared_norm


def check_ball(group: dict[str, Any]) -> None:
    """Check ``max_norm``."""
    if group["max_norm"] is not None and not float(group["max_norm"]) > 0:
        raise ValueError(f"Expected `max_norm` above 0, or None, found {group['max_norm']!r}.")


def project_(group: dict[str, Any]) -> None:
    r"""Scale the parameters of a group down to the norm ``max_norm``, if theirs is larger; remember norm and shapes.

    Example:
        >>> w = torch.tensor([3.0, 4.0])
        >>> project_({"params": [w], "max_norm": 1.0})
        >>> w
        tensor([0.6000, 0.8000])
    """
    if group["max_norm"] is None or not group["params"]:
        return
    params, radius = list(group["params"]), float(group["max_norm"])
    norm: Rate = as_rate(squared_norm(params).sqrt(), params[0].device)
    if isinstance(norm, Tensor):  # no waiting for the device
        factor = (radius / norm).clamp(max=1)
        for p in params:
            p.mul_(factor.to(p.device, p.dtype))
        group["norm"] = norm.clamp(max=radius)
    else:
        if norm > radius:
            torch._foreach_mul_(params, radius / norm)
        group["norm"] = min(norm, radius)
    group["shapes"] = shapes_of(params)


def follow_growth(group: dict[str, Any]) -> None:
    """Give the ball of a group its new radius, if shapes have changed since the last projection.

    Example:
        >>> group = {"params": [torch.ones(1)], "max_norm": 3.0}
        >>> project_(group)
        >>> group["params"] = [torch.ones(4)]
        >>> follow_growth(group)
        >>> group["max_norm"]
        6.0
    """
    if group["max_norm"] is None or group.get("shapes") in (None, shapes_of(group["params"])):
        return
    before, now = float(group["norm"]), float(squared_norm(list(group["params"])).sqrt())
    if before > 0 and now > 0:
        group["max_norm"] = float(group["max_norm"]) * now / before
    group["shapes"] = shapes_of(group["params"])


def shapes_of(params: list[Tensor]) -> int:
    """Return a number that tells the shapes of parameters from others, the same in every process."""
    return hash(tuple(tuple(p.shape) for p in params))
