"""Where optimizers remember something about a parameter: found by what it is keyed by, not by the optimizer's class.

``torch.optim`` keeps ``state[parameter]``. Others wrap an optimizer, keep a second mapping keyed by parameters, or
lists parallel to the parameters (slow weights). All are found by walking the optimizer's attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Slot(NamedTuple):
    """One place that belongs to one parameter: ``container[key]``; ``name`` is what the place is called."""

    container: Any
    key: Any
    parameter: Tensor
    name: str


def nested_optimizers(optimizer: Any) -> list[Any]:
    """Return an optimizer and all optimizers that it wraps, each once, the outermost first."""
    found: dict[int, Any] = {}
    pending = [optimizer]
    while pending:
        candidate = pending.pop(0)
        if id(candidate) in found or not hasattr(candidate, "param_groups"):
            continue
        found[id(candidate)] = candidate
        for value in getattr(candidate, "__dict__", {}).values():
            pending += _elements(value) if isinstance(value, (list, tuple, Mapping)) else [value]
    return list(found.values())


def parameters_of(optimizer: Any) -> list[Tensor]:
    """Return the parameters of an optimizer, each once, in the order of its param groups."""
    unique: dict[int, Tensor] = {}
    for nested in nested_optimizers(optimizer):
        for group in nested.param_groups:
            unique.update((id(p), p) for p in group["params"])
    return list(unique.values())


def state_slots(optimizer: Any) -> list[Slot]:
    """Return every place where an optimizer, or one that it wraps, remembers something about one parameter."""
    slots: dict[tuple[int, Any], Slot] = {}
    for nested in nested_optimizers(optimizer):
        for slot in _slots(nested):
            key = id(slot.key) if isinstance(slot.key, Tensor) else slot.key
            slots.setdefault((id(slot.container), key), slot)
    return list(slots.values())


def _slots(optimizer: Any) -> Iterator[Slot]:
    places = {**getattr(optimizer, "__dict__", {})}
    places.pop("param_groups", None)
    state = getattr(optimizer, "state", None)
    if state is not None:
        places["state"] = state
    groups = [list(group["params"]) for group in optimizer.param_groups]
    flat = [p for group in groups for p in group]
    for name, place in places.items():
        if isinstance(place, MutableMapping):
            yield from (Slot(place, key, key, name) for key in place if isinstance(key, Tensor))
        elif isinstance(place, list):
            yield from _parallel(place, flat, name)
            if len(place) == len(groups):
                for entries, parameters in zip(place, groups, strict=True):
                    yield from _parallel(entries, parameters, name)
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        for name, entries in group.items():
            yield from _parallel(entries, parameters, name)


def _parallel(entries: object, parameters: Sequence[Tensor], name: str) -> Iterator[Slot]:
    """Return the places of a list that has one tensor of the parameter's size for each parameter."""
    if not isinstance(entries, list) or not entries or len(entries) != len(parameters):
        return
    pairs = list(zip(entries, parameters, strict=True))
    if all(isinstance(e, Tensor) and e is not p and e.shape == p.shape for e, p in pairs):
        yield from (Slot(entries, i, p, name) for i, p in enumerate(parameters))


def _elements(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else list(value)
