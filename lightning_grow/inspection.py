"""What ``lightning-grow inspect TARGET`` does: build any importable model, trace it, print what may vary."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lightning_grow.costs import count_parameters, unit_parameters
from lightning_grow.structure import Structure


class TargetError(ValueError):
    """What was named on the command line cannot be imported, built or given an input. The message says why."""


def resolve(target: str) -> Any:
    """Import what a string names.

    Args:
        target: ``"package.module.Class"``, ``"package.module:callable"`` (dots allowed after the colon) or
            ``"path/to/file.py:callable"``.

    Raises:
        TargetError: If there is no such module, file or name.

    Example:
        >>> resolve("torch.nn:Linear")
        <class 'torch.nn.modules.linear.Linear'>
    """
    if ":" in target:
        place, _, path = target.rpartition(":")
        found: Any = _load_file(Path(place)) if place.endswith(".py") else _import(place, target)
        rest = path.split(".")
    else:
        found, rest = _longest_module(target)
    for name in rest:
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, dir(found), n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            where = getattr(found, "__name__", repr(found))
            raise TargetError(f"Cannot inspect '{target}': '{where}' has no '{name}'.{hint}")
        found = getattr(found, name)
    return found


def build(found: Any, target: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the module that was named, or that calling it returns.

    Args:
        found: A module, or a class or function that makes one.
        target: Its name, for messages.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        TargetError: If the call fails, or gives something that is not an ``nn.Module``.
    """
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise TargetError(f"Cannot inspect '{target}': expected a module, a class or a function, found {found!r:.80}.")
    try:
        model = found(*args, **(kwargs or {}))
    except Exception as error:
        raise TargetError(
            f"Cannot build '{target}': {type(error).__name__}: {error}. Give its arguments by --args, as JSON: "
            f"""--args '{{"name": value}}' or --args '[value, value]'."""
        ) from error
    if not isinstance(model, nn.Module):
        raise TargetError(f"Cannot inspect '{target}': calling it gave {type(model).__name__}, expected an nn.Module.")
    return model


