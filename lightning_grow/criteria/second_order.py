"""A second-order model of the loss around a network, for changes of single units: first-order effect and curvature."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_grow.criteria.likelihood import Labels, Likelihood, LikelihoodName, num_labels
from lightning_grow.criteria.objective import MeasurementError, Objective, measuring
from lightning_grow.criteria.overgrown import Overgrown, apart
from lightning_grow.criteria.reads import UNSEEN, Readers, Reads, gradients_of, sample_sums
from lightning_grow.criteria.units import UnitVectors
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.structure.errors import StructureError
from lightning_grow.surgery.edit import Edit

_MANY_LABELS = 10


class Effects(NamedTuple):
    """What a change of each unit does to the loss, by the approximation.

    Attributes:
        linear: Mean of :math:`u_n`: ``(size,)``.
        quadratic: Mean of :math:`v_n`, at least 0: ``(size,)``.
    """

    linear: Tensor
    quadratic: Tensor

    @property
    def change(self) -> Tensor:
        """The change of the loss, negative for a gain: ``(size,)``."""
        return self.linear + self.quadratic / 2


class GaussNewtonModel:
    r"""The second-order model of the loss around a network, for splits and removals of units.

    Exact for whatever reads the units with a linear layer or a convolution: sums over positions are taken inside the
    square. What makes the units (convolutions, norms, gates, any activation) does not matter.

    Args:
        model: The model; it is copied, not changed.
        groups: The groups, each without an obstacle, and with a fan-in that is trained.
        objective: The loss. What its consumers read must have the batch first.
        generator: Draws the seed of labels and signs; one draw, whatever the batches.
        likelihood: Which calls of loss functions tell what the model predicts; see `Likelihood`.
        labels: Labels for the curvature: ``"exact"``, ``"signs"``, ``"sampled"``, or, for comparisons only, ``"true"``;
            see `Likelihood.draws`. None is exact up to ten classes (or outputs of a sample), otherwise signs.
        num_draws: How many draws, where there are any.

    Raises:
        StructureError: If a group has an obstacle, or is read by something other than linear layers and convolutions
            (fused attention, recurrent layers).
        MeasurementError: If the loss shows no labels, is not finite, or a fan-in is frozen.

    Note:
        For each batch it keeps what the consumers read, and ``1 + draws`` gradients of that.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[AxisGroup],
        objective: Objective,
        generator: torch.Generator,
        *,
        likelihood: LikelihoodName = "auto",
        labels: Labels | None = None,
        num_draws: int = 1,
    ) -> None:
        for group in groups:
            if group.obstacle is not None:
                raise StructureError(f"Cannot split units of '{group.name}' and keep the function: {group.obstacle}.")
        if num_draws < 1:
            raise ValueError(f"Expected `num_draws` of at least 1, found {num_draws}.")
        self.groups = {group.name: group for group in groups}
        self._objective = objective
        self._likelihood, self._labels, self._num_draws = likelihood, labels, num_draws
        base = Overgrown(model, []).model.requires_grad_()
        self._readers = Readers(base, groups)
        unseen = self._readers.unseen(base, objective)
        if unseen:
            raise StructureError(f"Cannot tell what {', '.join(unseen)} contribute: {UNSEEN}. Exclude them.")
        # a generator of its own: how much it draws depends on the batches of this process
        own = torch.Generator().manual_seed(int(torch.randint(2**31 - 1, (1,), generator=generator)))
        with objective.together():
            self._batches = [self._seen(base, batch, own) for batch in objective.batches]
        self._twins = [_Twins(model, lot) for lot in apart(groups)]

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        return len(self._batches)

    def fan_in(self, group: str) -> Tensor:
        """Return the fan-in vectors of the units of a group: ``(size, length)``."""
        return next(twins.fan_in[group] for twins in self._twins if group in twins.fan_in)

    def splits(self, offsets: Mapping[str, Tensor], batch: int | None = None) -> dict[str, Effects]:
        """Return what splits by some offsets do.

        Args:
            offsets: ``(size, length)`` by group name, for some or all groups.
            batch: Which batch to look at; all by default.
        """
        with self._objective.together(), torch.no_grad():
            sums = [self._split_effects(offsets, place) for place in self._places(batch)]
        return self._mean({name: [torch.stack(found[name]) for found in sums] for name in offsets})

    def slopes(self, offsets: Mapping[str, Tensor], batch: int | None = None) -> dict[str, Tensor]:
        """Return the derivative of the predicted change with respect to the offsets: ``(size, length)`` by group."""
        places = self._places(batch)
        sums = {name: torch.zeros_like(offset) for name, offset in offsets.items()}
        with self._objective.together():
            for twins in self._twins:
                chosen = [name for name in twins.fan_in if name in offsets]
                for place in places if chosen else ():
                    with torch.enable_grad():
                        effects = self._split_effects({name: offsets[name] for name in chosen}, place)
                        change = torch.stack([e.change.sum() for e in effects.values()]).sum()
                    for name, slope in twins.slopes(change, chosen).items():
                        sums[name] += slope
        count = self._count(len(places))
        return {name: self._objective.reduce(total) / count for name, total in sums.items()}

    def removals(self) -> dict[str, Effects]:
        """Return what removing each unit does: the change is what the loss is predicted to rise by."""
        sums: dict[str, list[Tensor]] = {name: [] for name in self.groups}
        for seen in self._batches:
            for name in self.groups:
                minus = [-value for value in seen.values[name]]
                sums[name].append(torch.stack(seen.effects(name, minus, self.groups[name].size)))
        return self._mean(sums)

    def _split_effects(self, offsets: Mapping[str, Tensor], place: int) -> dict[str, Effects]:
        seen, found = self._batches[place], {}
        for twins in self._twins:
            chosen = [name for name in twins.fan_in if name in offsets]
            if not chosen:
                continue
            read = twins.read({name: offsets[name] for name in chosen}, self._objective, place)
            for name in chosen:
                moved = []
                for values in read[name]:
                    same, plus, minus = values.chunk(3, dim=1)
                    moved.append((plus + minus) / 2 - same)
                found[name] = seen.effects(name, moved, self.groups[name].size)
        return found

    def _seen(self, base: nn.Module, batch: Any, generator: torch.Generator) -> _Seen:
        """Run the model on a batch, once forwards and once backwards for the loss and for each draw of labels."""
        objective, readers = self._objective, self._readers
        with torch.enable_grad(), measuring(base, objective.seed):
            with Likelihood(self._likelihood) as likelihood, Reads(base, readers.weights) as reading:
                loss = objective.loss(base, batch)
            if not bool(torch.isfinite(loss)):
                raise MeasurementError("The loss is not finite on the batches that were observed.")
            labels = self._labels
            if labels is None:
                labels = "exact" if num_labels(likelihood.terms) <= _MANY_LABELS else "signs"
            samples, draws = likelihood.draws(loss, generator, labels, self._num_draws)
            sources = [read.source for read in reading.reads]
            rows = [read.arranged(read.source.detach()).shape[0] for read in reading.reads]
            delta = gradients_of(loss, sources, retain=True)
            drawn = [gradients_of((o * xi).sum(), sources, retain=True) for o, xi in draws]
        reads = reading.reads
        return _Seen(
            min([samples, *rows]),
            readers.by_unit(reads, [source.detach() for source in sources]),
            readers.by_unit(reads, delta),
            [readers.by_unit(reads, gradient) for gradient in drawn],
        )

    def _places(self, batch: int | None) -> list[int]:
        return list(range(self.num_batches)) if batch is None else [batch]

    def _count(self, batches: int) -> float:
        return float(self._objective.reduce(torch.tensor(float(batches), dtype=torch.float64)))

    def _mean(self, sums: Mapping[str, Sequence[Tensor]]) -> dict[str, Effects]:
        found = {}
        for name, effects in sums.items():
            count = self._count(len(effects))
            linear, quadratic = self._objective.reduce(torch.stack(list(effects)).double().sum(dim=0)) / count
            if not bool(torch.isfinite(linear).all() and torch.isfinite(quadratic).all()):
                raise MeasurementError("The gradient of the loss is not finite on the batches that were observed.")
            found[name] = Effects(linear, quadratic)
        return found


