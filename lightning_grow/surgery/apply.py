"""Apply edits to a model and its optimizers: plan everything, then commit everything, or nothing at all."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Attribute, Axis, Layout, Units, layout_length, layout_units, tensor_of
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.holders import Step
from lightning_grow.structure.layout import entry_index
from lightning_grow.structure.modules import conflict
from lightning_grow.structure.trials import eps_of
from lightning_grow.surgery.attributes import Change, described, kept_states
from lightning_grow.surgery.configs import configured
from lightning_grow.surgery.edit import Edit
from lightning_grow.surgery.fill import edited
from lightning_grow.surgery.optimizer_state import OptimizerMemory, plan_attributes
from lightning_grow.surgery.plan import (
    AxisMap,
    Given,
    TensorPlan,
    axis_map,
    gather,
    shift_source,
    value_source,
)
from lightning_grow.surgery.swap import Commit, check_swappable

log = logging.getLogger(__name__)


def apply_(
    model: nn.Module,
    edits: Iterable[Edit],
    optimizers: Iterable[Any] = (),
    *,
    new_state: Literal["mean", "zeros"] = "mean",
) -> None:
    """Resize the model in place: weights, buffers, module attributes and optimizer state; all or nothing.

    Parameters keep their identity, so that param groups, schedulers, tied weights and other references stay valid;
    dtype, device, ``requires_grad``, Python attributes and train or eval mode stay. Gradients of resized parameters
    are set to None. Optimizer state follows the units: see `optimizer_state`.

    Args:
        model: The model that the edited groups were traced from.
        edits: At most one edit for each group. All sizes refer to the model as it is now.
        optimizers: Optimizers of the model's parameters. State of optimizers that are not passed becomes stale.
        new_state: What squared gradients are for new entries: ``"mean"`` of the existing units, so that the first
            steps of new units are of the usual length, or ``"zeros"``.

    Raises:
        StructureError: If the model does not fit the edits (another size, an unknown tensor, sharded parameters), a
            parameter has hooks, or an autograd graph is alive. Nothing has changed then, as after any other error.
        ValueError: If a group is edited twice, values have a wrong shape, or an optimizer holds none of the model's
            parameters.
        TypeError: If an edit is not an `Edit`.

    Example:
        >>> from lightning_grow.structure.axes import Axis, AxisGroup, Block, Units
        >>> from lightning_grow.surgery.edit import widen
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> hidden = (Block((Units("0", "0.weight", 0, 1),)),)
        >>> axes = (Axis("0.weight", 0, "produced", hidden), Axis("0.bias", 0, "produced", hidden))
        >>> group = AxisGroup("0", 3, 1, (*axes, Axis("2.weight", 1, "consumed", hidden)))
        >>> apply_(model, [widen(group, 2)])
        >>> model[2].weight.shape
        torch.Size([2, 5])
    """
    for warning in apply_on_trial_(model, edits, optimizers, new_state=new_state):
        log.warning(warning)


def apply_on_trial_(
    model: nn.Module,
    edits: Iterable[Edit],
    optimizers: Iterable[Any] = (),
    *,
    new_state: Literal["mean", "zeros"] = "mean",
) -> tuple[str, ...]:
    """Do what `apply_` does, and return its warnings instead of logging them: for copies that nobody keeps."""
    if new_state not in ("mean", "zeros"):
        raise ValueError(f"new_state must be 'mean' or 'zeros', but is {new_state!r}.")
    with torch.inference_mode(False), torch.no_grad():
        plan = plan_model(model, edits)
        memories = [OptimizerMemory(optimizer, model.parameters()) for optimizer in _optimizers(optimizers)]
        with Commit(model, [planned.tensor for planned in plan.tensors]) as commit:
            for planned in plan.tensors:
                check_swappable(planned.name, planned.tensor)
            _commit(plan, memories, new_state, commit)
        for memory in memories:
            memory.report_resets()
    return plan.warnings


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """A parameter or buffer with the maps of its edited axes."""

    name: str
    tensor: Tensor
    maps: tuple[AxisMap, ...]
    is_mask: bool = False


@dataclass(frozen=True, eq=False)
class ModelPlan:
    """Everything that edits change in a model: shapes and integers, no new tensor yet."""

    tensors: tuple[PlannedTensor, ...]
    attributes: tuple[Change, ...]
    warnings: tuple[str, ...] = ()


def plan_model(model: nn.Module, edits: Iterable[Edit]) -> ModelPlan:
    """Return what edits change in a model, with all checks that need no new tensor.

    Raises:
        StructureError: If the model does not fit the edits.
        ValueError: If a group is edited twice or values have a wrong shape.
        TypeError: If an edit is not an `Edit`.
    """
    by_group = _edits(edits)
    sizes = _live_sizes(model, by_group)
    for edit in by_group.values():
        if edit.group.size != sizes[edit.group.name]:
            raise StructureError(
                f"The edit of group '{edit.group.name}' was planned for {edit.group.size} units, but the model has "
                f"{sizes[edit.group.name]}. Trace the model again, or use structure.resized(...)."
            )
    tensors: dict[int, PlannedTensor] = {}
    maps: dict[tuple[int, str, Layout], AxisMap] = {}
    for axis in _axes(model, by_group):
        tensor = tensor_of(model, axis.tensor)
        groups = layout_units(axis.layout)
        of_axis = {name: edit for name, edit in by_group.items() if name in groups}
        _check_length(axis, tensor, sizes)
        key = (axis.dim, axis.role, axis.layout)
        if key not in maps:
            maps[key] = axis_map(axis.dim, axis.role, axis.layout, sizes, of_axis)
        m = _padded(_with_given(maps[key], axis, tensor, sizes, of_axis), axis, of_axis)
        if m.is_identity(tensor.shape[axis.dim]):
            continue
        planned = tensors.get(id(tensor), PlannedTensor(axis.tensor, tensor, (), _is_mask(model, axis.tensor)))
        tensors[id(tensor)] = replace(planned, maps=tuple(sorted((*planned.maps, m), key=lambda m: m.dim)))
    attributes = [attribute for edit in by_group.values() for attribute in edit.group.attributes]
    new_sizes = {**sizes, **{name: edit.new_size for name, edit in by_group.items()}}
    index = {name: torch.tensor(edit.index) for name, edit in by_group.items()}

    def entries(attribute: Attribute, length: int) -> Tensor | None:
        fits = length == layout_length(attribute.layout, sizes)
        return entry_index(attribute.layout, sizes, index) if fits else None

    changes = [*described(model, attributes, sizes, new_sizes), *kept_states(model, attributes, entries)]
    _check_conflicts(changes)
    changes += _corrected_eps(model, by_group.values())
    written = {(id(change.owner), change.step) for change in changes}
    settings, warnings = configured(model, [edit.group for edit in by_group.values()], new_sizes)
    changes += [change for change in settings if (id(change.owner), change.step) not in written]
    return ModelPlan(tuple(tensors.values()), tuple(changes), tuple(warnings))


def _padded(m: AxisMap, axis: Axis, edits: Mapping[str, Edit]) -> AxisMap:
    """Return the map with what an edit does so that norms do not show its new units."""
    padded = [edit for edit in edits.values() if edit.padding is not None]
    if not padded:
        return m
    if len(edits) > 1:
        raise ValueError(
            f"Axis {axis.label} depends on the groups {', '.join(edits)}; widen them in one call after the other, to "
            "preserve the function under norms."
        )
    edit, padding = padded[0], padded[0].padding
    assert padding is not None
    gain = edit.ratio**0.5 if axis.label in padding.gains else 1.0
    if axis.label in padding.written:
        # Norms see one mean of all entries, not one for each place of a unit.
        return replace(m, fill=padding.fill, gain=gain, place=None)
    if axis.label in padding.shifts or (axis.role == "consumed" and padding.silent):
        return replace(m, fill="zeros", gain=gain)
    return replace(m, fill="random" if axis.role == "consumed" else "default", gain=gain)


def _corrected_eps(model: nn.Module, edits: Iterable[Edit]) -> list[Change]:
    """Return the changes of the numbers that keep norms from dividing by zero, where edits want them to follow."""
    changes: dict[tuple[str, str], Change] = {}
    for edit in edits:
        for path, name in edit.padding.eps if edit.padding is not None else ():
            module = model.get_submodule(path)
            before = changes[path, name].value if (path, name) in changes else eps_of(module, name)
            changes[path, name] = Change(module, Step(name, False), before * edit.ratio)
    return list(changes.values())


def _check_conflicts(changes: Iterable[Change]) -> None:
    sizes: dict[nn.Module, dict[str, Any]] = {}
    for owner, step, value in changes:
        if isinstance(owner, nn.Module) and not step.is_item:
            sizes.setdefault(owner, {})[step.key] = value
    for module, new in sizes.items():
        reason = conflict(module, new)
        if reason is not None:
            raise StructureError(f"The sizes of this {type(module).__name__} do not go together: {reason}.")


def _is_mask(model: nn.Module, name: str) -> bool:
    """Return whether a buffer is the mask of ``torch.nn.utils.prune`` beside a parameter."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return leaf.endswith("_mask") and f"{leaf.removesuffix('_mask')}_orig" in dict(
        module.named_parameters(recurse=False)
    )


