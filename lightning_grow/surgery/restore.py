"""Take on the shape of a state dict, larger or smaller; repeat changes of depth."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Attribute, Structure, layout_length, layout_units, stack_from_dict, tensor_of
from lightning_grow.structure.errors import StructureError
from lightning_grow.surgery.attributes import (
    Change,
    check_nothing_guessed,
    described,
    following,
    kept_sizes,
    kept_states,
)
from lightning_grow.surgery.configs import configured
from lightning_grow.surgery.depth import insert_, remove_
from lightning_grow.surgery.fill import edited
from lightning_grow.surgery.kernels import centred, kernel_changes, kernels_of
from lightning_grow.surgery.optimizer_state import OptimizerMemory
from lightning_grow.surgery.plan import AxisMap, TensorPlan
from lightning_grow.surgery.swap import Commit, check_swappable

log = logging.getLogger(__name__)


def resize_like_(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    structure: Structure | None = None,
    optimizers: Iterable[Any] = (),
) -> None:
    """Take on the shapes of a state dict, and its values; all or nothing.

    Parameters keep their identity, as in `apply_`. Sizes that modules keep as Python integers follow: those of the
    structure, and those of torch's own modules, with the padding of kernels of another size. Without a structure,
    numbers that equal a size that changes are refused, and those that do not (a number of heads that divides a width)
    are left alone. Tensors that are not in the
    state dict (non-persistent buffers) follow along the axes of the structure.

    Args:
        model: A model with the same names as the state dict's. Its hooks on ``load_state_dict`` are not called.
        state_dict: From ``model.state_dict()`` of a larger or smaller model, perhaps with non-persistent buffers added
            by name: what is left of their entries after units were pruned or split, it does not say itself.
        structure: The structure of this model, of any size: finds attributes and buffers that names cannot tell.
        optimizers: Optimizers of the model's parameters, whose state is to follow: cut off or filled at the end.

    Raises:
        StructureError: If the state dict is of another model: names that differ, tensors of other dimensions. If no
            structure is given and a module keeps a number that may be the length of an axis that changes.
            Nothing has changed then, as after any other error.
        ValueError: If an optimizer holds none of the model's parameters.

    Example:
        >>> small, large = nn.Linear(2, 3), nn.Linear(2, 5)
        >>> resize_like_(small, large.state_dict())
        >>> small
        Linear(in_features=2, out_features=5, bias=True)
    """
    values = _matched(model, state_dict)
    with torch.inference_mode(False), torch.no_grad():
        resized = _resized_tensors(model, values, structure)
        memories = [OptimizerMemory(optimizer, model.parameters()) for optimizer in optimizers]
        kept = kept_sizes(model)
        if structure is None:
            names, shapes = {id(r.tensor): r.name for r in resized}, {id(r.tensor): r.shape for r in resized}
            check_nothing_guessed(model, names, shapes)
        changes = [] if structure is None else _described(model, values, structure)
        changes += kernel_changes(model, {id(r.tensor): tuple(r.shape[2:]) for r in resized})
        with Commit(model, [r.tensor for r in resized]) as commit:
            for r in resized:
                check_swappable(r.name, r.tensor)
            for r in resized:
                _exchange(commit, r, values.get(r.name), memories)
            for memory in memories:
                for place in memory.shared_by([r.tensor for r in resized]):
                    commit.item(*place)
            for change in changes:
                commit.attribute(*change)
            for change in following(kept):
                commit.attribute(*change)
            done = {r.name for r in resized}
            for name, value in values.items():
                if name not in done:
                    commit.values(tensor_of(model, name), value)
        for memory in memories:
            memory.report_resets()


class DepthEvent(Protocol):
    """A change of depth as a record keeps it."""

    what: Any
    at: int | None
    stack: dict[str, Any] | None


class DepthRecord(Protocol):
    """A record of what happened in a run."""

    def depth_events(self) -> Sequence[DepthEvent]:
        """Return the events that inserted or removed blocks, in order."""


def replay_(model: nn.Module, record: DepthRecord, optimizers: Sequence[Any] = ()) -> None:
    """Repeat the changes of depth of a record, so that a fresh model has the names of the one that was recorded.

    Values are not restored: take on a state dict afterwards, by `resize_like_` or ``load_state_dict``.

    Args:
        model: A model as it was when the record began.
        record: What happened; its ``depth_events()`` say ``what`` (``"insert"`` or ``"remove"``), ``at`` and
            ``stack`` (the stack before the change, as plain data).
        optimizers: Optimizers of the model's parameters.

    Raises:
        StructureError: If an event does not say how to repeat it, or the model does not have its blocks. Events before
            it have been repeated.
    """
    for event in record.depth_events():
        if event.stack is None or event.at is None or event.what not in ("insert", "remove"):
            raise StructureError(f"The record does not say how to repeat this change of depth: {event}.")
        stack = stack_from_dict(event.stack)
        if event.what == "insert":
            insert_(model, stack, event.at, optimizers, preserve=False)
        else:
            remove_(model, stack, event.at, optimizers)


class _Resized(NamedTuple):
    name: str
    tensor: Tensor
    maps: tuple[AxisMap, ...]

    @property
    def shape(self) -> torch.Size:
        """The shape afterwards."""
        lengths = {m.dim: m.index.numel() for m in self.maps}
        return torch.Size(lengths.get(d, n) for d, n in enumerate(self.tensor.shape))


def _matched(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the state dict, checked against the names and dimensions of the model."""
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    own |= {n: buffer for n, buffer in model.named_buffers(remove_duplicate=False) if n in state_dict}
    given = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    for kind, names in (("lacks", own.keys() - given.keys()), ("has besides", given.keys() - own.keys())):
        if names:
            shown = ", ".join(f"'{name}'" for name in sorted(names)[:5])
            raise StructureError(
                f"The state dict is of another model than {type(model).__name__}: it {kind} {shown}"
                f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}. Models of other depth need the record of "
                "their changes first (replay_)."
            )
    shapes: dict[int, tuple[str, torch.Size]] = {}
    for name, tensor in own.items():
        expected = shapes.setdefault(id(tensor), (name, given[name].shape))
        if given[name].ndim != tensor.ndim or given[name].numel() == 0 < tensor.numel():
            raise StructureError(
                f"The state dict is of another model than {type(model).__name__}: '{name}' has shape "
                f"{tuple(given[name].shape)} in it, but {tuple(tensor.shape)} here."
            )
        if expected[1] != given[name].shape:
            raise StructureError(
                f"'{name}' and '{expected[0]}' are one tensor in {type(model).__name__}, but have the shapes "
                f"{tuple(given[name].shape)} and {tuple(expected[1])} in the state dict."
            )
    return {name: given[name] for name in own}


