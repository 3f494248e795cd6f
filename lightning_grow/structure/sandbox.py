"""Run a model with other tensors and sizes, and leave it exactly as it was."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from lightning_grow.structure.axes import Attribute
from lightning_grow.structure.holders import OF_MODULES, held, saved, write
from lightning_grow.structure.states import cut_state, is_state, put_state, resized_state, state_at, states


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what modules keep, also in the objects that they hold, and random generators, however the body ends."""
    modules = [(module, dict(module.__dict__)) for module in model.modules()]
    inner = [saved(value) for value in held(model.modules())]
    tables = [
        (value, value.copy() if value else None)  # most are empty: hooks that nobody has registered
        for _, attributes in modules
        for name, value in attributes.items()
        if name in OF_MODULES and isinstance(value, (dict, set))
    ]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for restore in inner:
                restore()
            for value, before in tables:
                value.clear()
                if before is not None:
                    value.update(before)
            for module, attributes in modules:
                module.__dict__.clear()
                module.__dict__.update(attributes)


def reseed(seed: int) -> None:
    """Seed the generators that `unchanged` puts back: of the CPU, and of the current CUDA device if it is in use.

    ``torch.manual_seed`` seeds all devices, also those that come into use later: the run would go on with that seed.

    Args:
        seed: The seed.

    Example:
        >>> with unchanged(nn.Linear(1, 1)):
        ...     reseed(0)
        ...     first = torch.rand(1)
        ...     reseed(0)
        ...     second = torch.rand(1)
        >>> bool(first == second)
        True
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)


def swap_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters and buffers, tied ones included. Use inside `unchanged`."""
    by_id = {id(t): tensors[n] for n, t in [*model.named_parameters(), *model.named_buffers()] if n in tensors}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in by_id:
                    table[name] = by_id[id(tensor)]  # type: ignore[assignment]
        if isinstance(module, nn.RNNBase):
            module.__dict__["_flat_weights"] = [module._parameters[n] for n in module._flat_weights_names]


def set_size(model: nn.Module, attribute: Attribute, size: Any) -> None:
    """Write a size that a module keeps as a Python integer: itself, or in an object or container that it holds.

    A tensor whose shape it is (see `states`) gets these entries, or is cut off or filled up at its end.
    """
    module = model.get_submodule(attribute.module)
    if not is_state(attribute.name):
        write(module, attribute.name, attribute.index, size)
        return
    tensor = state_at(module, attribute.name)
    if tensor is not None and attribute.index is not None:
        new = (resized_state if isinstance(size, Tensor) else cut_state)(tensor, attribute.index, size)
        put_state(module, attribute.name, new)


def cast_states(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the tensors that modules keep beside parameters and buffers another precision. Use inside `unchanged`."""
    modules = dict(model.named_modules())
    for (path, name), tensor in states(modules).items():
        put_state(modules[path], name, tensor.to(dtype))


def tensors_in(output: Any) -> list[Tensor]:
    """Return the tensors of an output: of nested containers, dataclasses, mappings and distributions.

    Other objects are looked into only where there is nothing else: a cache beside the answer is no answer.
    """
    return _tensors_in(output, 3, objects=False) or _tensors_in(output, 3, objects=True)


def _tensors_in(output: Any, depth: int, *, objects: bool) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        inner: Iterable[Any] = ()
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            inner = leaf.values()
        elif dataclasses.is_dataclass(leaf):
            inner = [getattr(leaf, f.name) for f in dataclasses.fields(leaf)]
        elif isinstance(leaf, Distribution) or (objects and hasattr(leaf, "__dict__")):
            inner = list(vars(leaf).values())
        for value in inner if depth else ():
            found += _tensors_in(value, depth - 1, objects=objects)
    return found


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Let layers run as the operators that they are made of: without fused shortcuts, and not compiled."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