def _commit(plan: ModelPlan, memories: Sequence[OptimizerMemory], new_state: str, commit: Commit) -> None:
    """Exchange tensor by tensor, so that only what a rollback needs is held twice."""
    for planned in plan.tensors:
        value = edited(planned.tensor, planned.name, planned.maps, planned.is_mask)
        tensor_plan = TensorPlan(planned.name, planned.maps, planned.tensor.shape, value)
        for memory in memories:
            for change in memory.planned(planned.tensor, tensor_plan, new_state):
                commit.item(*change)
        inverse = tensor_plan.inverse if planned.tensor.is_contiguous() else None
        restore = None if inverse is None else partial(gather, maps=inverse)
        commit.tensor(planned.tensor, value, plan_attributes(planned.tensor, tensor_plan), restore)
    changed = [planned.tensor for planned in plan.tensors]
    for memory in memories:
        for change in memory.shared_by(changed):
            commit.item(*change)
    for attribute in plan.attributes:
        commit.attribute(*attribute)


def _edits(edits: Iterable[Edit]) -> dict[str, Edit]:
    if isinstance(edits, Edit):
        raise TypeError("edits must be a list of edits, but is one Edit; pass [edit].")
    by_group: dict[str, Edit] = {}
    for edit in edits:
        if not isinstance(edit, Edit):
            raise TypeError(
                f"edits must hold Edit objects (from widen, split, prune), but one is a {type(edit).__name__}."
            )
        if edit.group.name in by_group:
            raise ValueError(
                f"Group '{edit.group.name}' is edited twice in one call; apply one edit after the other, or plan both "
                "as one Edit."
            )
        by_group[edit.group.name] = edit
    return dict(sorted(by_group.items()))


