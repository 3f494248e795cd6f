r"""GradMax: new units that change nothing, and will get as large a gradient as units can.

Evci, van Merriënboer, Unterthiner, Vladymyrov, Pedregosa, "GradMax: Growing Neural Networks using Gradient
Information", ICLR 2022, arXiv:2201.05125.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_grow.criteria.new_units import NewUnits, SingularPairs
from lightning_grow.criteria.objective import MeasurementError, Objective
from lightning_grow.criteria.selection import best_units
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.structure.errors import StructureError
from lightning_grow.surgery.edit import Edit
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import Proposal, in_all, rounded
from lightning_grow.trainer.structural_callback import StructuralCallback
from lightning_grow.trainer.unit_costs import Cost, check_cost, unit_costs

log = logging.getLogger(__name__)

ScaleBy = Literal["mean_norm", "fixed"]
Side = Literal["fan_in", "fan_out"]
_DEAD = 1e-3
"""Slopes at zero below this share of the usual one are none."""


def gradmax(
    model: nn.Module,
    group: AxisGroup,
    objective: Objective,
    num_units: int,
    generator: torch.Generator | None = None,
    *,
    scale: float = 0.5,
    scale_by: ScaleBy = "mean_norm",
    zero: Side = "fan_in",
    epsilon: float = 1e-4,
    oversampling: int | None = None,
    passes: int = 2,
) -> Edit:
    r"""Append units with a fan-in of zero, whose fan-out makes the gradient of the fan-in as large as it can be.

    With :math:`M = \sum \delta x^T` (gradients at what uses the units, inputs of what makes them, of the mean loss),
    new units with fan-outs :math:`W`, orthogonal columns of length ``norm`` each, get the fan-in gradient
    :math:`\varphi'(0) W^T M`. Its norm is largest, :math:`\varphi'(0)^2 norm^2 \sum_{j \le k} s_j^2`, if the columns
    are the leading left singular vectors of ``M``. The function is kept exactly where :math:`\varphi(0) = 0`. ``M`` is
    measured for any layer (`NewUnits`): convolutions with their borders, gated units, attention heads (in their
    values), recurrent units.

    Args:
        model: The model; it is not changed.
        group: The group to widen, without an obstacle.
        objective: The loss, and the batches that say what ``M`` is.
        num_units: Units to append, a multiple of ``group.step``. Beyond the rank of ``M`` they are random.
        generator: Draws what is random; by default it follows from the group's name and sizes.
        scale: Length of each new fan-out, relative to the mean of those that there are (``scale_by="mean_norm"``), or
            absolute (``"fixed"``), ``> 0``.
        scale_by: See ``scale``.
        zero: Which side of new units is zero. With ``"fan_out"`` the fan-in is the leading right singular vectors of
            ``M``, scaled like the fan-ins that there are: optimal for linear units only, but it keeps the function
            behind any activation.
        epsilon: Where the derivative at zero is 0, as that of ``torch.relu``, units without a fan-in would never learn.
            They get a fan-in of this length, relative to the mean of the others, along the direction that lowers the
            loss; the function changes in proportion. With 0, such groups are refused.
        oversampling: See `NewUnits.leading`.
        passes: Likewise: passes over the batches, at most.

    Returns:
        An edit which appends ``num_units`` units. Nothing is changed yet.

    Raises:
        StructureError: If such units are not possible: an obstacle, a frozen fan-in or fan-out, an activation that is
            not zero at zero (``zero="fan_in"``), a derivative of 0 at zero with ``epsilon=0``.
        MeasurementError: If the loss cannot be measured, or no unit would get a gradient.
        ValueError: If an argument is out of range.

    Note:
        Biases are left out of ``M``, as in the paper. Behind a batch norm, new units have the gain ``sqrt(eps)``; with
        a gain of 1, the norm would multiply the gradient by 316 in train mode.

    Example:
        >>> from lightning_grow.structure import trace
        >>> from lightning_grow.surgery import apply_
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(9, 4)
        >>> objective = Objective(lambda m, x: (m(x) - x[:, :2]).square().mean(), [x])
        >>> before = model(x).detach()
        >>> apply_(model, [gradmax(model, trace(model, x)["0"], objective, num_units=2)])
        >>> model[0].out_features, torch.allclose(before, model(x), atol=1e-6)
        (10, True)

    Reference:
        Evci et al., "GradMax: Growing Neural Networks using Gradient Information", ICLR 2022, arXiv:2201.05125.
    """
    if num_units < 1 or num_units % group.step:
        raise ValueError(
            f"Expected `num_units` to be a positive multiple of {group.step} for '{group.name}', found {num_units}."
        )
    if not (scale > 0 and epsilon >= 0):
        raise ValueError(f"Expected `scale` above 0 and `epsilon` of at least 0, found {scale!r} and {epsilon!r}.")
    new = NewUnits(model, [group], objective, None if generator is None else lambda _name: generator)
    new.look()
    why = _cannot(new, group.name, _Kind(scale, scale_by, zero, epsilon))
    if why is not None:
        raise StructureError(f"GradMax cannot widen '{group.name}': {why}")
    pairs = new.leading({group.name: num_units}, oversampling=oversampling, passes=passes)[group.name]
    if not len(pairs.values):
        raise MeasurementError(f"New units of '{group.name}' would get no gradient at all.")
    drawn = generator or torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
    return _edit(new, group.name, pairs, num_units, drawn, _Kind(scale, scale_by, zero, epsilon))


class _Kind(NamedTuple):
    """What new units are like; see `gradmax`."""

    scale: float
    scale_by: ScaleBy
    zero: Side
    epsilon: float


def _cannot(new: NewUnits, name: str, kind: _Kind) -> str | None:
    """Return why a group that was looked at cannot have units of this kind, and what to do."""
    space = new.spaces[name]
    if kind.zero == "fan_out":
        return None
    if space.constant:
        return (
            "what its units compute is not zero without a fan-in (as behind a sigmoid), so the function would change. "
            "Pass zero='fan_out', or exclude the group."
        )
    if space.slope < _DEAD and kind.epsilon == 0:
        return (
            "the derivative of its activation is 0 at zero (as that of torch.relu), so units without a fan-in would "
            "never learn. Pass an epsilon above 0, or zero='fan_out', or exclude the group."
        )
    return None


def _length(new: NewUnits, name: str, kind: _Kind) -> float:
    """Return the length of the side of new units that is not zero."""
    space = new.spaces[name]
    usual = space.fan_out_norm if kind.zero == "fan_in" else space.fan_in_norm
    return kind.scale * usual if kind.scale_by == "mean_norm" else kind.scale


def _edit(
    new: NewUnits,
    name: str,
    pairs: SingularPairs,
    num_units: int,
    generator: torch.Generator,
    kind: _Kind,
) -> Edit:
    space = new.spaces[name]
    length = _length(new, name, kind)
    if kind.zero == "fan_out":
        directions = _completed(pairs.fan_in, num_units, space.free, generator)
        return new.edit(name, length * directions, torch.zeros(num_units, space.fan_out_length, dtype=torch.float64))
    everywhere = torch.ones(space.fan_out_length, dtype=torch.bool)
    fan_out = length * _completed(pairs.fan_out, num_units, everywhere, generator)
    fan_in = torch.zeros(num_units, len(space.free), dtype=torch.float64)
    if space.slope < _DEAD:  # downhill: the fan-in gradient of unit j is s_j times its singular vector
        fan_in = -kind.epsilon * space.fan_in_norm * _completed(pairs.fan_in, num_units, space.free, generator)
    return new.edit(name, fan_in, fan_out)


def _completed(found: Tensor, num_units: int, free: Tensor, generator: torch.Generator) -> Tensor:
    """Return so many unit vectors: the given ones, then random ones, orthogonal as long as there is room."""
    vectors = list(found[:num_units])
    while len(vectors) < num_units:
        drawn = torch.randn(len(free), generator=generator, dtype=torch.float64) * free
        if len(vectors) < int(free.sum()):
            for _ in range(2):  # twice is enough
                for other in vectors:
                    drawn = drawn - (drawn @ other) * other
        vectors.append(drawn / drawn.norm())
    return torch.stack(vectors)


class GradMax(StructuralCallback):
    """Widens groups by units that change nothing, and get as large a gradient as units can.

    Groups that cannot have such units are left alone: those with an obstacle, with a frozen fan-in or fan-out, or with
    an activation that is not zero at zero (``zero="fan_out"`` has no such condition). The loss is measured on ordinary
    batches; all groups are measured in the same few passes.

    Args:
        scale: Length of the new fan-outs, relative to the mean of those that there are, or absolute.
        scale_by: ``"mean_norm"`` or ``"fixed"``.
        zero: Which side of new units is zero, ``"fan_in"`` or ``"fan_out"``; see `gradmax`.
        epsilon: Length of the fan-in of new units, relative to the others, behind activations with the derivative 0 at
            zero (``torch.relu``); see `gradmax`. The function changes by as much.
        together: Whether ``num_units``, or ``fraction``, is for all groups together: they go where they will get the
            largest gradient for their cost. Otherwise, as in the paper, each group gets as many.
        cost: What gains are divided by, with ``together``: ``"units"``, ``"parameters"``, ``"flops"``, ``"latency"``,
            or a function of the model and a group.
        oversampling: See `NewUnits.leading`.
        passes: Likewise: passes over the observed batches, at most.
        **common: When, where and how far; see `StructuralCallback`. Without ``num_units`` and ``fraction``, a quarter
            of the units is added.

    Example::

        trainer = L.Trainer(callbacks=[lg.GradMax(every_n_epochs=2, fraction=0.25, max_parameters=200_000)])
    """

    measures: ClassVar[bool] = True

    def __init__(
        self,
        scale: float = 0.5,
        scale_by: ScaleBy = "mean_norm",
        zero: Side = "fan_in",
        epsilon: float = 1e-4,
        together: bool = False,
        cost: Cost = "units",
        oversampling: int | None = None,
        passes: int = 2,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        for name, value, allowed in (("scale_by", scale_by, ("mean_norm", "fixed")), ("zero", zero, _SIDES)):
            if value not in allowed:
                raise MisconfigurationException(f"`{name}` should be one of {', '.join(allowed)}, found {value!r}.")
        if not scale > 0:
            raise MisconfigurationException(f"`scale` should be above 0, found {scale!r}.")
        if not 0 <= epsilon < 1:
            raise MisconfigurationException(f"`epsilon` should be in [0, 1), found {epsilon!r}.")
        if (oversampling is not None and oversampling < 0) or passes < 2:
            raise MisconfigurationException(
                f"`oversampling` should be at least 0 and `passes` at least 2, found {oversampling!r} and {passes!r}."
            )
        check_cost(cost)
        self._kind = _Kind(scale, scale_by, zero, epsilon)
        self.together = together
        self.cost: Cost = cost
        self.oversampling = oversampling
        self.passes = passes

    @override
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        new = self._measured(occasion)
        if not new.spaces:
            return []
        groups = {name: space.group for name, space in new.spaces.items()}
        fraction = 0.25 if self.num_units is None and self.fraction is None else self.fraction
        wanted = {name: rounded(group, self.num_units, fraction) for name, group in groups.items()}
        if self.together:
            total = in_all(list(groups.values()), self.num_units, fraction, default=0.25)
            wanted = {name: rounded(group, min(total, group.size), None) for name, group in groups.items()}
        pairs = new.leading(wanted, oversampling=self.oversampling, passes=self.passes)
        if self.together:
            gains = {n: (groups[n], (_length(new, n, self._kind) * pairs[n].values).square()) for n in groups}
            costs = unit_costs(occasion, self.cost, list(groups.values()))
            wanted = {n: len(chosen) for n, chosen in best_units(gains, total, costs=costs).items()}
        proposals = []
        for name, num_units in wanted.items():
            if len(pairs[name].values):
                generator = occasion.generator(f"{name} rest")
                proposals.append(Proposal(_edit(new, name, pairs[name], num_units, generator, self._kind)))
        return proposals

    def _measured(self, occasion: Occasion) -> NewUnits:
        """Return the measurements of the groups that can have such units; tell once about each that cannot."""
        why: dict[str, str] = {}
        new = NewUnits(occasion.model, occasion.groups, occasion.measured, occasion.generator, why.__setitem__)
        new.look()
        for name in list(new.spaces):
            reason = _cannot(new, name, self._kind)
            if reason is not None:
                why[name] = reason
                del new.spaces[name]
        for name, reason in why.items():
            self.leave_alone([name], reason)
        return new


_SIDES = ("fan_in", "fan_out")
