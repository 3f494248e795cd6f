r"""Gauss-Newton morphisms, a reconstruction: splits whose offsets are learned on a second-order model of the loss.

After Lawton, Galstyan, Ver Steeg, "Learning Morphisms with Gauss-Newton Approximation for Growing Networks", 2024,
arXiv:2411.05855. The paper's formulas were not at hand: what follows is a reconstruction from its abstract and
summaries. Unit ``k`` becomes two, of fan-in :math:`w_k \pm \theta_k`, with half of its fan-out each. To the first
order of the share of the fan-out that they take over, sample ``n`` then changes the loss by :math:`u_n`, and

.. math:: \hat L_k(\theta_k) = \operatorname{mean}_n [u_n + \tfrac12 v_n] + \tfrac\lambda2 \|\theta_k\|^2

with :math:`v_n` the same for labels that the model itself predicts, squared: the Gauss-Newton curvature. The larger
network is never trained, nor run backwards, to learn :math:`\theta`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_grow.criteria.curvature import lanczos
from lightning_grow.criteria.likelihood import Labels, LikelihoodName
from lightning_grow.criteria.objective import Objective
from lightning_grow.criteria.overgrown import Overgrown
from lightning_grow.criteria.reads import UNSEEN
from lightning_grow.criteria.second_order import GaussNewtonModel, unseen_groups
from lightning_grow.criteria.selection import best_units
from lightning_grow.criteria.splits import Offspring, Splits, offspring_edit
from lightning_grow.criteria.units import UnitVectors
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.surgery.edit import Edit
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import Proposal, in_all
from lightning_grow.trainer.structural_callback import StructuralCallback
from lightning_grow.trainer.unit_costs import Cost, check_cost, unit_costs

log = logging.getLogger(__name__)

_HALVINGS = 3
_KRYLOV_STEPS = 5


class Morphisms(NamedTuple):
    r"""Learned splits of all units of a group.

    Attributes:
        offsets: :math:`\theta`, what the two offspring have more and less: ``(size, length)``.
        gains: What the loss is predicted to fall by, at least 0: ``(size,)``.
    """

    offsets: Tensor
    gains: Tensor


def gauss_newton_splits(
    approximation: GaussNewtonModel,
    generator: torch.Generator,
    *,
    start: Mapping[str, Tensor] | None = None,
    damping: float = 1e-4,
    steps: int = 60,
    restarts: int = 2,
    lr: float = 0.03,
    start_length: float = 0.3,
    max_length: float = 1.0,
) -> dict[str, Morphisms]:
    r"""Learn the offsets of a split of each unit, on the approximation alone.

    Each restart begins with a direction of its own, and takes ``steps`` steps of Adam, each on one batch in turn. What
    all batches together say is best is kept; where nothing is better than no split at all, the gain is 0.

    Args:
        approximation: The model of the loss.
        generator: Draws the directions of restarts.
        start: Directions to begin the first of them with, ``(size, length)`` by group name: those of the most negative
            curvature of the units (`lanczos`), say.
        damping: :math:`\lambda`, what long offsets cost.
        steps: Steps for each restart; each takes a run forwards of a network whose units stand three times.
        restarts: How often to begin, ``>= 1``.
        lr: Learning rate, relative to the root mean square of a unit's fan-in.
        start_length: Length of the first offset, relative to that of the fan-in.
        max_length: Longest offset, relative to the length of the fan-in: linearisation ends somewhere.

    Returns:
        By group name, offsets and gains.

    Raises:
        ValueError: If a number is out of range.
        MeasurementError: If the approximation is not finite.
    """
    if damping < 0 or steps < 1 or restarts < 1 or not 0 < start_length <= max_length or not lr > 0:
        raise ValueError(
            "Expected damping >= 0, steps and restarts >= 1, lr > 0 and 0 < start_length <= max_length, found "
            f"{damping}, {steps}, {restarts}, {lr}, {start_length} and {max_length}."
        )
    lengths = {name: _lengths(approximation.fan_in(name)) for name in approximation.groups}
    best = {name: _none(approximation.fan_in(name)) for name in approximation.groups}
    for attempt in range(restarts):
        offsets = {}
        for name, length in lengths.items():
            if attempt == 0 and start is not None:
                direction = start[name].to(length)
            else:
                shape = approximation.fan_in(name).shape
                direction = torch.randn(shape, dtype=torch.float64, generator=generator).to(length)
            offsets[name] = start_length * length * direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-12)
        _descend(approximation, offsets, lengths, damping, steps, lr, max_length)
        for name, effects in approximation.splits(offsets).items():
            predicted = -effects.change - damping / 2 * offsets[name].double().square().sum(dim=1).to(effects.change)
            better = predicted > best[name].gains
            best[name] = Morphisms(
                torch.where(better[:, None], offsets[name], best[name].offsets),
                torch.where(better, predicted, best[name].gains),
            )
    return best


def _descend(
    approximation: GaussNewtonModel,
    offsets: dict[str, Tensor],
    lengths: Mapping[str, Tensor],
    damping: float,
    steps: int,
    lr: float,
    max_length: float,
) -> None:
    """Take steps of Adam on offsets, each unit in its own scale; longer ones are cut."""
    scales = {name: lengths[name] / offset.shape[1] ** 0.5 for name, offset in offsets.items()}
    scaled = [(offsets[name] / scales[name]).requires_grad_() for name in offsets]
    optimizer = torch.optim.Adam(scaled, lr=lr)
    for step in range(steps):
        slopes = approximation.slopes(offsets, step % approximation.num_batches)
        with torch.no_grad():
            for name, free in zip(offsets, scaled, strict=True):
                # in units of its own length a gradient has the size of the loss, whatever the width of the layer
                free.grad = (slopes[name] + damping * offsets[name]) * scales[name]
            optimizer.step()
            for name, free in zip(offsets, scaled, strict=True):
                longest = max_length * offsets[name].shape[1] ** 0.5
                free.mul_((longest / free.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0))
                offsets[name] = free.detach() * scales[name]


def _lengths(fan_in: Tensor) -> Tensor:
    """Return the length of each fan-in, 1 where it is 0: ``(size, 1)``."""
    norms = fan_in.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def _none(fan_in: Tensor) -> Morphisms:
    return Morphisms(torch.zeros_like(fan_in), torch.zeros(len(fan_in), dtype=torch.float64, device=fan_in.device))


def backed_off(
    model: nn.Module,
    groups: Mapping[str, AxisGroup],
    chosen: Mapping[str, Sequence[int]],
    offsets: Mapping[str, Tensor],
    objective: Objective,
) -> dict[str, dict[int, Tensor]]:
    r"""Halve what does not lower the true loss, up to three times, then drop it.

    Each split is tried alone; then what is left is tried together, and halved together.

    Args:
        model: The model; a copy of it is split.
        groups: The groups, by name.
        chosen: Units to split, by group name.
        offsets: :math:`\theta` for all units, ``(size, length)`` by group name.
        objective: The true loss, on batches that the offsets were not learned on.

    Returns:
        Offsets by group name and unit; without those that were dropped.
    """
    base = objective.value(Overgrown(model, []).model)
    found: dict[str, dict[int, Tensor]] = {}
    for name, units in chosen.items():
        if not units:
            continue
        group, order = groups[name], sorted(units)
        nothing = torch.zeros_like(offsets[name][0])
        trial = Overgrown(model, [split_edit(model, group, dict.fromkeys(order, nothing))])
        still = trial.vectors(name, "produced").clone()
        for place, unit in enumerate(order):
            for halving in range(_HALVINGS + 1):
                offset = offsets[name][unit] / 2**halving
                moved = still.clone()
                moved[unit] += offset.to(moved)
                moved[group.size + place] -= offset.to(moved)
                trial.write_(name, "produced", moved)
                if objective.value(trial.model) < base:
                    found.setdefault(name, {})[unit] = offset
                    break
            trial.write_(name, "produced", still)
    for _ in range(_HALVINGS + 1):
        edits = [split_edit(model, groups[name], units) for name, units in found.items()]
        if not found or objective.value(Overgrown(model, edits).model) < base:
            return found
        found = {name: {unit: offset / 2 for unit, offset in units.items()} for name, units in found.items()}
    return {}


def split_edit(model: nn.Module, group: AxisGroup, offsets: Mapping[int, Tensor], without: Sequence[int] = ()) -> Edit:
    r"""Return the edit that splits units symmetrically, and perhaps removes others.

    Args:
        model: The model; only read.
        group: The group.
        offsets: :math:`\theta` of each unit that splits, ``(length,)``. With zero the function is preserved.
        without: Units that go, none of which splits.
    """
    offspring = {unit: [Offspring(0.5, theta), Offspring(0.5, -theta)] for unit, theta in offsets.items()}
    edit = offspring_edit(model, group, offspring)
    if not without:
        return edit
    kept = [place for place, unit in enumerate(edit.index) if unit not in set(without)]
    vectors = UnitVectors(model, group, "produced")
    shifts = torch.zeros(len(kept), vectors.length, dtype=torch.float64)
    for row, place in enumerate(kept):
        unit = edit.index[place]
        if unit in offsets:
            shifts[row] = offsets[unit].to(shifts) * (1 if place < group.size else -1)
    index, share = tuple(edit.index[p] for p in kept), tuple(edit.share[p] for p in kept)
    return Edit(group, index, share, shifts=vectors.spread(shifts) if offsets else {})


def exchanged(
    approximation: GaussNewtonModel,
    splits: Mapping[str, Mapping[int, Tensor]],
    gains: Mapping[str, Tensor],
    num_units: int,
    least_units: Mapping[str, int],
) -> dict[str, list[int]]:
    """Return units that go, each in exchange for a split that is predicted to gain more than the loss rises without it.

    Args:
        approximation: The model of the loss.
        splits: Offsets by group name and unit: units that split do not go.
        gains: Gains of the splits, ``(size,)`` by group name.
        num_units: How many may go, at most.
        least_units: How many have to stay, by group name; one at least. Groups that come in steps keep theirs.
    """
    won = sorted((float(gains[name][unit]) for name, units in splits.items() for unit in units), reverse=True)
    rises = [
        (rise, name, unit)
        for name, effects in approximation.removals().items()
        for unit, rise in enumerate(effects.change.tolist())
        if unit not in splits.get(name, {}) and approximation.groups[name].step == 1
    ]
    gone: dict[str, list[int]] = {}
    left = {name: group.size for name, group in approximation.groups.items()}
    pairs = iter(won[:num_units])
    gain = next(pairs, None)
    for rise, name, unit in sorted(rises):
        if gain is None or rise >= gain:
            break
        if left[name] - 1 >= max(1, least_units.get(name, 1)):
            gone.setdefault(name, []).append(unit)
            left[name] -= 1
            gain = next(pairs, None)
    return gone


def gauss_newton(
    model: nn.Module,
    groups: Sequence[AxisGroup],
    objective: Objective,
    num_units: int,
    generator: torch.Generator | None = None,
    *,
    likelihood: LikelihoodName = "auto",
    labels: Labels | None = None,
    num_draws: int = 1,
    num_pruned: int = 0,
    damping: float = 1e-4,
    steps: int = 60,
    restarts: int = 2,
    costs: Mapping[str, float] | None = None,
    least_units: Mapping[str, int] | None = None,
) -> list[tuple[Edit, float]]:
    r"""Split the units for which a Gauss-Newton model of the loss predicts most, and perhaps remove others.

    The last batch of the objective is kept from learning, if there is another: splits that do not lower the true loss
    on it are halved, then dropped.

    Args:
        model: The model; only read.
        groups: The groups; they are compared on one scale.
        objective: The loss.
        num_units: Units to split in all, at most.
        generator: Draws labels and first directions; by default one with seed 0.
        likelihood: Which calls of loss functions tell what the model predicts; see `Likelihood`.
        labels: Labels for the curvature, and
        num_draws: how many draws of them; see `GaussNewtonModel`.
        num_pruned: Units that may go in exchange, at most; see `exchanged`.
        damping: :math:`\lambda`; see `gauss_newton_splits`.
        steps: Steps of Adam for each restart.
        restarts: How often to begin.
        costs: What one unit costs, by group name; all the same by default.
        least_units: Units that have to stay, by group name.

    Returns:
        Edits of the groups that change, each with its predicted gain.

    Raises:
        StructureError: If a group has an obstacle, or is read by something that `Reads` does not see.
        MeasurementError: If the loss shows no labels, is not finite, or a fan-in is frozen.

    Example:
        >>> from lightning_grow.structure import trace
        >>> from lightning_grow.surgery import apply_
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(64, 4)
        >>> y = (x[:, 0] * x[:, 1] > 0).long()
        >>> loss = lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1])
        >>> objective = Objective(loss, [(x, y)])
        >>> edits = gauss_newton(model, [trace(model, x)["0"]], objective, num_units=2, steps=20)
        >>> before = objective.value(model)
        >>> apply_(model, [edit for edit, gain in edits])
        >>> model[0].out_features, objective.value(model) < before
        (10, True)

    Reference:
        Lawton, Galstyan, Ver Steeg, "Learning Morphisms with Gauss-Newton Approximation for Growing Networks", 2024,
        arXiv:2411.05855; a reconstruction.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    learning, held_out = _parted(objective)
    approximation = GaussNewtonModel(
        model, groups, learning, generator, likelihood=likelihood, labels=labels, num_draws=num_draws
    )
    ends = lanczos(Splits(model, groups, learning), generator, _KRYLOV_STEPS)
    start = {name: end.lowest_vectors for name, end in ends.items()}
    found = gauss_newton_splits(approximation, generator, start=start, damping=damping, steps=steps, restarts=restarts)
    gains = {name: morphisms.gains.cpu() for name, morphisms in found.items()}
    offsets = {name: morphisms.offsets for name, morphisms in found.items()}
    by_name = approximation.groups
    chosen = best_units({name: (group, gains[name]) for name, group in by_name.items()}, num_units, costs=costs)
    kept = _whole_steps(backed_off(model, by_name, chosen, offsets, held_out), by_name, gains)
    gone = exchanged(approximation, kept, gains, num_pruned, least_units or {}) if num_pruned else {}
    edits = []
    for name, group in by_name.items():
        units, without = kept.get(name, {}), gone.get(name, [])
        if units or without:
            edits.append((split_edit(model, group, units, without), float(sum(gains[name][unit] for unit in units))))
    return edits


