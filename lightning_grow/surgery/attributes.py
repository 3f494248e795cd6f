"""Sizes kept as Python integers, by modules and in the objects that they hold: ``out_features``, ``config.width``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Attribute, layout_length
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.holders import OF_MODULES, Step, get, located, read, replaced
from lightning_grow.structure.modules import Kept, bookkeeping, of_input
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


def check_nothing_guessed(model: nn.Module, names: Mapping[int, str], resized: Mapping[int, torch.Size]) -> None:
    """Refuse numbers that modules keep and that may be a size that changes: only a structure can tell.

    Args:
        model: The model.
        names: Names of the tensors that change, by id.
        resized: Their shapes afterwards, by id.

    Raises:
        StructureError: If a module of the user's keeps a number that equals the length, of more than one entry, of an
            axis in it that changes (it may as well be the size of a kernel or a number of heads); or a norm without
            parameters one that equals any axis that changes.
    """
    for path, module in model.named_modules():
        above, numbers = _numbers_without_tensor(model, module)
        for tensor in (*above.parameters(), *above.buffers()) if numbers else ():
            after = resized.get(id(tensor), tensor.shape)
            for dim, (old, new) in enumerate(zip(tensor.shape, after, strict=True)):
                alike = [name for name, found in numbers.items() if old in found] if old not in (1, new) else []
                if alike:
                    raise StructureError(
                        f"'{'.'.join(filter(None, [path, alike[0]]))}' of {type(module).__name__} has the value {old}, "
                        f"as long as axis {dim} of '{names[id(tensor)]}', which becomes {new}. Whether it is that size "
                        "only the structure can tell: trace the model and give it, resize_like_(..., structure)."
                    )


def _numbers_without_tensor(model: nn.Module, module: nn.Module) -> tuple[nn.Module, dict[str, list[int]]]:
    """Return the numbers that a module keeps of which no tensor says what they count, and the module they may be of."""
    if unknown := of_input(module, 0):
        return model, {name: _integers(getattr(module, name)) for name, _ in unknown}
    if type(module).__module__.startswith("torch.nn."):
        return module, {}
    known = {kept.name for kept in bookkeeping(module)} | OF_MODULES
    found = {name: _integers(value) for name, value in vars(module).items() if name not in known}
    return module, {name: numbers for name, numbers in found.items() if numbers}


def _integers(value: Any) -> list[int]:
    entries = value if isinstance(value, (tuple, list)) else [value]
    return [entry for entry in entries if type(entry) is int]


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
