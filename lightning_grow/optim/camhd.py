r"""CAM-HD: learning rates on several levels at once, each by hypergradient descent, mixed by weights that are learned.

Jie, Gao, Vasnev, Tran, "Adaptive Hierarchical Hyper-gradient Descent", International Journal of Machine Learning and
Cybernetics 2022, arXiv:2008.07277.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grow.optim.agreement import Agreement, Moving
from lightning_grow.optim.base import at_least_zero, within
from lightning_grow.optim.directions import Direction, direction_of
from lightning_grow.optim.kept import KEY
from lightning_grow.optim.ladder import LAYER, LEVELS, PARAMETER, UNIT, Ladder, Level
from lightning_grow.optim.layers import Grouping, Layers
from lightning_grow.optim.move import move
from lightning_grow.optim.rate_owner import RateOwner, owns_gradients
from lightning_grow.optim.tensors import Rate

Base = Literal["sgd", "sgdn", "adam"]
Norm = Literal["softmax", "sum"]
Coupling = Literal["combination", "virtual", "implicit"]

_HYPERGRAD_LR: dict[str, float] = {"sgd": 1e-3, "sgdn": 1e-3, "adam": 1e-8}


class CAMHD(RateOwner):
    r"""Gradient descent with a rate for everything, for each layer, unit and parameter, all of which descend.

    Entry ``i`` moves by the combined rate of the levels ``k`` that it belongs to, each in its group :math:`G_k(i)`:

    .. math::

        w_i \leftarrow w_i - \alpha^*_i u_i, \quad
        \alpha^*_i = \sum_k \gamma_k \alpha^k_{G_k(i)}, \quad \sum_k \gamma_k = 1

    Here :math:`u` is the direction of the base optimizer. With :math:`H = g_t \cdot u_{t-1}`, entry by entry, the loss
    has the derivatives :math:`-\gamma_k \sum_{i \in G} H_i` by :math:`\alpha^k_G`, and :math:`-\sum_i \alpha^k_{G_k(i)}
    H_i` by :math:`\gamma_k`. Both descend, from the values that made the last step:

    .. math::

        \alpha^k_G \leftarrow \alpha^k_G + \beta \gamma_k \frac{N}{|G|} \sum_{i \in G} H_i, \quad
        \gamma = \text{softmax}(c), \quad c_k \leftarrow c_k - \delta \frac{\partial f}{\partial c_k}

    With :math:`N` parameters in all, and :math:`|G|` in a group, rates of all levels move on the same scale. With the
    global level alone, this is hypergradient descent (`SGDHD`, `AdamHD`).

    Layers are the modules of named parameters (``model.named_parameters()``). Among unnamed ones, a vector joins the
    tensor before it if it has an entry for each of its units. A unit is an index along dim 0 of a weight, with the
    matching entry of the bias; a layer without a matrix, such as a norm, is one unit. When the network grows, units
    keep their rates, copies take that of their parent and new units the mean of their layer; new layers begin with
    ``group["lr"]``.

    ``group["lr"]`` is the global rate; without that level, the mean of the coarsest. Written by hand, it changes all
    rates in proportion. All levels belong to one param group: groups are independent of each other.

    Args:
        params: Parameters, named parameters, or param groups.
        lr: What all rates begin with, from ``lr_min`` to ``lr_max``.
        base: What gives the direction: ``"sgd"``, ``"sgdn"`` (with Nesterov's momentum) or ``"adam"``.
        levels: Any of ``"global"``, ``"layer"``, ``"unit"`` and ``"parameter"``.
        weights: :math:`\gamma` to begin with, one for each level, at least 0, with the sum 1; by default all are equal.
        hypergrad_lr: :math:`\beta`, ``>= 0``; by default 1e-3, and 1e-8 for Adam.
        weights_lr: :math:`\delta`, ``>= 0``; with 0 the weights stay.
        norm: How weights keep the sum 1: ``"softmax"`` of what is learned, or division by the ``"sum"`` (negative ones
            become 0).
        chain_weights: Whether the step of a rate has the factor :math:`\gamma_k` of its derivative.
        coupling: ``"combination"``, as above; or a penalty on the squared distance of each rate to that of the next
            coarser level, with the finest level for the step and no weights: ``"virtual"`` takes its gradient after
            the plain step, which gives :math:`(1 - c) \hat\alpha + c \hat\alpha^{coarser}`; ``"implicit"`` where the
            rates go, :math:`(\hat\alpha + c \alpha^{coarser}) / (1 + c)`. The coarser rate is not pulled.
        coupling_strength: :math:`c = 2 \beta \lambda` for a penalty :math:`\lambda`: in ``[0, 1]`` if virtual, ``>= 0``
            if implicit. With infinity, one rate is left.
        momentum: Of ``"sgdn"``, in ``[0, 1)``.
        betas: Of ``"adam"``: decay of the moments, in ``[0, 1)``.
        eps: Of ``"adam"``: added to the root.
        weight_decay: Factor of the weights that is added to the gradient, or taken off the weights.
        decoupled_weight_decay: Whether weights shrink by their rate times ``weight_decay`` instead.
        lr_min: No rate of any level falls below.
        lr_max: None rises above.
        max_change: If given, no rate changes by more than this share of itself in a step, ``> 0``; rates of 0 are free.
        grouping: From the name of a parameter to the name of its layer; needs named parameters.
        maximize: Whether to climb.
        foreach: The fast form (None, True), or a plain loop over whole tensors (False).
        fused: True: loops compiled by Numba (the extra ``fused``; in seconds, once) that read each number once, for
            float32 and float64 on the CPU. Not together with ``foreach``.
        copy_grad: Keep copies of gradients, for ``"sgd"`` and ``"sgdn"``; see `SGDHD`.
        capturable: Refused.
        differentiable: Refused.

    Raises:
        ValueError: If an option is out of range, a parameter is complex, or ``grouping`` has no names to work on.

    Note:
        Memory beyond that of the base: the last gradient (by reference where that is safe; Adam's last direction is
        computed again), a number for each unit, and with the parameter level one tensor of the size of each parameter.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        >>> optimizer = CAMHD(model.named_parameters(), lr=0.01, levels=("global", "layer", "unit"))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> sorted(optimizer.rates())
        ['layer/0', 'layer/2', 'lr', 'unit/0', 'unit/2', 'weight/global', 'weight/layer', 'weight/unit']
        >>> optimizer.rates()["unit/0"].shape
        torch.Size([3])

    Reference:
        Jie et al., "Adaptive Hierarchical Hyper-gradient Descent", arXiv:2008.07277. The authors published no code: the
        derivatives are ours, checked against autograd; the order of the steps, the factor N/|G|, the defaults and the
        treatment of units are reconstructed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        base: Base = "sgd",
        levels: Sequence[Level] = ("global", "layer"),
        weights: Sequence[float] | None = None,
        hypergrad_lr: float | None = None,
        weights_lr: float = 0.03,
        norm: Norm = "softmax",
        chain_weights: bool = True,
        coupling: Coupling = "combination",
        coupling_strength: float = 0.0,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        lr_min: float = 0.0,
        lr_max: float = math.inf,
        max_change: float | None = None,
        grouping: Grouping | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        copy_grad: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        self.grouping = grouping
        self._layers: dict[int, tuple[Any, Layers]] = {}
        self._written: WeakKeyDictionary[Layers, tuple[list[Any], Tensor]] = WeakKeyDictionary()
        options = {
            "lr": lr,
            "base": base,
            "levels": tuple(levels),
            "weights": weights,
            "hypergrad_lr": hypergrad_lr,
            "weights_lr": weights_lr,
            "norm": norm,
            "chain_weights": chain_weights,
            "coupling": coupling,
            "coupling_strength": coupling_strength,
            "momentum": momentum,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "lr_min": lr_min,
            "lr_max": lr_max,
            "max_change": max_change,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "copy_grad": copy_grad,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, options)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("grouping", None)
        self._layers = {}
        self._written = WeakKeyDictionary()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "grouping": self.grouping}

    @override
    def _check(self, group: dict[str, Any]) -> None:
        _check_choice(group, "base", tuple(_HYPERGRAD_LR))
        _check_choice(group, "norm", ("softmax", "sum"))
        _check_choice(group, "coupling", ("combination", "virtual", "implicit"))
        if group["hypergrad_lr"] is None:
            group["hypergrad_lr"] = _HYPERGRAD_LR[group["base"]]
        super()._check(group)
        at_least_zero(group, "weights_lr", "coupling_strength")
        within(group, 0, 1, "momentum")
        if group["max_change"] is not None and not group["max_change"] > 0:
            raise ValueError(f"Expected `max_change` above 0, or None, found {group['max_change']!r}.")
        if group["coupling"] == "virtual" and not group["coupling_strength"] <= 1:
            raise ValueError(
                f"Expected `coupling_strength` in [0, 1] with the virtual coupling, found "
                f"{group['coupling_strength']!r}. The implicit coupling takes any."
            )
        _check_levels(group)
        if self.grouping is not None and "param_names" not in group:
            raise ValueError("`grouping` works on names: pass `model.named_parameters()` instead of the parameters.")

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state; rates keep their precision, also those of parameters in half precision."""
        super().load_state_dict(state_dict)
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for place, p in zip(places, params, strict=True):
            for name, entry in state_dict["state"].get(place, {}).items():
                if name in (LAYER, UNIT, PARAMETER) and isinstance(entry, Tensor):
                    self.state[p][name] = entry.to(p.device, copy=True)

    def rates(self) -> dict[str, Rate]:
        """Return all rates and weights by name.

        Returns:
            ``"lr"``, ``"layer/NAME"``, ``"unit/NAME"`` (one for each unit), ``"parameter/NAME"`` (in the shape of the
            parameter) and ``"weight/LEVEL"``; layers without a name have a number. With several param groups, each
            name ends in the number of its group, as ``"lr/0"``. Only levels that are on; before the first step, only
            ``"lr"`` and weights.
        """
        found: dict[str, Rate] = {}
        for number, group in enumerate(self.param_groups):
            end = "" if len(self.param_groups) == 1 else f"/{number}"
            found |= {f"{name}{end}": rate for name, rate in self._rates_of(group).items()}
        return found

    def _rates_of(self, group: dict[str, Any]) -> dict[str, Rate]:
        found: dict[str, Rate] = {"lr": group["lr"]}
        params, layers = self._trained(group)
        states = [self.state.get(p, {}) for p in params]
        for name, members in zip(layers.names, layers.members, strict=True):
            found |= {f"layer/{name}": states[place][LAYER] for place in members[:1] if LAYER in states[place]}
        units: dict[str, list[Tensor]] = {}
        for one in layers.unit_groups:
            if UNIT in states[one.members[0]]:
                units.setdefault(f"unit/{layers.names[one.layer]}", []).append(states[one.members[0]][UNIT].reshape(-1))
        found |= {name: torch.cat(rates) for name, rates in units.items()}
        for name, state in zip(layers.params, states, strict=True):
            found |= {f"parameter/{name}": state[PARAMETER]} if PARAMETER in state else {}
        if len(group["levels"]) > 1 and group["coupling"] == "combination":
            found |= {f"weight/{k}": w for k, w in zip(group["levels"], group["weights"], strict=True)}
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Adapt the rates and their weights, then take a step.

        Args:
            closure: Computes the loss and its gradients again, and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            RuntimeError: If a learning-rate scheduler writes the rate, too, or a gradient is sparse.
        """
        loss = self._run(closure)
        for group in self.param_groups:
            params, grads = self._ready(group)
            if params:
                self._adapt_and_move(group, params, grads)
        return loss

    def _adapt_and_move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        trained, layers = self._trained(group)
        places = {id(p): place for place, p in enumerate(trained)}
        moving = [Moving(places[id(p)], p, g, self.state[p]) for p, g in zip(params, grads, strict=True)]
        ladder = Ladder(group, layers, trained, self.state, params[0].device, self._written)
        direction = direction_of(group)
        agreement = Agreement(ladder, direction, self._with_last(group, direction, moving))
        ladder.descend(agreement.sums, agreement.weighted)
        for m in moving:
            direction.begin(m.param, m.state)
        move(ladder, direction, moving)
        ladder.write()
        if KEY in direction.last_needs:
            self._kept.keep(group, [m.state for m in moving], grads, owned=owns_gradients(group))

    def _trained(self, group: dict[str, Any]) -> tuple[list[Tensor], Layers]:
        """Return the parameters of a group that are trained, and their layers, which are kept while shapes last."""
        names = group.get("param_names", ())
        if len(names) != len(group["params"]):
            names = [None] * len(group["params"])
        trained = [(p, name) for p, name in zip(group["params"], names, strict=True) if p.requires_grad]
        device = next((p.device for p, _ in trained if p.grad is not None), trained[0][0].device if trained else "cpu")
        key = [device, *((id(p), p.shape, name) for p, name in trained)]
        number = next(number for number, other in enumerate(self.param_groups) if other is group)
        known = self._layers.get(number)
        if known is None or known[0] != key:
            has_names = all(name is not None for _, name in trained)
            known_names = [str(name) for _, name in trained] if has_names else None
            known = self._layers[number] = key, Layers([p for p, _ in trained], known_names, self.grouping, device)
        return [p for p, _ in trained], known[1]

    def _with_last(self, group: dict[str, Any], direction: Direction, moving: Sequence[Moving]) -> Sequence[Moving]:
        """Return the tensors of which the direction of the last step is known."""
        needed = set(direction.last_needs)
        known = [m for m in moving if needed <= m.state.keys()]
        if KEY not in direction.last_needs or not known:
            return known
        return known if self._kept.are_intact(group, [m.state[KEY] for m in known], [m.grad for m in known]) else []


def _check_choice(group: dict[str, Any], name: str, allowed: Sequence[str]) -> None:
    if group[name] not in allowed:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, allowed))}, found {group[name]!r}.")


def _check_levels(group: dict[str, Any]) -> None:
    """Check levels and their weights, and put them in order from coarse to fine."""
    levels, weights = group["levels"], group["weights"]
    if isinstance(levels, str) or not levels or len(set(levels)) < len(levels) or not set(levels) <= set(LEVELS):
        allowed = ", ".join(map(repr, LEVELS))
        raise ValueError(f"Expected `levels` to be one or several of {allowed}, each once, found {levels!r}.")
    if weights is None:
        weights = [1 / len(levels)] * len(levels)
    values = [float(w) for w in weights]
    if len(values) != len(levels) or not all(w >= 0 for w in values) or not math.isclose(sum(values), 1, abs_tol=1e-6):
        raise ValueError(
            f"Expected `weights` of at least 0 with the sum 1, one for each of the {len(levels)} levels, "
            f"found {group['weights']!r}."
        )
    given = dict(zip(levels, values, strict=True))
    group["levels"] = tuple(level for level in LEVELS if level in given)
    group["weights"] = tuple(given[level] for level in group["levels"])
