"""What the layers that use a group read of it, sample by sample: activations, and the gradients that reach them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_grow.criteria.objective import MeasurementError, Objective, measuring
from lightning_grow.criteria.units import sizes_of
from lightning_grow.structure.axes import Axis, AxisGroup
from lightning_grow.structure.layout import unit_entries

_LAST, _SECOND = -1, 1
# Where a function has its input and its weight, and along which dimension of the input the weight's units lie.
_READERS: Mapping[Any, tuple[int, int, int]] = {
    F.linear: (0, 1, _LAST),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), (0, 1, _SECOND)),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), (0, 1, _SECOND)),
    torch.addmm: (1, 2, _LAST),
    **dict.fromkeys((torch.mm, torch.matmul, Tensor.mm, Tensor.matmul, Tensor.__matmul__), (0, 1, _LAST)),
}
_TOLERANCE = 1e-2
UNSEEN = "something other than linear layers and convolutions reads their units"
"""Why some groups cannot be judged sample by sample; see `Readers.unseen`."""


@dataclass(frozen=True, eq=False)
class Read:
    """One reading of a tensor by a layer.

    Attributes:
        weight: Name of the weight that it is multiplied with.
        source: The tensor that is read; take gradients with respect to it.
        dim: The dimension of the source along which its units lie.
    """

    weight: str
    source: Tensor
    dim: int

    def arranged(self, tensor: Tensor) -> Tensor:
        """Return the source, or its gradient, as ``(rows, entries, positions)``."""
        tensor = tensor.movedim(self.dim, 1) if tensor.ndim > 1 else tensor[None]
        return tensor.flatten(2) if tensor.ndim > 2 else tensor[..., None]


class Reads(TorchFunctionMode):
    """Notes, while a model runs, what is multiplied with some of its weights: by linear layers and convolutions.

    It watches functions, not modules, so that it does not matter who calls them. Weights that are read in another way
    (fused attention, recurrent layers) are not seen; `unseen` tells.

    Args:
        model: The model that will run.
        weights: Names of the weights to watch.

    Attributes:
        reads: What was read, in order.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> with Reads(model, ["1.weight"]) as reading:
        ...     _ = model(torch.ones(4, 2))
        >>> [(read.weight, tuple(read.source.shape)) for read in reading.reads]
        [('1.weight', (4, 3))]
    """

    def __init__(self, model: nn.Module, weights: Sequence[str]) -> None:
        super().__init__()
        named = dict(model.named_parameters())
        self._names = {id(named[name]): name for name in weights}
        self.reads: list[Read] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let a function read through a view that can be told from others' views."""
        kwargs = dict(kwargs or {})
        place = _READERS.get(func)
        if place is None:
            return func(*args, **kwargs)
        args = list(args)
        source, weight, dim = place
        name = self._names.get(id(args[weight] if weight < len(args) else kwargs.get("weight")))
        if name is not None:
            holder, key = (args, source) if source < len(args) else (kwargs, "input")
            tensor = holder[key]  # type: ignore[index]
            tensor = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
            holder[key] = tensor  # type: ignore[index]
            self.reads.append(Read(name, tensor, dim))
        return func(*args, **kwargs)


class Readers:
    """The layers that read some groups, and which entries of what they read belong to which unit.

    Args:
        model: The model.
        groups: The groups, with the sizes that they have in the model.

    Attributes:
        weights: Names of the weights with which the groups are read.
    """

    def __init__(self, model: nn.Module, groups: Sequence[AxisGroup]) -> None:
        named = dict(model.named_parameters())
        self.groups = {group.name: group for group in groups}
        self._axes: dict[str, list[tuple[str, Axis, Tensor]]] = {}
        for group in groups:
            sizes = sizes_of(model, group)
            for axis in group.with_role("consumed"):
                if axis.tensor in named:
                    entries = unit_entries(axis.layout, sizes, group.name)
                    self._axes.setdefault(axis.tensor, []).append((group.name, axis, entries))
        self.weights = tuple(self._axes)

    def by_unit(self, reads: Sequence[Read], tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Return what was read, or the gradient of it, by group: ``(rows, size, entries of a unit, positions)`` each.

        Args:
            reads: What was read.
            tensors: The source, or gradient, of each.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in self.groups}
        for read, tensor in zip(reads, tensors, strict=True):
            arranged = read.arranged(tensor)
            for name, _, entries in self._axes[read.weight]:
                if int(entries.max()) < arranged.shape[1]:
                    found[name].append(arranged[:, entries.to(arranged.device)])
        return found

    def unseen(self, model: nn.Module, objective: Objective) -> list[str]:
        r"""Return the groups that something reads in a way that `Reads` does not see.

        Scaling what is read is scaling the weights that read it, so that with all readings seen
        :math:`\sum x \, \partial L/\partial x = \sum w \, \partial L/\partial w` for each entry. This is tried on
        the first batch.

        Args:
            model: A copy of the model, in which all parameters are trained.
            objective: The loss.
        """
        if not objective.batches:
            raise MeasurementError("There is no batch to measure the loss on.")
        named = dict(model.named_parameters())
        weights = [named[name] for name in self.weights]
        with objective.together(), torch.enable_grad(), measuring(model, objective.seed):
            with Reads(model, self.weights) as reading:
                loss = objective.loss(model, objective.batches[0])
            reads = reading.reads
            gradients = gradients_of(loss, [*(read.source for read in reads), *weights])
        of_weights = dict(zip(self.weights, gradients[len(reads) :], strict=True))
        missing = set(self.groups) - {name for axes in self._axes.values() for name, *_ in axes}
        for group in self.groups.values():
            if any(axis.tensor not in named for axis in group.with_role("consumed")):
                missing.add(group.name)
        for name, axes in self._axes.items():
            mine = [(read, g) for read, g in zip(reads, gradients, strict=False) if read.weight == name]
            for owner, axis, entries in axes:
                expected = (named[name].detach() * of_weights[name]).double().movedim(axis.dim, 0).flatten(1).sum(1)
                found = torch.zeros_like(expected)
                for read, gradient in mine:
                    x, g = read.arranged(read.source.detach()), read.arranged(gradient)
                    if x.shape[1] == len(expected):
                        found += (x * g).double().sum(dim=(0, 2))
                chosen = entries.flatten().to(expected.device)
                error = (found - expected)[chosen].square().sum()
                error, size = objective.reduce(torch.stack([error, expected[chosen].square().sum()])).tolist()
                if error > _TOLERANCE**2 * size:
                    missing.add(owner)
        return [name for name in self.groups if name in missing]


def gradients_of(output: Tensor, inputs: Sequence[Tensor], *, retain: bool = False) -> list[Tensor]:
    """Return the gradient of a loss with respect to some tensors; zero where none flows."""
    if not output.requires_grad or not inputs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(output, list(inputs), retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g.detach() for t, g in zip(inputs, found, strict=True)]


def sample_sums(product: Tensor, samples: int) -> Tensor:
    """Add up what belongs to one unit and one sample.

    Args:
        product: ``(rows, size, entries of a unit, positions)``.
        samples: Samples in the batch: rows are a multiple of it, those of a sample side by side.

    Returns:
        ``(samples, size)``.

    Raises:
        MeasurementError: If the rows are no multiple of the samples.
    """
    rows = product.shape[0]
    if samples < 1 or rows % samples:
        raise MeasurementError(
            f"A layer reads an input of first dimension {rows}, which is no multiple of the {samples} samples of the "
            "batch: what one sample contributes cannot be told. The first dimension should be that of the batch."
        )
    return product.sum(dim=(2, 3)).reshape(samples, rows // samples, -1).sum(dim=1)
