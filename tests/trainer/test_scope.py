"""Where callbacks may change a model, and how far: limits hold for every method, whatever it proposes."""

import logging
import pickle
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningCLI
from torch import nn

import lightning_grow as lg
from lightning_grow.growth import Net2Net, net2deeper, net2wider
from lightning_grow.planning import GroupLimits, GroupPlan, Plan, StackLimits, StackPlan
from lightning_grow.pruning import MagnitudePruning, prune_lowest
from lightning_grow.surgery import prune, split, widen
from lightning_grow.trainer import BlockEdit, Proposal, StructuralCallback
from lightning_grow.trainer.proposal import size_after, spared
from lightning_grow.trainer.scope import Scope
from tests.trainer.models import Perceptron, Residual, build, loader, trainer

MODEL = build(Residual)
STRUCTURE = lg.trace(MODEL, torch.zeros(3, 4))
HEADS = lg.trace(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval(), torch.zeros(2, 5, 8))


def limited(grow=True, prune=True, least=1, most=None):
    return GroupPlan(GroupLimits(grow, prune, least, most))


def fit(folder, *callbacks, module=None, **arguments):
    module = build(Perceptron) if module is None else module
    trainer(folder, *callbacks, **arguments).fit(module, loader())
    return module


def sizes(module):
    return module.fc1.out_features, module.fc2.out_features


# -- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{}, {"max_parameters": 150}])
@pytest.mark.parametrize("arguments", [{"fraction": 1.0}, {"num_units": 1}])
def test_growth_stops_at_the_limit_of_each_group(tmp_path, budget, arguments):
    plan = Plan({"fc1": limited(most=9), "fc2": limited(most=7)})
    grow = Net2Net(every_n_steps=2, groups=plan, verify=True, **arguments, **budget)
    module = fit(tmp_path, grow)
    assert sizes(module) == (9, 7)
    assert all(event.difference < 1e-5 for event in grow.record.events)


def test_one_group_at_its_limit_leaves_the_budget_to_the_others(tmp_path):
    plan = Plan({"fc1": limited(most=7), "fc2": limited()})
    module = fit(tmp_path, Net2Net(every_n_steps=2, fraction=1.0, groups=plan, max_parameters=200))
    assert module.fc1.out_features == 7
    assert 188 <= sum(p.numel() for p in module.parameters()) <= 200


def test_pruning_leaves_what_the_plan_says_and_goes_on_elsewhere(tmp_path):
    plan = Plan({"fc1": limited(least=5), "fc2": limited()})
    module = fit(tmp_path, MagnitudePruning(every_n_steps=1, num_units=2, groups=plan))
    assert sizes(module) == (5, 1)


def test_the_units_that_pruning_has_to_leave_are_the_best_ones(tmp_path):
    module = build(Perceptron)
    with torch.no_grad():
        module.fc1.weight.copy_(torch.tensor([9.0, 1.0, 8.0, 7.0, 2.0, 3.0]).unsqueeze(1).expand(6, 4))
    expected = module.fc1.weight[[0, 2, 3]].clone()
    plan = Plan({"fc1": limited(least=3)})
    module.lr = 0.0
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    fit(tmp_path, MagnitudePruning(at_steps=[1], num_units=5, groups=plan, roles=["produced"]), module=module)
    assert torch.equal(module.fc1.weight, expected)


def test_grow_false_and_prune_false_leave_a_group_alone(tmp_path):
    plan = Plan({"fc1": limited(grow=False), "fc2": limited(prune=False)})
    grow = Net2Net(at_steps=[2], num_units=2, groups=plan)
    shrink = MagnitudePruning(at_steps=[4, 5, 6], num_units=1, groups=plan)
    module = fit(tmp_path, grow, shrink)
    assert {(event.what, event.group) for event in grow.record.events} == {("widen", "fc2"), ("prune", "fc1")}
    assert sizes(module) == (3, 7)


def test_a_group_without_an_entry_is_left_alone(tmp_path):
    module = fit(tmp_path, Net2Net(every_n_steps=4, num_units=1, groups=Plan({"fc2": limited()})))
    assert sizes(module) == (6, 9)


def test_a_live_size_beyond_a_limit_is_no_error(tmp_path):
    """A plan is about limits, not about what the model had when it was written."""
    plan = Plan({"fc1": limited(most=4), "fc2": limited(most=6)})
    module = fit(tmp_path, Net2Net(every_n_steps=4, num_units=1, groups=plan))
    assert sizes(module) == (6, 6)


def test_stacks_grow_up_to_their_limit_and_blocks_to_come_belong_to_their_entries(tmp_path):
    plan = Plan.of(STRUCTURE, MODEL)
    text = plan.to_yaml().replace("max_blocks: null", "max_blocks: 4").replace("max_units: null", "max_units: 6")
    (tmp_path / "plan.yaml").write_text(text)
    grow = Net2Net(every_n_steps=2, num_units=1, depth=True, groups=str(tmp_path / "plan.yaml"))
    module = fit(tmp_path, grow, module=build(Residual))
    assert len(module.blocks) == 4
    assert {block.up.out_features for block in module.blocks} == {6}


