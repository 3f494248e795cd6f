"""Growth at random: the baseline that every criterion has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_grow.criteria.selection import best_units
from lightning_grow.criteria.splits import Offspring, offspring_edit
from lightning_grow.criteria.units import UnitVectors
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.structure.errors import StructureError
from lightning_grow.surgery.edit import Edit, widen
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import Proposal, in_all
from lightning_grow.trainer.structural_callback import StructuralCallback


def random_new_units(
    model: nn.Module, groups: Sequence[AxisGroup], num_units: int, generator: torch.Generator
) -> list[Edit]:
    """Append units with random fan-in and a fan-out of zero, in layers drawn at random.

    A layer is drawn with a probability in proportion to the units that it has. A fan-in vector, biases included, is
    uniform on the sphere, and as long as those of the layer are in the mean. The function is preserved exactly.

    Args:
        model: The model; only read.
        groups: The groups, each without an obstacle.
        num_units: Units to append in all, ``>= 1``; fewer if the steps of the groups do not add up to it.
        generator: Draws layers and weights; a CPU generator. The global random state is not touched.

    Returns:
        One edit for each group that grows.

    Raises:
        ValueError: If ``num_units`` is below 1.
        StructureError: If a group has an obstacle.

    Example:
        >>> from lightning_grow.structure import trace
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> groups = list(trace(model, torch.zeros(1, 4)).groups.values())
        >>> [str(edit) for edit in random_new_units(model, groups, 3, torch.Generator().manual_seed(0))]
        ['0: 8 -> 11 units']
    """
    _check(groups, num_units)
    counts = [0] * len(groups)
    left = num_units
    while True:
        weights = torch.tensor([float(g.size) if g.step <= left else 0.0 for g in groups], dtype=torch.float64)
        if not bool(weights.any()):
            break
        place = int(torch.multinomial(weights, 1, generator=generator))
        counts[place] += groups[place].step
        left -= groups[place].step
    named = dict(model.named_parameters())
    edits = []
    for group, count in zip(groups, counts, strict=True):
        vectors = UnitVectors(model, group, "produced")
        if count and vectors.axes:
            length = float(vectors.of(named).norm(dim=1).mean()) or 1.0
            drawn = torch.stack([length * _direction(vectors.length, generator) for _ in range(count)])
            edits.append(widen(group, count, generator, values=vectors.spread(drawn, new=count)))
        elif count:
            edits.append(widen(group, count, generator))
    return edits


def random_splits(
    model: nn.Module,
    groups: Sequence[AxisGroup],
    num_units: int,
    generator: torch.Generator,
    *,
    radius: float = 0.1,
) -> list[Edit]:
    r"""Split units drawn at random, in directions drawn at random.

    A unit with fan-in :math:`\theta` becomes two with :math:`\theta \pm \epsilon v` and half of its fan-out each, ``v``
    uniform on the sphere and :math:`\epsilon` = ``radius`` times the length of :math:`\theta`. The function changes by
    :math:`O(\epsilon^2)`, for better or worse.

    Args:
        model: The model; only read.
        groups: The groups, each without an obstacle. All their units are as likely to be drawn.
        num_units: Units to split in all, ``>= 1``; fewer if there are not so many.
        generator: Draws units and directions; a CPU generator. The global random state is not touched.
        radius: Length of the offsets, relative to the fan-in vector, ``>= 0``.

    Returns:
        One edit for each group that grows.

    Raises:
        ValueError: If a number is out of range.
        StructureError: If a group has an obstacle.

    Example:
        >>> from lightning_grow.structure import trace
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> groups = list(trace(model, torch.zeros(1, 4)).groups.values())
        >>> [str(edit) for edit in random_splits(model, groups, 3, torch.Generator().manual_seed(0))]
        ['0: 8 -> 11 units']
    """
    _check(groups, num_units)
    if radius < 0:
        raise ValueError(f"Expected `radius` of at least 0, found {radius!r}.")
    draws = {g.name: (g, torch.rand(g.size, dtype=torch.float64, generator=generator) + 1e-9) for g in groups}
    chosen = best_units(draws, num_units)
    named = dict(model.named_parameters())
    edits = []
    for group in groups:
        fan_in = UnitVectors(model, group, "produced").of(named).to("cpu", torch.float64)
        offspring: dict[int, Sequence[Offspring]] = {}
        for unit in chosen.get(group.name, []):
            offset = radius * _length(fan_in[unit]) * _direction(fan_in.shape[1], generator)
            offspring[unit] = (Offspring(0.5, offset), Offspring(0.5, -offset))
        if offspring:
            edits.append(offspring_edit(model, group, offspring))
    return edits


def _check(groups: Sequence[AxisGroup], num_units: int) -> None:
    if num_units < 1:
        raise ValueError(f"Expected `num_units` of at least 1, found {num_units}.")
    for group in groups:
        if group.obstacle is not None:
            raise StructureError(f"Cannot grow '{group.name}' and keep the function: {group.obstacle}.")


def _length(vector: Tensor) -> float:
    """Return the length of a fan-in vector; 1 for a unit that has none."""
    return float(vector.norm()) or 1.0


def _direction(length: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(length, dtype=torch.float64, generator=generator)
    return drawn.div(drawn.norm())


class RandomGrowth(StructuralCallback):
    """Adds units at random, in random layers: no loss is looked at, and nothing is measured.

    Args:
        kind: ``"new"``: units with random fan-in and a fan-out of zero; the function is kept. ``"split"``: random units
            are split in random directions; the function changes a little.
        radius: Length of the offsets of a split, relative to the fan-in vector; see `random_splits`.
        **common: When, where and how far; see `StructuralCallback`. ``num_units`` is for all groups together,
            ``fraction`` a share of the units of all groups together; without either, one tenth is added.

    Example::

        trainer = L.Trainer(callbacks=[lg.RandomGrowth(kind="split", every_n_epochs=2, num_units=8)])
    """

    def __init__(self, kind: Literal["new", "split"] = "new", radius: float = 0.1, **common: Any) -> None:
        super().__init__(**common)
        if kind not in ("new", "split"):
            raise MisconfigurationException(f"`kind` should be 'new' or 'split', found {kind!r}.")
        if radius < 0:
            raise MisconfigurationException(f"`radius` should be at least 0, found {radius!r}.")
        self.kind = kind
        self.radius = radius

    @override
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        groups = [group for group in occasion.groups if group.obstacle is None]
        if not groups:
            return []
        num_units = in_all(groups, self.num_units, self.fraction, default=0.1)
        generator = occasion.generator(type(self).__name__)
        if self.kind == "new":
            return [Proposal(edit) for edit in random_new_units(occasion.model, groups, num_units, generator)]
        edits = random_splits(occasion.model, groups, num_units, generator, radius=self.radius)
        return [Proposal(edit) for edit in edits]
