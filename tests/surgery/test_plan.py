"""Gather maps equal a plain loop over entries, whatever the layout, the edit and the memory format."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_grow.structure.axes import Axis, AxisGroup, Block, Layout, Units
from lightning_grow.surgery import Edit
from lightning_grow.surgery.fill import edited
from lightning_grow.surgery.plan import AxisMap, Given, axis_map, gather, value_source

fast = settings(deadline=None, derandomize=True, database=None, max_examples=60)
LEFT, RIGHT = Units("left", "left.weight", 0, 1), Units("right", "right.weight", 0, 1)
LAYOUTS: list[Layout] = [
    (Block((LEFT,)),),
    (Block((4, LEFT)),),
    (Block((LEFT, 3)),),
    (Block((2, LEFT, 3)), Block((RIGHT,)), Block((5,))),
    (Block((RIGHT, LEFT)),),
]
SIZES = {"left": 3, "right": 2}


def group(units: Units, layout: Layout) -> AxisGroup:
    return AxisGroup(units.group, SIZES[units.group], 1, (Axis("weight", 0, "produced", layout),))


@st.composite
def edits(draw: Any, layout: Layout) -> dict[str, Edit]:
    """Edits of one or both groups of a layout: any mixture of copies and new units."""
    names = sorted({f.group for block in layout for f in block.factors if isinstance(f, Units)})
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    result = {}
    for name in chosen:
        index = draw(st.lists(st.integers(-1, SIZES[name] - 1), min_size=1, max_size=6))
        share = draw(st.lists(st.sampled_from([0.25, 1.0]), min_size=len(index), max_size=len(index)))
        result[name] = Edit(group(LEFT if name == "left" else RIGHT, layout), tuple(index), tuple(share))
    return result


def walk(layout: Layout, sizes: dict[str, int]) -> list[tuple[int, tuple[Any, ...]]]:
    """Every entry of an axis as block and coordinates, in order."""
    entries = []
    for number, block in enumerate(layout):
        coordinates: list[tuple[Any, ...]] = [()]
        for factor in block.factors:
            count = factor if isinstance(factor, int) else sizes[factor.group]
            coordinates = [(*c, i) for c in coordinates for i in range(count)]
        entries += [(number, c) for c in coordinates]
    return entries


@fast
@given(st.data(), st.sampled_from(LAYOUTS))
def test_an_axis_map_equals_a_walk_over_the_entries(data: st.DataObject, layout: Layout) -> None:
    planned = data.draw(edits(layout))
    m = axis_map(0, "produced", layout, SIZES, planned)
    old = {entry: i for i, entry in enumerate(walk(layout, SIZES))}
    new = walk(layout, {n: planned[n].new_size if n in planned else s for n, s in SIZES.items()})
    index, share = [], []
    for number, coordinates in new:
        source, factor = [], 1.0
        for f, c in zip(layout[number].factors, coordinates, strict=True):
            edit = planned.get(f.group) if isinstance(f, Units) else None
            source.append(c if edit is None else edit.index[c])
            factor *= 1.0 if edit is None else edit.share[c]
        index.append(-1 if -1 in source else old[number, tuple(source)])
        share.append(factor)
    assert m.index.tolist() == index
    assert (torch.ones(len(share)) if m.share is None else m.share).tolist() == share
    if m.place is not None:
        fixed = [
            (
                n,
                *(
                    c
                    for f, c in zip(layout[n].factors, cs, strict=True)
                    if not isinstance(f, Units) or f.group not in planned
                ),
            )
            for n, cs in new
        ]
        for i in range(len(new)):
            for j in range(len(new)):
                assert (m.place[i] == m.place[j]) == (fixed[i] == fixed[j])


@fast
@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64]))
def test_gather_equals_indexing_with_zeros_for_new_entries(data: st.DataObject, dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 1 + 4 * 30 * 3).reshape(4, 30, 3).remainder(7).to(dtype)
    maps = []
    for dim in data.draw(st.sets(st.integers(0, 2))):
        index = data.draw(st.lists(st.integers(-1, tensor.shape[dim] - 1), min_size=1, max_size=90))
        if data.draw(st.booleans()):
            index = sorted(index)
        maps.append(AxisMap(dim, "produced", torch.tensor(index)))
    expected = tensor
    for m in maps:
        padded = torch.cat([expected, torch.zeros_like(expected.narrow(m.dim, 0, 1))], m.dim)
        expected = padded.index_select(m.dim, m.index.remainder(padded.shape[m.dim]))
    result = gather(tensor, tuple(maps))
    assert torch.equal(result, expected)
    assert result.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_channels_last_stays_channels_last() -> None:
    tensor = torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    grown = gather(tensor, (AxisMap(0, "produced", torch.tensor([0, 1, 2, 3, -1])),))
    assert grown.is_contiguous(memory_format=torch.channels_last)
    scattered = gather(tensor, (AxisMap(0, "produced", torch.arange(200) % 4),))
    assert scattered.is_contiguous(memory_format=torch.channels_last)


@fast
@given(st.data(), st.sampled_from(LAYOUTS))
def test_given_values_land_where_one_edit_alone_would_put_them(data: st.DataObject, layout: Layout) -> None:
    """Also when another group of the same axis is edited at the same time."""
    planned = data.draw(edits(layout))
    name = data.draw(st.sampled_from(sorted(planned)))
    alone = axis_map(0, "produced", layout, SIZES, {name: planned[name]})
    source, length = value_source(layout, SIZES, planned, name)
    assert length == int((alone.index < 0).sum())
    sizes = {**SIZES, name: planned[name].new_size}
    rest = {n: e for n, e in planned.items() if n != name}
    then = axis_map(0, "produced", layout, sizes, rest).index if rest else torch.arange(alone.index.numel())
    rank = torch.where(alone.index < 0, (alone.index < 0).cumsum(0) - 1, -1)
    assert source.tolist() == [int(rank[i]) if i >= 0 else -1 for i in then.tolist()]


def test_consumed_zeros_win_where_new_rows_and_new_columns_meet() -> None:
    tensor = torch.randn(3, 3)
    index = torch.tensor([0, 1, 2, -1])
    rows = AxisMap(0, "produced", index, values=(Given(torch.ones(1, 3), torch.tensor([-1, -1, -1, 0])),))
    columns = AxisMap(1, "consumed", index)
    out = edited(tensor, "weight", (rows, columns))
    assert torch.equal(out[3], torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert not out[:, 3].any()
    out = edited(tensor, "weight", (AxisMap(0, "produced", index), columns))
    assert out[3, :3].all()
    assert not out[:, 3].any()


def check_defaults(tensor: Tensor, role: Any, dim: int = 0, place: Tensor | None = None) -> Tensor:
    n = tensor.shape[dim]
    m = AxisMap(dim, role, torch.cat([torch.arange(n), torch.full((n,), -1)]), place=place, seed=3)
    out = edited(tensor, "weight", (m,))
    assert torch.equal(out.narrow(dim, 0, n), tensor)
    return out.narrow(dim, n, n)


def test_default_values_of_new_entries() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        matrix, kernel = torch.randn(64, 64) * 0.1, torch.randn(64, 1, 5, 5) * 0.1 + 1
        many = torch.randn(1100, 1000) * 0.1
        numbers = torch.Generator().manual_seed(5)
        state = torch.get_rng_state()
        fresh = check_defaults(matrix, "produced")
        assert abs(float(fresh.std()) / 0.1 - 1) < 0.05
        assert torch.equal(fresh, check_defaults(matrix, "produced"))
        assert torch.allclose(fresh.double(), check_defaults(matrix.double(), "produced"), atol=1e-6)
        large = check_defaults(many, "produced")
        assert abs(float(large.std()) / 0.1 - 1) < 0.01
        assert torch.linalg.matrix_rank(large[::11, :200].double()) == 100, "where numbers repeat, rows still differ"
        assert not check_defaults(matrix, "consumed", 1).any()
        assert not check_defaults(matrix[0], "produced").any()
        assert torch.equal(check_defaults(torch.ones(8), "carried"), torch.ones(8))
        assert torch.equal(check_defaults(torch.full((8, 1, 1), 1e-6), "carried"), torch.full((8, 1, 1), 1e-6))
        waves = torch.randn(64, 64, generator=numbers, dtype=torch.complex64)
        fresh = check_defaults(waves, "produced")
        assert abs(float(torch.view_as_real(fresh).std()) / 0.7 - 1) < 0.1
        assert torch.equal(check_defaults(torch.full((3,), 1 + 2j), "carried"), torch.full((3,), 1 + 2j))
        magnitudes = torch.tensor([[1.0], [3.0]])
        assert check_defaults(magnitudes, "produced").tolist() == [[2.0], [2.0]]
        table = torch.randn(5, 6, generator=numbers)
        table[2] = 0
        columns = check_defaults(table, "produced", 1)
        assert columns.any(1).tolist() == [True, True, False, True, True], "a padding token stays silent"
        depthwise = check_defaults(kernel, "carried")
        assert abs(float(depthwise.mean()) - 1) < 0.02
        assert abs(float(depthwise.std()) / 0.1 - 1) < 0.1
        zeros = check_defaults(torch.zeros(4, 25), "produced")
        assert 0.1 < float(zeros.std()) < 0.3, "a fan-in of 25 asks for 0.2"
        gates = torch.tensor([1.0, 1.0, 5.0, 5.0])
        doubled = AxisMap(0, "carried", torch.tensor([0, 1, -1, 2, 3, -1]), place=torch.tensor([0, 0, 0, 1, 1, 1]))
        assert edited(gates, "bias", (doubled,)).tolist() == [1.0, 1.0, 1.0, 5.0, 5.0, 5.0]
        assert torch.equal(torch.get_rng_state(), state), "the global random state is untouched"
