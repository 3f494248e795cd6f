r"""Hypergradient descent: the learning rate descends, too.

Baydin, Cornish, Martínez Rubio, Schmidt, Wood, "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018,
arXiv:1703.04782. If a step was :math:`w_t = w_{t-1} - \alpha u_{t-1}`, the loss at :math:`w_t` depends on
:math:`\alpha` with the derivative :math:`-\langle g_t, u_{t-1} \rangle`: the rate rises where the new gradient agrees
with the direction of the step before.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam
from typing_extensions import override

from lightning_grow.optim.base import within
from lightning_grow.optim.directions import Adam
from lightning_grow.optim.fused import adam_products, dots, fits
from lightning_grow.optim.kept import KEY
from lightning_grow.optim.pieces import CHUNK, pieces
from lightning_grow.optim.rate_owner import RateOwner, owns_gradients
from lightning_grow.optim.tensors import (
    SMALL,
    Rate,
    as_rate,
    can_fuse,
    clipped,
    dot,
    flattened,
    product,
    subtract_,
    total,
    wide_dtype,
)

Rule = Literal["additive", "multiplicative"]


class Hypergradient(RateOwner, ABC):
    """The abstract parent of optimizers whose rate descends: one rate for each param group, or one for all.

    A method says along which direction the last step went (`_agreement`), and takes the next one (`_advance`).
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], shared: bool) -> None:
        self.shared = shared
        super().__init__(params, defaults)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("shared", False)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "shared": self.shared}

    @override
    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["rule"] not in ("additive", "multiplicative"):
            raise ValueError(f"Expected `rule` to be 'additive' or 'multiplicative', found {group['rule']!r}.")
        if group["rule"] == "multiplicative" and not (group["hypergrad_lr"] < 1 and float(group["lr"]) > 0):
            raise ValueError(
                "Expected `hypergrad_lr` below 1 and `lr` above 0 with the multiplicative rule, found "
                f"{group['hypergrad_lr']!r} and {group['lr']!r}."
            )

    def rates(self) -> dict[str, Rate]:
        """Return the rate of each param group: ``"lr"``, or ``"lr/0"``, ``"lr/1"``, ... if there are several."""
        groups = self.param_groups
        return {"lr" if len(groups) == 1 else f"lr/{i}": group["lr"] for i, group in enumerate(groups)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Adapt the rates, then take a step.

        Args:
            closure: Computes the loss and its gradients again, and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            RuntimeError: If a learning-rate scheduler writes the rate, too, or a gradient is sparse.
        """
        loss = self._run(closure)
        ready = []
        for group in self.param_groups:
            params, grads = self._ready(group)
            if params:
                group["lr"] = as_rate(group["lr"], params[0].device)
                ready.append((group, params, grads))
        if self.shared:
            together = total([self._agreement(*each) for each in ready])
            for group, params, _ in ready:
                group["lr"] = self._moved(group, together.to(params[0].device))
        else:
            for each in ready:
                each[0]["lr"] = self._moved(each[0], self._agreement(*each))
        for group, params, grads in ready:
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                for p in params:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
            self._advance(group, params, grads)
        return loss

    def _moved(self, group: dict[str, Any], agreement: Tensor) -> Rate:
        """Return the rate after its own step."""
        rate, beta = group["lr"], group["hypergrad_lr"]
        change: Rate = agreement if isinstance(rate, Tensor) else agreement.item()
        moved = rate * (1 + beta * change) if group["rule"] == "multiplicative" else rate + beta * change
        return clipped(moved, group["lr_min"], group["lr_max"])

    @abstractmethod
    def _agreement(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> Tensor:
        r"""Return :math:`\langle g, u \rangle` (with the multiplicative rule, the cosine); 0 in the first step."""

    @abstractmethod
    def _advance(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Take the step."""


def _relative(group: dict[str, Any], product: Tensor, grads: Sequence[Tensor], length: Callable[[], Tensor]) -> Tensor:
    """Return a product, by the multiplicative rule the cosine."""
    if group["rule"] == "additive":
        return product
    lengths = (dot(grads, grads) * length()).sqrt()
    return torch.where(lengths > 0, product / lengths, torch.zeros_like(product))


class SGDHD(Hypergradient):
    r"""Stochastic gradient descent, with or without momentum, whose learning rate descends, too.

    .. math::

        \alpha_t &= \alpha_{t-1} + \beta \langle g_t, u_{t-1} \rangle \\
        w_t &= w_{t-1} - \alpha_t u_t

    The direction :math:`u_t` is that of `torch.optim.SGD`: :math:`g_t`; with momentum :math:`v_t = \mu v_{t-1} + (1 -
    \tau) g_t`; with Nesterov's, :math:`g_t + \mu v_t`. By the multiplicative rule the rate is multiplied by :math:`1 +
    \beta \cos(g_t, u_{t-1})`, which does not depend on the scale of the loss.

    Args:
        params: Parameters, named parameters, or param groups.
        lr: The rate to begin with, from ``lr_min`` to ``lr_max``; 0 works with the additive rule. ``group["lr"]`` is
            the rate of the moment.
        hypergrad_lr: Step :math:`\beta` of the rate, ``>= 0``; with 0 this is `torch.optim.SGD`. The product grows with
            the squared gradient, so that it depends on the scale of the loss; below 1 with the multiplicative rule.
        momentum: :math:`\mu`, in ``[0, 1)``.
        dampening: :math:`\tau`.
        nesterov: Whether the direction is Nesterov's; needs momentum, and no dampening.
        weight_decay: Factor of the weights that is added to the gradient (of a copy), or taken off the weights.
        decoupled_weight_decay: Whether weights shrink by ``lr * weight_decay`` instead; the rate does not see it.
        lr_min: The rate never falls below; published runs ended with rates below zero, which ``-1`` would allow.
        lr_max: The rate never rises above.
        rule: ``"additive"``, as published, or ``"multiplicative"``.
        shared: Whether all param groups share what their rates have in common: one sum of products for all.
        maximize: Whether to climb.
        foreach: The fast form (None, True) or a plain loop over tensors (False).
        fused: True: loops compiled by Numba (the extra ``fused``; in seconds, once) that read each number once, for
            float32 and float64 on the CPU. Not together with ``foreach``.
        copy_grad: Keep copies of gradients. By default they are kept by reference, as long as nobody overwrites them,
            which is noticed, but for writing through ``.data``.
        capturable: Refused.
        differentiable: Refused.

    Raises:
        ValueError: If an option is out of range, or a parameter is complex.

    Note:
        A rate of one's own is what a learning-rate scheduler would overwrite: with one, `step` raises.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([4.0]))
        >>> optimizer = SGDHD([w], lr=0.0, hypergrad_lr=0.01)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     (w**2 / 2).sum().backward()
        ...     optimizer.step()
        >>> round(optimizer.param_groups[0]["lr"], 2), abs(w.item()) < 0.2
        (0.43, True)

    Reference:
        Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018, arXiv:1703.04782. The
        multiplicative rule is recalled from the paper.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        hypergrad_lr: float = 1e-6,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        lr_min: float = 0.0,
        lr_max: float = math.inf,
        rule: Rule = "additive",
        shared: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        copy_grad: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "hypergrad_lr": hypergrad_lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "lr_min": lr_min,
            "lr_max": lr_max,
            "rule": rule,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "copy_grad": copy_grad,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, options, shared)

    @override
    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        within(group, 0, 1, "momentum")
        if group["nesterov"] and (not group["momentum"] or group["dampening"]):
            raise ValueError(
                "Nesterov's momentum needs `momentum` above 0 and no `dampening`, found "
                f"{group['momentum']!r} and {group['dampening']!r}."
            )

    @override
    def _agreement(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> Tensor:
        momentum, nesterov = float(group["momentum"]), group["nesterov"]
        needed = {"momentum_buffer"} if momentum and not nesterov else {KEY, "momentum_buffer"} if nesterov else {KEY}
        known = [place for place, p in enumerate(params) if needed <= self.state.get(p, {}).keys()]
        states, grads = [self.state[params[place]] for place in known], [grads[place] for place in known]
        nothing = torch.zeros((), dtype=wide_dtype(params[0].device), device=params[0].device)
        if not known:
            return nothing
        velocities = [state["momentum_buffer"] for state in states] if momentum else []
        if momentum and not nesterov:
            (along,) = dots(grads, [velocities], fused=group["fused"])
            return _relative(group, along, grads, lambda: dot(velocities, velocities))
        previous = [state[KEY] for state in states]
        if not self._kept.are_intact(group, previous, grads):
            return nothing
        product, *rest = dots(grads, [previous, velocities] if nesterov else [previous], fused=group["fused"])
        if nesterov:
            product = product + momentum * rest[0]

        def length() -> Tensor:
            if not nesterov:
                return dot(previous, previous)
            across = dot(previous, velocities)
            return dot(previous, previous) + 2 * momentum * across + momentum**2 * dot(velocities, velocities)

        return _relative(group, product, grads, length)

    @override
    def _advance(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        momentum, nesterov = group["momentum"], group["nesterov"]
        states = [self.state[p] for p in params]
        one_by_one = group["foreach"] is False
        if not momentum:
            (_loop_ if one_by_one else _whole_)(params, grads, [], group)
        else:
            fresh = [place for place, state in enumerate(states) if "momentum_buffer" not in state]
            for place in fresh:
                states[place]["momentum_buffer"] = grads[place].clone(memory_format=torch.preserve_format)
            first = set(fresh)
            for chosen in (fresh, [place for place in range(len(params)) if place not in first]):
                some = [params[i] for i in chosen], [grads[i] for i in chosen]
                velocities = [states[i]["momentum_buffer"] for i in chosen]
                if chosen:
                    (_loop_ if one_by_one else _whole_)(*some, velocities, group, is_first=chosen is fresh)
        if not momentum or nesterov:
            self._kept.keep(group, states, grads, owned=owns_gradients(group))


def _loop_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    velocities: Sequence[Tensor],
    group: dict[str, Any],
    *,
    is_first: bool = False,
) -> None:
    """Take a step of gradient descent, tensor by tensor: what `_whole_` does, as one reads it."""
    rate, momentum = group["lr"], group["momentum"]
    for place, (p, g) in enumerate(zip(params, grads, strict=True)):
        u = g
        if velocities:
            v = velocities[place]
            if not is_first:
                v.mul_(momentum).add_(g, alpha=1 - group["dampening"])
            u = g + momentum * v if group["nesterov"] else v
        p.sub_(rate * u)


def _whole_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    velocities: Sequence[Tensor],
    group: dict[str, Any],
    *,
    is_first: bool = False,
) -> None:
    """Take a step of gradient descent: by a fused kernel of torch's where it has one for these tensors."""
    rate, momentum = group["lr"], group["momentum"]
    pays = bool(velocities) or isinstance(rate, Tensor)  # on a CPU, plain steps are faster without
    if pays and not is_first and can_fuse(params, grads, *([velocities] if velocities else [])):
        torch._fused_sgd_(
            list(params),
            list(grads),
            list(velocities),
            weight_decay=0.0,
            momentum=momentum if velocities else 0.0,
            lr=rate.float() if isinstance(rate, Tensor) else rate,
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=False,
            is_first_step=False,
        )
        return
    if velocities and not is_first:
        torch._foreach_mul_(list(velocities), momentum)
        torch._foreach_add_(list(velocities), list(grads), alpha=1 - group["dampening"])
    if not velocities or group["nesterov"]:
        subtract_(params, grads, rate)
    if velocities:
        subtract_(params, velocities, rate * momentum if group["nesterov"] else rate)


class SGDNHD(SGDHD):
    r"""`SGDHD` with Nesterov's momentum, under its name in the paper, with the momentum 0.9.

    Args:
        params: Parameters, named parameters, or param groups.
        lr: The rate to begin with.
        hypergrad_lr: Step of the rate, ``>= 0``.
        momentum: In ``(0, 1)``.
        **options: Others of `SGDHD`, but for ``nesterov`` and ``dampening``.

    Raises:
        ValueError: If an option is out of range, or a parameter is complex.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([4.0]))
        >>> optimizer = SGDNHD([w], lr=1e-3, hypergrad_lr=1e-4)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     (w**2 / 2).sum().backward()
        ...     optimizer.step()
        >>> optimizer.param_groups[0]["lr"] > 1e-3
        True

    Reference:
        Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018, arXiv:1703.04782.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        hypergrad_lr: float = 1e-6,
        momentum: float = 0.9,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, hypergrad_lr, momentum=momentum, nesterov=True, **options)


class AdamHD(Hypergradient):
    r"""Adam whose learning rate descends, too.

    .. math::

        \alpha_t = \alpha_{t-1} + \beta \langle g_t, u_{t-1} \rangle, \quad
        u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    The direction of the step before is computed again from the moments, before they take in the new gradient: nothing
    is stored beyond what `torch.optim.Adam` stores, whose kernels take the step.

    Args:
        params: Parameters, named parameters, or param groups.
        lr: The rate to begin with; ``group["lr"]`` is that of the moment.
        hypergrad_lr: Step :math:`\beta` of the rate, ``>= 0``; with 0 this is `torch.optim.Adam`.
        betas: Decay of the moments, in ``[0, 1)``.
        eps: Added to the root, where torch's Adam adds it, ``>= 0``.
        weight_decay: Factor of the weights that is added to the gradient, or taken off the weights.
        decoupled_weight_decay: Whether weights shrink by ``lr * weight_decay`` instead, as in AdamW.
        lr_min: The rate never falls below.
        lr_max: The rate never rises above.
        rule: ``"additive"``, or ``"multiplicative"``; see `SGDHD`.
        shared: Whether one sum of products moves the rates of all param groups.
        maximize: Whether to climb.
        foreach: The fast form (None, True), with a fused kernel where torch has one, or a plain loop (False).
        fused: True: loops compiled by Numba (the extra ``fused``; in seconds, once) that read each number once, for
            float32 and float64 on the CPU. Not together with ``foreach``.
        capturable: Refused.
        differentiable: Refused.

    Raises:
        ValueError: If an option is out of range, or a parameter is complex.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([4.0]))
        >>> optimizer = AdamHD([w], lr=1e-3, hypergrad_lr=1e-3)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     (w**2 / 2).sum().backward()
        ...     optimizer.step()
        >>> round(optimizer.param_groups[0]["lr"], 3)  # 1e-3 * (1 + 4 + 4)
        0.009

    Reference:
        Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018, arXiv:1703.04782.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        hypergrad_lr: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        lr_min: float = 0.0,
        lr_max: float = math.inf,
        rule: Rule = "additive",
        shared: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "hypergrad_lr": hypergrad_lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "lr_min": lr_min,
            "lr_max": lr_max,
            "rule": rule,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, options, shared)

    @override
    def _agreement(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> Tensor:
        device = params[0].device
        sums = [torch.zeros((2,), dtype=wide_dtype(device), device=device)]
        wants_length = group["rule"] == "multiplicative"
        small: dict[tuple[torch.device, float], list[tuple[Tensor, dict[str, Any]]]] = {}
        large: list[tuple[Tensor, Tensor, Tensor]] = []
        scales: list[tuple[float, float]] = []
        for p, g in zip(params, grads, strict=True):
            state = self.state.get(p, {})
            if not state.keys() >= {"step", "exp_avg", "exp_avg_sq"}:
                continue
            if group["fused"] and fits(*(row := (g, state["exp_avg"], state["exp_avg_sq"]))):
                large.append(row)
                scales.append(Adam(group["betas"], group["eps"]).scales(float(state["step"])))
            elif p.numel() < SMALL and state["step"].device.type == "cpu" and group["foreach"] is not False:
                small.setdefault((p.device, state["step"].item()), []).append((g, state))
            else:
                sums.append(_adam_product(g, state, group, wants_length).to(sums[0]))
        for (_, step), rows in small.items():
            together = {name: flattened([state[name] for _, state in rows]) for name in ("exp_avg", "exp_avg_sq")}
            together["step"] = torch.tensor(step)
            sums.append(_adam_product(flattened([g for g, _ in rows]), together, group, wants_length).to(sums[0]))
        sums += adam_products(large, scales)
        product, length = torch.stack(sums).sum(dim=0)
        return _relative(group, product, grads, lambda: length)

    @override
    def _advance(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        fused = group["foreach"] is not False and can_fuse(params, grads, *moments)
        for p, state in zip(params, states, strict=True):
            device = p.device if fused else torch.device("cpu")
            state["step"] = state["step"].to(device) if "step" in state else torch.zeros((), device=device)
        rate = group["lr"]
        if isinstance(rate, Tensor):
            rate = rate.float() if fused else float(rate)
        adam(
            params,
            grads,
            moments[0],
            moments[1],
            [],
            [state["step"] for state in states],
            foreach=False if fused or group["foreach"] is False else None,
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=rate,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )


def _adam_product(grad: Tensor, state: dict[str, Any], group: dict[str, Any], wants_length: bool) -> Tensor:
    """Return the product of a gradient with Adam's last direction, and the squared length of that: ``(2,)``."""
    adam_of, step = Adam(group["betas"], group["eps"]), state["step"]
    remembered_step = {"step": float(step) if step.device.type == "cpu" else step}
    is_fast = grad.device.type == "cpu" and group["foreach"] is not False
    found = []
    for piece in pieces((grad, state["exp_avg"], state["exp_avg_sq"]), 1, CHUNK if is_fast else None):
        g, *moments = piece.tensors
        u = adam_of.last(moments, remembered_step)
        found.append(torch.stack([product(g, u), *([product(u, u)] * wants_length)]))
    sums: Tensor = torch.stack(found).sum(dim=0)
    return sums if wants_length else torch.cat([sums, torch.zeros_like(sums)])
