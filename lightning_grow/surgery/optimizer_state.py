"""The same gather applied to what optimizers remember.

State is found by what it is keyed by (`state_slots`) and understood by its shape and kind (`state_kinds`), not by the
class of the optimizer:

- scalars and step counts stay;
- what has the parameter's shape, also flattened, with leading history dimensions, inside nested dicts and lists, is
  gathered along the parameter's edited axes;
- factored second moments (one dimension averaged away, kept with length 1 or dropped) are gathered along the
  dimensions that they have;
- anything else (flat histories, preconditioner matrices, quantized blocks) is reset for this parameter, and said once.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import numbers
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_grow.surgery.fill import fill_mean_, scale_, write_new_
from lightning_grow.surgery.plan import AxisMap, TensorPlan, gather
from lightning_grow.surgery.state_kinds import GRADIENT, MASK, SQUARE, Kind, named_kind, observed_kind
from lightning_grow.surgery.state_slots import Slot, nested_optimizers, parameters_of, state_slots

log = logging.getLogger(__name__)


def plan_state(optimizer: Any, parameter: Tensor, plan: TensorPlan, new_state: str = "mean") -> dict[str, Any]:
    """Return what ``optimizer.state[parameter]`` becomes when the parameter is resized. Nothing is changed.

    Args:
        optimizer: The optimizer; its parameters are as before the edit.
        parameter: One of its parameters.
        plan: What the parameter becomes.
        new_state: What squared gradients are for new entries: ``"mean"`` of the existing units or ``"zeros"``.

    Returns:
        The new state: tensors of the new shape, the same objects for scalars; empty where it must start afresh.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adagrad([weight])
        >>> doubled = AxisMap(0, "produced", torch.tensor([0, 1, -1]))
        >>> plan = TensorPlan("weight", (doubled,), weight.shape, torch.tensor([1.0, 1.0, 0.0]))
        >>> plan_state(optimizer, weight, plan)["sum"].shape
        torch.Size([3])
    """
    memory = OptimizerMemory(optimizer)
    for change in memory.planned(parameter, plan, new_state):
        if change.container is optimizer.state:
            memory.report_resets()
            return dict(change.value)
    return {}


def plan_attributes(parameter: Tensor, plan: TensorPlan) -> dict[str, Tensor]:
    """Return what becomes of tensors of its shape that a parameter carries as Python attributes (masks, scores)."""
    found = {name: value for name, value in vars(parameter).items() if isinstance(value, Tensor)}
    followed = {}
    for name, value in found.items():
        if value.shape == parameter.shape and not value.requires_grad:
            kinds = {name: named_kind("", name) or observed_kind(name, [(value, parameter)])}
            with contextlib.suppress(_OpaqueError):
                followed[name] = _Follow(plan, "mean", kinds).content(value, name)
    return followed


class Change(NamedTuple):
    """What a place that belongs to a parameter becomes.

    Attributes:
        container: A mapping or list.
        key: The place in it.
        value: Its new content.
        restore: Computes the old content from the new one, bit for bit; None if that is not possible.
    """

    container: Any
    key: Any
    value: Any
    restore: Callable[[Any], Any] | None = None


class OptimizerMemory:
    """What one optimizer (and those that it wraps) remembers, as it is before an edit.

    Args:
        optimizer: Any object with ``param_groups`` and ``state``.
        model_parameters: If given, the optimizer must hold at least one of these.

    Raises:
        TypeError: If the object is no optimizer.
        ValueError: If the optimizer holds none of the model's parameters.
    """

    def __init__(self, optimizer: Any, model_parameters: Iterable[Tensor] | None = None) -> None:
        self._name = type(optimizer).__name__
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizers must hold optimizers with param_groups, but one is a {self._name}.")
        self._optimizer = optimizer
        self._parameters = parameters_of(optimizer)
        if model_parameters is not None:
            own = {id(p) for p in model_parameters}
            if not any(id(p) in own for p in self._parameters):
                raise ValueError(
                    f"The optimizer {self._name} holds none of the model's parameters. Pass the optimizers of this "
                    "model; after parameters were replaced, build the optimizer again."
                )
        self._slots: dict[int, list[Slot]] = {}
        for slot in state_slots(optimizer):
            self._slots.setdefault(id(slot.parameter), []).append(slot)
        self._resets: dict[str, list[str]] = {}
        self._flat = self._places_of_all_parameters()

    def kind_of(self, name: str) -> Kind:
        """Return the kind of a tensor entry, by its name."""
        return self._kinds.get(name, GRADIENT)

    def planned(self, parameter: Tensor, plan: TensorPlan, new_state: str) -> list[Change]:
        """Return what becomes of each place that remembers something about a parameter."""
        changes = []
        for slot in self._slots.get(id(parameter), []):
            content = slot.container[slot.key]
            try:
                state = _Follow(plan, new_state, self._kinds).content(content, slot.name)
            except _OpaqueError as reason:
                self._resets.setdefault(str(reason), []).append(plan.name)
                state = self._fresh(content, plan, parameter)
            changes.append(Change(slot.container, slot.key, state, _restore(content, state, plan)))
        return changes

    def shared_by(self, changed: Iterable[Tensor]) -> list[Change]:
        """Return what becomes of what the optimizer remembers about all parameters at once.

        L-BFGS keeps flat vectors over all parameters under the first one: a change of any makes them meaningless.
        """
        if not {id(p) for p in self._parameters} & {id(p) for p in changed}:
            return []
        changes = [
            Change(nested.__dict__, "_numel_cache", None)
            for nested in nested_optimizers(self._optimizer)
            if "_numel_cache" in getattr(nested, "__dict__", {})
        ]
        for container, key, name in self._flat:
            self._resets.setdefault(f"'{name}' covers all parameters at once", []).append("all parameters")
            changes.append(Change(container, key, type(container[key])()))
        return changes

    def report_resets(self) -> None:
        """Say once which parameters' state had to start afresh, and why."""
        if not self._resets:
            return
        names = [name for names in self._resets.values() for name in names]
        reasons = list(self._resets)
        log.warning(
            "%s: state of %s starts afresh, since %s%s.",
            self._name,
            ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else ""),
            reasons[0],
            f" (and {len(reasons) - 1} more reasons like it)" if len(reasons) > 1 else "",
        )

    @cached_property
    def _kinds(self) -> dict[str, Kind]:
        """The kind of each tensor entry, by name; read off all parameters before anything is changed."""
        classes = [type(nested).__name__ for nested in nested_optimizers(self._optimizer)]
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for slots in self._slots.values():
            for slot in slots:
                for name, tensor in _tensors(slot.container[slot.key], slot.name):
                    if tensor.numel() == slot.parameter.numel() and tensor.layout == torch.strided:
                        found.setdefault(name, []).append((tensor, slot.parameter))
        kinds = {}
        for name, pairs in found.items():
            named = [kind for kind in (named_kind(of, name) for of in reversed(classes)) if kind is not None]
            kinds[name] = named[0] if named else observed_kind(name, pairs)
        return kinds

    def _places_of_all_parameters(self) -> list[tuple[Any, Any, str]]:
        """Return places with vectors over all parameters, or over a param group: container, key, name of the entry."""
        totals = {sum(p.numel() for p in self._parameters)}
        totals |= {sum(p.numel() for p in g["params"]) for g in self._optimizer.param_groups if len(g["params"]) > 1}
        flat = []
        for slots in self._slots.values():
            for slot in slots:
                for name, tensor in _tensors(slot.container[slot.key], slot.name):
                    is_own = tensor.shape == slot.parameter.shape
                    if tensor.ndim == 1 and tensor.numel() in totals and not is_own and tensor.numel() > 1:
                        flat.append((slot.container, slot.key, name))
                        break
        return flat

    def _fresh(self, content: Any, plan: TensorPlan, parameter: Tensor) -> Any:
        """Return what the optimizer begins with: empty state, or what its constructor fills in."""
        if not isinstance(content, Mapping):
            return plan.value.clone()
        groups = self._optimizer.param_groups
        group: Mapping[str, Any] = next((g for g in groups if any(p is parameter for p in g["params"])), {})
        return _like(content, initial_state(self._optimizer, plan.value, group))


