"""Sizes kept as Python integers, by modules and in the objects that they hold: ``out_features``, ``config.width``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Attribute, layout_length
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.holders import Step, get, located, read, replaced
from lightning_grow.structure.modules import Kept, bookkeeping
from lightning_grow.structure.states import is_state, resized_state, state_at


class Change(NamedTuple):
    """An attribute of a module or of an object that it holds, or an item of a container, and its new value."""

    owner: Any
    step: Step
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
    found: dict[tuple[str, str, int | None], Attribute] = {}
    for attribute in attributes:
        if not is_state(attribute.name):
            found.setdefault((attribute.module, attribute.name, attribute.index), attribute)
    changes: dict[tuple[int, Step], Change] = {}
    for (path, name, index), attribute in found.items():
        label = f"{path}.{name}" if index is None else f"{path}.{name}[{index}]"
        try:
            module = model.get_submodule(path)
            before = read(module, name, index)
        except (AttributeError, LookupError) as error:
            raise StructureError(f"The model has no attribute '{label}' ({error}). Trace it again.") from error
        expected = layout_length(attribute.layout, sizes)
        if before != expected:
            raise StructureError(f"Attribute '{label}' should be {expected}, but is {before}. Trace the model again.")
        size = layout_length(attribute.layout, new_sizes)
        if size != before:
            owner, step, inside = located(module, name, index)
            value = changes[id(owner), step].value if (id(owner), step) in changes else get(owner, step)
            changes[id(owner), step] = Change(owner, step, replaced(value, inside, size))
    yield from changes.values()


def kept_states(
    model: nn.Module, attributes: Iterable[Attribute], entries: Callable[[Attribute, int], Tensor | None]
) -> Iterator[Change]:
    """Yield the changes of tensors that modules keep beside parameters and buffers; those that are not there are none.

    Args:
        model: The model.
        attributes: Attributes of a structure; the same one may come twice.
        entries: Returns which entries an axis of so many has afterwards, -1 for new ones; None if it stays as it is.
    """
    done: dict[tuple[str, str], tuple[nn.Module, Tensor]] = {}
    for attribute in dict.fromkeys(a for a in attributes if is_state(a.name)):
        key, dim = (attribute.module, attribute.name), attribute.index
        module = model.get_submodule(attribute.module)
        tensor = done[key][1] if key in done else state_at(module, attribute.name)
        index = None if tensor is None or dim is None or dim >= tensor.ndim else entries(attribute, tensor.shape[dim])
        if tensor is not None and dim is not None and index is not None:
            done[key] = module, resized_state(tensor, dim, index)
    for (_, name), (module, tensor) in done.items():
        owner, step, inside = located(module, name.removesuffix(".shape"))
        yield Change(owner, step, replaced(get(owner, step), inside, tensor))


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
            yield Change(module, Step(size.name, False), value)


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
                yield Change(module, Step(name, False), value)


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
