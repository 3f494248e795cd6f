"""Splitting steepest descent: units whose own curvature is negative become two, which part along it.

Wu, Wang, Liu, "Splitting Steepest Descent for Growing Neural Architectures", NeurIPS 2019, arXiv:1910.02366, and its
fast form: Wang et al., "Energy-Aware Neural Architecture Optimization with Fast Splitting Steepest Descent",
arXiv:1910.03103.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_grow.criteria.curvature import Extremes, Form, check_form, check_search, extremes, fits_in_memory
from lightning_grow.criteria.objective import MeasurementError, Objective
from lightning_grow.criteria.selection import best_units
from lightning_grow.criteria.splits import Offspring, Splits, can_split, offspring_edit
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.surgery.edit import Edit
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import Proposal
from lightning_grow.trainer.structural_callback import StructuralCallback
from lightning_grow.trainer.unit_costs import Cost, allowance, check_cost, unit_costs


def split_gains(splits: Splits, curvature: Mapping[str, Extremes]) -> dict[str, tuple[AxisGroup, Tensor]]:
    r"""Return by how much the loss should fall if a unit became two: :math:`-\tfrac12 \epsilon^2 \lambda_{min}`.

    Gains of several units add up, across layers too, up to terms of higher order in the radius.

    Args:
        splits: The groups, with the radius :math:`\epsilon` of each unit.
        curvature: The extreme eigenpairs of their splitting matrices.

    Returns:
        By group name, the group and one gain for each unit, ``(size,)``; above 0 where a split helps.
    """
    gains = {}
    for name, ends in curvature.items():
        radius = splits.radii[name].to(ends.lowest)
        gains[name] = splits.groups[name], -0.5 * radius**2 * ends.lowest
    return gains


def steepest_splits(
    model: nn.Module,
    groups: Sequence[AxisGroup],
    objective: Objective,
    num_units: int,
    *,
    form: Form = "lanczos",
    radius: float = 0.1,
    steps: int = 8,
    costs: Mapping[str, float] | None = None,
    max_cost: float | None = None,
    generator: torch.Generator | None = None,
) -> list[tuple[Edit, float]]:
    r"""Split the units whose splitting makes the loss fall most, wherever they are.

    Unit :math:`\theta` becomes two, :math:`\theta \pm \epsilon v_{min}`, each with half of its fan-out, where
    :math:`\lambda_{min}, v_{min}` is the lowest eigenpair of its splitting matrix
    :math:`S = E[\partial_h \ell \; \partial_\theta^2 h]`. No other split into units with positive shares makes the loss
    fall more, to second order. Units with :math:`\lambda_{min} \ge 0` are never split.

    Args:
        model: The model; only read.
        groups: The groups whose units may be split, each without an obstacle and not frozen.
        objective: The loss.
        num_units: Units to add in all, ``>= 1``; fewer if fewer gain something.
        form: ``"lanczos"``: products with the matrices alone, ``steps`` passes over the objective's batches for each
            lot of groups that share no tensor; ``"rayleigh"``: descent of the Rayleigh quotient, one batch after the
            other, as published for the fast form; ``"exact"``: whole matrices, as published first, for small layers.
        radius: :math:`\epsilon` relative to the length of the unit's fan-in vector, ``> 0``; to a length of 1 where
            that is 0.
        steps: Passes over the batches, ``>= 1``, for the forms other than ``"exact"``.
        costs: Cost of one unit, by group name, above 0; gains are compared for their cost.
        max_cost: What all new units together may cost at most.
        generator: Draws where to begin; by default one with seed 0. The global random state is not touched.

    Returns:
        For each group with units to split, the edit and by how much it should lower the loss. Nothing is changed yet.

    Raises:
        StructureError: If a group has an obstacle, or the matrices of the exact form would not fit.
        MeasurementError: If a group is frozen, the loss or its gradient is not finite, or there is no batch.
        ValueError: If a number is out of range.

    Example:
        >>> from lightning_grow.structure import trace
        >>> from lightning_grow.surgery import apply_
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.ones(3, 4)
        >>> objective = Objective(lambda m, batch: nn.functional.mse_loss(m(batch), batch[:, :1]), [x])
        >>> before = objective.value(model)
        >>> splits = steepest_splits(model, [trace(model, x)["0"]], objective, num_units=2)
        >>> apply_(model, [edit for edit, _ in splits])
        >>> model[0].out_features, objective.value(model) < before
        (10, True)
    """
    if num_units < 1:
        raise ValueError(f"Expected `num_units` of at least 1, found {num_units}.")
    check_form(form)
    splits = Splits(model, groups, objective, radius)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    curvature = extremes(splits, form, generator, steps, both=False)
    gains = split_gains(splits, curvature)
    found = []
    for name, units in best_units(gains, num_units, costs=costs, max_cost=max_cost).items():
        group, gain = gains[name]
        offsets = splits.radii[name][:, None] * curvature[name].lowest_vectors
        twins = {unit: [Offspring(0.5, offsets[unit]), Offspring(0.5, -offsets[unit])] for unit in units}
        found.append((offspring_edit(model, group, twins), float(gain[units].sum())))
    return found


class SplittingSteepestDescent(StructuralCallback):
    """Splits units in two along the direction in which the loss falls fastest, once plain descent has nothing to say.

    Units of all chosen groups are on one list. Groups with an obstacle and frozen groups are left alone, units that no
    split would better, too; with ``form="exact"`` also groups whose matrices would not fit, with a warning.

    Args:
        form: ``"lanczos"``, ``"rayleigh"`` or ``"exact"``; see `steepest_splits`.
        radius: How far the two part, relative to the length of the unit's fan-in vector.
        steps: Passes over the window's batches, for the forms other than ``"exact"``.
        cost: What a gain is divided by: ``"units"`` (all the same), ``"parameters"``, ``"flops"`` or ``"latency"`` of
            one more unit, or a function of the model and a group: energy, say.
        **common: When, where and how far; see `StructuralCallback`. ``num_units`` is for all groups together;
            ``fraction`` is a share of what all their units cost. Without either, ``fraction`` is 0.3.

    Raises:
        MisconfigurationException: If an argument is out of range.

    Example::

        trainer = L.Trainer(callbacks=[lg.SplittingSteepestDescent(on_plateau="val_loss", fraction=0.3)])
    """

    measures: ClassVar[bool] = True

    def __init__(
        self, form: Form = "lanczos", radius: float = 0.1, steps: int = 8, cost: Cost = "units", **common: Any
    ) -> None:
        super().__init__(**common)
        try:
            check_search(form, radius, steps)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        check_cost(cost)
        self.form: Form = form
        self.radius = radius
        self.steps = steps
        self.cost = cost

    @override
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        groups = [group for group in occasion.groups if can_split(occasion.model, group)]
        if self.form == "exact":
            large = [group for group in groups if not fits_in_memory(occasion.model, group)]
            groups = [group for group in groups if group not in large]
            why = "their splitting matrices would be too large. Use form='lanczos'."
            self.leave_alone((group.name for group in large), why, logging.WARNING)
        if not groups:
            return []
        costs = unit_costs(occasion, self.cost, groups)
        num_units, max_cost = allowance(groups, costs, self.num_units, self.fraction, default=0.3)
        splits = steepest_splits(
            occasion.model,
            groups,
            occasion.measured,
            num_units,
            form=self.form,
            radius=self.radius,
            steps=self.steps,
            costs=costs,
            max_cost=max_cost,
            generator=occasion.generator("splits"),
        )
        if not splits:
            raise MeasurementError("no unit gains anything by becoming two (see `SignedSplitting`).")
        return [Proposal(edit, gain) for edit, gain in splits]
