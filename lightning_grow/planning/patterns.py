"""Names and glob patterns: which entry of a plan counts for a name, and few patterns that tell many names apart."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

_WILD = re.compile(r"\[.[^\]]*\]|[*?]")
_NUMBER = re.compile(r"(?<![^.'])\d+(?![^.'])")
_MANY = 4
"""So many values of a number become a star; fewer, as in ``net.0``, ``net.2``, ``net.4``, are listed one by one."""


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern is a name, or matches it: ``*``, ``?`` and ``[0-9]``, dots being letters like others.

    Example:
        >>> matches("encoder.0.fc", "encoder.*"), matches("head", "encoder.*")
        (True, False)
    """
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def most_specific(name: str, patterns: Iterable[str]) -> str | None:
    """Return the pattern that counts for a name: of those that match, the one with the most literal characters.

    Example:
        >>> most_specific("blocks.3.fc", ["blocks.*", "blocks.*.fc", "head"])
        'blocks.*.fc'
    """
    found = [pattern for pattern in patterns if matches(name, pattern)]
    return max(found, key=lambda p: (p == name, len(_WILD.sub("", p)), p), default=None)


def near(name: str, names: Iterable[str]) -> str:
    """Return `` Did you mean ...?`` with the names that are spelled most like this one; empty if there are none."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=3)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def without_numbers(text: str) -> str:
    """Return a text in which the numbers within dotted names are stars.

    Example:
        >>> without_numbers("fixed by 'layers.3.norm' (Norm) at 4")
        "fixed by 'layers.*.norm' (Norm) at 4"
    """
    return re.sub(r"'[^']*'", lambda quoted: _NUMBER.sub("*", quoted[0]), text)


@dataclass(frozen=True)
class _Bundle:
    """Names that are alike but for numbers, which one pattern may stand for."""

    names: tuple[str, ...]
    literal: frozenset[int] = frozenset()


def merged(kinds: Mapping[str, Hashable], blocks: Collection[str] = ()) -> dict[str, list[str]]:
    """Find patterns that stand for names which are alike but for numbers in them, and of one kind.

    Whatever the patterns match otherwise, `most_specific` finds for each name the pattern that stands for it.

    Args:
        kinds: Names, in order, each with what names under one pattern must share.
        blocks: Qualified names of modules of which there can be more: what is inside them gets a star at once, so that
            the pattern also stands for blocks to come.

    Returns:
        The names that each pattern stands for, in the order of the first of them.

    Example:
        >>> found = merged({f"layers.{i}.fc": 64 for i in range(12)} | {"layers.12.fc": 32, "head": 8})
        >>> {pattern: len(names) for pattern, names in found.items()}
        {'layers.*.fc': 12, 'layers.12.fc': 1, 'head': 1}
    """
    alike: dict[Hashable, list[str]] = {}
    for name, kind in kinds.items():
        alike.setdefault((_shape(name, blocks), kind), []).append(name)
    bundles = [_Bundle(tuple(names)) for names in alike.values()]
    while wrong := _wrong(bundles, blocks):
        bundles = [part for b in bundles for part in (_split(b, blocks) if b in wrong else [b])]
    place = {name: i for i, name in enumerate(kinds)}
    bundles.sort(key=lambda bundle: place[bundle.names[0]])
    return {_pattern(bundle, blocks): list(bundle.names) for bundle in bundles}


def _wrong(bundles: Sequence[_Bundle], blocks: Collection[str]) -> set[_Bundle]:
    """Return the bundles whose stars are too many: they stand for too few numbers, or take names from other bundles."""
    if few := {bundle for bundle in bundles if _few(bundle, blocks)}:
        return few
    patterns: dict[str, _Bundle] = {}
    largest_first = sorted(bundles, key=lambda bundle: -len(bundle.names))
    equal = {b for b in largest_first if patterns.setdefault(_pattern(b, blocks), b) is not b}
    takers = {(b, patterns[most_specific(name, patterns) or ""]) for b in bundles for name in b.names if not equal}
    return equal or {taker for bundle, taker in takers if taker is not bundle}


def _split(bundle: _Bundle, blocks: Collection[str]) -> list[_Bundle]:
    """Return bundles in which one number more is literal."""
    where = _few(bundle, blocks) or [i for i in _numbered(bundle, blocks) if i not in bundle.literal]
    at = where[0]
    parts: dict[str, list[str]] = {}
    for name in bundle.names:
        parts.setdefault(name.split(".")[at], []).append(name)
    return [_Bundle(tuple(names), bundle.literal | {at}) for names in parts.values()]


def _few(bundle: _Bundle, blocks: Collection[str]) -> list[int]:
    """Return the places, outside of stacks, at which there are too few values for a star."""
    in_block = {i for name in bundle.names for i in _block_places(name, blocks)}
    values = [set(column) for column in zip(*(name.split(".") for name in bundle.names), strict=True)]
    return [i for i in _numbered(bundle, blocks) if i not in in_block and 1 < len(values[i]) < _MANY]


def _pattern(bundle: _Bundle, blocks: Collection[str]) -> str:
    parts = bundle.names[0].split(".")
    columns = list(zip(*(name.split(".") for name in bundle.names), strict=True))
    wild = set(_numbered(bundle, blocks)) - bundle.literal
    in_block = {i for name in bundle.names for i in _block_places(name, blocks)}
    return ".".join(
        _stem(part) + "*" if i in wild and (i in in_block or len(set(columns[i])) > 1) else glob.escape(part)
        for i, part in enumerate(parts)
    )


def _numbered(bundle: _Bundle, blocks: Collection[str]) -> list[int]:
    """Return the places at which names have a number, or a block."""
    parts = bundle.names[0].split(".")
    in_block = {i for name in bundle.names for i in _block_places(name, blocks)}
    return [i for i, part in enumerate(parts) if part.isdigit() or i in in_block]


def _block_places(name: str, blocks: Collection[str]) -> list[int]:
    parts = name.split(".")
    return [i for i in range(len(parts)) if ".".join(parts[: i + 1]) in blocks]


def _stem(part: str) -> str:
    return glob.escape(part.rstrip("0123456789"))


def _shape(name: str, blocks: Collection[str]) -> tuple[str, ...]:
    places = _block_places(name, blocks)
    return tuple(f"{_stem(part)}*" if part.isdigit() or i in places else part for i, part in enumerate(name.split(".")))
