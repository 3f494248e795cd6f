"""A plan tells what a model has, survives its file, and says what is wrong with a file."""

import dataclasses
import pickle

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_grow as lg
from lightning_grow.planning import (
    GroupFacts,
    GroupLimits,
    GroupPlan,
    Plan,
    PlanError,
    StackFacts,
    StackLimits,
    StackPlan,
)
from tests.trainer.models import Residual, build
from tests.zoo import ZOO

NAMES = ["mlp", "cnn_batch_norm", "flatten_head", "concat_raw", "tied_autoencoder"]


def residual():
    model = build(Residual)
    return model, lg.trace(model, torch.zeros(3, 4))


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_has_every_group_with_its_size_step_and_cost(name):
    entry = ZOO[name]
    model = entry.build()
    args, kwargs = entry.inputs()
    structure = lg.trace(model, *args, **kwargs)
    plan = lg.plan(model, *args, **kwargs)
    assert plan == Plan.of(structure, model)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert sum(e.found.groups for e in plan.groups.values()) == len(structure)
    assert sum(plan.pinned.values()) == len(structure.pinned)
    for group in structure.groups.values():
        found = plan.for_group(group.name).found
        assert (found.units, found.step, found.axes) == (group.size, group.step, len(group.axes))
        assert plan.for_group(group.name).change.grow == (group.obstacle is None)
        edited = entry.build()
        lg.apply_(edited, [lg.widen(group, group.step)])
        more = sum(p.numel() for p in edited.parameters()) - plan.parameters
        if group.step == 1:
            assert more == found.parameters_per_unit
        assert f" {found.parameters_per_unit:,} " in str(plan)
        assert found.entries_per_unit == 1 or f" {found.units} of {found.entries_per_unit} " in str(plan)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_survives_its_file(name, tmp_path):
    entry = ZOO[name]
    args, kwargs = entry.inputs()
    plan = lg.plan(entry.build(), *args, **kwargs)
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    assert "plan.yaml" in (tmp_path / "plan.yaml").read_text().split("\n\n")[0]
    assert pickle.loads(pickle.dumps(plan)) == plan


limits = st.builds(
    lambda grow, prune, low, more: (grow, prune, low, None if more is None else low + more),
    st.booleans(), st.booleans(), st.integers(1, 9), st.none() | st.integers(0, 9),
)  # fmt: skip
spans = st.integers(1, 10**9) | st.tuples(st.integers(0, 9), st.integers(10, 99))
text = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=200)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.dictionaries(text, st.tuples(limits, st.none() | spans, st.none() | text), max_size=4),
    st.dictionaries(text, st.tuples(limits, st.none() | spans, st.none() | text), max_size=4),
    st.dictionaries(text, st.integers(0, 999), max_size=4),
)
def test_whatever_a_plan_says_it_says_again_after_a_round_trip(groups, stacks, pinned):
    plan = Plan(
        {n: GroupPlan(GroupLimits(*c), s and GroupFacts(2, 3, 1, 1, s, s), o) for n, (c, s, o) in groups.items()},
        {n: StackPlan(StackLimits(*c), s and StackFacts(2, 3, s), o) for n, (c, s, o) in stacks.items()},
        "Net", 12, pinned,
    )  # fmt: skip
    again = Plan.from_yaml(plan.to_yaml())
    assert again == plan
    assert list(again.groups) == list(plan.groups)
    assert str(again) == str(plan)


def test_a_lightning_module_brings_its_own_input():
    from lightning_grow.examples import ImageClassifier

    model = ImageClassifier(image_size=8)
    assert lg.plan(model) == lg.plan(model, model.example_input_array)
    model.example_input_array = {"x": model.example_input_array}
    assert lg.plan(model).groups
    model.example_input_array = None
    with pytest.raises(lg.StructureError, match="needs example inputs"):
        lg.plan(model)


def test_a_deep_model_has_a_short_file_that_also_stands_for_blocks_to_come():
    model = nn.Sequential(*build(Residual, depth=20).blocks, nn.Linear(6, 2))
    plan = lg.plan(model, torch.zeros(3, 6))
    (entry,) = plan.groups.values()
    assert (entry.found.groups, entry.found.units) == (20, 4)
    assert list(plan.stacks) == list(lg.trace(model, torch.zeros(3, 6)).stacks)
    assert plan.for_group("20.up") == entry
    assert len(plan.to_yaml().splitlines()) < 35


def test_obstacles_are_told_and_keep_groups_from_growing_until_someone_says_otherwise():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    plan = lg.plan(model, torch.zeros(3, 4))
    entry = plan.groups["0"]
    assert not entry.change.grow
    assert entry.change.prune
    assert "LayerNorm averages over this axis" in entry.obstacle
    assert "changes it: LayerNorm" in str(plan)
    edited = Plan.from_yaml(plan.to_yaml().replace("grow: false", "grow: true"))
    assert edited.groups["0"].change.grow


def test_heads_come_whole():
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    plan = lg.plan(model, torch.zeros(2, 5, 8))
    structure = lg.trace(model, torch.zeros(2, 5, 8))
    for name, entry in plan.groups.items():
        assert entry.found.entries_per_unit == structure[name].units.per_unit
        assert entry.change.min_units == structure[name].step


