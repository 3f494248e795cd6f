"""ALI-G: Polyak's step towards zero loss, with one hyperparameter, the largest rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from typing_extensions import override

from lightning_grow.optim.ball import check_ball, follow_growth, project_
from lightning_grow.optim.base import at_least_zero, within
from lightning_grow.optim.loss import LossOptimizer, is_finite
from lightning_grow.optim.polyak import polyak_move_, polyak_rate


class ALIG(LossOptimizer):
    r"""Descend as far as the loss is above its lower bound: a rate from loss and gradient at each step, no schedule.

    The loss of a batch is modelled by its tangent, but never below a known bound :math:`b`. The proximal step of that
    model, with :math:`\eta` the maximal rate, goes along :math:`-g` by

    .. math:: \gamma = \mathrm{clip}\left(\frac{\ell - b}{\|g\|^2 + \epsilon},\ 0,\ \eta\right),

    with :math:`\|g\|^2` over all parameters together. It is for models that can bring the loss of (nearly) every sample
    down to the bound; where they cannot, see `ALIGPlus`. `polyak_move_` says how momentum and decay act.

    The loss comes from the closure or from ``set_loss``; under a Lightning Trainer, nothing has to be done. Gradients
    must not be clipped: a shorter gradient makes the step longer.

    When the network grows or shrinks, new entries of the momentum are zero, and ``max_norm`` changes as the norm of
    the parameters does, so that the next projection does not undo the preservation of the function.

    Args:
        params: Parameters, named parameters, or param groups.
        lr: Maximal rate, at least 0; None: no cap. ``group["lr"]`` is infinite then.
        momentum: In [0, 1). A momentum of 0.9 acts like a maximal rate ten times as large.
        adjusted_momentum: Keep gradients in the buffer instead of steps, as `torch.optim.SGD` does.
        weight_decay: Decoupled, at least 0: just before the step, and not part of the formula of its length. L2 in the
            loss would keep it from reaching its bound; `max_norm` is the paper's way to regularise.
        max_norm: Largest norm of the parameters of a group, above 0; None: no limit. One ball for each param group:
            they are projected into it at construction and after each step.
        lower_bound: What the loss cannot fall below. 0 for the cross entropy, hinge and squared losses; the entropy of
            the targets for smoothed or mixed labels.
        eps: Added to the squared norm, at least 0.
        max_skips: How many steps in a row may be skipped, for want of a finite loss and gradient, before an error.
        maximize: Refused.
        foreach: False: a plain loop over tensors, the reference.
        fused: True: loops compiled by Numba (the extra ``fused``; in seconds, once) that read each number once, for
            float32 and float64 on the CPU. Not together with ``foreach``.
        differentiable: Refused.
        capturable: Refused.

    Raises:
        ValueError: If an option is out of range.

    Note:
        ``group["step_size"]`` is the rate of the last step, ``optimizer.skipped`` how many were skipped.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = ALIG([w], eps=0.0)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.norm()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)  # a sharp minimum of 0 is reached in one step
        >>> w.norm().item() < 1e-6
        True

    Reference:
        Berrada, Zisserman, Kumar, "Training Neural Networks for and by Interpolation", ICML 2020, arXiv:1906.05661.
        Decoupled decay outside of the formula is in the spirit of ProxSPS (arXiv:2301.04935), not of the paper.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        momentum: float = 0.0,
        adjusted_momentum: bool = False,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        lower_bound: float = 0.0,
        eps: float = 1e-5,
        max_skips: int = 10,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": math.inf if lr is None else lr,
            "momentum": momentum,
            "adjusted_momentum": adjusted_momentum,
            "weight_decay": weight_decay,
            "max_norm": max_norm,
            "lower_bound": lower_bound,
            "eps": eps,
            "max_skips": max_skips,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("lr", 0.0) is None:
            param_group["lr"] = math.inf
        super().add_param_group(param_group)
        with torch.no_grad():
            project_(self.param_groups[-1])

    @override
    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        at_least_zero(group, "eps")
        within(group, 0, 1, "momentum")
        check_ball(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, or skip it and count it.

        Args:
            closure: Computes the loss and its gradients again, and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            RuntimeError: If the loss is not known, or too many steps in a row were skipped.
        """
        returned, loss = self._evaluate(closure)
        if loss is None:
            return returned
        work = [(group, *self._with_gradients(group)) for group in self.param_groups]
        grads = [g for _, _, own in work for g in own]
        value, square = self._numbers(loss, grads)
        rates = [polyak_rate(value - g["lower_bound"], square, g["eps"], float(g["lr"])) for g in self.param_groups]
        if not is_finite(value, square, *rates):
            self._skip(value, square)
            return returned
        self._step_taken()
        for (group, params, own), rate in zip(work, rates, strict=True):
            follow_growth(group)
            polyak_move_(group, self.state, params, own, rate)
            project_(group)
            group["step_size"] = rate
        return returned
