"""One list for all layers: the largest gains, for their cost, in steps."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grow.criteria import best_units
from lightning_grow.structure.axes import Axis, AxisGroup, Block, Units

fast = settings(deadline=None, derandomize=True, database=None, max_examples=150)
GAINS = st.lists(st.integers(-5, 20).map(float), min_size=1, max_size=6)
COST = st.integers(1, 6).map(float)


def group(name, size, step=1):
    layout = (Block((Units(name, f"{name}.weight", 0, 1),)),)
    return AxisGroup(name, size, step, (Axis(f"{name}.weight", 0, "produced", layout),))


def table(*gains, step=1):
    names = "abcdef"
    return {
        name: (group(name, len(gain), step), torch.tensor(gain, dtype=torch.float64))
        for name, gain in zip(names, gains, strict=False)
    }


def gain_of(gains, chosen):
    return sum(float(gains[name][1][units].sum()) for name, units in chosen.items())


@fast
@given(st.lists(GAINS, min_size=1, max_size=3), st.integers(1, 12))
def test_with_equal_costs_the_largest_positive_gains_are_chosen(lists, number):
    gains = table(*lists)
    every = sorted((gain for one in lists for gain in one if gain > 0), reverse=True)
    chosen = best_units(gains, number)
    assert gain_of(gains, chosen) == sum(every[:number])
    assert sum(map(len, chosen.values())) == len(every[:number])
    same = best_units(gains, number, costs=dict.fromkeys(gains, 2.5), max_cost=2.5 * number)
    assert gain_of(gains, same) == gain_of(gains, chosen)


@fast
@given(st.lists(GAINS, min_size=2, max_size=3), st.lists(COST, min_size=3, max_size=3), st.integers(1, 20))
def test_what_the_relaxed_knapsack_takes_whole(lists, prices, budget):
    """Nothing within the budget gains more than what is taken and the part of one candidate that still fits."""
    gains, costs = table(*lists), dict(zip("abc", prices, strict=True))
    chosen = best_units(gains, 99, costs=costs, max_cost=budget)
    spent = sum(costs[name] * len(units) for name, units in chosen.items())
    assert spent <= budget
    items = [(gain, costs[name]) for name, (_, gain) in gains.items() for gain in gain.tolist() if gain > 0]
    most = max((gain for gain, cost in items), default=0.0)
    best = max(
        (
            sum(gain for gain, _ in some)
            for number in range(len(items) + 1)
            for some in itertools.combinations(items, number)
            if sum(cost for _, cost in some) <= budget
        )
        if len(items) <= 9
        else [0.0]
    )
    assert gain_of(gains, chosen) + most >= best


@fast
@given(st.lists(GAINS, min_size=2, max_size=3), st.lists(COST, min_size=3, max_size=3), st.integers(1, 20), COST)
def test_what_becomes_dearer_is_never_taken_more_often(lists, prices, budget, factor):
    """Candidates were skipped once if they did not fit, and what came after them was taken: this law broke."""
    gains, costs = table(*lists), dict(zip("abc", prices, strict=True))
    before = best_units(gains, 99, costs=costs, max_cost=budget)
    after = best_units(gains, 99, costs=costs | {"a": costs["a"] * (1 + factor)}, max_cost=budget)
    assert len(after.get("a", [])) <= len(before.get("a", []))


@fast
@given(st.lists(GAINS, min_size=1, max_size=3), st.integers(1, 12), st.integers(2, 3))
def test_units_go_in_steps(lists, number, step):
    chosen = best_units(table(*lists, step=step), number)
    assert all(len(units) % step == 0 and units == sorted(set(units)) for units in chosen.values())
    assert sum(map(len, chosen.values())) <= number


def test_what_costs_more_than_there_is_stands_in_nobodys_way():
    gains = table([100.0], [1.0, 1.0])
    assert best_units(gains, 9, costs={"a": 50.0, "b": 1.0}, max_cost=2.0) == {"b": [0, 1]}


def test_what_does_not_fit_ends_the_list():
    """Else the small ones behind it would be taken, five instead of one, because their layer has become dearer."""
    gains = table([20.0, 1.0, 1.0, 1.0, 1.0], [45.0])
    assert best_units(gains, 9, costs={"a": 1.0, "b": 9.0}, max_cost=10.0) == {"a": [0], "b": [0]}
    assert best_units(gains, 9, costs={"a": 2.0, "b": 9.0}, max_cost=10.0) == {"a": [0]}


def test_ties_go_by_order_of_groups_and_units():
    assert best_units(table([1.0, 1.0], [1.0]), 2) == {"a": [0, 1]}


def test_nothing_to_gain_and_no_candidates():
    assert best_units(table([0.0, -1.0]), 3) == {}
    assert best_units({}, 3) == {}


@pytest.mark.parametrize(
    ("match", "gains", "arguments"),
    [
        ("`num_units` of at least 1, found 0", table([1.0]), {"num_units": 0}),
        ("costs above 0", table([1.0]), {"num_units": 1, "costs": {"a": 0.0}}),
        ("one gain for each candidate of 'a'", {"a": (group("a", 2), torch.ones(2, 2))}, {"num_units": 1}),
    ],
)
def test_bad_input(match, gains, arguments):
    with pytest.raises(ValueError, match=match):
        best_units(gains, **arguments)
