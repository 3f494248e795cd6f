"""The directions of base optimizers: that of the last step, from what is remembered of it, and the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grow.optim.fused import ADAM, GRADIENT, NESTEROV, Rule
from lightning_grow.optim.kept import KEY
from lightning_grow.optim.tensors import Rate

States = Sequence[Mapping[str, Any]]


class Direction(ABC):
    """How a base optimizer goes, piece by piece.

    Attributes:
        last_needs: Names of the state that the last direction is computed from.
        next_needs: Names of the state that the next direction is computed from.
        has_scratch: Whether directions are tensors of their own.
    """

    last_needs: ClassVar[tuple[str, ...]]
    next_needs: ClassVar[tuple[str, ...]]
    has_scratch: ClassVar[bool] = True

    def begin(self, param: Tensor, state: MutableMapping[str, Any]) -> None:
        """Fill in what is not there yet, and count the step."""
        for name in self.next_needs:
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)

    @abstractmethod
    def rule(self, state: Mapping[str, Any]) -> Rule:
        """Return how the kernels of `fused` compute the direction, of the last step or of one that has begun."""

    @abstractmethod
    def last(self, remembered: Sequence[Tensor], state: Mapping[str, Any]) -> Tensor:
        """Return the direction of the last step, from pieces of what `last_needs` names."""

    @abstractmethod
    def next(self, grad: Tensor, remembered: Sequence[Tensor], state: Mapping[str, Any]) -> Tensor:
        """Return the direction of the next step; pieces of what `next_needs` names take in the gradient."""


class FusedDirection(Direction):
    """A direction for which torch has a kernel that takes the whole step of a list of tensors with one rate."""

    @abstractmethod
    def fused_(self, params: list[Tensor], grads: list[Tensor], states: States, rate: Rate) -> None:
        """Take the step of tensors, with what `next_needs` names, that `can_fuse` has found fit."""


class Gradient(Direction):
    """Gradient descent: the gradient."""

    last_needs = (KEY,)
    next_needs = ()
    has_scratch = False

    @override
    def rule(self, state: Mapping[str, Any]) -> Rule:
        return Rule(GRADIENT)

    @override
    def last(self, remembered: Sequence[Tensor], state: Mapping[str, Any]) -> Tensor:
        return remembered[0]

    @override
    def next(self, grad: Tensor, remembered: Sequence[Tensor], state: Mapping[str, Any]) -> Tensor:
        return grad


class Nesterov(FusedDirection):
    """Gradient descent with Nesterov's momentum: ``g + momentum * v`` with ``v = momentum * v + g``."""

    last_needs = (KEY, "momentum_buffer")
    next_needs = ("momentum_buffer",)

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum

    @override
    def rule(self, state: Mapping[str, Any]) -> Rule:
        return Rule(NESTEROV, (self.momentum,))

    @override
    def last(self, remembered: Sequence[Tensor], state: Mapping[str, Any]) -> Tensor:
        return torch.add(remembered[0], remembered[1], alpha=self.momentum)

    @override
    def next(self, grad: Tensor, remembered: Sequence[Tensor], state: Mapping[str, Any]) -> Tensor:
        v = remembered[0].mul_(self.momentum).add_(grad)
        return grad + self.momentum * v

    @override
    def fused_(self, params: list[Tensor], grads: list[Tensor], states: States, rate: Rate) -> None:
        torch._fused_sgd_(
            params,
            grads,
            [state["momentum_buffer"] for state in states],
            weight_decay=0.0,
            momentum=self.momentum,
            lr=rate.float() if isinstance(rate, Tensor) else rate,
            dampening=0.0,
            nesterov=self.momentum > 0,
            maximize=False,
            is_first_step=False,
        )


class Adam(FusedDirection):
    """Adam: the first moment over the root of the second, both corrected for their start at zero, as torch has it."""

    last_needs = ("exp_avg", "exp_avg_sq")
    next_needs = ("exp_avg", "exp_avg_sq")

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self.betas, self.eps = betas, eps

    def scales(self, step: Any) -> tuple[Any, Any]:
        """Return what the root of the second moment is multiplied by, and what is added, to divide the first by it."""
        first, second = (1 - beta**step for beta in self.betas)
        return first / second**0.5, self.eps * first

    @override
    def begin(self, param: Tensor, state: MutableMapping[str, Any]) -> None:
        super().begin(param, state)
        state["step"] = state.get("step", 0) + 1

    @override
    def rule(self, state: Mapping[str, Any]) -> Rule:
        return Rule(ADAM, (*self.scales(state["step"]), *self.betas))

    @override
    def last(self, remembered: Sequence[Tensor], state: Mapping[str, Any]) -> Tensor:
        scale, eps = self.scales(state["step"])
        u = remembered[1].sqrt()
        u.mul_(scale).add_(eps)
        return torch.div(remembered[0], u, out=u)

    @override
    def next(self, grad: Tensor, remembered: Sequence[Tensor], state: Mapping[str, Any]) -> Tensor:
        m, s = remembered[:2]
        m.lerp_(grad, 1 - self.betas[0])
        s.mul_(self.betas[1]).addcmul_(grad, grad, value=1 - self.betas[1])
        return self.last(remembered, state)

    @override
    def fused_(self, params: list[Tensor], grads: list[Tensor], states: States, rate: Rate) -> None:
        counts = {state["step"] for state in states}
        steps = {n: torch.full((), n, dtype=torch.float32, device=params[0].device) for n in counts}
        torch._fused_adam_(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [steps[state["step"]] for state in states],
            amsgrad=False,
            lr=rate.float() if isinstance(rate, Tensor) else rate,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )


def direction_of(group: Mapping[str, Any]) -> Direction:
    """Return how the base of a param group goes."""
    if group["base"] == "adam":
        return Adam(group["betas"], group["eps"])
    return Nesterov(group["momentum"]) if group["base"] == "sgdn" else Gradient()
