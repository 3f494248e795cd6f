"""What optimizers have in common that adapt ``group["lr"]`` themselves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grow.optim.base import AdaptiveOptimizer, at_least_zero, check_bounds, within


class RateOwner(AdaptiveOptimizer):
    """The abstract parent: bounds of the rate, no scheduler beside it, weight decay, gradients kept between steps.

    Args:
        params: Parameters, named parameters, or param groups.
        defaults: Options of a param group, with those of `AdaptiveOptimizer`, ``hypergrad_lr``, ``weight_decay``,
            ``decoupled_weight_decay``, ``lr_min`` and ``lr_max`` among them; ``copy_grad`` where gradients are kept.
    """

    @override
    def _check(self, group: dict[str, Any]) -> None:
        at_least_zero(group, "hypergrad_lr", "weight_decay", "eps")
        check_bounds(group)
        if not math.isfinite(float(group["lr"])) or not group["lr_min"] <= float(group["lr"]) <= group["lr_max"]:
            bounds = f"{group['lr_min']} to {group['lr_max']}"
            raise ValueError(f"Expected `lr` from `lr_min` to `lr_max`, {bounds}, found {group['lr']!r}.")
        for number, beta in enumerate(group.get("betas", ())):
            within({f"betas[{number}]": beta}, 0, 1, f"betas[{number}]")

    def _ready(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters of a group that have a gradient, and the gradients, with coupled weight decay.

        Raises:
            RuntimeError: If a learning-rate scheduler writes the rate, too, or a gradient is sparse.
        """
        if "initial_lr" in group:
            raise RuntimeError(
                f"A learning-rate scheduler writes the rate of {type(self).__name__}, which adapts it itself: take the "
                "scheduler away, or bound the rate by `lr_min` and `lr_max`."
            )
        params, grads = self._with_gradients(group)
        if params and _is_coupled(group):
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        return params, grads


def owns_gradients(group: dict[str, Any]) -> bool:
    """Whether the gradients that a step works on are tensors of its own: negated, or with weight decay."""
    return bool(group["maximize"]) or _is_coupled(group)


def _is_coupled(group: dict[str, Any]) -> bool:
    return bool(group["weight_decay"]) and not group["decoupled_weight_decay"]
