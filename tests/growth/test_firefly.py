"""Firefly: what it predicts is what happens, and the best candidates are the ones that are kept."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.criteria import Objective
from lightning_grow.criteria.candidates import Candidates, Effects
from lightning_grow.growth import Firefly, firefly
from lightning_grow.growth.firefly import best_candidates
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_
from lightning_grow.trainer import Occasion
from lightning_grow.trainer.proposal import trimmed

X = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Y = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)).double()


OBJECTIVE = Objective(
    lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), [(X[:32], Y[:32]), (X[32:], Y[32:])]
)
GROUPS = list(trace(perceptron(), X).groups.values())


@pytest.mark.parametrize("share_new", [0.0, 0.5, 1.0])
def test_the_loss_falls_by_what_was_predicted(share_new):
    model = perceptron()
    before = OBJECTIVE.value(model)
    grown = firefly(model, GROUPS, OBJECTIVE, 4, generator(), share_new=share_new, radius=0.02, steps=40)
    apply_(model, [edit for edit, _ in grown])
    assert model[0].out_features + model[2].out_features == 16
    predicted = sum(gain for _, gain in grown)
    assert predicted > 0
    assert before - OBJECTIVE.value(model) == pytest.approx(predicted, rel=0.1)


def test_quotas_are_kept_apart_and_one_list_prefers_new_units():
    """New units are of first order in the amplitude, splits of second."""

    def new(grown):
        return sum(edit.num_new for edit, _ in grown), sum(edit.new_size - edit.group.size for edit, _ in grown)

    model = perceptron()
    assert new(firefly(model, GROUPS, OBJECTIVE, 4, generator(), share_new=0.25, steps=20)) == (1, 4)
    assert new(firefly(model, GROUPS, OBJECTIVE, 8, generator(), share_new=0.0, steps=20))[0] == 0
    assert new(firefly(model, GROUPS, OBJECTIVE, 8, generator(), share_new=1.0, steps=5)) == (8, 8)
    assert new(firefly(model, GROUPS, OBJECTIVE, 8, generator(), one_list=True, radius=0.01, steps=5)) == (8, 8)


def candidates():
    return Candidates(perceptron(), GROUPS, OBJECTIVE, generator(), num_new=3)


def effects(splits0, new0, splits2, new2):
    def padded(values, size):
        return torch.tensor([*values, *[1.0] * (size - len(values))], dtype=torch.float64)

    return {"0": Effects(padded(splits0, 7), padded(new0, 3)), "2": Effects(padded(splits2, 5), padded(new2, 3))}


def kept(grown):
    return {edit.group.name: (edit.index[edit.group.size :], gain) for edit, gain in grown}


def test_the_best_are_kept_wherever_they_are():
    found = effects([0.0, -3.0], [-1.0], [-4.0], [2.0, -5.0])
    assert kept(best_candidates(candidates(), found, 4)) == {"0": ((-1, 1), 4.0), "2": ((-1, 0), 9.0)}
    assert kept(best_candidates(candidates(), found, 2)) == {"2": ((-1, 0), 9.0)}
    assert kept(best_candidates(candidates(), found, 3, one_list=True)) == {"0": ((1,), 3.0), "2": ((-1, 0), 9.0)}


def test_what_splits_leave_goes_to_new_units_and_what_does_not_help_is_not_kept():
    found = effects([], [-1.0, -2.0], [], [-3.0])
    assert kept(best_candidates(candidates(), found, 4)) == {"0": ((-1, -1), 3.0), "2": ((-1,), 3.0)}
    assert best_candidates(candidates(), effects([], [], [], []), 4) == []


def test_costs_divide_effects():
    found = effects([], [-3.0], [], [-1.0])
    assert list(kept(best_candidates(candidates(), found, 1, share_new=1.0))) == ["0"]
    costs = {"0": 10.0, "2": 1.0}
    assert list(kept(best_candidates(candidates(), found, 1, share_new=1.0, costs=costs))) == ["2"]


@torch.no_grad()
def test_a_budget_that_drops_splits_puts_their_parents_back():
    model, found = perceptron(), candidates()
    edit = found.edit("0", [2, 4], [1])
    assert edit.index == (*range(7), -1, 2, 4)
    shorter = trimmed(edit, 8, {g.name: g.size for g in GROUPS})
    plain = found.edit("0", [], [1])
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    apply_(one, [shorter])
    apply_(other, [plain])
    torch.testing.assert_close(one(X), other(X), rtol=0, atol=1e-14)


def test_it_is_the_same_again():
    model = perceptron()
    first, again = (firefly(model, GROUPS, OBJECTIVE, 4, generator(), steps=5) for _ in range(2))
    for (edit, gain), (same, too) in zip(first, again, strict=True):
        assert (edit.index, gain) == (same.index, too)
        assert all(torch.equal(edit.values[label], same.values[label]) for label in edit.values)
        assert all(torch.equal(edit.shifts[label], same.shifts[label]) for label in edit.shifts)


def test_the_callback_searches_what_can_be_searched():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)
    ).double()
    structure = trace(model, X)
    groups = tuple(structure.groups.values())
    occasion = Occasion(model, structure, groups, (), {}, step=3, seed=0, objective=OBJECTIVE)
    (proposal,) = Firefly(every_n_steps=1, num_units=2, search_steps=3, cost="flops").propose(occasion)
    assert (proposal.change.group.name, proposal.change.new_size) == ("3", 7)
    assert proposal.predicted > 0
    model[3].requires_grad_(False)
    assert Firefly(every_n_steps=1).propose(occasion) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share_new": 1.5}, r"`share_new` should be in \[0, 1\]"),
        ({"num_candidates": 0}, "`num_candidates` should be at least 1"),
        ({"points": 0}, "`points` should be at least 1"),
        ({"window_batches": 0}, "`window_batches` should be at least 1"),
        ({"search_steps": -1}, "`search_steps` should be at least 0"),
        ({"radius": 0.0}, "`radius` should be above 0"),
        ({"search_lr": 0.0}, "`search_lr` should be above 0"),
        ({"cost": "money"}, "`cost` should be"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        Firefly(**arguments)


def test_wrong_numbers_are_named():
    with pytest.raises(ValueError, match="`num_units` of at least 1"):
        firefly(perceptron(), GROUPS, OBJECTIVE, 0, generator())
    with pytest.raises(ValueError, match=r"`share_new` in \[0, 1\]"):
        firefly(perceptron(), GROUPS, OBJECTIVE, 1, generator(), share_new=2.0, steps=0)