def initial_state(optimizer: Any, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that a newly built optimizer of this class has for a parameter: empty for most, not for Adagrad.

    Args:
        optimizer: An optimizer of the class.
        parameter: The value of the parameter.
        group: The options of its param group.
    """
    twin = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.is_floating_point())
    known = inspect.signature(type(optimizer)).parameters
    options = {k: v for k, v in group.items() if k in known and k != "params"}
    try:
        state = type(optimizer)([twin], **options).state
        return dict(state[twin]) if twin in state else {}
    except Exception:  # noqa: BLE001 (another constructor; nearly all optimizers fill their state in the first step)
        return {}


_COUNTS = (torch.int16, torch.int32, torch.int64)


def _restore(content: Any, state: Any, plan: TensorPlan) -> Callable[[Any], Any] | None:
    """Return a function that takes state back, where all that followed is of the parameter's shape."""
    inverse = plan.inverse
    if inverse is None or not isinstance(content, Mapping) or content.keys() != state.keys():
        return None
    followed = {key for key, value in content.items() if state[key] is not value}
    if not all(_is_dense(content[key], plan.old_shape) for key in followed):
        return None
    return lambda now: _like(now, {k: gather(v, inverse) if k in followed else v for k, v in now.items()})


def _is_dense(entry: Any, shape: torch.Size) -> bool:
    return isinstance(entry, Tensor) and entry.shape == shape and entry.is_contiguous()


class _OpaqueError(Exception):
    """State that does not follow an edit; the message completes 'starts afresh, since ...'."""


class _Follow:
    """Transforms the state of one parameter."""

    def __init__(self, plan: TensorPlan, new_state: str, kinds: Mapping[str, Kind]) -> None:
        self._plan = plan
        self._new_state = new_state
        self._kinds = kinds

    def content(self, content: Any, name: str) -> Any:
        """Return state after the edit: tensors of the new shape, containers of the same type, all else as it is."""
        if isinstance(content, Tensor):
            return self._tensor(content, name)
        if isinstance(content, Mapping):
            return _like(content, _kept_products(content, {k: self.content(v, str(k)) for k, v in content.items()}))
        if isinstance(content, (list, tuple, deque)):
            return _like(content, [self.content(entry, name) for entry in content])
        if (
            content is None
            or isinstance(content, (numbers.Number, str, torch.dtype, torch.device))
            or callable(content)
        ):
            return content
        if any(True for value in getattr(content, "__dict__", {}).values() for _ in _tensors(value, name)):
            raise _OpaqueError(f"'{name}' is a {type(content).__name__} with tensors of unknown meaning")
        return content

    def _tensor(self, state: Tensor, name: str) -> Tensor:
        old_shape = self._plan.old_shape
        is_factor = state.ndim == len(old_shape) > 1  # of a parameter with a single row, say
        if state.ndim == 0 or name == "step" or (state.numel() <= 1 and state.shape != old_shape and not is_factor):
            return state
        described = f"'{name}' of shape {tuple(state.shape)} and type {state.dtype} does not follow its parameter"
        is_code = state.is_quantized or (state.element_size() == 1 and state.dtype != torch.bool)
        if is_code or state.layout != torch.strided:
            raise _OpaqueError(described)
        kind = MASK if state.dtype == torch.bool else self._kinds.get(name, named_kind("", name) or SQUARE)
        if state.shape != old_shape and state.ndim == 1 and state.numel() == old_shape.numel():
            return self._shaped(state.reshape(old_shape), kind, tuple(range(len(old_shape)))).reshape(-1)
        dims = _parameter_dims(state.shape, old_shape, {m.dim for m in self._plan.maps}, name)
        if dims is None:
            raise _OpaqueError(described)
        return self._shaped(state, kind, dims)

    def _shaped(self, state: Tensor, kind: Kind, dims: tuple[int | None, ...]) -> Tensor:
        """Return state whose dimensions are dimensions of the parameter (None: of their own, or averaged away)."""
        maps = tuple(replace(m, dim=dims.index(m.dim)) for m in self._plan.maps if m.dim in dims)
        is_factor = {d for d in dims if d is not None} != set(range(len(self._plan.old_shape)))
        wants_mean = self._new_state == "mean" or is_factor  # a zero factor would silence the squares of old units, too
        is_mean = kind.new == "always mean" or (kind.new == "mean" and wants_mean)
        is_mean = is_mean and state.dtype not in _COUNTS
        out = gather(state, maps, zero_new=not is_mean)
        if kind.new == "weight":
            return self._weight_copy(out, maps, kind.scale)
        for m in maps:
            if m.has_new and is_mean:
                fill_mean_(out, m, state)
        for m in maps:
            if m.share is not None and m.role != "consumed" and kind.power:
                scale_(out, m, m.share**kind.power)
            if m.gain != 1 and kind.power:
                scale_(out, m, m.gains**-kind.power)  # what is multiplied by a gain has a gradient divided by it
        return out

    def _weight_copy(self, out: Tensor, maps: tuple[AxisMap, ...], scale: float) -> Tensor:
        for m in maps:
            if m.share is not None and m.role == "consumed":
                scale_(out, m, m.share)
            if m.gain != 1:
                scale_(out, m, m.gains)
        if out.shape == self._plan.value.shape:
            for m in maps:
                if m.has_new:
                    entries = m.new_entries.to(self._plan.value.device)
                    new = self._plan.value.index_select(m.dim, entries).to(out)
                    write_new_(out, m, new if scale == 1 else new * scale)
        return out


def _parameter_dims(
    shape: torch.Size, old_shape: torch.Size, edited: set[int], name: str
) -> tuple[int | None, ...] | None:
    """Return for each dimension of a state tensor the dimension of the parameter that it follows, or None if unclear.

    A dimension that is not one of the parameter's (averaged away and kept with length 1, or a history) is None.
    """
    ndim = len(old_shape)
    averaged = ndim - 1 if "row" in name else ndim - 2 if "col" in name else ndim
    factor = torch.Size(1 if d == averaged else n for d, n in enumerate(old_shape))
    if averaged < ndim > 1 and 1 in old_shape and shape == factor:  # lengths alone do not tell
        return tuple(None if d == averaged else d for d in range(ndim))
    if shape == old_shape:
        return tuple(range(ndim))
    if len(shape) == ndim and all(n in (1, o) for n, o in zip(shape, old_shape, strict=True)):
        return tuple(d if n == o else None for d, (n, o) in enumerate(zip(shape, old_shape, strict=True)))
    if len(shape) == ndim - 1:
        dropped = [d for d in range(ndim) if shape == old_shape[:d] + old_shape[d + 1 :]]
        candidates = {tuple(i for i in range(ndim) if i != d) for d in dropped}
        if len({tuple(i if i in edited else -1 for i in c) for c in candidates}) > 1:
            wanted = ndim - 1 if "row" in name else ndim - 2 if "col" in name else None
            candidates = {c for c in candidates if wanted is not None and wanted not in c}
        return min(candidates) if candidates else None
    extra = len(shape) - ndim
    if extra > 0 and shape[extra:] == old_shape and not set(shape[:extra]) & {old_shape[d] for d in edited}:
        return (*(None,) * extra, *range(ndim))
    return None


def _kept_products(before: Mapping[Any, Any], after: dict[Any, Any]) -> dict[Any, Any]:
    """Rescale factored squares so that their products stay what they were, where units left or share.

    Rows ``r`` and columns ``c`` stand for ``r c / mean(r)``, and each is a mean over the other: where the mean of the
    rows has changed, the columns change with it, and the other way round.
    """
    pairs = [(k, k.replace("row", "col")) for k in before if isinstance(k, str) and "row" in k]
    for row, column in ((r, c) for r, c in pairs if c in before):
        tensors = (before[row], before[column], after[row], after[column])
        if not all(isinstance(t, Tensor) and t.is_floating_point() and t.ndim <= 2 for t in tensors):
            continue
        old_rows, old_columns, rows, columns = (t.double().mean() for t in tensors)
        after[row] = _scaled(after[row], float(columns / old_columns))
        after[column] = _scaled(after[column], float(rows / old_rows))
    return after


def _scaled(tensor: Tensor, ratio: float) -> Tensor:
    """Multiply, unless the ratio is 1 to rounding or undefined."""
    return tensor * ratio if 0 < ratio < math.inf and abs(ratio - 1) > 1e-5 else tensor


def _tensors(content: Any, name: str) -> list[tuple[str, Tensor]]:
    """Return all tensors inside nested state, each with the name of the innermost entry."""
    if isinstance(content, Tensor):
        return [(name, content)]
    if isinstance(content, Mapping):
        return [pair for key, value in content.items() for pair in _tensors(value, str(key))]
    if isinstance(content, (list, tuple, deque)):
        return [pair for entry in content for pair in _tensors(entry, name)]
    return []


def _like(container: Any, content: Any) -> Any:
    """Return ``content`` in a container of the same type."""
    if hasattr(container, "_fields"):
        return type(container)(*content)
    if not isinstance(container, (MutableMapping, MutableSequence)):
        return type(container)(content)
    new = copy.copy(container)  # types of the user's own may need arguments
    new.clear()
    new.update(content) if isinstance(new, MutableMapping) else new.extend(content)
    return new
