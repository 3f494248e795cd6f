r"""CAM-HD: learning rates on several levels at once, each by hypergradient descent, mixed by weights that are learned.

Jie, Gao, Vasnev, Tran, "Adaptive Hierarchical Hyper-gradient Descent", International Journal of Machine Learning and
Cybernetics 2022, arXiv:2008.07277.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grow.optim.base import at_least_zero, within
from lightning_grow.optim.directions import Direction, FusedDirection, Gradient, direction_of
from lightning_grow.optim.kept import KEY
from lightning_grow.optim.ladder import LAYER, LEVELS, PARAMETER, UNIT, Ladder, Level
from lightning_grow.optim.layers import Grouping, Layers
from lightning_grow.optim.pieces import CHUNK, Piece, of_units, pieces, unit_products, unit_sums
from lightning_grow.optim.rate_owner import RateOwner, owns_gradients
from lightning_grow.optim.tensors import SMALL, Rate, can_fuse, flattened, product, subtract_, wide_dtype

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
        moving = [_Moving(places[id(p)], p, g, self.state[p]) for p, g in zip(params, grads, strict=True)]
        ladder = Ladder(group, layers, trained, self.state, params[0].device, self._written)
        direction = direction_of(group)
        ladder.descend(*_measured(ladder, direction, self._with_last(group, direction, moving)))
        for m in moving:
            direction.begin(m.param, m.state)
        _move(ladder, direction, moving)
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

    def _with_last(self, group: dict[str, Any], direction: Direction, moving: Sequence[_Moving]) -> Sequence[_Moving]:
        """Return the tensors of which the direction of the last step is known."""
        known = [m for m in moving if all(name in m.state for name in direction.last_needs)]
        if KEY not in direction.last_needs or not known:
            return known
        return known if self._kept.are_intact(group, [m.state[KEY] for m in known], [m.grad for m in known]) else []


class _Moving(NamedTuple):
    """A tensor that takes part in a step."""

    place: int
    param: Tensor
    grad: Tensor
    state: dict[str, Any]


def _measured(ladder: Ladder, direction: Direction, moving: Sequence[_Moving]) -> tuple[list[Tensor], list[Tensor]]:
    """Return sums of H = g u, with u the direction of the last step; rates of parameters descend on the way.

    Returns:
        For each tensor a number, or one for each unit if units have rates; and parts of the sum of rates of parameters
        times H.
    """
    dtype = wide_dtype(ladder.device)
    sums: list[Tensor | None] = [None] * len(ladder.params)
    weighted: list[Tensor] = []
    if ladder.in_pieces:
        moving, small = _parted(moving)
        if small:
            for m, those in zip(small, _measured_together(ladder, direction, small, weighted), strict=True):
                sums[m.place] = those
    for m in moving:
        num_units = ladder.num_units(m.place)
        found: list[Tensor] = []
        scratch = direction.has_scratch or num_units > 1
        for piece in _in_pieces(ladder, m, [m.grad], direction.last_needs, num_units, has_scratch=scratch):
            grad, *parts = piece.tensors
            u, grad = _wide(direction.last(parts, m.state)), _wide(grad)
            if not ladder.has_parameters:
                found.append(unit_products(grad, u, num_units))
                continue
            if ladder.levels == ("parameter",):  # then no sum is needed, and no product
                ladder.descend_parameters_(m.place, parts[-1], grad, u)
                continue
            products, rates = grad * u, parts[-1]
            found.append(unit_sums(products, num_units))
            if ladder.learns_weights:
                weighted.append(unit_products(rates, products, 1).to(ladder.device, dtype))
            ladder.descend_parameters_(m.place, rates, products)
        if len(found) > 1:
            found = [torch.cat(found) if num_units > 1 else torch.stack(found).sum()]
        sums[m.place] = found[0] if found else None
    most = max((ladder.num_units(place) for place, found in enumerate(sums) if found is None), default=0)
    zeros = torch.zeros(most, device=ladder.device)
    whole = [zeros[: ladder.num_units(place)] if found is None else found for place, found in enumerate(sums)]
    return whole, weighted


def _parted(moving: Sequence[_Moving]) -> tuple[list[_Moving], list[_Moving]]:
    """Return large tensors, and small ones that can be worked on as one: of one device, and as old as each other."""
    large, small = [], []
    for m in moving:
        (small if m.param.numel() < SMALL else large).append(m)
    if len({m.state.get("step") for m in small}) > 1 or len({m.param.device for m in small}) > 1:
        return list(moving), []
    return large, small


def _measured_together(
    ladder: Ladder, direction: Direction, small: Sequence[_Moving], weighted: list[Tensor]
) -> Sequence[Tensor]:
    """Return the sums of H of small tensors, with few calls for all of them; see `_measured`."""
    remembered = [flattened([m.state[name] for m in small]) for name in direction.last_needs]
    products = _wide(flattened([m.grad for m in small])) * _wide(direction.last(remembered, small[0].state))
    if ladder.has_parameters:
        rates = [m.state[PARAMETER] for m in small]
        if ladder.learns_weights:
            weighted.append(product(flattened(rates).to(products), products).to(wide_dtype(ladder.device)))
        for m, r, h in zip(small, rates, products.split([r.numel() for r in rates]), strict=True):
            ladder.descend_parameters_(m.place, r, h.view(r.shape))
    places, counts = ladder.places_of_sums(tuple(m.place for m in small))
    products = products.to(wide_dtype(products.device))
    return products.new_zeros(sum(counts)).index_add_(0, places, products).split(counts)


def _move(ladder: Ladder, direction: Direction, moving: Sequence[_Moving]) -> None:
    """Take the step."""
    group = ladder.group
    decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
    if group["foreach"] is not False and not ladder.has_parameters:
        if isinstance(direction, Gradient):
            _move_along_gradients(ladder, moving, decay)
            return
        if isinstance(direction, FusedDirection) and not ladder.has_units and not decay:
            moving = _move_fused(ladder, direction, moving)
    for m in moving:
        common, share, own = ladder.common(m.place), ladder.share_of_parameters, None
        tensors, num_units = [m.param, m.grad], ladder.num_units(m.place)
        for piece in _in_pieces(ladder, m, tensors, direction.next_needs, num_units, has_scratch=direction.has_scratch):
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


def _move_along_gradients(ladder: Ladder, moving: Sequence[_Moving], decay: float) -> None:
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


def _move_fused(ladder: Ladder, direction: FusedDirection, moving: Sequence[_Moving]) -> list[_Moving]:
    """Take the step of tensors that share a rate by one kernel of torch's; return those that it cannot take."""
    lists: dict[int, list[_Moving]] = {}
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


def _in_pieces(
    ladder: Ladder, m: _Moving, tensors: list[Tensor], names: Sequence[str], num_units: int, *, has_scratch: bool
) -> list[Piece]:
    """Return tensors, state, and rates of parameters if there are any, in pieces where that keeps them in the cache."""
    tensors = [*tensors, *(m.state[name] for name in names)]
    if ladder.has_parameters:
        tensors.append(m.state[PARAMETER])
    is_worth_it = ladder.in_pieces and (has_scratch or ladder.has_parameters)
    return pieces(tensors, num_units, CHUNK if is_worth_it else None)


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


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


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