def unseen_groups(model: nn.Module, groups: Sequence[AxisGroup], objective: Objective) -> list[str]:
    """Return the names of the groups whose units something other than linear layers and convolutions reads.

    Args:
        model: The model; a copy of it runs once.
        groups: The groups.
        objective: The loss.
    """
    base = Overgrown(model, []).model.requires_grad_()
    return Readers(base, groups).unseen(base, objective)


class _Seen(NamedTuple):
    """One batch: what consumers read, and the gradients of it, by group and reading.

    Attributes:
        samples: How many samples the batch has.
        values: What is read: ``(rows, size, entries, positions)`` each.
        delta: Its gradient.
        drawn: Its gradients for drawn labels.
    """

    samples: int
    values: Mapping[str, list[Tensor]]
    delta: Mapping[str, list[Tensor]]
    drawn: Sequence[Mapping[str, list[Tensor]]]

    def effects(self, group: str, moved: Sequence[Tensor], size: int) -> Effects:
        """Return the first-order effect of a change of what is read, and the curvature along it."""
        if not moved:
            return Effects(torch.zeros(size), torch.zeros(size))

        def along(gradients: Sequence[Tensor]) -> Tensor:
            sums = [sample_sums(g * m, self.samples) for g, m in zip(gradients, moved, strict=True)]
            return torch.stack(sums).sum(dim=0)

        linear = along(self.delta[group]).sum(dim=0)
        squares = [along(gradients[group]).square().sum(dim=0) for gradients in self.drawn]
        return Effects(linear, torch.stack(squares).sum(dim=0))


