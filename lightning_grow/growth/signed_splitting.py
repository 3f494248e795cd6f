"""Signed splitting steepest descent: offspring with negative shares too, where no other split lowers the loss.

Wu, Ye, Lei, Lee, Liu, "Steepest Neural Architecture Descent: Escaping Local Optimum with Signed Neural Splitting",
arXiv:2003.10392.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_grow.criteria.curvature import Extremes, Form, check_form, check_search, extremes, fits_in_memory
from lightning_grow.criteria.objective import MeasurementError, Objective
from lightning_grow.criteria.splits import Offspring, Splits, can_split, offspring_edit
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.surgery.edit import Edit
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import Proposal
from lightning_grow.trainer.structural_callback import StructuralCallback
from lightning_grow.trainer.unit_costs import Cost, allowance, check_cost, unit_costs

WAYS = (2, 3, 4)
"""Offspring that a unit can have. More than four never help."""


class Share(NamedTuple):
    """One offspring, before its directions are known.

    Attributes:
        weight: Its share of the fan-out, perhaps negative.
        lowest: How far it lies along the lowest eigenvector, in radii.
        highest: How far it lies along the highest eigenvector, in radii.
    """

    weight: float
    lowest: float = 0.0
    highest: float = 0.0


class Scheme(NamedTuple):
    r"""How a unit is split.

    Attributes:
        value: :math:`Q = \sum_k w_k \delta_k^T S \delta_k`: the loss changes by :math:`\tfrac12 \epsilon^2 Q`.
        shares: The offspring.
    """

    value: float
    shares: tuple[Share, ...]


def signed_scheme(lowest: float, highest: float, ways: int, c: float = 3.0) -> Scheme:
    r"""Return the best split of a unit into at most so many, with shares of both signs.

    It minimises :math:`Q` under :math:`\sum w = 1`, :math:`\sum |w| \le c`, :math:`\sum w \delta = 0`,
    :math:`\|\delta\| \le 1`. With ``c=1`` all shares are positive, and two offspring are best.

    Args:
        lowest: Smallest eigenvalue of the splitting matrix.
        highest: Largest eigenvalue.
        ways: Offspring at most: 2, 3 or 4.
        c: Bound of the sum of the shares' magnitudes, ``>= 1``.

    Returns:
        The scheme; value 0 and no offspring if no split lowers the loss.

    Note:
        The mixed scheme of three, where both ends of the spectrum matter, is not in the paper as far as is known here;
        it was derived for this project, and checked numerically.

    Example:
        >>> signed_scheme(-1.0, 2.0, ways=4).value
        -4.0
        >>> [share.weight for share in signed_scheme(1.0, 2.0, ways=2).shares]
        [2.0, -1.0]
    """
    if ways not in WAYS:
        raise ValueError(f"Expected `ways` of 2, 3 or 4, found {ways}.")
    if not c >= 1:
        raise ValueError(f"Expected `c` of at least 1, found {c!r}.")
    schemes = [Scheme(0.0, ()), *_of_two(lowest, highest, c)]
    if ways >= 3:
        schemes += _of_three(lowest, highest, c)
    if ways >= 4 and lowest < 0 < highest:
        schemes.append(_of_four(lowest, highest, c))
    return min(schemes, key=lambda scheme: scheme.value)  # the first of equals: with fewer offspring


def _of_two(lowest: float, highest: float, c: float) -> list[Scheme]:
    ratio = (c - 1) / (c + 1)
    return [
        Scheme(lowest, (Share(0.5, 1.0), Share(0.5, -1.0))),
        Scheme(-ratio * highest, (Share((c + 1) / 2, highest=ratio), Share(-(c - 1) / 2, highest=1.0))),
    ]


def _of_three(lowest: float, highest: float, c: float) -> list[Scheme]:
    if c == 1:  # the third has no share
        return []
    more, less = (c + 1) / 2, (c - 1) / 2
    schemes = [
        Scheme(more * lowest, (Share(more / 2, 1.0), Share(more / 2, -1.0), Share(-less))),
        Scheme(-less * highest, (Share(more), Share(-less / 2, highest=1.0), Share(-less / 2, highest=-1.0))),
    ]
    if lowest < 0 < highest:
        y = less / more
        x = math.sqrt(1 - y * y)
        mixed = more * lowest - less / (c + 1) * (2 * highest + (c - 1) * lowest)
        schemes.append(Scheme(mixed, (Share(more / 2, x, y), Share(more / 2, -x, y), Share(-less, highest=1.0))))
    return schemes


def _of_four(lowest: float, highest: float, c: float) -> Scheme:
    more, less = (c + 1) / 2, (c - 1) / 2
    if c == 1:
        return Scheme(lowest, (Share(0.5, 1.0), Share(0.5, -1.0)))
    low = (Share(more / 2, 1.0), Share(more / 2, -1.0))
    high = (Share(-less / 2, highest=1.0), Share(-less / 2, highest=-1.0))
    return Scheme(more * lowest - less * highest, low + high)


def best_schemes(
    splits: Splits,
    curvature: Mapping[str, Extremes],
    num_units: int,
    *,
    c: float = 3.0,
    ways: Sequence[int] = WAYS,
    costs: Mapping[str, float] | None = None,
    max_cost: float | None = None,
) -> dict[str, dict[int, Scheme]]:
    """Choose which units to split, and how many ways each: what gains most for each unit that it adds.

    A knapsack in which each unit is split in one way or not at all, solved greedily as its linear relaxation: a unit
    goes from one way to one with more offspring when what that gains more, for the units that it adds more, is next in
    line. With costs, gains are compared for their cost. In groups whose units come in steps, so many units go together.

    Args:
        splits: The groups, with their radii.
        curvature: The extreme eigenpairs.
        num_units: Units to add in all, ``>= 1``: a split into ``m`` adds ``m - 1``.
        c: Bound of the sum of the shares' magnitudes, ``>= 1``.
        ways: Offspring that a unit may have at most, of 2, 3 and 4.
        costs: Cost of one unit, by group name.
        max_cost: What all new units together may cost at most.

    Returns:
        By group name and unit, the scheme; groups without any are left out.
    """
    if num_units < 1:
        raise ValueError(f"Expected `num_units` of at least 1, found {num_units}.")
    moves: list[_Move] = []
    for name, ends in curvature.items():
        group = splits.groups[name]
        schemes, gains = _options(splits, name, ends, c, ways)
        best = torch.tensor([max(gain.values(), default=0.0) for gain in gains], dtype=torch.float64)
        order = best.argsort(descending=True, stable=True).tolist()
        for begin in range(0, len(order) // group.step * group.step, group.step):
            units = order[begin : begin + group.step]
            moves += _moves(name, units, schemes, gains, 1.0 if costs is None else costs[name])
    found: dict[str, dict[int, Scheme]] = {}
    left, money = num_units, max_cost
    closed: set[tuple[str, int]] = set()
    for move in sorted(moves, key=lambda move: -move.ratio):  # stable
        key = (move.group, move.units[0])
        if money is not None and move.cost > money:
            break
        if move.added > left or key in closed:
            closed.add(key)
            continue
        found.setdefault(move.group, {}).update(zip(move.units, move.schemes, strict=True))
        left -= move.added
        money = None if money is None else money - move.cost
    return found


class _Move(NamedTuple):
    """From one way to split some units to one with more offspring."""

    ratio: float
    group: str
    units: list[int]
    schemes: list[Scheme]
    added: int
    cost: float


def _options(
    splits: Splits, name: str, ends: Extremes, c: float, ways: Sequence[int]
) -> tuple[list[dict[int, Scheme]], list[dict[int, float]]]:
    """Return for each unit, by the number of units that it adds, the scheme and its gain."""
    schemes: list[dict[int, Scheme]] = []
    gains: list[dict[int, float]] = []
    radii = splits.radii[name].double().tolist()
    for low, high, radius in zip(ends.lowest.tolist(), ends.highest.tolist(), radii, strict=True):
        options = [signed_scheme(low, high, way, c) for way in sorted(ways)]
        schemes.append({len(s.shares) - 1: s for s in options if s.value < 0})
        gains.append({added: -0.5 * radius**2 * scheme.value for added, scheme in schemes[-1].items()})
    return schemes, gains


def _moves(
    name: str, units: list[int], schemes: list[dict[int, Scheme]], gains: list[dict[int, float]], cost: float
) -> list[_Move]:
    """Return the steps along the upper hull of gain over added units: each gains less for its cost than the last."""
    common = sorted(set.intersection(*(set(gains[unit]) for unit in units)))
    points = {added: sum(gains[unit][added] for unit in units) for added in common}
    moves: list[_Move] = []
    at, gained = 0, 0.0
    while max(points, default=0) > at:
        slopes = {added: (gain - gained) / (added - at) for added, gain in points.items() if added > at}
        added = max(slopes, key=lambda added: slopes[added])  # the first of equals: fewest
        if slopes[added] <= 0:
            break
        more = (added - at) * len(units)
        chosen = [schemes[unit][added] for unit in units]
        moves.append(_Move(slopes[added] / (cost * len(units)), name, units, chosen, more, more * cost))
        at, gained = added, points[added]
    return moves


def signed_splits(
    model: nn.Module,
    groups: Sequence[AxisGroup],
    objective: Objective,
    num_units: int,
    *,
    c: float = 3.0,
    ways: Sequence[int] = WAYS,
    form: Form = "lanczos",
    radius: float = 0.1,
    steps: int = 8,
    costs: Mapping[str, float] | None = None,
    max_cost: float | None = None,
    generator: torch.Generator | None = None,
) -> list[tuple[Edit, float]]:
    r"""Split units into two, three or four whose shares of the fan-out may be negative.

    Where the splitting matrix :math:`S` of a unit is positive, no split with positive shares lowers the loss; with
    shares :math:`w` of both signs, :math:`\sum w = 1` and :math:`\sum |w| \le c`, every :math:`S \ne 0` does.

    Args:
        model: The model; only read.
        groups: The groups whose units may be split, each without an obstacle and not frozen.
        objective: The loss.
        num_units: Units to add in all, ``>= 1``: a split into ``m`` adds ``m - 1``.
        c: Bound of the sum of the shares' magnitudes, ``>= 1``: fan-out norms grow up to so many times. With 1 this is
            `SplittingSteepestDescent`.
        ways: Offspring that a unit may have, of 2, 3 and 4.
        form: How eigenpairs are found: ``"lanczos"``, ``"rayleigh"`` or ``"exact"``.
        radius: Longest offset relative to the length of the unit's fan-in vector, ``> 0``.
        steps: Passes over the batches, ``>= 1``, for the forms other than ``"exact"``; ``"rayleigh"`` takes twice as
            many, for it finds the ends of a spectrum one by one.
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
        >>> splits = signed_splits(model, [trace(model, x)["0"]], objective, num_units=3)
        >>> apply_(model, [edit for edit, _ in splits])
        >>> model[0].out_features, objective.value(model) < before
        (11, True)

    Reference:
        Wu et al., "Steepest Neural Architecture Descent: Escaping Local Optimum with Signed Neural Splitting",
        arXiv:2003.10392.
    """
    check_form(form)
    _check(c, ways)
    splits = Splits(model, groups, objective, radius)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    curvature = extremes(splits, form, generator, steps)
    chosen = best_schemes(splits, curvature, num_units, c=c, ways=ways, costs=costs, max_cost=max_cost)
    found = []
    for name, schemes in chosen.items():
        offspring = {unit: _offspring(scheme, splits, curvature[name], name, unit) for unit, scheme in schemes.items()}
        gain = -0.5 * sum(float(splits.radii[name][unit]) ** 2 * scheme.value for unit, scheme in schemes.items())
        found.append((offspring_edit(model, splits.groups[name], offspring), gain))
    return found


def _offspring(scheme: Scheme, splits: Splits, ends: Extremes, group: str, unit: int) -> list[Offspring]:
    radius = float(splits.radii[group][unit])
    low, high = radius * ends.lowest_vectors[unit], radius * ends.highest_vectors[unit]
    return [Offspring(share.weight, share.lowest * low + share.highest * high) for share in scheme.shares]


def _check(c: float, ways: Sequence[int]) -> None:
    if not c >= 1:
        raise ValueError(f"Expected `c` of at least 1, found {c!r}.")
    if not ways or not set(ways) <= set(WAYS):
        raise ValueError(f"Expected `ways` to be some of 2, 3 and 4, found {list(ways)}.")


class SignedSplitting(StructuralCallback):
    """Splits units into two, three or four, some with negative shares: also where no ordinary split lowers the loss.

    Units of all chosen groups are on one list, and each is split in the way that gains most for the units it adds.
    Groups with an obstacle and frozen groups are left alone.

    Args:
        c: How large the shares' magnitudes may be together, ``>= 1``. Fan-out norms, and with them gradients and weight
            decay, grow up to so many times. With 1 this is `SplittingSteepestDescent`.
        ways: Offspring that a unit may have, of 2, 3 and 4; all three by default.
        form: ``"lanczos"``, ``"rayleigh"`` or ``"exact"``; see `signed_splits`.
        radius: Longest offset, relative to the length of the unit's fan-in vector.
        steps: Passes over the window's batches, for the forms other than ``"exact"``.
        cost: What a gain is divided by: ``"units"`` (all the same), ``"parameters"``, ``"flops"`` or ``"latency"`` of
            one more unit, or a function of the model and a group: energy, say.
        **common: When, where and how far; see `StructuralCallback`. ``num_units`` is for all groups together;
            ``fraction`` is a share of what all their units cost. Without either, ``fraction`` is 0.3.

    Raises:
        MisconfigurationException: If an argument is out of range.

    Example::

        trainer = L.Trainer(callbacks=[lg.SignedSplitting(on_plateau="val_loss", num_units=6)])
    """

    measures: ClassVar[bool] = True

    def __init__(
        self,
        c: float = 3.0,
        ways: list[int] | None = None,
        form: Form = "lanczos",
        radius: float = 0.1,
        steps: int = 8,
        cost: Cost = "units",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        ways = list(WAYS) if ways is None else ways
        try:
            check_search(form, radius, steps)
            _check(c, ways)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        check_cost(cost)
        self.c = c
        self.ways = ways
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
        splits = signed_splits(
            occasion.model,
            groups,
            occasion.measured,
            num_units,
            c=self.c,
            ways=self.ways,
            form=self.form,
            radius=self.radius,
            steps=self.steps,
            costs=costs,
            max_cost=max_cost,
            generator=occasion.generator("splits"),
        )
        if not splits:
            raise MeasurementError("no unit gains anything by a split, or none that gains fits.")
        return [Proposal(edit, gain) for edit, gain in splits]
