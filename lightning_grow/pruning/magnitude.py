"""Magnitude pruning: the units with the smallest weights go, whole.

Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv:1608.08710.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_grow.criteria.magnitude import magnitude
from lightning_grow.structure.axes import AxisGroup, Role
from lightning_grow.surgery.edit import Edit, prune
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import Proposal, in_all
from lightning_grow.trainer.structural_callback import StructuralCallback


def prune_lowest(
    scores: Mapping[str, tuple[AxisGroup, Tensor]], num_units: int, min_size: int | Mapping[str, int] = 1
) -> list[Edit]:
    """Remove the units with the lowest scores, wherever they are.

    One threshold for all groups: a group whose units all matter loses none. Within a group, units go in multiples of
    ``group.step``, and at least ``min_size`` units (rounded up to the step) stay.

    Args:
        scores: By group name, the group and one score per unit, ``(group.size,)``; higher = worth more.
        num_units: Units to remove in all, at least 1; fewer go if the groups cannot spare them.
        min_size: Units that each group keeps, at least 1; or, by group name, units that this group keeps.

    Returns:
        One edit for each group that loses units, in the order of ``scores``.

    Raises:
        ValueError: If a number is out of range, or the scores of a group are not one per unit.
    """
    kept = min_size if isinstance(min_size, Mapping) else dict.fromkeys(scores, min_size)
    if num_units < 1 or min(kept.values(), default=1) < 1:
        raise ValueError(f"Expected `num_units` and `min_size` of at least 1, found {num_units} and {min_size}.")
    bundles: list[tuple[float, str, list[int]]] = []
    for name, (group, score) in scores.items():
        if score.shape != (group.size,):
            raise ValueError(f"Expected {group.size} scores for '{name}', found shape {tuple(score.shape)}.")
        order = torch.argsort(score, stable=True).tolist()
        least = -(-kept.get(name, 1) // group.step) * group.step
        spare = max(0, group.size - least) // group.step * group.step
        for begin in range(0, spare, group.step):
            units = order[begin : begin + group.step]
            bundles.append((float(score[units].mean()), name, units))
    gone: dict[str, list[int]] = {name: [] for name in scores}
    left = num_units
    for _, name, units in sorted(bundles, key=lambda bundle: bundle[0]):  # stable: ties go by order of the groups
        if len(units) <= left:
            gone[name] += units
            left -= len(units)
    return [prune(scores[name][0], sorted(units)) for name, units in gone.items() if units]


class MagnitudePruning(StructuralCallback):
    """Removes the units whose weights are smallest, relative to the mean unit of their group.

    The model becomes smaller, and faster, at once: whole rows and columns go, no mask stays. A budget says when to
    stop: pruning goes on at each event as long as the model exceeds it. Without a budget, `stop` says so.

    Args:
        min_size: Units that each group keeps at least.
        roles: Whose weights count: those that make a unit (``"produced"``), that use it (``"consumed"``), or that it
            passes on its way (``"carried"``).
        p: Exponent of the norm; 1 in the paper.
        **common: When, where and how far; see `StructuralCallback`. ``num_units`` is for all groups together,
            ``fraction`` a share of the units of all groups together; without either, one tenth goes.

    Example::

        trainer = L.Trainer(callbacks=[lg.MagnitudePruning(every_n_epochs=1, start=5, max_parameters=50_000)])
    """

    shrinks: ClassVar[bool] = True

    def __init__(self, min_size: int = 1, roles: list[Role] | None = None, p: float = 2.0, **common: Any) -> None:
        super().__init__(**common)
        if min_size < 1:
            raise MisconfigurationException(f"`min_size` should be at least 1, found {min_size!r}.")
        if self.fraction is not None and not self.fraction < 1:
            raise MisconfigurationException(f"`fraction` should be below 1 for pruning, found {self.fraction!r}.")
        unknown = set(roles or ()) - {"produced", "carried", "consumed"}
        if unknown or roles == []:
            raise MisconfigurationException(
                f"`roles` should name some of 'produced', 'carried' and 'consumed', found {roles!r}."
            )
        if not p > 0:
            raise MisconfigurationException(f"`p` should be above 0, found {p!r}.")
        self.min_size = min_size
        self.roles: list[Role] = roles or ["produced", "consumed"]
        self.p = p

    @override
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        groups = [group for group in occasion.groups if _has(group, self.roles, occasion)]
        scores = {g.name: (g, magnitude(g, occasion.model, roles=self.roles, p=self.p)) for g in groups}
        if not scores:
            return []
        num_units = in_all(groups, self.num_units, self.fraction, default=0.1)
        min_size = {name: max(self.min_size, occasion.least_units.get(name, 1)) for name in scores}
        return [Proposal(edit) for edit in prune_lowest(scores, num_units, min_size)]


def _has(group: AxisGroup, roles: Sequence[Role], occasion: Occasion) -> bool:
    names = {name for name, _ in occasion.model.named_parameters()}
    return any(axis.role in roles and axis.tensor in names for axis in group.axes)
