"""Sizes that modules keep as Python integers: ``out_features``, ``normalized_shape``, ``hidden_size``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Attribute, layout_length
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.modules import Kept, bookkeeping


class Change(NamedTuple):
    """An attribute of a module and its new value."""

    module: nn.Module
    name: str
    value: Any


def described(
    model: nn.Module, attributes: Iterable[Attribute], sizes: Mapping[str, int], new_sizes: Mapping[str, int]
) -> Iterator[Change]:
    """Yield the changes of attributes that a structure describes.

    Args:
        model: The model.
        attributes: The attributes; the same one may come twice.
        sizes: Units of each group that the model has now.
        new_sizes: Units of each group afterwards.

    Raises:
        StructureError: If the model does not have such an attribute, or it has another value.
    """
    found: dict[tuple[str, str], dict[int | None, Attribute]] = {}
    for attribute in attributes:
        found.setdefault((attribute.module, attribute.name), {})[attribute.index] = attribute
    for (owner, name), entries in found.items():
        try:
            module = model.get_submodule(owner)
            value = before = getattr(module, name)
        except AttributeError as error:
            raise StructureError(f"The model has no attribute '{owner}.{name}' ({error}). Trace it again.") from error
        for attribute in entries.values():
            value = _resized(value, attribute, sizes, new_sizes)
        if value != before:
            yield Change(module, name, value)


def kept_sizes(model: nn.Module) -> list[tuple[nn.Module, Kept]]:
    """Return the sizes that torch's own modules keep, where they agree with the parameters now."""
    found = []
    for module in model.modules():
        for kept in bookkeeping(module):
            value = getattr(module, kept.name, None)
            entry = value if kept.index is None or value is None else value[kept.index]
            if entry == _kept_size(module, kept):
                found.append((module, kept))
    return found


def following(kept: Iterable[tuple[nn.Module, Kept]]) -> Iterator[Change]:
    """Yield the changes of sizes, found by `kept_sizes` before, that no longer agree with the parameters."""
    for module, size in kept:
        before = getattr(module, size.name)
        entry = _kept_size(module, size)
        value = before if entry is None else _put(before, size.index, entry)
        if value != before:
            yield Change(module, size.name, value)


def guessed(model: nn.Module, resized: Mapping[int, torch.Size]) -> Iterator[Change]:
    """Yield changes of integers that equal a changed axis of a parameter of the same module, and no other axis.

    Args:
        model: The model.
        resized: Shapes afterwards of the tensors that change, by id.
    """
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not any(id(tensor) in resized for tensor in tensors):
            continue
        after: dict[int, set[int]] = {}
        for tensor in tensors:
            for old, new in zip(tensor.shape, resized.get(id(tensor), tensor.shape), strict=True):
                after.setdefault(old, set()).add(new)
        certain = {old: next(iter(new)) for old, new in after.items() if old > 1 and len(new) == 1}
        for name, before in list(vars(module).items()):
            if type(before) is int:
                value: Any = certain.get(before, before)
            elif isinstance(before, (tuple, list)) and before and all(type(entry) is int for entry in before):
                value = _rebuilt(before, [certain.get(entry, entry) for entry in before])
            else:
                continue
            if value != before:
                yield Change(module, name, value)


def _resized(value: Any, attribute: Attribute, sizes: Mapping[str, int], new_sizes: Mapping[str, int]) -> Any:
    expected = layout_length(attribute.layout, sizes)
    found = value if attribute.index is None else value[attribute.index]
    if found != expected:
        place = "" if attribute.index is None else f"[{attribute.index}]"
        raise StructureError(
            f"Attribute '{attribute.module}.{attribute.name}{place}' should be {expected}, but is {found}. Trace the "
            "model again."
        )
    return _put(value, attribute.index, layout_length(attribute.layout, new_sizes))


def _put(value: Any, index: int | None, entry: int) -> Any:
    if index is None:
        return entry
    entries = list(value)
    entries[index] = entry
    return _rebuilt(value, entries)


def _rebuilt(value: Any, entries: list[Any]) -> Any:
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def _kept_size(module: nn.Module, kept: Kept) -> int | None:
    tensor: Any = module
    for name in kept.parameter.split("."):
        tensor = getattr(tensor, name, None)
    return tensor.shape[kept.dim] // kept.divisor * kept.times if isinstance(tensor, Tensor) else None
