"""Sizes inside the plain objects that modules hold: configurations, ``hparams``, dictionaries and lists, nested ones.

A *place* is a module and a path inside it, such as ``config.stages[1].width`` or ``sizes['hidden']``. What holds sizes
is data: its attributes are numbers, texts and more of such objects. A trainer that a module knows is none.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_STEP = re.compile(r"""\[(-?\d+|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\]|\.?([^.\[\]]+)""")
_LEAVES = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
_DATA = (Tensor, Enum, PurePath, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, range, slice)
_MUTABLE = (list, OrderedDict, dict, set, deque)
_FOREIGN = ("builtins", "torch", "numpy", "threading", "logging", "weakref", "functools", "lightning_grow")
OF_MODULES = frozenset(vars(nn.Module()))
"""What every module keeps for itself."""

_DEEPEST = 5
_LONGEST = 256
_MOST = 200

Place = tuple[str, str, int | None]
"""Module, path inside it, and position if the last container is a list or tuple."""

_Entry = tuple[Place, Any, tuple[int, str] | None]
"""A place, what is there, and the attribute of which watched object leads to it."""


class Step(NamedTuple):
    """One step of a path: an attribute, or an item of a container."""

    key: Any
    is_item: bool

    def __str__(self) -> str:
        return f"[{self.key!r}]" if self.is_item else f".{self.key}"


@lru_cache(maxsize=4096)
def steps(name: str, index: int | None = None) -> tuple[Step, ...]:
    """Return the steps of a path.

    Example:
        >>> [str(step) for step in steps("config.sizes", 1)]
        ['.config', '.sizes', '[1]']
    """
    found = [Step(ast.literal_eval(item), True) if item else Step(name, False) for item, name in _STEP.findall(name)]
    return (*found, Step(index, True)) if index is not None else tuple(found)


def read(module: nn.Module, name: str, index: int | None = None) -> Any:
    """Return what is at a place.

    Raises:
        LookupError: If there is no such place.
    """
    return _chain(module, steps(name, index))[-1]


def located(module: nn.Module, name: str, index: int | None = None) -> tuple[Any, Step, tuple[Step, ...]]:
    """Return the object or mapping to change in order to change a place, where in it, and what follows inside that.

    Tuples and lists are values: they may be constants of the program, so that `replaced` ones take their place.

    Raises:
        LookupError: If there is no such place.
    """
    path = steps(name, index)
    chain = _chain(module, path)
    last = max(i for i, owner in enumerate(chain[:-1]) if not isinstance(owner, (tuple, list)))
    return chain[last], path[last], path[last + 1 :]


def replaced(value: Any, inside: Sequence[Step], entry: Any) -> Any:
    """Return a value with another entry inside its tuples and lists."""
    if not inside:
        return entry
    entries = list(value)
    entries[inside[0].key] = replaced(entries[inside[0].key], inside[1:], entry)
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def write(module: nn.Module, name: str, index: int | None, entry: Any) -> None:
    """Put an entry at a place."""
    owner, step, inside = located(module, name, index)
    put(owner, step, replaced(get(owner, step), inside, entry))


def _chain(module: nn.Module, path: Iterable[Step]) -> list[Any]:
    """Return the module and what each step leads to."""
    chain: list[Any] = [module]
    for step in path:
        try:
            chain.append(get(chain[-1], step))
        except (AttributeError, LookupError, TypeError) as error:
            raise LookupError(f"{type(chain[-1]).__name__} has no '{step}'") from error
    return chain


def get(owner: Any, step: Step) -> Any:
    """Return an attribute or item as it is kept, whatever its class makes of access to it."""
    if step.is_item:
        return dict.__getitem__(owner, step.key) if isinstance(owner, dict) else owner[step.key]
    kept = getattr(owner, "__dict__", {})
    return kept[step.key] if step.key in kept else getattr(owner, step.key)


def put(owner: Any, step: Step, value: Any) -> None:
    """Set an attribute or item, also of objects that refuse it: frozen dataclasses, checked configurations."""
    if step.is_item:
        if isinstance(owner, dict):
            dict.__setitem__(owner, step.key, value)
        else:
            owner[step.key] = value
    elif step.key in getattr(owner, "__dict__", {}):
        owner.__dict__[step.key] = value
    else:
        object.__setattr__(owner, step.key, value)


def held(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the objects and containers that modules hold and that can be changed, each once.

    What every module keeps (its parameters, children and hooks) is not among them.
    """
    known: dict[int, tuple[Any, bool]] = {}
    first = ((name, value) for module in modules for name, value in module.__dict__.items())
    queue = deque((value, _DEEPEST) for name, value in first if name not in OF_MODULES and type(value) not in _QUICK)
    while queue:
        value, depth = queue.popleft()
        if isinstance(value, tuple):
            queue.extend((v, depth - 1) for v in value if depth and type(v) not in _QUICK)
        elif id(value) not in known:
            known[id(value)] = value, isinstance(value, _MUTABLE) or is_settings(value)
            if known[id(value)][1] and depth:
                queue.extend((v, depth - 1) for _, v in contents(value) if type(v) not in _QUICK)
    return [value for value, is_held in known.values() if is_held]


def saved(value: Any) -> Callable[[], None]:
    """Return a function that puts back what an object or container holds now."""
    fields = dict(contents(value, attributes_only=True))
    base: Any = next((kind for kind in _MUTABLE if isinstance(value, kind)), None)
    kept: Any = None if base is None else base(value)

    def restore() -> None:
        if base is not None:
            base.clear(value)  # not the method of a class that refuses it
        if isinstance(kept, dict):
            for key, entry in kept.items():
                base.__setitem__(value, key, entry)
        elif base is not None:
            (base.update if base is set else base.extend)(value, kept)
        attributes = getattr(value, "__dict__", None)
        if attributes is not None:
            attributes.clear()
            attributes.update({step.key: v for step, v in fields.items()})
        else:
            for step, v in fields.items():
                object.__setattr__(value, step.key, v)

    return restore


def contents(value: Any, *, attributes_only: bool = False) -> Iterator[tuple[Step, Any]]:
    """Yield what an object or container holds, and where."""
    if not attributes_only and isinstance(value, dict):
        yield from ((Step(k, True), v) for k, v in dict.items(value) if type(k) in (str, int))
    elif not attributes_only and isinstance(value, (list, tuple, deque)):
        yield from ((Step(i, True), v) for i, v in enumerate(value))
    kept = getattr(value, "__dict__", None)
    if kept is not None:
        yield from ((Step(n, False), v) for n, v in kept.items() if type(n) is str)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((Step(f.name, False), getattr(value, f.name)) for f in dataclasses.fields(value))


class Holders:
    """The integers that modules keep, themselves and in the objects that they hold.

    Args:
        modules: The modules of a model by name. An object that several hold has its place in the first of them.

    Attributes:
        watched: Objects whose reading is noted, by id.
        reads: The attributes of them that have been read while `noting`.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._places: dict[int, tuple[str, str, Any]] = {}
        self._entries: dict[str, list[_Entry]] = {}
        self.watched: dict[int, Any] = {}
        self.reads: dict[int, set[str]] = {}
        for path in modules:
            self._entries[path] = list(self._of_module(path))

    def own(self, path: str) -> list[tuple[Place, int]]:
        """Return the integers above 1 that a module keeps as attributes, also inside tuples and lists."""
        return [(place, value) for place, value in self.integers(path) if place[0] == path and is_own(place[1])]

    def integers(self, path: str) -> list[tuple[Place, int]]:
        """Return `own` and the integers in objects that the module holds, but for those that nothing has read."""
        return [(place, value) for place, value in self.numbers(path) if value > 1]

    def numbers(self, path: str) -> list[tuple[Place, int]]:
        """Return the same and all smaller numbers."""
        found = self._entries[path]
        return [(place, value) for place, value, owner in found if type(value) is int and self._may_be_read(owner)]

    def sequences(self, path: str) -> list[tuple[Place, Sequence[Any]]]:
        """Return the lists and tuples that a module or an object that it holds keeps, if something has read them."""
        found = self._entries[path]
        return [(place, value) for place, value, owner in found if type(value) is not int and self._may_be_read(owner)]

    def _may_be_read(self, owner: tuple[int, str] | None) -> bool:
        return owner is None or owner[0] not in self.reads or owner[1] in self.reads[owner[0]]

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note which attributes of held objects are read. Classes that cannot be watched count as read."""
        originals: dict[type, Any] = {}
        for value in self.watched.values():
            kind = type(value)
            if kind not in originals:
                original = kind.__dict__.get("__getattribute__")
                try:
                    setattr(kind, "__getattribute__", self._noting(kind))  # noqa: B010 (typed as a method)
                except (AttributeError, TypeError):
                    continue
                originals[kind] = original
            self.reads.setdefault(id(value), set())
        try:
            yield
        finally:
            for kind, original in originals.items():
                if original is None:
                    delattr(kind, "__getattribute__")
                else:
                    setattr(kind, "__getattribute__", original)  # noqa: B010

    def _noting(self, kind: type) -> Callable[[Any, str], Any]:
        plain: Any = kind.__getattribute__
        reads = self.reads

        def __getattribute__(value: Any, name: str) -> Any:  # noqa: N807
            found = plain(value, name)
            noted = reads.get(id(value))
            if noted is not None and name not in noted:
                kept = object.__getattribute__(value, "__dict__")
                # What is read under another name is kept under one that has the same value; a copy reads everything.
                all_of_it = name in ("__dict__", "__reduce_ex__")
                noted.update([name] if name in kept else [n for n, v in kept.items() if all_of_it or v is found])
            return found

        return __getattribute__

    def _of_module(self, path: str) -> Iterator[_Entry]:
        visited: set[int] = set()
        for name, value in self._modules[path].__dict__.items():
            if name not in OF_MODULES:
                yield from self._below(path, name, value, None, visited, _DEEPEST)

    def _below(
        self, path: str, name: str, value: Any, owner: tuple[int, str] | None, visited: set[int], depth: int
    ) -> Iterator[_Entry]:
        if type(value) is int:
            yield (path, name, None), value, owner
            return
        if type(value) in _QUICK or not depth:
            return
        if isinstance(value, (tuple, list)):
            if isinstance(value, torch.Size) or len(value) > _LONGEST or any(isinstance(v, nn.Module) for v in value):
                return
            yield (path, name, None), value, owner
        else:
            if id(value) in visited or not (isinstance(value, dict) or is_settings(value)):
                return
            visited.add(id(value))
            path, name, _ = self._places.setdefault(id(value), (path, name, value))
            if isinstance(value, dict) and len(value) > _LONGEST:
                return
        is_object = not isinstance(value, (list, dict, tuple))
        if is_object and hasattr(value, "__dict__"):
            self.watched[id(value)] = value
        for step, inner in contents(value):
            below = (id(value), step.key) if is_object else owner
            if type(inner) is int and step.is_item and isinstance(value, (list, tuple)):
                yield (path, name, step.key), inner, below
            else:
                yield from self._below(path, f"{name}{step}", inner, below, visited, depth - 1)


_QUICK = frozenset({float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, Tensor})


def is_own(name: str) -> bool:
    """Return whether a place is an attribute of the module itself, or an entry of a tuple or list that is one.

    Example:
        >>> is_own("width"), is_own("config.width")
        (True, False)
    """
    return "." not in name and "[" not in name


def is_settings(value: Any) -> bool:
    """Return whether an object is data: all that it holds is plain, or data itself."""
    return _holds_data(value) and _all_data(value)


def _holds_data(value: Any) -> bool:
    """Return whether an object could hold settings, going by its kind."""
    kind = type(value)
    if isinstance(value, (*_LEAVES, *_DATA, nn.Module)) or callable(value):
        return False
    if kind.__module__.partition(".")[0] in _FOREIGN:
        return False
    return hasattr(value, "__dict__") or dataclasses.is_dataclass(value)


def _all_data(value: Any) -> bool:
    seen: dict[int, Any] = {id(value): value}
    queue = deque([(value, _DEEPEST)])
    while queue:
        holder, depth = queue.popleft()
        for _, inner in contents(holder):
            if type(inner) in _QUICK or isinstance(inner, (*_LEAVES, *_DATA)) or id(inner) in seen:
                continue
            if not isinstance(inner, (list, dict, tuple, set, frozenset, deque)) and not _holds_data(inner):
                return False
            if not depth or len(seen) > _MOST:
                return False
            seen[id(inner)] = inner
            queue.append((inner, depth - 1))
    return True