def test_an_entry_without_facts_or_limits_may_do_anything():
    plan = Plan.from_yaml("groups: {fc*: , 'head': {change: {max_units: 8}}}")
    assert plan.for_group("fc1").change == GroupLimits()
    assert plan.for_group("head").change.max_units == 8
    assert plan.for_group("other") is None
    assert plan.for_stack("blocks") is None
    assert "fc*" in str(plan)


FACTS = "{groups: 1, units: 8, step: 4, entries_per_unit: 1, parameters_per_unit: 1, axes: 1}"
BAD = [
    ("groups: [", "is not YAML: .* line 1"),
    ("- fc1", r"should be a mapping, 'key: value', found \['fc1'\]"),
    ("", "should be a mapping, 'key: value', found None"),
    ("model: Net", "is not a plan: it has neither `groups` nor `stacks`"),
    ("groups: {}\ngroup: {}", "has an unknown key 'group'. Did you mean 'groups'"),
    ("groups: {fc1: {}, fc1: {}}", "the key 'fc1' stands there twice.*line 1"),
    ("groups: {1: {}}", r"`groups`, should have names as keys, found 1. Put quotes around it: '1'"),
    ("groups: {fc1: 3}", "groups, 'fc1' should be a mapping, 'key: value', found 3"),
    ("groups: {fc1: {chang: {}}}", "groups, 'fc1' has an unknown key 'chang'. Did you mean 'change'"),
    ("groups: {fc1: {change: {max_unit: 3}}}", "`change` has an unknown key 'max_unit'. Did you mean 'max_units'"),
    ("groups: {fc1: {change: {max_blocks: 3}}}", "unknown key 'max_blocks'"),
    ("groups: {fc1: {change: {grow: 1}}}", "'fc1', `change`: `grow` should be true or false, found 1"),
    ("groups: {fc1: {change: {prune: 'no way'}}}", "`prune` should be true or false, found 'no way'"),
    ("groups: {fc1: {change: {max_units: none}}}", "`max_units` should be a whole number or null, found 'none'"),
    ("groups: {fc1: {change: {max_units: true}}}", "`max_units` should be a whole number or null, found True"),
    ("groups: {fc1: {change: {min_units: 2.5}}}", "`min_units` should be a whole number, found 2.5"),
    ("groups: {fc1: {change: {min_units: null}}}", "`min_units` should be a whole number, found None"),
    ("groups: {fc1: {change: {min_units: 0}}}", "`min_units` should be at least 1, found 0"),
    ("groups: {fc1: {change: {min_units: 8, max_units: 4}}}", "found max_units: 4 and min_units: 8"),
    ("stacks: {b: {change: {min_blocks: 8, max_blocks: 4}}}", "stacks, 'b', .*found max_blocks: 4 and min_blocks: 8"),
    ("groups: {fc1: {obstacle: 3}}", "`obstacle` should be a text, found 3"),
    ("groups: {fc1: {found: {units: 3}}}", "'fc1', `found` is incomplete"),
    ("groups: {fc1: {found: {groups: 1, units: x, step: 1, entries_per_unit: 1, parameters_per_unit: 1, axes: 1}}}",
     "`units` should be a whole number, found 'x'"),
    ("groups: {fc1: {found: {groups: 1, units: 8, step: 4, entries_per_unit: 1, parameters_per_unit: [1], axes: 1}}}",
     "`parameters_per_unit` should be a whole number, or the least and the greatest in a list"),
    ("groups: {fc1: {change: {max_units: 10}, found: " + FACTS + "}}",
     "'fc1': `max_units` should be a multiple of the step of 4 units, 8 or 12, found 10"),
    ("groups: {fc1: {change: {min_units: 3}, found: " + FACTS + "}}",
     "`min_units` should be a multiple of the step of 4 units, 4, found 3"),
    ("groups: {}\npinned: {size 1: many}", r"pinned\['size 1'\]` should be a number, found 'many'"),
    ("groups: {}\nparameters: many", "`parameters` should be a whole number, found 'many'"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "match"), BAD)
def test_a_mistake_in_a_file_is_named_with_its_place(content, match, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(PlanError, match=match) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(f"The plan '{path}'")


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"The plan 'nowhere.yaml' cannot be read in '.*': No such file"):
        Plan.load("nowhere.yaml")
    (tmp_path / "model.ckpt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"cannot be read"):
        Plan.load(tmp_path / "model.ckpt")


def test_python_is_held_to_the_same_rules():
    with pytest.raises(PlanError, match="`grow` should be true or false"):
        GroupLimits(grow="yes")
    with pytest.raises(PlanError, match=r"groups\['fc1'\]` should be a GroupPlan"):
        Plan(groups={"fc1": GroupLimits()})
    with pytest.raises(PlanError, match="`change` should be a mapping"):
        GroupPlan(change=StackLimits())


def test_a_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan().model = "Net"


def test_the_file_is_ordinary_yaml():
    model, structure = residual()
    data = yaml.safe_load(Plan.of(structure, model).to_yaml())
    assert list(data) == ["model", "parameters", "groups", "stacks", "pinned"]
    assert data["groups"]["blocks.*.up"]["found"]["groups"] == 2
    assert data["stacks"]["blocks"]["change"] == {"grow": True, "prune": True, "min_blocks": 1, "max_blocks": None}
