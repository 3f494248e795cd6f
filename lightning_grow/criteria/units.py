"""From the entries of a tensor to the units that they belong to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Axis, AxisGroup, Role, layout_length, layout_units, tensor_of
from lightning_grow.structure.layout import entry_owner, unit_entries


def sum_over_units(values: Tensor, group: AxisGroup, axis: Axis, sizes: Mapping[str, int]) -> Tensor:
    """Add up the values of a tensor that belong to each unit along one axis.

    Args:
        values: One value for each entry of the axis's tensor, in its shape.
        group: The group that the axis belongs to.
        axis: One of its axes, perhaps composite; entries of other groups are left out.
        sizes: Units of each group that the axis depends on.

    Returns:
        float64 ``(group.size,)``.
    """
    owner = entry_owner(axis.layout, sizes, group.name)
    entries = values.detach().to("cpu", torch.float64).movedim(axis.dim, 0).reshape(len(owner), -1).sum(dim=1)
    return torch.zeros(sizes[group.name], dtype=torch.float64).index_add_(0, owner[owner >= 0], entries[owner >= 0])


def sizes_of(model: nn.Module, group: AxisGroup) -> dict[str, int]:
    """Return the unit counts, in the model, of every group that the axes of this group depend on."""
    units = {name: u for axis in group.axes for name, u in layout_units(axis.layout).items()}
    return {name: u.size_in(model) for name, u in units.items()}


class UnitVectors:
    """The weights of a group, unit by unit: one vector for each unit, whatever tensors and axes it is spread over.

    With role ``"produced"`` it is the fan-in of a unit: rows of the layers that make it, and biases; for an attention
    head the rows of its queries, keys and values; for a gated unit those of its gate, too. With role ``"consumed"`` it
    is its fan-out.

    Args:
        model: The model, or a resized copy of it.
        group: The group, with the size that it has in the model.
        role: Whose axes count.
        trained: Leave out parameters that are frozen.

    Attributes:
        axes: The axes that count, in the order in which their entries follow each other in a vector.
        length: Entries of each vector.
        lengths: Those of each axis.
        shapes: Shape of the tensor of each axis, by label.
        sizes: Units of each group that the axes depend on.

    Example:
        >>> from lightning_grow.structure import trace
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> fan_in = UnitVectors(model, trace(model, torch.zeros(1, 4))["0"], "produced")
        >>> fan_in.of(dict(model.named_parameters())).shape  # four weights and a bias
        torch.Size([8, 5])
    """

    def __init__(self, model: nn.Module, group: AxisGroup, role: Role, *, trained: bool = True) -> None:
        self.group = group
        self.sizes = sizes_of(model, group)
        named = dict(model.named_parameters())
        self.axes = tuple(
            axis
            for axis in group.with_role(role)
            if axis.tensor in named and (named[axis.tensor].requires_grad or not trained)
        )
        self.shapes = {axis.label: tuple(named[axis.tensor].shape) for axis in self.axes}
        self._entries = {axis.label: unit_entries(axis.layout, self.sizes, group.name) for axis in self.axes}
        self.lengths = [
            self._entries[a.label].shape[1] * (named[a.tensor].numel() // named[a.tensor].shape[a.dim])
            for a in self.axes
        ]
        self.length = sum(self.lengths)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, each once."""
        return tuple(dict.fromkeys(axis.tensor for axis in self.axes))

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors of tensors by parameter name (the parameters, or their gradients): ``(size, length)``."""
        parts = []
        for axis in self.axes:
            entries = self._entries[axis.label]
            tensor = tensors[axis.tensor].detach().movedim(axis.dim, 0)
            parts.append(tensor[entries.reshape(-1).to(tensor.device)].reshape(len(entries), -1))
        return torch.cat(parts, dim=1)

    def write_(self, model: nn.Module, vectors: Tensor) -> None:
        """Set the weights of all units of a model: ``(size, length)``."""
        with torch.no_grad():
            for axis, part in zip(self.axes, torch.split(vectors, self.lengths, dim=1), strict=True):
                tensor = tensor_of(model, axis.tensor).detach().movedim(axis.dim, 0)
                entries = self._entries[axis.label].reshape(-1).to(tensor.device)
                tensor[entries] = part.reshape(len(entries), *tensor.shape[1:]).to(tensor)

    def spread(self, vectors: Tensor, *, new: int = 0) -> dict[str, Tensor]:
        """Return vectors as entries of the axes, by label: what `Edit.shifts` and `Edit.values` want.

        Args:
            vectors: ``(units, length)``: one for each unit of the group after an edit (shifts), or
            new: so many, for each new unit (values), without entries for anything else.

        Returns:
            Tensors of the shapes of the parameters, with the axis as long as it is then; where other units share an
            axis, and for units that are not given, zero.
        """
        found = {}
        units = new or len(vectors)
        for axis, part in zip(self.axes, torch.split(vectors, self.lengths, dim=1), strict=True):
            sizes = {**self.sizes, self.group.name: units}
            entries = unit_entries(axis.layout, sizes, self.group.name).reshape(-1)
            shape = list(self.shapes[axis.label])
            rest = shape[: axis.dim] + shape[axis.dim + 1 :]
            rows = vectors.new_zeros([layout_length(axis.layout, sizes), *rest])
            rows[entries] = part.reshape(len(entries), *rest)
            found[axis.label] = (rows[entries.sort().values] if new else rows).movedim(0, axis.dim)
        return found
