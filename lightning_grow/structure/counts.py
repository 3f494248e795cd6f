"""How many blocks there are, where Python keeps it: counts, lists with an entry for each block, positions of blocks.

A forward may run ``self.layers[: self.config.num_layers]``, or ask a list of its settings about each layer. Which
numbers and lists these are is found by trial: with them, one block more runs, and without it does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from lightning_grow.structure.holders import Holders, Step, get, located, read, replaced
from lightning_grow.structure.modules import bookkeeping, is_position

_MOST = 12

Path = tuple[str, str]
"""A module, and the path to what it keeps: ``("", "config.num_layers")``."""

Kept = tuple[tuple[Path, ...], tuple[Path, ...]]
"""Numbers that count blocks, and lists with an entry for each block."""


def find_counts(holders: Holders, container: str, lengths: Sequence[int], works: Callable[[Kept], bool]) -> Kept | None:
    """Return the numbers and lists that must grow with a stack so that one block more is run; None if none help.

    Args:
        holders: The integers and lists that modules keep.
        container: The name of the module whose children the blocks are.
        lengths: How many there are, by any way of counting.
        works: Whether one block more is run if these numbers and lists grow.
    """
    above = [container]
    while above[-1]:
        above.append(above[-1].rpartition(".")[0])
    numbers = _paths([(p, v) for path in above for p, v in holders.numbers(path) if v in lengths])
    lists = _paths([(p, v) for path in above for p, v in holders.sequences(path) if len(v) in lengths])
    named: dict[str, list[Path]] = {}
    for path in numbers:
        named.setdefault(path[1].rpartition(".")[2], []).append(path)
    sets = list(dict.fromkeys([*((n,) for n in numbers), *map(tuple, named.values()), tuple(numbers)]))
    trials: list[Kept] = [(s, ()) for s in sets if s]
    trials += [(s, tuple(lists)) for s in [*sets, ()] if lists]
    for trial in itertools.islice(dict.fromkeys(trials), _MOST):
        if works(trial):
            return _fewest(trial, works)
    return None


def _paths(found: Sequence[tuple[tuple[str, str, int | None], Any]]) -> list[Path]:
    names = ((module, name if index is None else f"{name}[{index}]") for (module, name, index), _ in found)
    return list(dict.fromkeys(names))


def _fewest(kept: Kept, works: Callable[[Kept], bool]) -> Kept:
    """Leave out what is not needed."""
    counts, lists = kept
    for path in (*counts, *lists):
        fewer = tuple(p for p in counts if p != path), tuple(p for p in lists if p != path)
        if len(counts) + len(lists) > 1 and works(fewer):
            counts, lists = fewer
    return counts, lists


def changes_of_depth(
    model: nn.Module, kept: Kept, blocks: int, first: int, at: int, *, insert: bool
) -> Iterator[tuple[Any, Step, Any]]:
    """Yield what to change, where in it, and the new content, when a block is inserted or removed.

    Args:
        model: The model.
        kept: Numbers and lists, as `find_counts` returned them.
        blocks: How many blocks the stack has.
        first: Position of its first block among the children of the container.
        at: Position in the stack, of the new block or of the one that goes.
        insert: Whether a block is inserted. Its entries are those of its neighbour.

    Raises:
        LookupError: If the model does not keep such a number or list.
    """
    values: dict[tuple[int, Step], tuple[Any, Step, Any]] = {}
    for i, (path, name) in enumerate((*kept[0], *kept[1])):
        module = model.get_submodule(path)
        owner, step, inside = located(module, name)
        entry = read(module, name)
        if i < len(kept[0]):
            entry += 1 if insert else -1
        else:
            position = at + (0 if len(entry) == blocks else first)
            entries = list(entry)
            if insert:
                entries.insert(position, entries[max(position - 1, 0)])
            else:
                del entries[position]
            entry = type(entry)(*entries) if hasattr(entry, "_fields") else type(entry)(entries)
        _, _, value = values.get((id(owner), step), (owner, step, get(owner, step)))
        values[id(owner), step] = owner, step, replaced(value, inside, entry)
    yield from values.values()


def counted(blocks: Sequence[nn.Module]) -> list[tuple[str, str, int]]:
    """Return what blocks keep as their own position, such as ``layer_idx``: module, path in it, first value.

    It is a position if it counts up from block to block, and is called so or starts at 0 or 1: widths may count up by
    chance. In a stack of one block, it is one if it is called so. Sizes of torch's own modules are none.
    """
    found = []
    entries = [_numbers(block) for block in blocks]
    for (path, name), first in entries[0].items():
        values = [other.get((path, name)) for other in entries]
        counts = values == list(range(first, first + len(values)))
        if counts and (is_position(name.rpartition(".")[2]) or (len(values) > 1 and first in (0, 1))):
            found.append((path, name, first))
    return found


def renumbered(
    before: Sequence[nn.Module], after: Sequence[nn.Module], later: Sequence[nn.Module]
) -> Iterator[tuple[Any, Step, Any]]:
    """Yield what to change, where in it, and the new content, so that blocks keep their position as they did.

    Args:
        before: The blocks of a stack.
        after: The blocks that it will have.
        later: Children of the container behind them; those that count on from the blocks move with them.
    """
    for path, name, first in counted(before):
        moved = [(block, position) for position, block in enumerate(after, first)]
        expected, new = first + len(before), first + len(after)
        moved += [(b, new + i) for i, b in enumerate(later) if _position(b, path, name) == expected + i]
        for block, position in moved:
            if _position(block, path, name) not in (None, position):
                owner, step, inside = located(block.get_submodule(path), name)
                yield owner, step, replaced(get(owner, step), inside, position)


_OF_KERNELS = {"kernel_size", "padding", "dilation", "stride", "output_padding", "_reversed_padding_repeated_twice"}
"""What convolutions keep about their kernels; that they grow from block to block makes them no positions."""


def _numbers(block: nn.Module) -> dict[Path, int]:
    holders = Holders(dict(block.named_modules()))
    found = {}
    for path, inner in block.named_modules():
        sizes = {kept.name for kept in bookkeeping(inner)}
        if isinstance(inner, nn.modules.conv._ConvNd):
            sizes |= _OF_KERNELS
        for (module, name, index), value in holders.numbers(path):
            if name not in sizes:
                found[module, name if index is None else f"{name}[{index}]"] = value
    return found


def _position(block: nn.Module, path: str, name: str) -> int | None:
    """Return what a block keeps at a place; None if it keeps nothing there."""
    try:
        found = read(block.get_submodule(path), name)
    except (AttributeError, LookupError):
        return None
    return found if type(found) is int else None
