"""What the entries of a configuration mean: found by building the model anew from it, on the meta device.

Some models can be built again from an object that they hold: ``type(model)(model.config)``. Each number in it is
changed in turn, and the shapes that follow tell which widths it stands for: one entry may make the width of all layers.
Which number makes one block more is found alike. Where a class cannot be built like that, nothing is claimed.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_grow.structure.axes import AxisGroup, Setting, Stack, layout_length
from lightning_grow.structure.holders import Holders, is_settings, read, write

log = logging.getLogger(__name__)

_MOST_MODULES = 5000
_MOST_PAIRS = 12
_MOST_DEFAULTS = 8

Shapes = dict[str, tuple[int, ...]]
Built = tuple[Shapes, dict[str, float]]
"""Shapes of the parameters, and the factors that modules keep: a model with others is another function."""


def expressed(
    model: nn.Module, groups: Mapping[str, AxisGroup], stacks: Mapping[str, Stack]
) -> tuple[dict[str, AxisGroup], dict[str, Stack]]:
    """Return groups and stacks with the entries of configurations that stand for them.

    Args:
        model: The model. It is left unchanged.
        groups: Its groups by name.
        stacks: Its stacks by name.
    """
    groups, stacks = dict(groups), dict(stacks)
    for path, module in _configured(model):
        try:
            meaning = _Meaning(path, module, groups)
            settings = meaning.settings()
            stacks = {name: meaning.counted(model, stack) for name, stack in stacks.items()}
        except _NoClaimError as reason:
            log.debug("nothing is known of the configuration of '%s': %s", path, reason)
            continue
        for name, group in groups.items():
            inside = all(axis.tensor.startswith(f"{path}." if path else "") for axis in group.axes)
            mine = tuple(s for s in settings if any(u.group == name for u, _ in s.counts))
            mine = mine or ((Setting(path, "config"),) if inside and meaning.expresses else ())
            groups[name] = replace(group, settings=(*group.settings, *mine))
    return groups, stacks


class _NoClaimError(Exception):
    """The model cannot be built from its configuration, or is another one then."""


def _configured(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that keep a configuration of which they are made, each configuration once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        config = vars(module).get("config")
        if config is None or id(config) in seen or not hasattr(config, "__dict__") or not is_settings(config):
            continue
        try:
            parameters = list(inspect.signature(type(module)).parameters.values())
        except (TypeError, ValueError):
            continue
        required = [
            p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if len(required) == 1:
            seen |= {id(v) for v in (config, *vars(config).values()) if hasattr(v, "__dict__")}
            yield path, module


class _Meaning:
    """Finds what the entries of the configuration of one module mean."""

    def __init__(self, path: str, module: nn.Module, groups: Mapping[str, AxisGroup]) -> None:
        self.path, self._kind, self._groups = path, type(module), groups
        self._sizes = {name: group.size for name, group in groups.items()}
        self._stub = nn.Module()
        try:
            self._stub.config = copy.deepcopy(module.config)
        except Exception as error:  # the model's own code: anything can happen
            raise _NoClaimError(f"it cannot be copied ({error})") from error
        holders = Holders({"": self._stub})
        if sum(1 for _ in module.modules()) > _MOST_MODULES:
            raise _NoClaimError("building it takes long")
        with holders.noting():
            self._now = self._built({})
        if self._now is None or self._now[0].keys() != _shapes(module).keys():
            raise _NoClaimError("the class cannot be built from it, or has other parameters then")
        self.expresses = self._now[0] == _shapes(module)
        first: dict[int, str] = {}
        named = module.named_parameters(remove_duplicate=False)
        self._first = {name: first.setdefault(id(p), name) for name, p in named}
        self._entries = {_text(place): value for place, value in holders.numbers("") if value > 0}
        reads = holders.reads.get(id(self._stub.config))
        empty = [n for n, v in vars(self._stub.config).items() if v is None and not n.startswith("_")]
        self._defaults = [n for n in empty if reads is None or n in reads]
        self._lists = {_text(place): value for place, value in holders.sequences("")}
        self._axes = {(a.tensor, a.dim): a.layout for g in groups.values() for a in g.axes}

    # -- building --------------------------------------------------------------------------------------------------

    def _built(self, changes: Mapping[str, Any]) -> Built | None:
        """Return what a model built with changed entries is; None if it cannot be built."""
        before = {name: read(self._stub, name) for name in changes}
        for name, value in changes.items():
            write(self._stub, name, None, value)
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                built = self._kind(copy.deepcopy(self._stub.config))
                return _shapes(built), _factors(built)
        except Exception as error:  # the model's own code: anything can happen
            log.debug("%s cannot be built with %s: %s", self._kind.__name__, dict(changes), error)
            return None
        finally:
            for name, value in before.items():
                write(self._stub, name, None, value)

    def _moved(self, changes: Mapping[str, Any]) -> dict[tuple[str, int], int] | None:
        """Return the sizes that change with entries, by axis; None if no model of the same tensors can be built."""
        built = self._built(changes)
        if built is None or self._now is None:
            return None
        (shapes, factors), (old_shapes, old_factors) = built, self._now
        if shapes.keys() != old_shapes.keys() or factors != old_factors:
            return None
        moved = {}
        for name, shape in shapes.items():
            for dim, (old, new) in enumerate(zip(old_shapes[name], shape, strict=True)):
                if old != new:
                    moved[f"{self.path}.{self._first[name]}".removeprefix("."), dim] = new
        return moved

    # -- widths ----------------------------------------------------------------------------------------------------

    def settings(self) -> list[Setting]:
        """Return the entries that stand for groups: alone, two together, or one that is left to its default.

        A model with other shapes than the one built from its configuration has been resized: then there are none.
        """
        if not self.expresses:
            return []
        found: dict[str, list[list[Setting]]] = {}
        touching: dict[str, set[str]] = {}
        counts = {n: v for n, v in self._entries.items() if any(v % size == 0 for size in self._sizes.values())}
        for name, value in counts.items():
            moved = self._moved({name: 2 * value}) or {}
            if not self._add(found, {name: value}, moved):
                for group in self._touched(moved):
                    touching.setdefault(group, set()).add(name)
        pairs = {p for g, names in touching.items() if g not in found for p in itertools.combinations(sorted(names), 2)}
        for pair in sorted(pairs)[:_MOST_PAIRS]:
            values = {name: self._entries[name] for name in pair}
            self._add(found, values, self._moved({name: 2 * value for name, value in values.items()}) or {})
        left = sorted({g.size for n, g in self._groups.items() if n not in found}, reverse=True)
        for name, size in list(itertools.product(self._defaults, left))[:_MOST_DEFAULTS]:
            self._add(found, {f"config.{name}": size}, self._moved({f"config.{name}": 2 * size}) or {})
        # Where two ways lead to the same shapes, nobody knows which one is meant.
        return list({s: None for ways in found.values() if len(ways) == 1 for s in ways[0]})

    def _add(
        self, found: dict[str, list[list[Setting]]], values: Mapping[str, int], moved: Mapping[tuple[str, int], int]
    ) -> bool:
        """Add entries as multiples of the unit counts that they double; return whether that is what they do."""
        driven = self._driven(moved)
        groups = [self._groups[name] for name in self._groups if name in driven]
        if not driven or not self._is_explained(moved, driven):
            return False
        # One entry must count the units themselves: twice the entries of each unit would look the same.
        whole = all(value % group.size == 0 for value in values.values() for group in groups)
        if not whole or not all(group.size in values.values() for group in groups):
            return False
        settings = [
            Setting(self.path, name, tuple((group.units, value // group.size) for group in groups))
            for name, value in values.items()
        ]
        for group in groups:
            found.setdefault(group.name, []).append(settings)
        return True

    def _driven(self, moved: Mapping[tuple[str, int], int]) -> set[str]:
        """Return the groups of which an axis has changed by itself, not by another group in it."""
        own = {(g.units.tensor, g.units.dim): n for n, g in self._groups.items()}
        return {own[key] for key in moved if key in own}

    def _touched(self, moved: Mapping[tuple[str, int], int]) -> set[str]:
        """Return the groups of which any axis has changed."""
        return {n for n, g in self._groups.items() if any((a.tensor, a.dim) in moved for a in g.axes)}

    def _is_explained(self, moved: Mapping[tuple[str, int], int], driven: set[str]) -> bool:
        """Return whether the changes are those of groups that have twice as many units, and no others."""
        sizes = self._sizes | {name: 2 * self._sizes[name] for name in driven}
        if any(key not in self._axes for key in moved):
            return False
        prefix = f"{self.path}." if self.path else ""
        known = {f"{prefix}{first}" for first in self._first.values()}
        return all(
            moved.get(key, layout_length(layout, self._sizes)) == layout_length(layout, sizes)
            for key, layout in self._axes.items()
            if key[0] in known
        )

    # -- depth -----------------------------------------------------------------------------------------------------

    def counted(self, model: nn.Module, stack: Stack) -> Stack:
        """Return a stack with the entries that count its blocks, and lists with an entry for each."""
        container, _, last = stack.blocks[-1].rpartition(".")
        prefix = f"{self.path}." if self.path else ""
        if not stack.blocks[-1].startswith(prefix) or self._now is None:
            return stack
        children = [n for n, _ in model.get_submodule(container).named_children()]
        if children[-1] != last or not last.isdigit():
            return replace(stack, uncounted=(*stack.uncounted, self.path))
        block = stack.blocks[-1].removeprefix(prefix)
        new = f"{container}.{int(last) + 1}".removeprefix(".").removeprefix(prefix)
        now = self._now[0]
        wanted = now | {
            new + name.removeprefix(block): shape for name, shape in now.items() if name.startswith(f"{block}.")
        }
        lengths = {len(stack.blocks), len(children)}
        lists = {name: value for name, value in self._lists.items() if len(value) in lengths}
        longer: dict[str, Any] = {name: [*value, value[-1]] for name, value in lists.items()}
        for name, value in self._entries.items():
            known = any(_same_place(model, (self.path, name), place) for place in stack.counts)
            if value not in lengths or known:
                continue
            for extra in ({}, longer) if longer else ({},):
                built = self._built({name: value + 1, **extra})
                if built is not None and built[0] == wanted:
                    counts = (*stack.counts, (self.path, name))
                    more = tuple(
                        (self.path, n)
                        for n in extra
                        if not any(_same_place(model, (self.path, n), place) for place in stack.per_block)
                    )
                    return replace(stack, counts=counts, per_block=(*stack.per_block, *more))
        return stack if stack.counts else replace(stack, uncounted=(*stack.uncounted, self.path))


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}


def _factors(module: nn.Module) -> dict[str, float]:
    return {
        f"{path}.{name}": value
        for path, inner in module.named_modules()
        for name, value in vars(inner).items()
        if type(value) is float
    }


def _text(place: tuple[str, str, int | None]) -> str:
    return place[1] if place[2] is None else f"{place[1]}[{place[2]}]"


def _same_place(model: nn.Module, one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Return whether two paths lead to the same entry of the same object."""
    if one[1].rpartition(".")[2] != other[1].rpartition(".")[2]:
        return False
    owners = [
        read(model.get_submodule(path), name.rpartition(".")[0]) if "." in name else model.get_submodule(path)
        for path, name in (one, other)
    ]
    return owners[0] is owners[1]
