"""Random growth: any unit, any direction, nothing measured; new units are silent."""

import collections
import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.growth import RandomGrowth, random_new_units, random_splits
from lightning_grow.structure import StructureError, trace
from lightning_grow.surgery import apply_
from lightning_grow.trainer import Occasion

X = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3), nn.Tanh(), nn.Linear(3, 2)).double()


GROUPS = list(trace(perceptron(), X).groups.values())


@torch.no_grad()
def test_new_units_are_silent_and_as_large_as_the_others():
    model = perceptron()
    before = model(X)
    lengths = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).norm(dim=1)
    apply_(model, random_new_units(model, GROUPS, 12, generator()))
    assert model[0].out_features + model[2].out_features == 24
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-12)
    new = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1)[9:].norm(dim=1)
    torch.testing.assert_close(new, lengths.mean().expand(len(new)))


@pytest.mark.parametrize("kind", ["new", "split"])
def test_layers_are_drawn_in_proportion_to_their_units(kind):
    """9 units and 3."""
    model, counts = perceptron(), collections.Counter()
    for seed in range(200):
        random = generator(seed)
        edits = random_new_units(model, GROUPS, 1, random) if kind == "new" else random_splits(model, GROUPS, 1, random)
        counts.update(edit.group.name for edit in edits)
    assert sum(counts.values()) == 200
    assert 130 < counts["0"] < 170


@torch.no_grad()
def test_a_split_moves_both_halves_by_the_radius_and_shares_the_fan_out():
    model = perceptron()
    grown = copy.deepcopy(model)
    (edit,) = random_splits(model, GROUPS[:1], 4, generator(), radius=0.2)
    apply_(grown, [edit])
    fan_in = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1)
    moved = torch.cat([grown[0].weight, grown[0].bias[:, None]], dim=1) - fan_in[list(edit.index)]
    for place, unit in enumerate(edit.index[9:], start=9):
        torch.testing.assert_close(moved[place], -moved[unit])
        torch.testing.assert_close(moved[place].norm(), 0.2 * fan_in[unit].norm())
        torch.testing.assert_close(grown[2].weight[:, place], model[2].weight[:, unit] / 2)
    assert len(set(edit.index[9:])) == 4
    assert torch.equal(moved[[u for u in range(9) if u not in edit.index[9:]]].abs().max(), torch.zeros(()).double())


@torch.no_grad()
def test_the_function_changes_with_the_square_of_the_radius():
    model = perceptron()
    before, changes = model(X), []
    for radius in (0.0, 0.01, 0.02):
        grown = copy.deepcopy(model)
        apply_(grown, random_splits(model, GROUPS, 5, generator(), radius=radius))
        changes.append(float((grown(X) - before).norm()))
    assert changes[0] < 1e-14
    assert 3.9 < changes[2] / changes[1] < 4.1


def test_draws_are_its_own():
    model, state = perceptron(), torch.get_rng_state()
    first, again, other = (random_splits(model, GROUPS, 5, generator(seed)) for seed in (1, 1, 2))
    assert [e.index for e in first] == [e.index for e in again] != [e.index for e in other]
    random_new_units(model, GROUPS, 5, generator())
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_keep_the_function_is_left_alone():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    structure = trace(model, X)
    groups = tuple(structure.groups.values())
    for call in (
        lambda: random_new_units(model, groups, 2, generator()),
        lambda: random_splits(model, groups, 2, generator()),
    ):
        with pytest.raises(StructureError, match="Cannot grow '0' and keep the function"):
            call()
    for kind in ("new", "split"):
        occasion = Occasion(model, structure, groups, (), {}, step=3, seed=0)
        proposals = RandomGrowth(kind=kind, every_n_steps=1, num_units=2).propose(occasion)
        assert [(p.change.group.name, p.change.new_size) for p in proposals] == [("3", 7)]
        occasion = Occasion(model, structure, groups[:1], (), {}, step=3, seed=0)
        assert RandomGrowth(kind=kind, every_n_steps=1).propose(occasion) == []


def test_a_frozen_layer_gets_new_units_all_the_same():
    model = perceptron()
    model[0].requires_grad_(False)
    (edit,) = random_new_units(model, GROUPS[:1], 2, generator())
    assert edit.new_size == 11


def test_wrong_arguments_are_named():
    model = perceptron()
    with pytest.raises(ValueError, match="`num_units` of at least 1"):
        random_new_units(model, GROUPS, 0, generator())
    with pytest.raises(ValueError, match="`radius` of at least 0"):
        random_splits(model, GROUPS, 1, generator(), radius=-1.0)
    with pytest.raises(MisconfigurationException, match="`kind` should be 'new' or 'split'"):
        RandomGrowth(kind="other")
    with pytest.raises(MisconfigurationException, match="`radius` should be at least 0"):
        RandomGrowth(radius=-1.0)
