"""Which entry of a composite axis belongs to which unit: compared with a plain loop over all entries."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grow.structure.axes import Block, Layout, Units, layout_length
from lightning_grow.structure.layout import entry_index, entry_share

GROUPS = ("a", "b")
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def layouts() -> st.SearchStrategy[Layout]:
    """Sums of products of small numbers and units of two groups."""
    units = st.sampled_from([Units(name, f"{name}.weight", 0, 1) for name in GROUPS])
    factors = st.lists(st.integers(1, 3) | units, min_size=1, max_size=3)
    return st.lists(factors.map(lambda f: Block(tuple(f))), min_size=1, max_size=3).map(tuple)


def edits() -> st.SearchStrategy[dict[str, tuple[int, list[int]]]]:
    """For each group a size and an index."""
    one = st.integers(1, 4).flatmap(
        lambda size: st.tuples(st.just(size), st.lists(st.integers(-1, size - 1), min_size=1, max_size=5))
    )
    return st.fixed_dictionaries(dict.fromkeys(GROUPS, one))


def names_of_entries(layout: Layout, sizes: dict[str, int]) -> list[tuple]:
    """Each entry's block and its position in every factor, in order."""
    names = []
    for number, block in enumerate(layout):
        ranges = [range(f if isinstance(f, int) else sizes[f.group]) for f in block.factors]
        names += [(number, *position) for position in itertools.product(*ranges)]
    return names


def reference(layout: Layout, sizes: dict[str, int], index: dict[str, list[int]]) -> list[int]:
    """The plain twin: name every new entry, rename its units to the old ones, and look that name up."""
    old = {name: i for i, name in enumerate(names_of_entries(layout, sizes))}
    new_sizes = sizes | {group: len(i) for group, i in index.items()}
    found = []
    for number, *position in names_of_entries(layout, new_sizes):
        renamed = [
            index[f.group][p] if isinstance(f, Units) and f.group in index else p
            for f, p in zip(layout[number].factors, position, strict=True)
        ]
        found.append(-1 if -1 in renamed else old[number, *renamed])
    return found


@quick
@given(layout=layouts(), plan=edits(), edited=st.sets(st.sampled_from(GROUPS)))
def test_the_index_map_equals_the_plain_loop(layout: Layout, plan: dict, edited: set[str]) -> None:
    sizes = {name: size for name, (size, _) in plan.items()}
    index = {name: plan[name][1] for name in edited}
    found = entry_index(layout, sizes, {name: torch.tensor(i) for name, i in index.items()})
    assert found.tolist() == reference(layout, sizes, index)


@quick
@given(layout=layouts(), plan=edits())
def test_maps_of_two_groups_compose(layout: Layout, plan: dict) -> None:
    """Both groups at once equal one after the other."""
    sizes = {name: size for name, (size, _) in plan.items()}
    index = {name: torch.tensor(i) for name, (_, i) in plan.items()}
    both = entry_index(layout, sizes, index)
    first = entry_index(layout, sizes, {"a": index["a"]})
    second = entry_index(layout, sizes | {"a": len(index["a"])}, {"b": index["b"]})
    chained = torch.where(second < 0, -1, first[second.clamp(min=0)])
    assert torch.equal(both, chained)


@quick
@given(layout=layouts(), plan=edits())
def test_shares_multiply_over_the_units_of_an_entry(layout: Layout, plan: dict) -> None:
    sizes = {name: len(i) for name, (_, i) in plan.items()}
    share = {"a": torch.linspace(0.1, 0.9, sizes["a"], dtype=torch.float64)}
    found = entry_share(layout, sizes, share)
    expected = []
    for number, *position in names_of_entries(layout, sizes):
        value = 1.0
        for factor, p in zip(layout[number].factors, position, strict=True):
            value *= share["a"][p].item() if isinstance(factor, Units) and factor.group == "a" else 1.0
        expected.append(value)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert len(found) == layout_length(layout, sizes)