def _parted(objective: Objective) -> tuple[Objective, Objective]:
    """Keep the last batch from learning, where there is another."""
    if len(objective.batches) < 2:
        return objective, objective
    return objective.on(objective.batches[:-1]), objective.on(objective.batches[-1:])


def _whole_steps(
    kept: Mapping[str, dict[int, Tensor]],
    groups: Mapping[str, AxisGroup],
    gains: Mapping[str, Tensor],
) -> dict[str, dict[int, Tensor]]:
    """Leave out the splits of least gain that would violate the step of a group."""
    found = {}
    for name, units in kept.items():
        best = sorted(units, key=lambda unit: -float(gains[name][unit]))
        number = len(best) // groups[name].step * groups[name].step
        found[name] = {unit: units[unit] for unit in sorted(best[:number])}
    return {name: units for name, units in found.items() if units}


class GaussNewton(StructuralCallback):
    r"""Splits the units for which a Gauss-Newton model of the loss predicts most, by offsets learned on it.

    A reconstruction: the formulas of the paper (arXiv:2411.05855) were not at hand. The last of the observed batches
    is kept from learning, and splits that do not lower the true loss on it are halved, then dropped.

    Args:
        likelihood: Which calls of loss functions tell what the model predicts: ``"auto"``, ``"cross_entropy"``,
            ``"binary_cross_entropy"`` or ``"mse"``. A loss that goes through none of them calls the event off.
        labels: Labels for the curvature. ``"exact"`` takes the mean over all that the model thinks possible;
            ``"signs"`` mixes them by random signs, ``"sampled"`` draws them from what the model predicts. None is
            exact up to ten classes (for squared errors: outputs of a sample), otherwise signs.
        num_draws: How many draws, where there are any; more are less noisy.
        num_pruned: Units that may go at each event, at most: a unit goes in exchange for a split that is predicted to
            gain more than the loss rises without it.
        damping: :math:`\lambda`, what long offsets cost. The paper calls results sensitive to it.
        steps: Steps of Adam on the offsets, for each restart.
        restarts: How often to begin, at first in the direction of the most negative curvature.
        cost: What a gain is divided by: ``"units"`` (nothing), ``"parameters"``, ``"flops"``, ``"latency"``, or a
            function.
        window_batches: Ordinary batches observed before an event; with one, nothing is held out.
        **common: When, where and how far; see `StructuralCallback`. ``num_units`` is for all groups together,
            ``fraction`` a share of the units of all groups together; without either, one tenth is split.

    Example::

        trainer = L.Trainer(callbacks=[lg.GaussNewton(every_n_epochs=2, num_units=4, max_parameters=50_000)])
    """

    measures: ClassVar[bool] = True

    def __init__(
        self,
        likelihood: LikelihoodName = "auto",
        labels: Literal["exact", "signs", "sampled"] | None = None,
        num_draws: int = 1,
        num_pruned: int = 0,
        damping: float = 1e-4,
        steps: int = 60,
        restarts: int = 2,
        cost: Cost = "units",
        window_batches: int = 8,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if likelihood not in ("auto", "cross_entropy", "binary_cross_entropy", "mse"):
            raise MisconfigurationException(
                "`likelihood` should be 'auto', 'cross_entropy', 'binary_cross_entropy' or 'mse', found "
                f"{likelihood!r}."
            )
        if labels not in (None, "exact", "signs", "sampled"):
            raise MisconfigurationException(f"`labels` should be 'exact', 'signs' or 'sampled', found {labels!r}.")
        counts = {"steps": (steps, 1), "restarts": (restarts, 1), "num_draws": (num_draws, 1)}
        counts["window_batches"] = (window_batches, 1)
        for name, (value, least) in {**counts, "num_pruned": (num_pruned, 0)}.items():
            if value < least:
                raise MisconfigurationException(f"`{name}` should be at least {least}, found {value!r}.")
        if damping < 0:
            raise MisconfigurationException(f"`damping` should be at least 0, found {damping!r}.")
        check_cost(cost)
        self.likelihood: LikelihoodName = likelihood
        self.labels: Labels | None = labels
        self.num_draws = num_draws
        self.num_pruned = num_pruned
        self.damping = damping
        self.steps = steps
        self.restarts = restarts
        self.cost = cost
        self.window_batches = window_batches

    @override
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        groups = [g for g in occasion.groups if g.obstacle is None and UnitVectors(occasion.model, g, "produced").axes]
        groups = self._readable(groups, occasion) if groups else []
        if not groups:
            return []
        found = gauss_newton(
            occasion.model,
            groups,
            occasion.measured,
            in_all(groups, self.num_units, self.fraction, default=0.1),
            occasion.generator("gauss_newton"),
            likelihood=self.likelihood,
            labels=self.labels,
            num_draws=self.num_draws,
            num_pruned=self.num_pruned,
            damping=self.damping,
            steps=self.steps,
            restarts=self.restarts,
            costs=unit_costs(occasion, self.cost, groups),
            least_units=occasion.least_units,
        )
        return [Proposal(edit, gain) for edit, gain in found]

    def _readable(self, groups: Sequence[AxisGroup], occasion: Occasion) -> list[AxisGroup]:
        """Leave out what cannot be told sample by sample, and say so once."""
        unseen = unseen_groups(occasion.model, groups, occasion.measured)
        self.leave_alone(unseen, UNSEEN)
        return [group for group in groups if group.name not in unseen]