def _resized_tensors(model: nn.Module, values: Mapping[str, Tensor], structure: Structure | None) -> list[_Resized]:
    """Return every tensor that changes its shape, once."""
    found: dict[int, _Resized] = {}
    kernels = kernels_of(model)
    for name, value in values.items():
        tensor = tensor_of(model, name)
        if value.shape != tensor.shape:
            lengths_of = enumerate(zip(tensor.shape, value.shape, strict=True))
            is_kernel = id(tensor) in kernels
            maps = [(centred if d > 1 and is_kernel else _cut)(d, a, b) for d, (a, b) in lengths_of if a != b]
            found.setdefault(id(tensor), _Resized(name, tensor, tuple(maps)))
    if structure is None:
        return list(found.values())
    lengths: dict[str, dict[int, int]] = {}
    sizes = _sizes(model, values, structure)[1]
    for axis in (axis for group in structure.groups.values() for axis in group.axes):
        if axis.tensor not in values and sizes.keys() >= layout_units(axis.layout).keys():
            lengths.setdefault(axis.tensor, {})[axis.dim] = layout_length(axis.layout, sizes)
    for name, by_dim in lengths.items():
        tensor = tensor_of(model, name)
        maps = [_cut(d, tensor.shape[d], n) for d, n in by_dim.items() if n != tensor.shape[d]]
        if maps:
            found.setdefault(id(tensor), _Resized(name, tensor, tuple(maps)))
    return list(found.values())


def _cut(dim: int, old: int, new: int) -> AxisMap:
    """Cut an axis off at its end, or append new entries."""
    index = torch.arange(new)
    return AxisMap(dim, "carried", torch.where(index < old, index, -1))


def _exchange(commit: Commit, r: _Resized, value: Tensor | None, memories: Sequence[OptimizerMemory]) -> None:
    if value is None:
        value = edited(r.tensor, r.name, r.maps)
    else:
        value = torch.empty_like(value, dtype=r.tensor.dtype, device=r.tensor.device).copy_(value)
    plan = TensorPlan(r.name, r.maps, r.tensor.shape, value)
    for memory in memories:
        for change in memory.planned(r.tensor, plan, "mean"):
            commit.item(*change)
    commit.tensor(r.tensor, value)


def _sizes(
    model: nn.Module, values: Mapping[str, Tensor], structure: Structure
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the unit counts that the model has, and those of the state dict, read off any axis that tells."""
    after: dict[str, int] = {}
    found = -1
    while found < len(after):
        found = len(after)
        for name, group in structure.groups.items():
            for axis in group.axes:
                others = layout_units(axis.layout).keys() - {name}
                if name not in after and axis.tensor in values and others <= after.keys():
                    without, with_one = (layout_length(axis.layout, {**after, name: size}) for size in (0, 1))
                    size, rest = divmod(values[axis.tensor].shape[axis.dim] - without, with_one - without)
                    if rest == 0 and size > 0:
                        after[name] = size
    return {name: structure[name].units.size_in(model) for name in after}, after


def _described(model: nn.Module, values: Mapping[str, Tensor], structure: Structure) -> list[Change]:
    before, after = _sizes(model, values, structure)
    attributes = [
        a for g in structure.groups.values() for a in g.attributes if after.keys() >= layout_units(a.layout).keys()
    ]

    def entries(attribute: Attribute, length: int) -> Tensor | None:
        new = torch.arange(layout_length(attribute.layout, after))
        fits = length == layout_length(attribute.layout, before)
        return torch.where(new < length, new, -1) if fits and len(new) != length else None

    changes = [*described(model, attributes, before, after), *kept_states(model, attributes, entries)]
    changed = [structure[name] for name in after if after[name] != before[name]]
    settings, warnings = configured(model, changed, after)
    for warning in warnings:
        log.warning(warning)
    written = {(id(change.owner), change.step) for change in changes}
    return [*changes, *(change for change in settings if (id(change.owner), change.step) not in written)]
