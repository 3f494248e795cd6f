r"""What the loss gains when a unit becomes several that differ a little: curvature of single units, for any model.

A unit with fan-in :math:`\theta` is replaced by offspring :math:`\theta + \delta_k` that share its fan-out by
weights :math:`w_k`, with :math:`\sum_k w_k = 1` and :math:`\sum_k w_k \delta_k = 0`. Then

.. math:: L_{new} - L = \tfrac12 \sum_k w_k \delta_k^T S \delta_k + O(\delta^3),

with the *splitting matrix* :math:`S = E[\partial_h \ell \; \partial_\theta^2 h]` of the unit: its own second
derivative, weighted by the gradient that reaches it (Wu, Wang, Liu, "Splitting Steepest Descent", NeurIPS 2019,
arXiv:1910.02366). In a copy in which every unit stands twice, with half of its fan-out each, the loss at
:math:`\theta \pm v` has the gradient :math:`S v` with respect to :math:`v`: the gradient of the one twin less that of
the other. One backward pass gives it for all units, whatever layers make and use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_grow.criteria.lift import Lift, difference
from lightning_grow.criteria.objective import MeasurementError, Objective
from lightning_grow.criteria.overgrown import Overgrown, apart
from lightning_grow.criteria.units import UnitVectors
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.structure.errors import StructureError
from lightning_grow.surgery.edit import Edit


class Offspring(NamedTuple):
    """One of the units that take the place of another.

    Attributes:
        weight: Its share of the fan-out.
        offset: What is added to the fan-in: ``(length,)``.
    """

    weight: float
    offset: Tensor


def offspring_edit(model: nn.Module, group: AxisGroup, offspring: Mapping[int, Sequence[Offspring]]) -> Edit:
    """Return the edit that replaces units by their offspring.

    The first takes the place of the unit; the others are appended, unit by unit. With offsets 0 and weights that add
    up to 1, the function is preserved exactly where ``group.obstacle`` is None.

    Args:
        model: The model; only read.
        group: The group.
        offspring: By unit, what takes its place: at least one.

    Raises:
        ValueError: If a unit has no offspring or does not exist, or the group's step is violated.
    """
    vectors = UnitVectors(model, group, "produced")
    index, share = list(range(group.size)), [1.0] * group.size
    shifts = torch.zeros(group.size, vectors.length, dtype=torch.float64)
    appended: list[Tensor] = []
    for unit in sorted(offspring):
        if not offspring[unit] or not 0 <= unit < group.size:
            raise ValueError(f"Unit {unit} of '{group.name}' ({group.size} units) needs offspring, one at least.")
        first, *others = offspring[unit]
        share[unit], shifts[unit] = first.weight, first.offset.to(shifts)
        index += [unit] * len(others)
        share += [other.weight for other in others]
        appended += [other.offset.to(shifts) for other in others]
    shifts = torch.cat([shifts, torch.stack(appended)]) if appended else shifts
    moved = vectors.spread(shifts) if bool(shifts.any()) else {}
    return Edit(group, tuple(index), tuple(share), shifts=moved)


def can_split(model: nn.Module, group: AxisGroup) -> bool:
    """Return whether units of a group can be split so that the function is kept, and a gradient says how."""
    return group.obstacle is None and bool(UnitVectors(model, group, "produced").axes)


class Splits:
    """Measures splitting matrices of groups, without writing them out.

    Each product needs one pass over the objective's batches for each lot of groups that share no tensor (`apart`), in
    a copy in which one lot is doubled: up to two passes of the model itself, and twice its memory.

    The derivative is taken at a finite radius: exact to second order in it for smooth units. A unit with a kink has no
    curvature but at the kink; a finite radius sees the kinks that such a split would reach. That is the surrogate for
    ReLU that this library chooses: no activation is replaced by another.

    Args:
        model: The model; it is not changed.
        groups: The groups, each without an obstacle.
        objective: The loss.
        radius: Length of the offsets, relative to the fan-in vector of a unit, ``> 0``.

    Attributes:
        groups: The groups by name.
        objective: The loss.
        radii: Absolute radius of each unit: ``(size,)`` by group name.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[AxisGroup], objective: Objective, radius: float = 0.05
    ) -> None:
        if not radius > 0:
            raise ValueError(f"Expected `radius` above 0, found {radius!r}.")
        self.groups = {group.name: group for group in groups}
        self.objective = objective
        self._copies: list[tuple[list[AxisGroup], Overgrown]] = []
        self._fan_in: dict[str, Tensor] = {}
        self._lifts: dict[str, Lift] = {}
        self.radii: dict[str, Tensor] = {}
        named = dict(model.named_parameters())
        for group in groups:
            if group.obstacle is not None:
                raise StructureError(f"Cannot split units of '{group.name}' and keep the function: {group.obstacle}.")
            vectors = UnitVectors(model, group, "produced")
            if not vectors.axes:
                raise MeasurementError(f"The fan-in of '{group.name}' is frozen: no gradient says how to split it.")
            self._fan_in[group.name] = vectors.of(named)
            self._lifts[group.name] = Lift(vectors, _doubled(group))
            norms = self._fan_in[group.name].norm(dim=1)
            self.radii[group.name] = radius * torch.where(norms > 0, norms, norms.new_ones(()))
        self._model = model
        self._lots = apart(groups)

    def length(self, group: str) -> int:
        """Return the length of a fan-in vector."""
        return self._fan_in[group].shape[1]

    def directions(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random unit vectors for all units: ``(size, length)`` by group name."""
        found = {}
        for name, fan_in in self._fan_in.items():
            drawn = torch.randn(fan_in.shape, dtype=torch.float64, generator=generator).to(fan_in)
            found[name] = drawn / drawn.norm(dim=1, keepdim=True)
        return found

    def products(self, vectors: Mapping[str, Tensor], batch: int | None = None) -> dict[str, Tensor]:
        """Return the product of each unit's splitting matrix with a vector of its own.

        Args:
            vectors: Unit vectors, ``(size, length)``, for some or all groups, by name.
            batch: Position of the one batch to use, instead of all.

        Returns:
            ``(size, length)`` by group name; 0 where there is nothing but round-off.

        Raises:
            MeasurementError: If the loss or its gradient is not finite, or there is no batch.
        """
        objective = self.objective if batch is None else self.objective.on([self.objective.batches[batch]])
        found: dict[str, Tensor] = {}
        for lot in self._lots:
            chosen = [group for group in lot if group.name in vectors]
            if not chosen:
                continue
            twins = self._twins(lot)
            for group in lot:
                fan_in = self._fan_in[group.name]
                offset = torch.zeros_like(fan_in)
                if group.name in vectors:
                    offset = vectors[group.name].to(fan_in) * self.radii[group.name][:, None]
                both = torch.cat([fan_in + offset, fan_in - offset])
                twins.write_(group.name, "produced", self._lifts[group.name].up(both))
            _, gradients = twins.gradients(objective, roles=("produced",))
            for group in chosen:
                gradient = self._lifts[group.name].down(gradients[group.name, "produced"])
                found[group.name] = difference(*gradient.chunk(2)) / self.radii[group.name][:, None]
        return found

    def _twins(self, lot: list[AxisGroup]) -> Overgrown:
        for members, copy in self._copies:
            if members is lot:
                return copy
        twins = Overgrown(self._model, [_doubled(group) for group in lot])
        self._copies.append((lot, twins))
        return twins


def _doubled(group: AxisGroup) -> Edit:
    return Edit(group, (*range(group.size),) * 2, (0.5,) * (2 * group.size))
