"""Firefly: the best of many small changes, splits of units and new units, found by gradient descent on all at once.

Wu, Liu, Stone, Liu, "Firefly Neural Architecture Descent: a General Approach for Growing Neural Networks", NeurIPS
2020, arXiv:2102.08574.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_grow.criteria.candidates import Candidates, Effects, searchable
from lightning_grow.criteria.objective import Objective
from lightning_grow.criteria.selection import best_units
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.surgery.edit import Edit
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import Proposal, in_all
from lightning_grow.trainer.structural_callback import StructuralCallback
from lightning_grow.trainer.unit_costs import Cost, check_cost, unit_costs


def firefly(
    model: nn.Module,
    groups: Sequence[AxisGroup],
    objective: Objective,
    num_units: int,
    generator: torch.Generator,
    *,
    share_new: float = 0.5,
    one_list: bool = False,
    num_candidates: int | None = None,
    radius: float = 0.1,
    steps: int = 16,
    lr: float = 0.05,
    points: int = 3,
    costs: Mapping[str, float] | None = None,
) -> list[tuple[Edit, float]]:
    r"""Split units and add new ones where, and how, the loss falls most.

    1. All units of all groups are split, and new units stand beside them, each with a small amplitude. Directions of
       the splits, fan-in and fan-out of the new units are trained (`Candidates.train_`).
    2. The effect of each candidate is its share in the change of the loss along the ray from no amplitude to all.
    3. The best are kept, wherever they are; the others never were. The loss should fall by what is predicted.

    The function changes: by :math:`O(\epsilon)` for a new unit, by :math:`O(\epsilon^2)` for a split.

    Args:
        model: The model; it is not changed.
        groups: The groups, each without an obstacle.
        objective: The loss; its batches are used for both steps.
        num_units: Units to add in all, ``>= 1``; fewer if fewer candidates lower the loss.
        generator: Draws the candidates to begin with; a CPU generator.
        share_new: Share of ``num_units`` for new units, in ``[0, 1]``; what splits leave of theirs goes to new units,
            too.
        one_list: Have one list for both instead, in which new units nearly always win: their effect is of lower order.
        num_candidates: New units tried in each group (70 in the published code); None: as many as it has, at least 16.
        radius: Amplitudes :math:`\epsilon`: of splits relative to the unit's fan-in vector, of new units relative to
            the mean length of the group's fan-out vectors; ``> 0``.
        steps: Training steps of the candidates, one batch each, for each lot of groups that share no tensor.
        lr: Step of a candidate's vectors, relative to their length.
        points: Midpoints of the integral along the ray.
        costs: Cost of a unit by group name: candidates are sorted by effect over cost.

    Returns:
        One edit for each group that grows, and the fall of the loss that it should bring (positive).

    Raises:
        ValueError: If a number is out of range.
        StructureError: If a group has an obstacle.
        MeasurementError: If the loss is not finite, there is no batch, or a group is frozen.

    Example:
        >>> from lightning_grow.structure import trace
        >>> from lightning_grow.surgery import apply_
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(32, 4)
        >>> objective = Objective(lambda m, x: (m(x) - x.prod(dim=1, keepdim=True)).square().mean(), [x])
        >>> groups = list(trace(model, x).groups.values())
        >>> grown = firefly(model, groups, objective, 4, torch.Generator().manual_seed(0))
        >>> apply_(model, [edit for edit, gain in grown])
        >>> model[0].out_features
        12

    Reference:
        Wu et al., "Firefly Neural Architecture Descent: a General Approach for Growing Neural Networks", NeurIPS 2020,
        arXiv:2102.08574.
    """
    if num_units < 1:
        raise ValueError(f"Expected `num_units` of at least 1, found {num_units}.")
    candidates = Candidates(
        model,
        groups,
        objective,
        generator,
        num_new=0 if share_new == 0 and not one_list else num_candidates,
        radius=radius,
        splits=share_new != 1 or one_list,
    )
    candidates.train_(steps, lr=lr)
    effects = candidates.effects(points)
    return best_candidates(candidates, effects, num_units, share_new=share_new, one_list=one_list, costs=costs)


def best_candidates(
    candidates: Candidates,
    effects: Mapping[str, Effects],
    num_units: int,
    *,
    share_new: float = 0.5,
    one_list: bool = False,
    costs: Mapping[str, float] | None = None,
) -> list[tuple[Edit, float]]:
    """Return the edits that keep the best candidates, and the fall of the loss that each should bring.

    Args:
        candidates: The candidates.
        effects: What each adds to the change of the loss, as `Candidates.effects` returns.
        num_units: Units to add in all, ``>= 1``.
        share_new: Share of them for new units; see `firefly`.
        one_list: Have one list for splits and new units; see `firefly`.
        costs: Cost of a unit by group name.

    Raises:
        ValueError: If ``share_new`` is not in ``[0, 1]``.
    """
    if not 0 <= share_new <= 1:
        raise ValueError(f"Expected `share_new` in [0, 1], found {share_new!r}.")
    groups = candidates.groups
    splits = {name: (groups[name], -effect.splits) for name, effect in effects.items()}
    new = {name: (groups[name], -effect.new) for name, effect in effects.items()}
    if one_list:
        both = {name: (group, torch.cat([gain, new[name][1]])) for name, (group, gain) in splits.items()}
        chosen = best_units(both, num_units, costs=costs)
        kept = {name: _apart(units, len(splits[name][1])) for name, units in chosen.items()}
    else:
        quota = num_units - round(share_new * num_units)
        best_splits = best_units(splits, quota, costs=costs) if quota else {}
        quota = num_units - sum(len(units) for units in best_splits.values())
        best_new = best_units(new, quota, costs=costs) if quota and share_new else {}
        kept = {name: (best_splits.get(name, []), best_new.get(name, [])) for name in groups}
    found = []
    for name, (split_units, new_units) in kept.items():
        if split_units or new_units:
            gain = float(splits[name][1][split_units].sum() + new[name][1][new_units].sum())
            found.append((candidates.edit(name, split_units, new_units), gain))
    return found


def _apart(units: Sequence[int], size: int) -> tuple[list[int], list[int]]:
    return [u for u in units if u < size], [u - size for u in units if u >= size]


class Firefly(StructuralCallback):
    """Splits units and adds new ones where the loss falls most, after a short search on the observed batches.

    Args:
        share_new: Share of the added units that are new, the others being splits; see `firefly`.
        one_list: Compare splits and new units in one list instead.
        num_candidates: New units tried in each group; by default as many as it has, at least 16.
        radius: Amplitude of a candidate, relative to the weights around it.
        search_steps: Training steps of the candidates for each lot of groups that share no tensor.
        search_lr: Step of a candidate's vectors in the search, relative to their length.
        points: Midpoints of the integral along the ray.
        cost: What a unit costs, for effects over costs: ``"units"`` (all the same), ``"parameters"``, ``"flops"``,
            ``"latency"``, or a function of the model and a group.
        window_batches: Ordinary batches observed before an event, on which candidates are trained and compared.
        **common: When, where and how far; see `StructuralCallback`. ``num_units`` is for all groups together,
            ``fraction`` a share of the units of all groups together; without either, one tenth is added.

    Example::

        trainer = L.Trainer(callbacks=[lg.Firefly(every_n_epochs=2, num_units=8, max_parameters=50_000)])
    """

    measures: ClassVar[bool] = True

    def __init__(
        self,
        share_new: float = 0.5,
        one_list: bool = False,
        num_candidates: int | None = None,
        radius: float = 0.1,
        search_steps: int = 16,
        search_lr: float = 0.05,
        points: int = 3,
        cost: Cost = "units",
        window_batches: int = 8,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not 0 <= share_new <= 1:
            raise MisconfigurationException(f"`share_new` should be in [0, 1], found {share_new!r}.")
        at_least = {"num_candidates": num_candidates, "points": points, "window_batches": window_batches}
        for name, number in at_least.items():
            if number is not None and number < 1:
                raise MisconfigurationException(f"`{name}` should be at least 1, found {number!r}.")
        if search_steps < 0:
            raise MisconfigurationException(f"`search_steps` should be at least 0, found {search_steps!r}.")
        for name, value in {"radius": radius, "search_lr": search_lr}.items():
            if not value > 0:
                raise MisconfigurationException(f"`{name}` should be above 0, found {value!r}.")
        check_cost(cost)
        self.share_new = share_new
        self.one_list = one_list
        self.num_candidates = num_candidates
        self.radius = radius
        self.search_steps = search_steps
        self.search_lr = search_lr
        self.points = points
        self.cost = cost
        self.window_batches = window_batches

    @override
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        groups = searchable(occasion.model, occasion.groups)
        if not groups:
            return []
        grown = firefly(
            occasion.model,
            groups,
            occasion.measured,
            in_all(groups, self.num_units, self.fraction, default=0.1),
            occasion.generator(type(self).__name__),
            share_new=self.share_new,
            one_list=self.one_list,
            num_candidates=self.num_candidates,
            radius=self.radius,
            steps=self.search_steps,
            lr=self.search_lr,
            points=self.points,
            costs=unit_costs(occasion, self.cost, groups),
        )
        return [Proposal(edit, gain) for edit, gain in sorted(grown, key=lambda pair: -pair[1])]