def test_the_shallowest_stack_that_may_grow_grows(tmp_path):
    class Two(Residual):
        def __init__(self):
            super().__init__(depth=1)
            self.others = build(Residual, depth=2).blocks

        def forward(self, x):
            return self.head(self.others(self.blocks(self.stem(x))))

    plan = Plan(stacks={"blocks": StackPlan(StackLimits(max_blocks=1)), "others": StackPlan()})
    module = fit(tmp_path, Net2Net(at_steps=[2], width=False, depth=True, groups=plan), module=build(Two))
    assert (len(module.blocks), len(module.others)) == (1, 3)


def test_a_method_that_knows_nothing_of_limits_is_held_to_them(tmp_path):
    class Greedy(StructuralCallback):
        shrinks = True

        def propose(self, occasion):
            wider = [Proposal(widen(occasion.structure["fc2"], 20))]
            return wider + [Proposal(prune(g, range(g.size - 1))) for g in occasion.groups if g.name == "fc1"]

    plan = Plan({"fc1": limited(least=4), "fc2": limited(most=8)})
    module = fit(tmp_path, Greedy(at_steps=[2], groups=plan))
    assert sizes(module) == (4, 8)


def test_a_resumed_run_keeps_to_the_plan_and_equals_one_without_interruption(tmp_path):
    plan = Plan({"fc1": limited(most=10), "fc2": limited(most=6)})
    plan.save(tmp_path / "plan.yaml")

    def grow():
        return Net2Net(every_n_steps=3, num_units=1, groups=str(tmp_path / "plan.yaml"))

    whole = fit(tmp_path, grow(), max_epochs=3)
    first = trainer(tmp_path, grow(), max_epochs=1)
    first.fit(build(Perceptron), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = build(Perceptron)
    trainer(tmp_path, grow(), max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert sizes(resumed) == sizes(whole) == (10, 6)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_only_what_the_plan_lets_change_is_logged(tmp_path):
    class Logged(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            self.names = {name for name in trainer.logged_metrics if name.endswith("/size")}

    logged = Logged()
    fit(tmp_path, Net2Net(groups=Plan({"fc1": limited(grow=False), "fc2": limited()})), logged)
    assert logged.names == {"grow/fc2/size"}


def test_an_event_that_the_plan_allows_nothing_says_where_the_limits_stand(tmp_path, caplog):
    Plan({"fc1": limited(most=6)}).save("plan.yaml")
    with caplog.at_level(logging.INFO, logger="lightning_grow"):
        fit(tmp_path, Net2Net(every_n_steps=2, groups="plan.yaml"), max_epochs=1)
    (line,) = [r.getMessage() for r in caplog.records if "nothing to do" in r.getMessage()]
    assert line.endswith("(their obstacles stand in the structure, their limits in the plan 'plan.yaml')")


# -- what is asked of `groups` ---------------------------------------------------------------------------------------


def test_callbacks_with_plans_pickle_and_are_told_apart():
    first, second = Net2Net(groups=Plan({"fc1": limited()})), Net2Net(groups=Plan({"fc2": limited()}))
    assert first.state_key != second.state_key
    again = pickle.loads(pickle.dumps(first))
    assert again.scope == first.scope
    assert again.state_key == Net2Net(groups=Plan({"fc1": limited(most=9)})).state_key


@pytest.mark.parametrize("groups", [3, [3], {"fc1"}, Scope()])
def test_anything_else_is_refused(groups):
    with pytest.raises(MisconfigurationException, match="should be a list of patterns, a plan, or the path"):
        Net2Net(groups=groups)


def test_a_pattern_without_a_list_and_a_file_that_is_not_there_are_told_at_construction():
    with pytest.raises(MisconfigurationException, match=r"'fc\*' cannot be read.*write a list: groups=\['fc\*'\]"):
        Net2Net(groups="fc*")


def test_a_malformed_file_is_told_at_construction_with_its_entry(tmp_path):
    (tmp_path / "plan.yaml").write_text("groups: {fc1: {change: {max_unit: 4}}}")
    with pytest.raises(MisconfigurationException, match=r"plan.yaml', groups, 'fc1', `change` has .*'max_units'"):
        MagnitudePruning(groups=tmp_path / "plan.yaml")


def test_a_file_that_one_rank_does_not_have_is_told_with_the_rank(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    with pytest.raises(MisconfigurationException, match=r"cannot be read.*\(on rank 3\)"):
        Net2Net(groups="plan.yaml")


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (Plan({"fc3": limited()}), r"The plan, `groups`, names 'fc3', but no group .* Did you mean 'fc2' or 'fc1'"),
        (Plan({"fc1": limited(), "encoder.*": limited()}), r"names 'encoder\.\*', but no group.*Groups: fc1, fc2\."),
        (Plan({"head": limited()}), r"'head'.* head.weight\[0\] is pinned: model output"),
        (Plan(stacks={"fc1": StackPlan()}), "`stacks`, names 'fc1', but no stack of this model"),
        (Plan({"fc1": limited(grow=False)}), "The plan lets nothing in this model grow"),
        (Plan(), "The plan lets nothing in this model grow"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused_at_the_first_batch(tmp_path, plan, match):
    with pytest.raises(MisconfigurationException, match=match):
        fit(tmp_path, Net2Net(groups=plan))


def test_a_plan_that_lets_nothing_be_pruned_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="lets nothing in this model be pruned"):
        fit(tmp_path, MagnitudePruning(groups=Plan({"fc1": limited(prune=False)})))


# -- in YAML ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Lightning's own, with newer jsonargparse
@pytest.mark.parametrize(
    "given",
    ["plan.yaml", ["fc*", "!fc2"], None, {"groups": {"fc1": {"change": {"max_units": 9}}}}],
    ids=["file", "patterns", "none", "plan"],
)
def test_a_callback_from_yaml_takes_a_plan_and_prints_it_again(given, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    Plan({"fc1": limited(most=9)}).save("plan.yaml")
    callback = {"class_path": "lightning_grow.Net2Net", "init_args": {"every_n_steps": 2, "groups": given}}
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))

    def cli(*args):
        return LightningCLI(Perceptron, args=list(args), run=False, seed_everything_default=0)

    made = [c for c in cli("--config", "config.yaml").trainer.callbacks if isinstance(c, Net2Net)]
    with pytest.raises(SystemExit):
        cli("--config", "config.yaml", "--print_config")
    Path("again.yaml").write_text(capsys.readouterr().out)
    again = [c for c in cli("--config", "again.yaml").trainer.callbacks if isinstance(c, Net2Net)]
    assert made[0].scope == again[0].scope
    if given == "plan.yaml" or isinstance(given, dict):
        assert made[0].scope.plan.groups["fc1"].change.max_units == 9
    else:
        assert made[0].scope.patterns == tuple(given or ())


# -- the mechanism ---------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_no_proposal_ever_leaves_the_limits_or_the_step(data):
    structure = data.draw(st.sampled_from([STRUCTURE, HEADS]))
    group = structure[data.draw(st.sampled_from(list(structure.groups)))]
    least = data.draw(st.integers(1, 3 * group.size))
    most = data.draw(st.none() | st.integers(least, 4 * group.size))
    may_grow, may_prune = data.draw(st.booleans()), data.draw(st.booleans())
    steps = data.draw(st.integers(1, 8))
    fewer = min(steps, group.size // group.step - 1) * group.step
    more = steps * group.step
    edit = data.draw(
        st.sampled_from(
            [
                widen(group, more),
                net2wider(group, more, preserve=False),
                split(group, range(min(more, group.size))),
                prune(group, range(fewer)),
            ]
        )
    )
    scope = Scope.of(Plan({group.name: limited(may_grow, may_prune, least, most)}))
    kept = scope.within_limits([Proposal(edit, predicted=0.5)], structure)
    after = size_after(kept[0].change) if kept else group.size
    wanted = size_after(edit)
    assert after % group.step == 0
    assert min(group.size, wanted) <= after <= max(group.size, wanted)
    if after > group.size:
        assert may_grow
        assert most is None or after <= most
    elif after < group.size:
        assert may_prune
        assert after >= least
    elif wanted > group.size:
        assert not may_grow or most < group.size + group.step
    elif wanted < group.size:
        assert not may_prune or least > group.size - group.step
    assert all(proposal.predicted == 0.5 for proposal in kept)


def test_depth_has_limits_too():
    stack = STRUCTURE.stacks["blocks"]
    more, less = Proposal(net2deeper(stack)), Proposal(BlockEdit(stack, 0, remove=True))

    def kept(**limits):
        scope = Scope.of(Plan(stacks={"blocks": StackPlan(StackLimits(**limits))}))
        return scope.within_limits([more, less], STRUCTURE)

    assert kept() == [more, less]
    assert kept(max_blocks=3) == [more, less]
    assert kept(max_blocks=2) == [less]
    assert kept(min_blocks=2) == [more]
    assert kept(grow=False, prune=False) == []


def test_patterns_have_no_limits():
    proposals = [Proposal(widen(STRUCTURE["stem"], 100))]
    assert Scope.of(["blocks*"]).within_limits(proposals, STRUCTURE) == proposals


def test_a_milder_edit_keeps_the_order_of_the_units():
    group = STRUCTURE["stem"]
    assert spared(prune(group, [0, 2, 4]), 5).index == (0, 1, 2, 3, 5)
    assert spared(prune(group, [0, 2, 4]), 5).share == (1.0,) * 5
    with pytest.raises(ValueError, match="it cannot stop at 7"):
        spared(prune(group, [0]), 7)


def test_each_group_can_keep_units_of_its_own_number():
    groups = {name: STRUCTURE[name] for name in ("stem", "blocks.0.up")}
    scores = {name: (group, torch.arange(float(group.size))) for name, group in groups.items()}
    edits = {e.group.name: e.new_size for e in prune_lowest(scores, 100, {"stem": 4, "blocks.0.up": 2})}
    assert edits == {"stem": 4, "blocks.0.up": 2}
    with pytest.raises(ValueError, match="of at least 1"):
        prune_lowest(scores, 1, {"stem": 0})