class _Twins:
    """A copy in which each unit has two more beside it whose fan-out is zero: nothing shows what they compute."""

    def __init__(self, model: nn.Module, lot: Sequence[AxisGroup]) -> None:
        edits = [Edit(g, (*range(g.size),) * 3, (1.0,) * g.size + (0.0,) * (2 * g.size)) for g in lot]
        self.fan_in: dict[str, Tensor] = {}
        named = dict(model.named_parameters())
        for group in lot:
            vectors = UnitVectors(model, group, "produced")
            if not vectors.axes:
                raise MeasurementError(f"The fan-in of '{group.name}' is frozen: no gradient says how to split it.")
            self.fan_in[group.name] = vectors.of(named)
        self._model = Overgrown(model, edits).model
        trebled = [dataclasses.replace(group, size=3 * group.size) for group in lot]
        self._vectors = {group.name: UnitVectors(self._model, group, "produced") for group in trebled}
        self._readers = Readers(self._model, trebled)
        used = {name for vectors in self._vectors.values() for name in vectors.parameters}
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name in used)
        self._named = {n: p for n, p in self._model.named_parameters() if n in used}

    def read(self, offsets: Mapping[str, Tensor], objective: Objective, place: int) -> dict[str, list[Tensor]]:
        """Run forwards, and return what is read of each unit and its two offspring."""
        for name, fan_in in self.fan_in.items():
            offset = offsets[name].to(fan_in) if name in offsets else torch.zeros_like(fan_in)
            self._vectors[name].write_(self._model, torch.cat([fan_in, fan_in + offset, fan_in - offset]))
        with measuring(self._model, objective.seed), Reads(self._model, self._readers.weights) as reading:
            objective.loss(self._model, objective.batches[place])
        return self._readers.by_unit(reading.reads, [read.source for read in reading.reads])

    def slopes(self, change: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the derivative with respect to the offsets of some groups."""
        gradients = dict(zip(self._named, gradients_of(change, list(self._named.values())), strict=True))
        found = {}
        for name in names:
            _, plus, minus = self._vectors[name].of(gradients).chunk(3)
            found[name] = plus - minus
        return found
