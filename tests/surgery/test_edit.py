"""Edits are plain data, and refuse what makes no sense."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grow.surgery import Edit, prune, split, widen
from tests.surgery.models import perceptron

GROUP = perceptron().groups["0"]
PAIRS = replace(GROUP, size=6, step=2)


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(st.sets(st.integers(0, 5)), st.integers(0, 1000))
def test_shares_of_a_split_are_unequal_and_add_up_to_one(units: set[int], seed: int) -> None:
    edit = split(GROUP, sorted(units), torch.Generator().manual_seed(seed))
    assert edit.index == (*range(6), *sorted(units))
    for unit in range(6):
        shares = [s for u, s in zip(edit.index, edit.share, strict=True) if u == unit]
        assert sum(shares) == 1.0
        assert len(shares) == 1 or (0.3 <= min(shares) < 0.45 and max(shares) < 0.7 + 1e-9)


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(st.sets(st.integers(0, 5), max_size=5))
def test_pruning_keeps_the_other_units_in_order(units: set[int]) -> None:
    edit = prune(GROUP, list(units))
    assert edit.index == tuple(u for u in range(6) if u not in units)
    assert edit.is_identity == (not units)


def test_seeds_follow_from_names_and_sizes_or_from_the_generator() -> None:
    state = torch.get_rng_state()
    assert widen(GROUP, 2).seed == widen(GROUP, 2).seed
    assert widen(GROUP, 2).seed != widen(GROUP, 3).seed
    assert widen(GROUP, 2).seed != widen(replace(GROUP, name="other"), 2).seed
    first, second = (widen(GROUP, 2, torch.Generator().manual_seed(4)).seed for _ in range(2))
    assert first == second != widen(GROUP, 2).seed
    assert (
        split(GROUP, [1], torch.Generator().manual_seed(4)).share
        == split(GROUP, [1], torch.Generator().manual_seed(4)).share
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_units_may_come_as_tensors_and_edits_travel() -> None:
    edit = prune(GROUP, torch.tensor([4, 1]))
    assert edit.index == (0, 2, 3, 5)
    assert pickle.loads(pickle.dumps(edit)).index == edit.index
    assert str(edit) == "0: 6 -> 4 units"


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "num_units must be at least 1", lambda: widen(GROUP, 0)),
        (ValueError, "num_units must be at least 1", lambda: widen(GROUP, -2)),
        (TypeError, "whole number, but is 1.5", lambda: widen(GROUP, 1.5)),
        (TypeError, "whole number, but is True", lambda: widen(GROUP, True)),
        (ValueError, "steps of 2 units.* from 6 to 7; choose 6 or 8", lambda: widen(PAIRS, 1)),
        (ValueError, "steps of 2 units", lambda: split(PAIRS, [0])),
        (ValueError, "steps of 2 units", lambda: prune(PAIRS, [0])),
        (ValueError, "prune units 6 of group '0': its units are 0 to 5", lambda: prune(GROUP, [6])),
        (ValueError, "split units -1 of group '0'", lambda: split(GROUP, [-1])),
        (ValueError, "twice: 3", lambda: prune(GROUP, [3, 3])),
        (ValueError, "twice: 2", lambda: split(GROUP, [2, 1, 2])),
        (ValueError, "prune 7 units of group '0': it has 6", lambda: prune(GROUP, range(7))),
        (ValueError, "Cannot prune all 6 units", lambda: prune(GROUP, range(6))),
        (TypeError, "whole number, but is 'a'", lambda: prune(GROUP, "a")),
        (ValueError, "at least one of its 6 units", lambda: Edit(GROUP, ())),
        (ValueError, "copies units 7, but its units are 0 to 5", lambda: Edit(GROUP, (0, 7))),
        (ValueError, "2 units after it, but 1 shares", lambda: Edit(GROUP, (0, 1), (1.0,))),
        (
            ValueError,
            r"Values or shifts are given for 9.weight\[0\], but the axes of group '0' are",
            lambda: widen(GROUP, 1, values={"9.weight[0]": torch.ones(1, 3)}),
        ),
        (
            ValueError,
            "adds no new unit",
            lambda: Edit(GROUP, (0, 1), values={"0.weight[0]": torch.ones(1, 3)}),
        ),
    ],
)
def test_bad_arguments_are_refused(error: type[Exception], message: str, make) -> None:
    with pytest.raises(error, match=message):
        make()