def _optimizers(optimizers: Iterable[Any]) -> list[Any]:
    if hasattr(optimizers, "param_groups"):
        raise TypeError("optimizers must be a list of optimizers, but is one optimizer; pass [optimizer].")
    unique = {id(optimizer): optimizer for optimizer in optimizers}
    return list(unique.values())


def _live_sizes(model: nn.Module, edits: Mapping[str, Edit]) -> dict[str, int]:
    """Return the live unit count of every group that the edited axes and attributes depend on."""
    units: dict[str, Units] = {}
    for group in (edit.group for edit in edits.values()):
        for layout in (*(axis.layout for axis in group.axes), *(attribute.layout for attribute in group.attributes)):
            units.update(layout_units(layout))
    return {name: _tensor(model, u.tensor, name).shape[u.dim] // u.per_unit for name, u in units.items()}


def _tensor(model: nn.Module, name: str, group: str) -> Tensor:
    try:
        tensor = tensor_of(model, name)
    except AttributeError:
        tensor = None
    if not isinstance(tensor, Tensor):
        raise StructureError(
            f"The model has no parameter or buffer '{name}', on which group '{group}' depends. The structure belongs "
            "to another model, or the model has changed: trace it again."
        )
    if nn.parameter.is_lazy(tensor):
        raise StructureError(f"'{name}' has no shape yet (a lazy module): run one batch through the model first.")
    return tensor


def _axes(model: nn.Module, edits: Mapping[str, Edit]) -> list[Axis]:
    """Return each edited axis once; an axis that several edited groups consume is consumed."""
    axes: dict[tuple[int, int], Axis] = {}
    for edit in edits.values():
        for axis in edit.group.axes:
            tensor = _tensor(model, axis.tensor, edit.group.name)
            if not 0 <= axis.dim < tensor.ndim:
                raise StructureError(
                    f"Group '{edit.group.name}' has axis {axis.label}, but the tensor has shape {tuple(tensor.shape)}. "
                    "Trace the model again."
                )
            known = axes.get((id(tensor), axis.dim))
            if known is not None and known.layout != axis.layout:
                raise StructureError(
                    f"Axis {axis.label} is laid out as '{axis}' in group '{edit.group.name}', but as '{known}' in "
                    "another edit. Take both groups from the same structure."
                )
            if known is None or axis.role == "consumed":
                axes[id(tensor), axis.dim] = axis
    return list(axes.values())


def _check_length(axis: Axis, tensor: Tensor, sizes: Mapping[str, int]) -> None:
    expected = layout_length(axis.layout, sizes)
    if tensor.shape[axis.dim] != expected:
        raise StructureError(
            f"Axis {axis} should have {expected} entries, but '{axis.tensor}' has shape {tuple(tensor.shape)}. "
            "Trace the model again."
        )


def _with_given(m: AxisMap, axis: Axis, tensor: Tensor, sizes: Mapping[str, int], edits: Mapping[str, Edit]) -> AxisMap:
    """Return the map with the values of new entries, and what is added to any, that the edits give for this axis."""
    values, shifts = [], []
    for name, edit in edits.items():
        if axis.label in edit.values:
            source, length = value_source(axis.layout, sizes, edits, name)
            values.append(_checked("Values", edit.values[axis.label], source, length, axis, tensor, name))
        if axis.label in edit.shifts:
            source, length = shift_source(axis.layout, sizes, edits, name)
            shifts.append(_checked("Shifts", edit.shifts[axis.label], source, length, axis, tensor, name))
    return replace(m, values=tuple(values), shifts=tuple(shifts)) if values or shifts else m


def _checked(what: str, given: Tensor, source: Tensor, length: int, axis: Axis, tensor: Tensor, group: str) -> Given:
    expected = (*tensor.shape[: axis.dim], length, *tensor.shape[axis.dim + 1 :])
    if given.shape != expected:
        new = "new " if what == "Values" else ""
        raise ValueError(
            f"{what} of {axis.label} in the edit of group '{group}' must have shape {tuple(expected)} (that of the "
            f"tensor before the edit, with {length} {new}entries along dimension {axis.dim}), but have shape "
            f"{tuple(given.shape)}."
        )
    return Given(given, source)
