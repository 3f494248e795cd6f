"""Which tensors of a param group make a layer, and which entries of a layer make a unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_grow.optim.tensors import wide_dtype

Grouping = Callable[[str], str]
"""From the name of a parameter to the name of its layer."""


class UnitGroup(NamedTuple):
    """Tensors that share their units.

    Attributes:
        members: Places of the tensors in the param group, that of the weight first.
        layer: Number of their layer.
        num_units: Entries along dim 0 of each member; 1 where all members together make one unit.
        start: Place of the first unit among all units.
    """

    members: tuple[int, ...]
    layer: int
    num_units: int
    start: int

    @property
    def units(self) -> slice:
        """The places of the units among all units."""
        return slice(self.start, self.start + self.num_units)


class Layers:
    """The layers and units of a param group, as its shapes are now.

    Args:
        params: Parameters of a param group.
        names: Their names, if known.
        grouping: From names to layers; by default, a layer is a module.
        device: Where numbers for layers and units are wanted.

    Attributes:
        params: Name of each parameter, or its number.
        names: Name of each layer; without names of parameters, their number.
        members: Places of the tensors of each layer.
        layer_of: The layer of each tensor.
        unit_groups: All groups of tensors that share units, layer by layer.
        unit_group_of: The number of that of each tensor.
        unit_counts: Number of units of each.
        size: Number of parameters altogether.

    Example:
        >>> linear = torch.nn.Linear(4, 3)
        >>> layers = Layers(list(linear.parameters()))
        >>> layers.members, layers.unit_groups
        ([[0, 1]], [UnitGroup(members=(0, 1), layer=0, num_units=3, start=0)])
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        names: Sequence[str] | None = None,
        grouping: Grouping | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._factors: dict[tuple[torch.device, torch.dtype], tuple[Tensor, list[Tensor]]] = {}
        self._places: dict[tuple[tuple[int, ...], tuple[int, ...], bool], Tensor] = {}
        self.params = list(map(str, range(len(params)))) if names is None else list(names)
        self._device = torch.device(device)
        self._is_on_device = all(p.device == self._device for p in params)
        self._dims = [p.ndim for p in params]
        self._sizes = [p.numel() for p in params]
        keys = _by_name(names, grouping) if names is not None else _by_shape(params)
        found: dict[str, list[int]] = {}
        for place, key in enumerate(keys):
            found.setdefault(key, []).append(place)
        self.names = list(found)
        self.members = list(found.values())
        numbers = {key: number for number, key in enumerate(found)}
        self.layer_of = [numbers[key] for key in keys]
        self.size = sum(self._sizes)
        self.unit_groups: list[UnitGroup] = []
        for number, members in enumerate(self.members):
            for group, num_units in _units(members, params, names):
                self.unit_groups.append(UnitGroup(group, number, num_units, self.num_units))
        self.unit_group_of = {place: number for number, units in enumerate(self.unit_groups) for place in units.members}
        self.unit_counts = [units.num_units for units in self.unit_groups]

    @property
    def num_units(self) -> int:
        """Number of all units."""
        return self.unit_groups[-1].start + self.unit_groups[-1].num_units if self.unit_groups else 0

    @cached_property
    def layer_scales(self) -> Tensor:
        """N/|G| of each layer: how many times as many parameters there are altogether."""
        return self._numbers([self.size / max(1, sum(self._sizes[p] for p in members)) for members in self.members])

    @cached_property
    def unit_scales(self) -> Tensor:
        """The same of each unit."""
        sizes = [sum(self._sizes[p] for p in units.members) / units.num_units for units in self.unit_groups]
        scales = self._numbers([self.size / max(1, size) for size in sizes])
        return scales.repeat_interleave(torch.tensor(self.unit_counts, device=self._device))

    @cached_property
    def layer_of_unit(self) -> Tensor:
        """The layer of each unit."""
        numbers = torch.tensor([units.layer for units in self.unit_groups])
        return numbers.repeat_interleave(torch.tensor(self.unit_counts)).to(self._device)

    @cached_property
    def _belongs(self) -> Tensor:
        layer_of = torch.tensor(self.layer_of)
        return (layer_of == torch.arange(len(self.names))[:, None]).to(self._device, wide_dtype(self._device))

    @cached_property
    def _ends(self) -> Tensor:
        """For each layer, how many units there are up to its last."""
        counts = [sum(u.num_units for u in self.unit_groups if u.layer == number) for number in range(len(self.names))]
        return torch.tensor(counts).cumsum(0).to(self._device)

    @cached_property
    def _ranks(self) -> list[tuple[list[int], Tensor]]:
        """The second members of all groups, then the third ones, ..., with the places of their units."""
        ranks: list[tuple[list[int], Tensor]] = []
        for rank in range(1, max((len(u.members) for u in self.unit_groups), default=0)):
            groups = [units for units in self.unit_groups if len(units.members) > rank]
            places = torch.cat([torch.arange(u.units.start, u.units.stop) for u in groups])
            ranks.append(([u.members[rank] for u in groups], places.to(self._device)))
        return ranks

    def as_factors(self, of_units: Tensor, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Return numbers for all units as what each tensor can be multiplied with.

        They are views of a buffer, which the next call overwrites.

        Args:
            of_units: The numbers, ``(units,)``.
            device: Where they are wanted.
            dtype: In which type.
        """
        known = self._factors.get((device, dtype))
        if known is None:
            buffer = torch.empty(self.num_units, device=device, dtype=dtype)
            views = []
            for place, dims in enumerate(self._dims):
                units = self.unit_groups[self.unit_group_of[place]]
                n = units.num_units
                views.append(buffer[units.units].view((n, *(1,) * (dims - 1)) if n > 1 else ()))
            known = self._factors[device, dtype] = buffer, views
        known[0].copy_(of_units)
        return known[1]

    def places_of_sums(self, places: tuple[int, ...], lengths: tuple[int, ...], *, by_units: bool) -> Tensor:
        """Return the unit or layer of numbers, of which each tensor has so many; see `Ladder.places_of_sums`.

        Args:
            places: The places of the tensors.
            lengths: How many numbers each has: a multiple of its units.
            by_units: Whether units are wanted.
        """
        known = self._places.get((places, lengths, by_units))
        if known is None:
            parts = [torch.zeros(0, dtype=torch.int64)]
            for place, length in zip(places, lengths, strict=True):
                units = self.unit_groups[self.unit_group_of[place]]
                if by_units:
                    numbers = torch.arange(units.num_units) + units.start
                    parts.append(numbers.repeat_interleave(length // units.num_units))
                else:
                    parts.append(torch.full((length,), self.layer_of[place]))
            known = self._places[places, lengths, by_units] = torch.cat(parts).to(self._device)
        return known

    def sums_of_tensors(self, sums: Sequence[Tensor]) -> Tensor:
        """Add up a number for each tensor to one for each layer, always in the same order."""
        return self._belongs @ self._together(sums)

    def sums_of_units(self, rows: Sequence[Tensor]) -> Tensor:
        """Add up what each tensor has for its units, ``(units,)``, to one number for each unit."""
        sums = self._together([rows[units.members[0]] for units in self.unit_groups])
        for places, units in self._ranks:
            sums.index_add_(0, units, self._together([rows[place] for place in places]))
        return sums

    def layer_sums_of_units(self, sums: Tensor) -> Tensor:
        """Add up a number for each unit to one for each layer."""
        total = torch.cat([sums.new_zeros(1), sums.cumsum(0)])[self._ends]
        return total.diff(prepend=total.new_zeros(1))

    def _together(self, parts: Sequence[Tensor]) -> Tensor:
        if not self._is_on_device:
            parts = [part.to(self._device) for part in parts]
        return torch.hstack(list(parts)).to(wide_dtype(self._device))

    def _numbers(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=wide_dtype(self._device), device=self._device)


def _by_name(names: Sequence[str], grouping: Grouping | None) -> list[str]:
    return [name.rpartition(".")[0] if grouping is None else grouping(name) for name in names]


def _by_shape(params: Sequence[Tensor]) -> list[str]:
    """Let a vector join the tensor before it, and those that joined it, where it has an entry for each of its units."""
    keys: list[str] = []
    number, length = -1, None
    for p in params:
        if p.ndim > 1 or length is None or p.shape != (length,):
            number, length = number + 1, p.shape[0] if p.ndim else None
        keys.append(str(number))
    return keys


def _units(
    members: Sequence[int], params: Sequence[Tensor], names: Sequence[str] | None
) -> list[tuple[tuple[int, ...], int]]:
    """Return the units of a layer: dim 0 of each weight, with the vectors that match; all the rest is one unit."""
    weights = [place for place in members if params[place].ndim > 1 and params[place].shape[0]]
    mates: dict[int, list[int]] = {place: [] for place in weights}
    rest: list[int] = []
    for place in members:
        if place in mates:
            continue
        matching = [w for w in weights if params[place].shape == params[w].shape[:1]]
        if len(matching) > 1 and names is not None:
            twin = names[place].replace("bias", "weight")
            matching = [w for w in matching if names[w] == twin] or matching
        (mates[matching[0]] if matching else rest).append(place)
    groups = [((w, *mates[w]), params[w].shape[0]) for w in weights]
    return [*groups, (tuple(rest), 1)] if rest else groups
