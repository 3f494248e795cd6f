"""A copy of a model with more units than it should keep: candidates are tried in it, all at once.

What a criterion wants to know of a candidate (a split, a new unit) is how the loss changes when it is there. In an
overgrown copy, made by the same surgery that will make the real change, candidates are ordinary weights; the gradient
of the loss with respect to them answers for all candidates of all layers in one pass, for any kind of layer.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_grow.criteria.objective import MeasurementError, Objective
from lightning_grow.criteria.units import UnitVectors, sizes_of
from lightning_grow.structure.axes import AxisGroup, Role, tensor_of
from lightning_grow.structure.layout import entry_share
from lightning_grow.surgery.apply import apply_on_trial_
from lightning_grow.surgery.edit import Edit


class Overgrown:
    """A resized copy of a model, with the weights of the edited groups at hand, unit by unit.

    Args:
        model: The model; it is copied, and not changed.
        edits: What the copy has more of. Parameters that the edits touch are trained in the copy.

    Raises:
        MeasurementError: If the model cannot be copied.

    Attributes:
        model: The copy.

    Example:
        >>> import torch
        >>> from lightning_grow.structure import trace
        >>> from lightning_grow.surgery import widen
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(3, 4)
        >>> wide = Overgrown(model, [widen(trace(model, x)["0"], 3)])
        >>> wide.vectors("0", "consumed").shape
        torch.Size([11, 2])
    """

    def __init__(self, model: nn.Module, edits: Iterable[Edit]) -> None:
        edits = list(edits)
        self.model = _copied(model)
        apply_on_trial_(self.model, edits)
        self._vectors: dict[tuple[str, Role], UnitVectors] = {}
        self._groups: dict[str, AxisGroup] = {}
        roles: tuple[Role, ...] = ("produced", "consumed")
        for edit in edits:
            group = self._groups[edit.group.name] = _resized(edit)
            for role in roles:
                self._vectors[group.name, role] = UnitVectors(self.model, group, role)

    def vectors(self, group: str, role: Role) -> Tensor:
        """Return the weights of the units of a group: ``(size, length)``."""
        return self._vectors[group, role].of(dict(self.model.named_parameters()))

    def write_(self, group: str, role: Role, vectors: Tensor) -> None:
        """Set the weights of all units of a group: ``(size, length)``."""
        self._vectors[group, role].write_(self.model, vectors)

    def entries(self, group: str, units: Sequence[int]) -> dict[str, Tensor]:
        """Return what some units have in the copy, by axis label: what `Edit.values` wants, to keep them.

        Tensors that the group has several axes of (units that read their own group) are left out.

        Args:
            group: Name of an edited group.
            units: Units of the copy, in rising order.
        """
        members = self._groups[group]
        sizes = sizes_of(self.model, members)
        chosen = torch.zeros(members.size, dtype=torch.float64).index_fill_(0, torch.tensor(units), 1.0) + 1
        found = {}
        tensors = [axis.tensor for axis in members.axes]
        for axis in members.axes:
            if tensors.count(axis.tensor) > 1:
                continue
            mine = torch.nonzero(entry_share(axis.layout, sizes, {group: chosen}) == 2).flatten()
            tensor = tensor_of(self.model, axis.tensor).detach()
            found[axis.label] = tensor.index_select(axis.dim, mine.to(tensor.device))
        return found

    def gradients(
        self, objective: Objective, roles: Sequence[Role] = ("produced", "consumed")
    ) -> tuple[float, Mapping[tuple[str, Role], Tensor]]:
        """Return the loss, and its gradient for the units of each group and role: ``(size, length)`` each."""
        wanted = {key: vectors for key, vectors in self._vectors.items() if key[1] in roles and vectors.axes}
        names = [name for vectors in wanted.values() for name in vectors.parameters]
        loss, gradients = objective.gradients(self.model, names)
        return loss, {key: vectors.of(gradients) for key, vectors in wanted.items()}


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # the module's own attributes: anything can happen
        raise MeasurementError(f"{type(model).__name__} cannot be copied to try candidates in it: {error}") from error


def _resized(edit: Edit) -> AxisGroup:
    return dataclasses.replace(edit.group, size=edit.new_size)


def apart(groups: Sequence[AxisGroup]) -> list[list[AxisGroup]]:
    """Sort groups into as few lots as is easily found, such that no two groups of a lot share a tensor.

    If all groups grew at once, weights between two of them would grow along both axes; within a lot, twice the units
    are twice the weights.
    """
    lots: list[list[AxisGroup]] = []
    used: list[set[str]] = []
    for group in groups:
        tensors = {axis.tensor for axis in group.axes}
        place = next((place for place, taken in enumerate(used) if not taken & tensors), len(lots))
        if place == len(lots):
            lots.append([])
            used.append(set())
        lots[place].append(group)
        used[place] |= tensors
    return lots
