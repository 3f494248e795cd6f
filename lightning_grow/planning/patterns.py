"""Names and glob patterns: which entry of a plan counts for a name, and few patterns that tell many names apart."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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


def merged(
    kinds: Mapping[str, Hashable], blocks: Collection[str] = (), *, inside: bool = False
) -> dict[str, list[str]]:
    """Find patterns that stand for names which are alike but for numbers in them, and of one kind.

    Whatever the patterns match otherwise, `most_specific` finds for each name the pattern that stands for it.

    Args:
        kinds: Names, in order, each with what names under one pattern must share.
        blocks: Qualified names of modules of which there can be more: their names get a star at once, so that the
            pattern also stands for blocks to come.
        inside: Only where they are around what is named, not where they are named themselves.

    Returns:
        The names that each pattern stands for, in the order of the first of them.

    Example:
        >>> found = merged({f"layers.{i}.fc": 64 for i in range(12)} | {"layers.12.fc": 32, "head": 8})
        >>> {pattern: len(names) for pattern, names in found.items()}
        {'layers.*.fc': 12, 'layers.12.fc': 1, 'head': 1}
    """
    alike: dict[Hashable, list[_Name]] = {}
    for text, kind in kinds.items():
        name = _Name.of(text, blocks, inside)
        alike.setdefault((name.shape, kind), []).append(name)
    bundles = [_Bundle(tuple(names)) for names in alike.values()]
    while wrong := _wrong(bundles):
        bundles = [part for bundle in bundles for part in (bundle.split() if bundle in wrong else [bundle])]
    place = {name: i for i, name in enumerate(kinds)}
    bundles.sort(key=lambda bundle: place[bundle.names[0].text])
    return {bundle.pattern: [name.text for name in bundle.names] for bundle in bundles}


def _wrong(bundles: Sequence[_Bundle]) -> set[_Bundle]:
    """Return the bundles whose stars are too many: they stand for too few numbers, or take names from other bundles."""
    if few := {bundle for bundle in bundles if bundle.few}:
        return few
    patterns: dict[str, _Bundle] = {}
    largest_first = sorted(bundles, key=lambda bundle: -len(bundle.names))
    equal = {bundle for bundle in largest_first if patterns.setdefault(bundle.pattern, bundle) is not bundle}
    if equal:
        return equal
    takers = {(b, patterns[most_specific(name.text, patterns) or ""]) for b in bundles for name in b.names}
    return {taker for bundle, taker in takers if taker is not bundle}


@dataclass(frozen=True)
class _Name:
    """A qualified name, and the places at which it names a block of a stack."""

    text: str
    parts: tuple[str, ...]
    blocks: frozenset[int]

    @classmethod
    def of(cls, text: str, blocks: Collection[str], inside: bool) -> _Name:
        parts = tuple(text.split("."))
        places = range(len(parts) - inside)
        return cls(text, parts, frozenset(i for i in places if ".".join(parts[: i + 1]) in blocks))

    @property
    def shape(self) -> tuple[str, ...]:
        """The parts, with stars for numbers."""
        return tuple(_starred(p) if p.isdigit() or i in self.blocks else p for i, p in enumerate(self.parts))


@dataclass(frozen=True)
class _Bundle:
    """Names that are alike but for numbers, which one pattern may stand for."""

    names: tuple[_Name, ...]
    literal: frozenset[int] = frozenset()

    @cached_property
    def pattern(self) -> str:
        """The names, with stars in the place of numbers that differ, and of blocks."""
        first = self.names[0].parts
        stars = {i for i in self._free if i in self._blocks or len(self._values[i]) > 1}
        return ".".join(_starred(part) if i in stars else glob.escape(part) for i, part in enumerate(first))

    @cached_property
    def few(self) -> list[int]:
        """The places, outside of stacks, at which there are too few values for a star."""
        return [i for i in self._free if i not in self._blocks and 1 < len(self._values[i]) < _MANY]

    def split(self) -> list[_Bundle]:
        """Return bundles in which one number more is literal."""
        at = (self.few or self._free)[0]
        names: dict[str, list[_Name]] = {}
        for name in self.names:
            names.setdefault(name.parts[at], []).append(name)
        return [_Bundle(tuple(some), self.literal | {at}) for some in names.values()]

    @cached_property
    def _blocks(self) -> frozenset[int]:
        return frozenset().union(*(name.blocks for name in self.names))

    @cached_property
    def _values(self) -> list[set[str]]:
        return [set(column) for column in zip(*(name.parts for name in self.names), strict=True)]

    @cached_property
    def _free(self) -> list[int]:
        """The places at which there are numbers, or blocks, that are not literal."""
        places = enumerate(self.names[0].parts)
        return [i for i, part in places if (part.isdigit() or i in self._blocks) and i not in self.literal]


def _starred(part: str) -> str:
    return glob.escape(part.rstrip("0123456789")) + "*"
