"""What all optimizers here have in common: the grammar of ``torch.optim``, and early refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grow.optim.fused import check_fused
from lightning_grow.optim.kept import KeptGradients

Closure = Callable[[], Any]


class AdaptiveOptimizer(Optimizer):
    """The abstract parent: checks what is common, runs the closure, and collects what has a gradient.

    Args:
        params: Parameters, named parameters, or param groups.
        defaults: Options of a param group, with ``lr``, ``maximize`` and ``foreach`` among them.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        for option in ("differentiable", "capturable"):
            if defaults.pop(option, False):
                raise ValueError(f"{type(self).__name__} does not support `{option}=True`. {_WHY[option]}")
        super().__init__(params, defaults)

    @cached_property
    def _kept(self) -> KeptGradients:
        """Which gradients are kept by reference: of this process, in no state and no pickle."""
        return KeptGradients()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; its options are checked like those of the constructor.

        Raises:
            ValueError: If an option is out of range, or a parameter is complex.
            ModuleNotFoundError: If ``fused`` is True, and Numba is not there.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
            self._check_real(group)
            check_fused(group)
        except (ValueError, ModuleNotFoundError):
            del self.param_groups[-1]
            raise

    def _check_real(self, group: dict[str, Any]) -> None:
        if any(p.is_complex() for p in group["params"]):
            raise ValueError(f"{type(self).__name__} does not support complex parameters.")

    def _check(self, group: dict[str, Any]) -> None:
        """Check the options of a param group: raise a ValueError that names option, range and what was found."""
        at_least_zero(group, "lr", "weight_decay")

    def _run(self, closure: Closure | None) -> Tensor | float | None:
        """Return the loss that a closure computes, or None without one."""
        if closure is None:
            return None
        with torch.enable_grad():
            loss: Tensor | float | None = closure()
        return loss

    def _with_gradients(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters of a group that have a gradient, and the gradients; negative ones to maximize.

        Raises:
            RuntimeError: If a gradient is sparse.
        """
        params = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        if any(g.is_sparse for g in grads):
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients. Set `sparse=False` in the embedding."
            )
        return params, list(torch._foreach_neg(grads)) if group.get("maximize") and grads else grads


_WHY = {
    "differentiable": "Its step is not part of an autograd graph.",
    "capturable": "Its step size is read or branched on outside of a CUDA graph.",
}


def at_least_zero(group: dict[str, Any], *names: str) -> None:
    """Check that options are numbers of at least 0."""
    for name in names:
        if name in group and not float(group[name]) >= 0:
            raise ValueError(f"Expected `{name}` of at least 0, found {group[name]!r}.")


def within(group: dict[str, Any], low: float, high: float, *names: str) -> None:
    """Check that options are numbers in ``[low, high)``."""
    for name in names:
        if not low <= float(group[name]) < high:
            raise ValueError(f"Expected `{name}` in [{low:g}, {high:g}), found {group[name]!r}.")


def check_bounds(group: dict[str, Any]) -> None:
    """Check ``lr_min`` and ``lr_max``."""
    if not 0 <= abs(float(group["lr_min"])) < math.inf or not group["lr_min"] <= group["lr_max"]:
        raise ValueError(
            f"Expected a finite `lr_min` of at most `lr_max`, found {group['lr_min']!r} and {group['lr_max']!r}."
        )
