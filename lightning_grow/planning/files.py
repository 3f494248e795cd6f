"""Plain data to YAML for people and back: every mistake in a file is named with the place where it is."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from lightning_grow.planning.errors import PlanError
from lightning_grow.planning.patterns import near

T = TypeVar("T")


def to_text(data: Mapping[str, Any]) -> str:
    """Return YAML, in which what is four levels deep stands on one line."""
    return yaml.dump(_on_lines(data), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def from_text(text: str, source: str) -> dict[str, Any]:
    """Read a mapping from YAML.

    Args:
        text: The YAML.
        source: What to call it in messages.

    Raises:
        PlanError: If it is not YAML, has a key twice, or is not a mapping.
    """
    try:
        data = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise PlanError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    return mapping(data, source)


def mapping(data: object, where: str) -> dict[str, Any]:
    """Return ``data`` as a dict, whose keys are strings.

    Raises:
        PlanError: If it is anything else.
    """
    if not isinstance(data, Mapping):
        raise PlanError(f"{where} should be a mapping, 'key: value', found {shown(data)}.")
    for key in data:
        if not isinstance(key, str):
            raise PlanError(f"{where} should have names as keys, found {shown(key)}. Put quotes around it: '{key}'.")
    return dict(data)


def checked(cls: type[T], data: object, where: str, **given: object) -> T:
    """Build a dataclass from a mapping of its fields.

    Args:
        cls: The dataclass.
        data: The mapping.
        where: Names the place in messages.
        **given: Fields that have been built from ``data`` already.

    Raises:
        PlanError: If there are other keys, or the dataclass refuses a value.
    """
    values = mapping(data, where)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise PlanError(f"{where} has an unknown key '{key}'.{near(key, names)} Known: {', '.join(names)}.")
    try:
        return cls(**{key: _frozen(value) for key, value in values.items()} | given)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    except TypeError as error:  # a field without a default is missing
        raise PlanError(f"{where} is incomplete: {error}.") from error


def plain(value: object) -> Any:
    """Return dataclasses as dicts, without optional fields that are None, and tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not field.metadata.get("optional") or getattr(value, field.name) is not None
        }
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def check_type(name: str, value: object, expected: type | types.UnionType, words: str) -> None:
    """Raise if a value is of another type; True and False are no numbers.

    Raises:
        PlanError: If it is.
    """
    wrong_bool = isinstance(value, bool) and expected is not bool
    if wrong_bool or not isinstance(value, expected):
        raise PlanError(f"`{name}` should be {words}, found {shown(value)}.")


def shown(value: object) -> str:
    """Return a value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class _Line(dict[str, Any]):
    """A mapping that is written on one line."""


def _on_lines(value: Any, depth: int = 0) -> Any:
    if not isinstance(value, Mapping):
        return value
    kind = dict if depth < 3 else _Line
    return kind((key, _on_lines(inner, depth + 1)) for key, inner in value.items())


class _Dumper(yaml.SafeDumper):
    """Writes blocks, some mappings on one line, and texts with quotes in them between double quotes."""


def _write_line(dumper: yaml.SafeDumper, data: _Line) -> yaml.Node:
    return dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)


def _write_text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style='"' if data.startswith("'") else None)


_Dumper.add_representer(_Line, _write_line)
_Dumper.add_representer(str, _write_text)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: YAML itself would drop the first without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            seen.add(key)
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result
