r"""What the loss says of units that are not there yet: a bilinear form in their fan-in and fan-out, for any layer.

A unit with a small fan-in :math:`a` and a fan-out :math:`b` changes the loss by

.. math:: L(a, b) - L = c \, b^T M a + O(|a|^2 |b|),

with the *form* :math:`M = \sum \delta x^T` of the inputs that make it and the gradients at what uses it, and the slope
:math:`c` of what lies between. Nothing is known here of layers: in an overgrown copy, the gradient with respect to the
fan-in of a candidate is :math:`c M^T b`, and that with respect to its fan-out, for a small fan-in, :math:`c M a`.
Fan-outs of candidates with one fan-in add up to zero, so that the copy computes exactly what the model does, and all
layers are asked at once. The slope is :math:`\varphi'(0)`, as torch takes it. Where that is 0, as for ``torch.relu``,
candidates get a positive bias, and it is the slope from above; or, failing that, they come in pairs with fan-ins
:math:`\pm a`, of which the antisymmetric half counts, and it is the mean of both sides:
:math:`\mathrm{relu}(z) - \mathrm{relu}(-z) = z`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_grow.criteria.objective import Objective
from lightning_grow.criteria.overgrown import Overgrown
from lightning_grow.criteria.transparent import refusal, transparent_values
from lightning_grow.criteria.units import UnitVectors, sizes_of
from lightning_grow.structure.axes import Axis, AxisGroup, Role, Units, layout_units, tensor_of
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.layout import entry_share
from lightning_grow.surgery.edit import Edit, widen

_NOTHING = 1e-3
"""A gradient below this share of what it could be is none."""
_TINY = 1e-6
"""Length of the fan-in at which fan-in gradients are taken, relative to a usual one: they do not lose digits."""
_SMALL = 16
"""Forms with a side of at most this length are written out."""
_LEVEL = 0.1
"""The bias that lifts units to where a ReLU is linear."""
_RANK = 1e-5
"""Singular values below this share of the largest are noise."""


class SingularPairs(NamedTuple):
    """The leading singular pairs of a form, ``k`` of them.

    Attributes:
        fan_out: Unit vectors ``(k, q)``, orthogonal; float64 on the CPU, as all here.
        values: Singular values ``(k,)``, falling, above 0; of the form with the slope ``c`` in it.
        fan_in: Unit vectors ``(k, p)``, orthogonal; zero outside of the free entries.
    """

    fan_out: Tensor
    values: Tensor
    fan_in: Tensor


@dataclass(eq=False)
class Space:
    """The vectors of one group: fan-ins of length ``p``, fan-outs of length ``q``, as in `UnitVectors`.

    Attributes:
        group: The group.
        free: The entries of a fan-in that the form is about, bool ``(p,)``: weights, not biases; of gated units and
            attention heads those that their output is linear in.
        base: The fan-in of a new unit that does nothing yet, ``(p,)``: zero where it is free, and in biases; random in
            gates, queries and keys.
        biases: Which entries of a fan-in are biases, bool ``(p,)``.
        lifted: Labels of the biases that units pass on their way, of norms for example.
        fan_out_length: ``q``.
        fan_in_norm: Mean length of the fan-in vectors that there are; 1 if that is 0.
        fan_out_norm: Mean length of the fan-out vectors that there are; 1 if that is 0.
        slope: After `NewUnits.look`: the slope at exactly zero over the mean of both sides: 1 for smooth activations, 0
            for ``torch.relu``, whose derivative at zero is 0, so that such units would never learn.
        constant: After `NewUnits.look`: whether a unit returns something without any fan-in, as behind a sigmoid.
    """

    group: AxisGroup
    free: Tensor
    base: Tensor
    biases: Tensor
    lifted: tuple[str, ...]
    fan_out_length: int
    fan_in_norm: float
    fan_out_norm: float
    slope: float = 1.0
    constant: bool = False


class NewUnits:
    """Measures the forms of groups without writing them out.

    One pass of the objective in a copy with more units answers for all groups. Its memory is that of the copy: as many
    more units in each group as there are candidates.

    Args:
        model: The model; it is not changed.
        groups: The groups, each without an obstacle.
        objective: The loss.
        generator: Returns a generator for a name; draws gates and probes.
        on_refusal: Is told the name of each group that cannot have such units, and why; they are left out then. By
            default, an error is raised.

    Attributes:
        spaces: By group name.
        passes: Passes of the objective so far, those over a single batch not counted.

    Raises:
        StructureError: If a group cannot have new units that begin at zero, with the reason (`refusal`).
        MeasurementError: If the loss cannot be measured.

    Example:
        >>> from lightning_grow.structure import trace
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double(), torch.randn(9, 4).double()
        >>> objective = Objective(lambda m, x: (m(x) - x[:, :2]).square().mean(), [x])
        >>> new = NewUnits(model, [trace(model, x)["0"]], objective)
        >>> new.form("0").shape  # two columns of the next layer; four weights and a bias
        torch.Size([2, 5])
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[AxisGroup],
        objective: Objective,
        generator: Callable[[str], torch.Generator] | None = None,
        on_refusal: Callable[[str, str], None] | None = None,
    ) -> None:
        self._model = model
        self._on_refusal = on_refusal
        self._objective = objective
        self._generator = generator or (lambda name: torch.Generator().manual_seed(zlib.crc32(name.encode())))
        self.spaces: dict[str, Space] = {}
        self.passes = 0
        self._seen: set[str] = set()
        parts: dict[str, Tensor] = {}
        named = dict(model.named_parameters())
        for group in groups:
            why = refusal(model, group)
            if why is not None:
                self._refuse(group.name, why)
                continue
            fan_in, fan_out = (UnitVectors(model, group, role) for role in _ROLES)
            part = parts[group.name] = _parts(model, fan_in)
            in_norm, out_norm = (float(v.of(named).double().norm(dim=1).mean()) or 1.0 for v in (fan_in, fan_out))
            base = torch.zeros(fan_in.length, dtype=torch.float64)
            lifted = tuple(a.label for a in group.with_role("carried") if _is_bias(model, a.tensor))
            self.spaces[group.name] = Space(group, part >= 0, base, part < 0, lifted, fan_out.length, in_norm, out_norm)
        self._find_gates({name: part for name, part in parts.items() if len(_indices(part)) > 1})

    # -- products ---------------------------------------------------------------------------------------------------

    def products(
        self, fan_out: Mapping[str, Tensor], fan_in: Mapping[str, Tensor], objective: Objective | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return products of forms with vectors, in one pass for all groups.

        Args:
            fan_out: Vectors ``(s, q)`` by group name.
            fan_in: Vectors ``(t, p)`` by group name; entries that are not free do not count.
            objective: The loss on some of the batches only; by default, on all.

        Returns:
            By group name, ``(s, p)``: the vectors times ``c M``, and ``(t, q)``: ``c M`` times the vectors.
        """
        self.look()
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        vectors: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.spaces:
            space = self.spaces[name]
            b = _or_none(fan_out.get(name), space.fan_out_length)
            a = _or_none(fan_in.get(name), len(space.free)) * space.free
            if len(a) + len(b):
                vectors[name] = b, a
                rows[name] = self._candidates(name, b, a)
        found = {}
        for name, (by_in, by_out, _) in self._gradients(rows, objective or self._objective).items():
            (b, a), free = vectors[name], self.spaces[name].free
            s, t, way = len(b), len(a), self._way(name)
            to_in = (by_in[:s] - by_in[s + 1 : 2 * s + 1]) / 2 if way == "pairs" else by_in[:s]
            if way == "lift":
                to_out = (by_out[len(by_out) - t - 1 : -1] - by_out[-1:]) / self._step(name)
            else:
                one, other = by_out[len(by_out) - 2 * t :].chunk(2) if t else (by_out[:0], by_out[:0])
                to_out = (one - other) / (2 * self._step(name)) * (self.spaces[name].slope if way == "base" else 1.0)
            found[name] = to_in * free, to_out if t else by_out[:0]
        self.passes += 1
        return found

    def _candidates(self, name: str, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return fan-ins and fan-outs of candidates; all fan-outs that belong to one fan-in add up to zero."""
        space, step = self.spaces[name], self._step(name)
        balanced = torch.cat([b, -b.sum(dim=0, keepdim=True)]) if len(b) else b
        nothing = b.new_zeros(2 * len(a), space.fan_out_length)
        both = [space.base + step * a, space.base - step * a]
        if self._way(name) == "pairs":
            probe = self._probe(name) if len(b) else torch.zeros_like(space.base)
            at = [(space.base + sign * probe).expand(len(balanced), -1) for sign in (1, -1)]
            return torch.cat([*at, *both]), torch.cat([balanced, -balanced, nothing])
        if self._way(name) == "base":
            return torch.cat([space.base.expand(len(balanced), -1), *both]), torch.cat([balanced, nothing])
        base = space.base + _LEVEL * space.biases
        at = [base.expand(len(balanced), -1), base + step * a, base[None]]  # the last one for comparison
        return torch.cat(at), torch.cat([balanced, nothing[: len(a)], nothing.new_zeros(1, space.fan_out_length)])

    def _way(self, name: str) -> str:
        """Return how a group is measured.

        ``"base"``: at a fan-in of zero, as new units will be. ``"lift"``: where there is no derivative at zero, with a
        positive bias, which puts a ReLU where it is linear. ``"pairs"``: with fan-ins of both signs, where neither
        works: without biases, with gates, or behind activations that are not zero at zero.
        """
        space = self.spaces[name]
        if space.constant:
            return "pairs"
        if space.slope >= _NOTHING:
            return "base"
        return "lift" if bool(space.biases.any() or space.lifted) and not bool(space.base.any()) else "pairs"

    def look(self) -> None:
        """Measure, in one pass over the first batch, what a unit with no fan-in does: ``slope`` and ``constant``."""
        rows = {}
        for name in self.spaces:
            space = self.spaces[name]
            if name in self._seen:
                continue
            self._seen.add(name)
            b = _unit(torch.randn(space.fan_out_length, generator=self._generator(name), dtype=torch.float64))
            probe = self._probe(name)
            at = torch.stack([space.base, space.base, space.base + probe, space.base - probe])
            rows[name] = at, torch.stack([b, -b, b, -b])  # what is left of the probes' outputs is tiny
        for name, (by_in, by_out, present) in self._gradients(rows, self._first).items() if rows else ():
            space = self.spaces[name]
            alive = float(((by_in[2] - by_in[3]) / 2 * space.free).norm())
            space.slope = float((by_in[0] * space.free).norm()) / alive if alive > 0 else 1.0
            usual = float(present.norm(dim=1).max())
            space.constant = float(by_out[0].norm()) > _NOTHING**2 * usual

    def form(self, name: str, chunk: int = 64) -> Tensor:
        """Return the form of one group, written out: ``c M``, ``(q, p)``. Entries that are not free are zero.

        Args:
            name: The group.
            chunk: Candidates in one copy.
        """
        space = self.spaces[name]
        if space.fan_out_length <= int(space.free.sum()):
            eye = torch.eye(space.fan_out_length, dtype=torch.float64)
            return torch.cat([self.products({name: part}, {})[name][0] for part in torch.split(eye, chunk)])
        eye = torch.eye(len(space.free), dtype=torch.float64)[space.free]
        found = torch.zeros(space.fan_out_length, len(space.free), dtype=torch.float64)
        found[:, space.free] = torch.cat(
            [self.products({}, {name: part})[name][1] for part in torch.split(eye, chunk)]
        ).T
        return found

    def leading(
        self, num_units: Mapping[str, int], *, oversampling: int | None = None, passes: int = 2
    ) -> dict[str, SingularPairs]:
        """Return the leading singular pairs of the forms, by a randomised block method.

        The range of a form is sketched with random fan-outs, and sharpened by power steps: each pass applies the form,
        or its transpose, to an orthonormal basis of what the one before it found (Halko, Martinsson, Tropp, "Finding
        structure with randomness", SIAM Review 2011, arXiv:0909.4061). All but the last pass run over a quarter of
        the batches, because a sketch need not be exact. Where it spans the shorter side, one pass writes the form out,
        and the pairs are exact.

        Args:
            num_units: Pairs wanted, by group name, ``>= 1``; there are fewer where the rank is lower.
            oversampling: Vectors in a sketch above those wanted, ``>= 0``; by default 4, and in groups of less than 32
                an eighth of the units, for candidates cost as much as units do.
            passes: Passes over the objective, ``>= 2``.

        Returns:
            By group name; all groups are measured in the same passes.
        """
        bases: dict[str, tuple[str, Tensor]] = {}
        sketched: list[str] = []
        for name, wanted in num_units.items():
            space = self.spaces[name]
            p, q = int(space.free.sum()), space.fan_out_length
            more = min(4, max(1, space.group.size // 8)) if oversampling is None else oversampling
            sketch = max(wanted + more, _SMALL if min(p, q) <= _SMALL else 0)
            if q <= min(p, sketch):
                bases[name] = "out", torch.eye(q, dtype=torch.float64)
            elif p <= sketch:
                bases[name] = "in", torch.eye(len(space.free), dtype=torch.float64)[space.free]
            else:
                drawn = torch.randn(q, sketch, generator=self._generator(f"{name} sketch"), dtype=torch.float64)
                bases[name] = "out", torch.linalg.qr(drawn).Q.T
                sketched.append(name)
        few = self._objective.on(self._objective.batches[: -(-len(self._objective.batches) // 4)])
        for _ in range(passes - 1 if sketched else 0):
            for name, image in self._images({name: bases[name] for name in sketched}, few).items():
                bases[name] = "in" if bases[name][0] == "out" else "out", torch.linalg.qr(image.T).Q.T
        images = self._images({name: bases[name] for name in num_units}, self._objective)
        return {name: _pairs(*bases[name], images[name], num_units[name]) for name in num_units}

    def _images(self, bases: Mapping[str, tuple[str, Tensor]], objective: Objective) -> dict[str, Tensor]:
        """Return the products of forms with bases of either side."""
        sides = ({n: b for n, (side, b) in bases.items() if side == wanted} for wanted in ("out", "in"))
        out, into = sides
        products = self.products(out, into, objective)
        return {name: products[name][0 if side == "out" else 1] for name, (side, _) in bases.items()}

    # -- edits ------------------------------------------------------------------------------------------------------

    def edit(self, name: str, fan_in: Tensor, fan_out: Tensor) -> Edit:
        """Return the edit that appends units.

        What they pass on their way lets them through as they are (`transparent_values`). Units without a fan-out are
        silent anyway: behind a batch norm they have the gain 1, as they are no smaller than others.

        Args:
            name: The group.
            fan_in: What is added to the base: ``(k, p)``.
            fan_out: ``(k, q)``.
        """
        group, base = self.spaces[name].group, self.spaces[name].base
        values = transparent_values(self._model, group, len(fan_in), silent=not bool(fan_out.any()))
        values |= UnitVectors(self._model, group, "produced").spread(base + fan_in, new=len(fan_in))
        values |= UnitVectors(self._model, group, "consumed").spread(fan_out, new=len(fan_in))
        return widen(group, len(fan_in), values=values)

    # -- private ----------------------------------------------------------------------------------------------------

    @property
    def _first(self) -> Objective:
        objective = self._objective
        return objective.on(objective.batches[:1])

    def _refuse(self, name: str, why: str) -> None:
        if self._on_refusal is None:
            raise StructureError(f"New units of '{name}' cannot begin at zero: {why}.")
        self._on_refusal(name, why)

    def _step(self, name: str) -> float:
        """Length of the fan-ins at which fan-out gradients are taken: where errors of the method and round-off meet."""
        space = self.spaces[name]
        axis = space.group.with_role("consumed")[0]
        power = {"pairs": 1 / 3, "base": 1 / 3, "lift": 2 / 5}[self._way(name)]
        return space.fan_in_norm * float(torch.finfo(tensor_of(self._model, axis.tensor).dtype).eps ** power)

    def _probe(self, name: str) -> Tensor:
        """Return a tiny fan-in, at which a derivative by the fan-in loses no digits."""
        space = self.spaces[name]
        drawn = torch.randn(len(space.free), generator=self._generator(f"{name} probe"), dtype=torch.float64)
        return _TINY * space.fan_in_norm * _unit(drawn * space.free)

    def _find_gates(self, parts: Mapping[str, Tensor]) -> None:
        """Let what gets no gradient at zero be random, such as gates and queries: see `_free_parts`."""
        rows = {}
        for name, part in parts.items():
            space = self.spaces[name]
            loud = self._random_fan_in(name, part)
            b = _unit(torch.randn(space.fan_out_length, generator=self._generator(name), dtype=torch.float64))
            zero = torch.zeros_like(loud)
            bases = [zero, *(loud * (part != index) for index in _indices(part))]
            at = [loud]
            out = [torch.zeros_like(b)]
            for base, free in zip(bases, [part >= 0, *(part == i for i in _indices(part))], strict=True):
                probe = torch.randn(len(part), generator=self._generator(f"{name} probe"), dtype=torch.float64)
                offset = _TINY * space.fan_in_norm * _unit(probe * free)
                at += [base + offset, base - offset]
                out += [b, -b]
            rows[name] = torch.stack(at), torch.stack(out)
        for name, (by_in, by_out, _) in self._gradients(rows, self._first).items() if rows else ():
            self._settle_gates(name, parts[name], by_in, by_out)

    def _settle_gates(self, name: str, part: Tensor, by_in: Tensor, by_out: Tensor) -> None:
        indices = _indices(part)
        slopes = (by_in[1::2] - by_in[2::2]) / 2
        constant = ((by_out[1::2] + by_out[2::2]) / 2).norm(dim=1) / by_out[0].norm().clamp(min=1e-300)
        alone = [float(slopes[1 + i][part == index].norm()) for i, index in enumerate(indices)]
        at_zero = [float(slopes[0][part == index].norm()) for index in indices]
        enough = _NOTHING * max(alone)
        alive = [index for index, norm in zip(indices, at_zero, strict=True) if norm > enough]
        space = self.spaces[name]
        if not alive:
            silent = [i for i in range(len(indices)) if constant[1 + i] < _NOTHING and alone[i] > enough]
            if not silent:
                del self.spaces[name]
                self._refuse(name, "no part of their fan-in both silences them and learns")
                return
            alive = [indices[max(silent, key=lambda i: alone[i])]]
        space.free = torch.isin(part, torch.tensor(alive))
        space.base = self._random_fan_in(name, part) * ~space.free

    def _random_fan_in(self, name: str, part: Tensor) -> Tensor:
        """Return weights as large as those that there are, part by part; biases are zero."""
        vectors = UnitVectors(self._model, self.spaces[name].group, "produced")
        present = vectors.of(dict(self._model.named_parameters())).to("cpu", torch.float64)
        drawn = torch.randn(len(part), generator=self._generator(f"{name} gates"), dtype=torch.float64)
        for index in _indices(part):
            drawn[part == index] *= float(present[:, part == index].square().mean().sqrt())
        return drawn * (part >= 0)

    def _room(self, group: AxisGroup, num_units: int) -> Edit:
        """Return the edit that makes room for candidates, which let everything through."""
        values = transparent_values(self._model, group, num_units)
        if self._way(group.name) == "lift":
            for label in self.spaces[group.name].lifted:
                values[label] = torch.full(values[label].shape, _LEVEL, dtype=torch.float64)
        return widen(group, num_units, values=values)

    def _gradients(
        self, rows: Mapping[str, tuple[Tensor, Tensor]], objective: Objective
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return the gradients at candidates, ``(n, p)`` and ``(n, q)``, and at the fan-outs of present units."""
        found = {}
        for names in _lots([self.spaces[name].group for name in rows]):
            groups = {name: self.spaces[name].group for name in names}
            more = {name: -(-len(rows[name][0]) // group.step) * group.step for name, group in groups.items()}
            edits = [self._room(groups[name], more[name]) for name in names]
            wide = Overgrown(self._model, edits)
            grown = {name: dataclasses.replace(g, size=g.size + more[name]) for name, g in groups.items()}
            known = {name: group.size for name, group in groups.items()}
            masks = {(n, role): _known_entries(wide.model, grown, known, n, role) for n in names for role in _ROLES}
            for (name, role), mask in masks.items():
                vectors = wide.vectors(name, role).clone()
                vectors[known[name] :] = 0
                given = rows[name][_ROLES.index(role)]
                vectors[known[name] : known[name] + len(given), mask] = given.to(vectors)
                wide.write_(name, role, vectors)
            _, gradients = wide.gradients(objective)
            for name in names:
                new = slice(known[name], known[name] + len(rows[name][0]))
                parts = [gradients[name, role][:, masks[name, role]].to("cpu", torch.float64) for role in _ROLES]
                found[name] = parts[0][new], parts[1][new], parts[1][: known[name]]
        return found


_ROLES: tuple[Role, Role] = ("produced", "consumed")


def _parts(model: nn.Module, vectors: UnitVectors) -> Tensor:
    """Return the part that each entry of a fan-in belongs to, int64 ``(p,)``, or -1 for biases.

    Parts are what might be zero alone: each tensor, and each of its blocks, such as the gates of a recurrent layer.
    Tensors that have the same number of blocks, more than one, share them: block by block they are added up.
    """
    keys: list[tuple[object, int]] = []
    codes: dict[str, Tensor] = {}
    named = dict(model.named_parameters())
    for axis in vectors.axes:
        tensor, sizes = named[axis.tensor], sizes_of(model, vectors.group)
        blocks = _blocks_of(axis, vectors.group.name, sizes)
        if tensor.ndim < 2:
            code = torch.full_like(blocks, -1)
        else:
            number = int(blocks.max()) + 1
            mine: list[tuple[object, int]] = [(number if number > 1 else axis.label, index) for index in range(number)]
            keys += [key for key in mine if key not in keys]
            code = torch.tensor([keys.index(key) for key in mine])[blocks.clamp(min=0)]
        shape = [-1 if dim == axis.dim else 1 for dim in range(tensor.ndim)]
        codes[axis.tensor] = code.reshape(shape).expand(tensor.shape)
    return vectors.of(codes)[0].long()


def _blocks_of(axis: Axis, group: str, sizes: Mapping[str, int]) -> Tensor:
    """Return, for each entry of an axis, which of the group's blocks it is in, or -1: int64 ``(length,)``."""
    codes, count = [], 0
    for block in axis.layout:
        length = block.length(sizes)
        places = [i for i, f in enumerate(block.factors) if isinstance(f, Units) and f.group == group]
        if not places:
            codes.append(torch.full((length,), -1))
            continue
        before = 1
        for factor in block.factors[: places[0]]:
            before *= factor if isinstance(factor, int) else sizes[factor.group]
        codes.append(count + torch.arange(length) // (length // before))
        count += before
    return torch.cat(codes)


def _known_entries(
    model: nn.Module, grown: Mapping[str, AxisGroup], known: Mapping[str, int], name: str, role: Role
) -> Tensor:
    """Return which entries of a vector in a copy do not belong to new units of any group: bool ``(length,)``."""
    vectors = UnitVectors(model, grown[name], role)
    named = dict(model.named_parameters())
    axes = {axis.label: axis for group in grown.values() for axis in group.axes}
    marks = {}
    for axis in vectors.axes:
        shape = named[axis.tensor].shape
        mark = torch.ones(shape, dtype=torch.bool)
        for along in axes.values():
            if along.tensor != axis.tensor:
                continue
            sizes = {n: units.size_in(model) for n, units in layout_units(along.layout).items()}
            chosen = [n for n in sizes if n in grown and not (n == name and along.dim == axis.dim)]
            if chosen:
                old = {n: (torch.arange(sizes[n]) < known[n]).double() for n in chosen}
                there = entry_share(along.layout, sizes, old) > 0
                mark &= there.reshape([-1 if dim == along.dim else 1 for dim in range(len(shape))])
        marks[axis.tensor] = mark
    return vectors.of(marks)[0]


def _lots(groups: Sequence[AxisGroup]) -> list[list[str]]:
    """Sort groups into lots in which no two are factors of one block, such as heads and their features."""
    lots: list[tuple[list[str], set[str]]] = []
    for group in groups:
        met = {
            factor.group
            for axis in group.axes
            for block in axis.layout
            for factor in block.factors
            if isinstance(factor, Units) and any(isinstance(f, Units) and f.group == group.name for f in block.factors)
        }
        for names, taken in lots:
            if group.name not in taken:
                names.append(group.name)
                taken.update(met)
                break
        else:
            lots.append(([group.name], met))
    return [names for names, _ in lots]


def _pairs(side: str, basis: Tensor, image: Tensor, num_units: int) -> SingularPairs:
    """Return singular pairs of a form from its image of an orthonormal basis: ``basis M`` or ``basis M^T``, by rows."""
    left, values, right = torch.linalg.svd(image, full_matrices=False)
    kept = min(num_units, int((values > _RANK * values[:1]).sum()))
    inside, outside = (left.T @ basis)[:kept], right[:kept]
    fan_out, fan_in = (inside, outside) if side == "out" else (outside, inside)
    largest = fan_out.abs().argmax(dim=1, keepdim=True)
    sign = fan_out.gather(1, largest).sign()
    return SingularPairs(fan_out * sign, values[:kept], fan_in * sign)


def _is_bias(model: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] == "bias" and bool(tensor_of(model, name).ndim == 1)


def _indices(part: Tensor) -> list[int]:
    return sorted(set(part.tolist()) - {-1})


def _unit(vector: Tensor) -> Tensor:
    return nn.functional.normalize(vector, dim=0)


def _or_none(vectors: Tensor | None, length: int) -> Tensor:
    return torch.zeros(0, length, dtype=torch.float64) if vectors is None else vectors.to("cpu", torch.float64)