def example_inputs(
    model: nn.Module, shapes: Sequence[str] = (), dtypes: Sequence[str] = (), inputs: str | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword inputs to trace a model with.

    Args:
        model: The model; its ``example_input_array``, if it has one, is used when nothing else is given.
        shapes: One for each input, as in ``"1,3,32,32"``.
        dtypes: One for each shape, or one for all, as in ``"int64"``; default float32.
        inputs: Names a function that returns the inputs: a tensor, a tuple, or a dict of keyword arguments.

    Raises:
        TargetError: If there is nothing to run the model on, or a shape or dtype cannot be read.

    Example:
        >>> args, kwargs = example_inputs(nn.Linear(4, 2), shapes=["1,4"])
        >>> args[0].shape
        torch.Size([1, 4])
    """
    if inputs is not None:
        made = resolve(inputs)
        example = made() if callable(made) else made
    elif shapes:
        example = tuple(_zeros(shape, dtype) for shape, dtype in zip(shapes, _each(dtypes, len(shapes)), strict=True))
    else:
        example = getattr(model, "example_input_array", None)
        if example is None:
            raise TargetError(
                f"{type(model).__name__} says nothing about its input: it has no 'example_input_array'. Give the shape "
                "of each input, --input-shape 1,3,32,32 (and --input-dtype int64 for token ids), or a function that "
                "returns the inputs, --inputs module:function."
            )
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def describe(model: nn.Module, structure: Structure, *, every_axis: bool = False) -> Group:
    """Return tables for a terminal: groups with sizes and costs, stacks, and what is pinned with its reasons.

    Args:
        model: The model that was traced.
        structure: What was found.
        every_axis: List all axes with their layouts, and all that is pinned.
    """
    total = count_parameters(model, structure)
    head = Text.assemble((type(model).__name__, "bold"), f": {total:,} parameters, ")
    head.append(f"{len(structure.groups)} groups of units, {len(structure.stacks)} stacks of blocks")
    parts: list[Table | Text] = [head, _groups_table(model, structure)]
    if every_axis:
        parts.append(_axes_table(structure))
    if structure.stacks:
        parts.append(_stacks_table(model, structure))
    if structure.pinned:
        parts.append(_pinned_table(structure, None if every_axis else 4))
    return Group(*parts)


def _table(title: str, left: Sequence[str], **numbers: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="italic", box=box.SIMPLE_HEAD, pad_edge=False)
    first, *others = left
    table.add_column(first, no_wrap=True, overflow="fold")
    for column in numbers.values():
        table.add_column(column, justify="right")
    for column in others:
        table.add_column(column, overflow="fold")
    return table


def _groups_table(model: nn.Module, structure: Structure) -> Table:
    table = _table(
        "Width: units that are resized together",
        ("group", "axes", "widening"),
        size="units",
        step="step",
        cost="parameters",
        unit_cost="per unit",
    )
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, group in structure.groups.items():
        tensors = dict.fromkeys(axis.tensor for axis in group.axes if axis.tensor in sizes)
        counts = {role: len(group.with_role(role)) for role in ("produced", "carried", "consumed")}
        table.add_row(
            name,
            f"{group.size:,}",
            str(group.step),
            f"{sum(sizes[tensor] for tensor in tensors):,}",
            f"{unit_parameters(model, structure, name):,}",
            ", ".join(f"{count} {role}" for role, count in counts.items() if count),
            "keeps the function" if group.obstacle is None else f"changes it: {group.obstacle}",
        )
    return table


def _axes_table(structure: Structure) -> Table:
    table = _table("Axes: how each group runs through the tensors", ("group", "role", "axis"))
    for name, group in structure.groups.items():
        for axis in group.axes:
            table.add_row(name, axis.role, str(axis))
    return table


def _listed(labels: Sequence[str], most: int | None) -> str:
    """Join the first labels, and say how many more there are."""
    if most is None or len(labels) <= most:
        return ", ".join(labels)
    return ", ".join([*labels[: most - 1], f"and {len(labels) - most + 1:,} more"])


def _stacks_table(model: nn.Module, structure: Structure) -> Table:
    table = _table(
        "Depth: blocks that can be repeated or removed", ("stack", "a new block"), number="blocks", cost="per block"
    )
    for name, stack in structure.stacks.items():
        cost = sum(parameter.numel() for parameter in model.get_submodule(stack.blocks[0]).parameters())
        start = "starts as the identity" if stack.obstacle is None else f"changes the function: {stack.obstacle}"
        table.add_row(name or "(the model itself)", str(len(stack.blocks)), f"{cost:,}", start)
    return table


def _pinned_table(structure: Structure, most: int | None) -> Table:
    table = _table("Pinned: axes that stay as they are", ("reason", "which"), number="axes")
    by_reason: dict[str, list[str]] = {}
    for label, reason in structure.pinned.items():
        by_reason.setdefault(reason, []).append(label)
    for reason, labels in by_reason.items():
        table.add_row(reason, str(len(labels)), _listed(labels, most))
    return table


def parse_arguments(text: str | None) -> tuple[list[Any], dict[str, Any]]:
    """Read JSON arguments: an object is keywords, a list is positions.

    Raises:
        TargetError: If the text is not JSON, or is neither of the two.

    Example:
        >>> parse_arguments('{"width": 8}')
        ([], {'width': 8})
    """
    try:
        value = json.loads(text) if text else []
    except json.JSONDecodeError as error:
        raise TargetError(
            f"--args should be JSON, such as '{{\"width\": 8}}' or '[8, 2]'; {text!r} is not: {error}."
        ) from error
    if isinstance(value, dict):
        return [], value
    if isinstance(value, list):
        return value, {}
    raise TargetError(f"--args should be a JSON object or list, found {text!r}.")


def _longest_module(target: str) -> tuple[ModuleType, list[str]]:
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        place = ".".join(parts[:cut])
        try:
            known = importlib.util.find_spec(place) is not None
        except ModuleNotFoundError:
            known = False
        if known:
            return _import(place, target), parts[cut:]
    return _import(parts[0], target), parts[1:]


def _import(place: str, target: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise TargetError(
            f"Cannot inspect '{target}': {error}. Give package.module.Class, package.module:callable or "
            f"path/to/file.py:callable; the current folder is searched too."
        ) from error
    except ValueError as error:
        raise TargetError(f"Cannot inspect '{target}': '{place}' is not the name of a module.") from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"There is no file '{path}'.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"'{path}' cannot be imported as a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look a class's module up by name
    spec.loader.exec_module(module)
    return module


def _zeros(shape: str, dtype: str) -> Tensor:
    kind = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(kind, torch.dtype):
        raise TargetError(f"--input-dtype should name a torch dtype such as float32 or int64, found {dtype!r}.")
    try:
        sizes = [int(size) for size in shape.replace("x", ",").split(",") if size.strip()]
        return torch.zeros(sizes, dtype=kind)
    except (ValueError, RuntimeError) as error:
        raise TargetError(f"--input-shape should be integers such as 1,3,32,32, found {shape!r}.") from error


def _each(dtypes: Sequence[str], number: int) -> Sequence[str]:
    given = list(dtypes) or ["float32"]
    if len(given) == 1:
        return given * number
    if len(given) != number:
        raise TargetError(f"Give one --input-dtype, or one for each of the {number} --input-shape, found {len(given)}.")
    return given
