r"""Candidates of growth, tried out together: every unit split, and new units beside them, in an over-grown copy.

This is the search of Wu, Liu, Stone, Liu, "Firefly Neural Architecture Descent: a General Approach for Growing Neural
Networks", NeurIPS 2020, arXiv:2102.08574. With amplitudes :math:`\epsilon`, unit directions ``v`` and unit fan-outs
``o``, a layer's candidates are

* the split of unit ``i``: fan-in :math:`\theta_i \pm \epsilon_i v_i`, with half of its fan-out each;
* new unit ``j``: fan-in :math:`n_j`, fan-out :math:`\epsilon_j o_j`.

All amplitudes are on while ``v``, ``n`` and ``o`` are trained for some steps. Then the change of the loss along the ray
from no amplitude to all of them, :math:`\sum_i \int_0^{\epsilon_i} \partial L / \partial \epsilon_i`, says what each
candidate adds to it. The derivative at 0 would not do: a split is even in :math:`\epsilon`, so its own is 0 there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_grow.criteria.lift import Lift, difference
from lightning_grow.criteria.objective import MeasurementError, Objective
from lightning_grow.criteria.overgrown import Overgrown, apart
from lightning_grow.criteria.units import UnitVectors
from lightning_grow.structure.axes import AxisGroup, Role
from lightning_grow.structure.errors import StructureError
from lightning_grow.surgery.edit import Edit


def searchable(model: nn.Module, groups: Sequence[AxisGroup]) -> list[AxisGroup]:
    """Return the groups that can be searched for candidates: without an obstacle, fan-in and fan-out trained."""
    roles: tuple[Role, ...] = ("produced", "consumed")
    return [g for g in groups if g.obstacle is None and all(UnitVectors(model, g, role).axes for role in roles)]


class Effects(NamedTuple):
    """What the candidates of a group add to the change of the loss; negative is good.

    Attributes:
        splits: One number for each unit: ``(size,)``, float64 on the CPU; empty where no unit is split.
        new: One number for each new unit: ``(num_new,)``, float64 on the CPU.
    """

    splits: Tensor
    new: Tensor


@dataclass(eq=False)
class _State:
    """The candidates of one group: fan-in vectors have length ``p``, fan-out vectors ``r``."""

    group: AxisGroup
    theta: Tensor  # (size, p), what the units have now
    radii: Tensor  # (size,), the amplitudes of the splits
    amplitude: float  # of the new units' fan-out
    scale: float  # length of a usual fan-in vector
    fan_in_lift: Lift
    fan_out_lift: Lift
    v: Tensor  # (size, p), unit rows; (0, p) without splits
    n: Tensor  # (num_new, p), relative to `scale`
    o: Tensor  # (num_new, r), unit rows

    @property
    def trained(self) -> list[Tensor]:
        return [self.v, self.n, self.o]


class Candidates:
    """Splits of all units of some groups, and new units, with what they would do to the loss.

    Groups that share a tensor are searched one after the other (`apart`), those of a lot together. One step of `train_`
    costs a forward and a backward pass of a copy with twice the units and the new ones besides, for each lot.

    Args:
        model: The model; it is not changed.
        groups: The groups, each without an obstacle.
        objective: The loss.
        generator: Draws the candidates; a CPU generator.
        num_new: New units in each group, rounded up to its step; None: as many as it has, but at least 16.
        radius: Amplitudes: of splits relative to the unit's fan-in vector, of new units relative to the mean length of
            the group's fan-out vectors; ``> 0``.
        splits: Whether units are split.
        copies: So many of the new units of each group begin with the fan-in of a unit that there is.

    Raises:
        StructureError: If a group has an obstacle.
        MeasurementError: If a group has no trained fan-in or fan-out.
        ValueError: If a number is out of range.

    Example:
        >>> from lightning_grow.structure import trace
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double(), torch.randn(32, 4).double()
        >>> objective = Objective(lambda m, x: (m(x) - x.prod(dim=1, keepdim=True)).square().mean(), [x])
        >>> found = Candidates(model, [trace(model, x)["0"]], objective, torch.Generator().manual_seed(0), num_new=5)
        >>> found.train_(steps=10)
        >>> {name: (len(e.splits), len(e.new)) for name, e in found.effects().items()}
        {'0': (8, 5)}
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[AxisGroup],
        objective: Objective,
        generator: torch.Generator,
        *,
        num_new: int | None = None,
        radius: float = 0.1,
        splits: bool = True,
        copies: int = 0,
    ) -> None:
        if not radius > 0:
            raise ValueError(f"Expected `radius` above 0, found {radius!r}.")
        if (num_new is not None and num_new < 0) or copies < 0:
            raise ValueError(f"Expected `num_new` and `copies` of at least 0, found {num_new} and {copies}.")
        self.groups = {group.name: group for group in groups}
        self._model = model
        self._objective = objective
        self._splits = splits
        self._lots = apart(groups)
        self._states: dict[str, _State] = {}
        for group in groups:
            wanted = max(group.size, 16) if num_new is None else num_new
            wanted = -(-wanted // group.step) * group.step
            self._states[group.name] = self._draw(group, wanted, radius, copies, generator)

    def train_(self, steps: int, *, lr: float = 0.05, penalty: float = 1e-4) -> None:
        """Train directions, new fan-in and new fan-out by Adam, one batch of the objective a step, amplitudes on.

        Args:
            steps: Steps for each lot; the learning rate falls to zero over them as a cosine does.
            lr: How far a vector moves in one step, about, relative to its usual length.
            penalty: Weight of the squared length of new fan-in vectors, relative to the usual one, added to the loss.

        Raises:
            MeasurementError: If the loss or a gradient is not finite, or there is no batch.
        """
        if steps and not self._objective.batches:
            raise MeasurementError("There is no batch to train candidates on.")
        for lot in self._lots:
            copy = self._copy(lot)
            states = [self._states[group.name] for group in lot]
            vectors = [vectors for state in states for vectors in state.trained if vectors.numel()]
            if not vectors:
                continue
            optimizer = torch.optim.Adam([{"params": [v], "lr": lr / math.sqrt(v.shape[1])} for v in vectors])
            bases = [group["lr"] for group in optimizer.param_groups]
            for step in range(steps):
                batch = self._objective.batches[step % len(self._objective.batches)]
                self._write(copy, states, 1.0)
                _, gradients = copy.gradients(self._objective.on([batch]))
                for state in states:
                    _give_gradients(state, gradients, penalty)
                for group, base in zip(optimizer.param_groups, bases, strict=True):
                    group["lr"] = base * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.step()
                for state in states:
                    state.v /= state.v.norm(dim=1, keepdim=True)
                    state.o /= state.o.norm(dim=1, keepdim=True)

    def effects(self, points: int = 3) -> dict[str, Effects]:
        """Return what each candidate adds to the change of the loss, by group name: integrals along the joint ray.

        Args:
            points: Midpoints of the integral, one pass over the batches for each lot and point; the error of the sum
                falls as ``1 / points**2``.

        Raises:
            MeasurementError: If the loss or a gradient is not finite, or there is no batch.
            ValueError: If ``points`` is below 1.
        """
        if points < 1:
            raise ValueError(f"Expected `points` of at least 1, found {points}.")
        found: dict[str, Effects] = {}
        for lot in self._lots:
            copy = self._copy(lot)
            states = [self._states[group.name] for group in lot]
            sums = {s.group.name: (torch.zeros(len(s.v)).double(), torch.zeros(len(s.n)).double()) for s in states}
            for point in range(points):
                self._write(copy, states, (point + 0.5) / points)
                _, gradients = copy.gradients(self._objective)
                for state in states:
                    splits, new = sums[state.group.name]
                    along_v, _, along_o = _towards(state, gradients)
                    splits += (along_v * state.v).sum(dim=1).to(splits) / points
                    new += (along_o * state.o).sum(dim=1).to(new) / points
            found.update({name: Effects(*both) for name, both in sums.items()})
        return {name: found[name] for name in self.groups}

    def change(self, amplitude: float = 1.0) -> float:
        """Return the sum over lots of the change of the loss when all candidates of the lot are on.

        Args:
            amplitude: Factor of all amplitudes; with 0, nothing changes.
        """
        before = self._objective.value(Overgrown(self._model, []).model)
        change = 0.0
        for lot in self._lots:
            copy = self._copy(lot)
            self._write(copy, [self._states[group.name] for group in lot], amplitude)
            change += self._objective.value(copy.model) - before
        return change

    def edit(self, group: str, splits: Sequence[int], new: Sequence[int]) -> Edit:
        """Return the edit that keeps some candidates of a group, with their amplitudes on.

        New units are appended first, in rising order; then the second halves of the splits.

        Args:
            group: Name of the group.
            splits: Units to split, each once.
            new: New units to keep, each once.

        Raises:
            ValueError: If there is no such candidate, or the group's step is violated.
        """
        state = self._states[group]
        splits, new = sorted(set(splits)), sorted(set(new))
        if any(not 0 <= i < len(state.v) for i in splits) or any(not 0 <= j < len(state.n) for j in new):
            raise ValueError(f"'{group}' has {len(state.v)} splits and {len(state.n)} new units as candidates.")
        size = state.group.size
        index = (*range(size), *(-1,) * len(new), *splits)
        share = [0.5 if unit in splits else 1.0 for unit in range(size)] + [1.0] * len(new) + [0.5] * len(splits)
        shifts = {}
        if splits:
            offsets = torch.zeros(len(index), state.theta.shape[1], dtype=torch.float64)
            moved = (state.radii[splits, None] * state.v[splits]).to(offsets)
            offsets[splits] = moved
            offsets[size + len(new) :] = -moved
            shifts = UnitVectors(self._model, state.group, "produced").spread(offsets)
        values: Mapping[str, Tensor] = {}
        if new:
            first = size + len(state.v)
            fan_in, fan_out = state.scale * state.n[new], state.amplitude * state.o[new]
            values = {
                **self._copy([state.group]).entries(group, [first + j for j in new]),
                **UnitVectors(self._model, state.group, "produced").spread(fan_in, new=len(new)),
                **UnitVectors(self._model, state.group, "consumed").spread(fan_out, new=len(new)),
            }
        return Edit(state.group, index, tuple(share), values=values, shifts=shifts)

    def directions(self, group: str) -> Tensor:
        """Return the directions of the splits of a group: unit vectors, ``(size, fan-in length)``."""
        return self._states[group].v.clone()

    def radii(self, group: str) -> Tensor:
        """Return the amplitudes of the splits of a group: ``(size,)``."""
        return self._states[group].radii.clone()

    def _draw(self, group: AxisGroup, num_new: int, radius: float, copies: int, generator: torch.Generator) -> _State:
        if group.obstacle is not None:
            raise StructureError(f"Cannot grow '{group.name}' and keep the function: {group.obstacle}.")
        named = dict(self._model.named_parameters())
        produced = UnitVectors(self._model, group, "produced")
        consumed = UnitVectors(self._model, group, "consumed")
        if not produced.axes or not consumed.axes:
            what = "fan-in" if not produced.axes else "fan-out"
            raise MeasurementError(f"The {what} of '{group.name}' is frozen: no gradient says how to grow it.")
        theta, fan_out = produced.of(named), consumed.of(named)
        norms = theta.norm(dim=1)
        p, r = theta.shape[1], fan_out.shape[1]
        scale = float(norms.mean()) or 1.0
        drawn = _unit(torch.randn(num_new, p, dtype=torch.float64, generator=generator).to(theta))
        edit = self._overgrowth(group, num_new)
        copied = torch.randint(group.size, (min(copies, num_new),), generator=generator).to(theta.device)
        drawn[: len(copied)] = theta[copied] / scale
        return _State(
            group,
            theta,
            radii=radius * torch.where(norms > 0, norms, norms.new_ones(())),
            amplitude=radius * (float(fan_out.norm(dim=1).mean()) or 1.0),
            scale=scale,
            fan_in_lift=Lift(produced, edit),
            fan_out_lift=Lift(consumed, edit),
            v=_unit(
                torch.randn(group.size if self._splits else 0, p, dtype=torch.float64, generator=generator).to(theta)
            ),
            n=drawn,
            o=_unit(torch.randn(num_new, r, dtype=torch.float64, generator=generator).to(theta)),
        )

    def _copy(self, lot: Sequence[AxisGroup]) -> Overgrown:
        """Return the over-grown copy of a lot: units, their twins, new units."""
        return Overgrown(self._model, [self._overgrowth(g, len(self._states[g.name].n)) for g in lot])

    def _overgrowth(self, group: AxisGroup, num_new: int) -> Edit:
        twice = 2 if self._splits else 1
        index = (*tuple(range(group.size)) * twice, *(-1,) * num_new)
        return Edit(group, index, (1 / twice,) * (group.size * twice) + (1.0,) * num_new)

    def _write(self, copy: Overgrown, states: Sequence[_State], t: float) -> None:
        """Set the weights of a copy: ``t`` times all amplitudes."""
        for s in states:
            offset = t * s.radii[:, None] * s.v if self._splits else None
            halves = [s.theta] if offset is None else [s.theta + offset, s.theta - offset]
            rows = torch.cat([*halves, s.scale * s.n])
            copy.write_(s.group.name, "produced", s.fan_in_lift.up(rows))
            if len(s.n):
                columns = copy.vectors(s.group.name, "consumed")
                columns[-len(s.n) :] = s.fan_out_lift.up(t * s.amplitude * s.o)
                copy.write_(s.group.name, "consumed", columns)


def _towards(state: _State, gradients: Mapping[tuple[str, Role], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the loss with respect to directions, new fan-in and new fan-out, with all amplitudes 1."""
    num_new, size = len(state.n), state.group.size
    rows = state.fan_in_lift.down(gradients[state.group.name, "produced"])
    columns = state.fan_out_lift.down(gradients[state.group.name, "consumed"])
    first = len(rows) - num_new
    along_v = state.radii[:, None] * difference(rows[:size], rows[size:first]) if len(state.v) else state.v
    return along_v, state.scale * rows[first:], state.amplitude * columns[first:]


def _give_gradients(state: _State, gradients: Mapping[tuple[str, Role], Tensor], penalty: float) -> None:
    along_v, along_n, along_o = (g.to(state.theta) for g in _towards(state, gradients))
    state.v.grad = along_v - (along_v * state.v).sum(dim=1, keepdim=True) * state.v  # along the sphere
    state.n.grad = along_n + 2 * penalty * state.n
    state.o.grad = along_o - (along_o * state.o).sum(dim=1, keepdim=True) * state.o


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / vectors.norm(dim=1, keepdim=True)
    return unit
