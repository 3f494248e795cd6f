"""Few patterns for many names, and yet each name has exactly one that counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grow.planning.patterns import matches, merged, most_specific, near, without_numbers

part = st.sampled_from(["0", "1", "2", "3", "4", "10", "fc", "layer1", "layer12", "a[0]", "b*", "norm"])
names = st.lists(st.lists(part, min_size=1, max_size=4).map(".".join), unique=True, max_size=40)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(names, st.data())
def test_every_name_has_the_pattern_that_stands_for_it(names, data):
    kinds = {name: data.draw(st.integers(0, 2)) for name in names}
    blocks = set(data.draw(st.lists(st.sampled_from(names)))) if names else set()
    found = merged(kinds, blocks)
    assert sorted(name for group in found.values() for name in group) == sorted(names)
    for pattern, group in found.items():
        assert len({kinds[name] for name in group}) == 1
        assert {most_specific(name, found) for name in group} == {pattern}


def test_a_deep_model_needs_few_patterns():
    names = {f"encoder.layer.{i}.{leaf}": leaf for i in range(24) for leaf in ("attention", "dense")}
    assert list(merged(names)) == ["encoder.layer.*.attention", "encoder.layer.*.dense"]


def test_the_block_that_is_unlike_the_others_has_an_entry_of_its_own():
    names = {f"layers.{i}.fc": 32 if i == 3 else 64 for i in range(8)}
    found = merged(names, {f"layers.{i}" for i in range(8)})
    assert {pattern: len(group) for pattern, group in found.items()} == {"layers.*.fc": 7, "layers.3.fc": 1}


def test_what_is_inside_a_stack_gets_a_star_for_blocks_to_come():
    assert list(merged({"stage.0.conv": 4, "head": 2}, {"stage.0"})) == ["stage.*.conv", "head"]
    assert list(merged({"features.dense1.conv": 4}, {"features.dense1"})) == ["features.dense*.conv"]


def test_what_is_a_block_itself_may_keep_its_name():
    """A stack in the model itself is called like its first block."""
    assert list(merged({"2": 6, "2.0.inner": 1}, {"2", "2.0"}, inside=True)) == ["2", "*.*.inner"]


def test_a_few_layers_of_a_perceptron_stay_apart():
    assert list(merged(dict.fromkeys(["net.0", "net.2", "net.4"], 8))) == ["net.0", "net.2", "net.4"]


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
    [
        (["*", "encoder.*", "encoder.*.fc"], "encoder.0.fc", "encoder.*.fc"),
        (["encoder.*.fc", "*", "encoder.*"], "encoder.0.fc", "encoder.*.fc"),
        (["encoder.*.fc", "encoder.0.fc"], "encoder.0.fc", "encoder.0.fc"),
        (["encoder.[0-9].fc", "encoder.*.f*"], "encoder.0.fc", "encoder.[0-9].fc"),
        (["a[0]"], "a[0]", "a[0]"),
        (["decoder.*"], "encoder.0.fc", None),
    ],
)
def test_the_most_specific_pattern_counts_in_whatever_order(patterns, name, expected):
    assert most_specific(name, patterns) == expected
    assert most_specific(name, patterns[::-1]) == expected


def test_a_pattern_matches_like_the_shell_does_and_itself():
    assert matches("a.b.c", "a.*")
    assert matches("a[0].b", "a[0].b")
    assert not matches("A", "a")


def test_numbers_within_names_only():
    assert without_numbers("size of 4 in 'a.0.b1.12' (Norm)") == "size of 4 in 'a.*.b1.*' (Norm)"


def test_near_misses_are_named():
    assert near("encodr.fc", ["encoder.fc", "head"]) == " Did you mean 'encoder.fc'?"
    assert near("zzz", ["encoder.fc"]) == ""
