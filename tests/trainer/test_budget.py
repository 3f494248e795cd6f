"""Proposals are shortened to stay within a budget, and keep what they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_grow.costs import count_flops, count_parameters
from lightning_grow.growth import net2deeper, net2wider
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_, prune, split, widen
from lightning_grow.trainer.budget import Budget, Meter, apply_changes_
from lightning_grow.trainer.proposal import Proposal, fingerprint, is_nothing, rounded, trimmed
from tests.trainer.models import Residual, build
from tests.zoo import ZOO


def perceptron():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()


X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
STRUCTURE = trace(perceptron(), X)


def meter(model, **limits):
    return Meter(Budget(**limits), model, STRUCTURE, lambda m: m(X))


def wider(*sizes):
    return [Proposal(net2wider(STRUCTURE[n], k, spread=0.3)) for n, k in zip(("0", "2"), sizes, strict=True)]


@torch.no_grad()
@settings(max_examples=20, deadline=None, derandomize=True)
@given(limit=st.integers(70, 400), first=st.integers(1, 12), second=st.integers(1, 12))
def test_shortened_growth_fits_as_tightly_as_units_allow_and_keeps_the_function(limit, first, second):
    model = perceptron()
    fitting = meter(model, max_parameters=limit).fit(wider(first, second))
    expected = model(X)
    apply_(model, [p.change for p in fitting])
    count = sum(p.numel() for p in model.parameters())
    assert count <= max(limit, 77)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-10)
    full = (model[0].out_features, model[2].out_features) == (6 + first, 5 + second)
    dearest = max(4 + 1 + model[2].out_features, model[0].out_features + 1 + 2)
    assert full or limit < 77 or count > limit - dearest


def test_growth_is_cut_evenly():
    model = perceptron()
    fitting = meter(model, max_parameters=150).fit(wider(12, 10))
    sizes = {p.change.group.name: len(p.change.index) for p in fitting}
    assert sizes["0"] > 8
    assert sizes["2"] > 6


def test_what_fits_is_not_touched_and_pruning_never_is():
    model = perceptron()
    proposals = wider(1, 1)
    assert meter(model, max_parameters=1000).fit(proposals) == proposals
    small = [Proposal(prune(STRUCTURE["0"], [1]))]
    assert meter(model, max_parameters=10).fit(small) == small


def test_flops_are_measured_on_a_copy():
    model = perceptron()
    fitting = meter(model, max_flops=700).fit(wider(12, 12))
    assert model[0].out_features == 6
    apply_(model, [p.change for p in fitting])
    assert 500 < count_flops(lambda: model(X)) <= 700


def test_latency_comes_from_one_rank():
    asked = []
    model = perceptron()
    limited = Meter(Budget(max_latency_ms=5.0), model, STRUCTURE, lambda m: m(X), lambda ms: asked.append(ms) or 9.0)
    assert limited.excess() == {"max_latency_ms": (9.0, 5.0)}
    assert asked[0] > 0


@pytest.mark.parametrize(("limit", "blocks", "grown"), [(10**6, 3, 4), (220, 3, 0), (190, 2, 2), (160, 2, 0)])
def test_a_block_that_is_too_much_is_left_out(limit, blocks, grown):
    model = build(Residual)
    x = torch.zeros(1, 4)
    structure = trace(model, x)
    proposals = [Proposal(net2wider(structure["blocks.0.up"], 4)), Proposal(net2deeper(structure.stacks["blocks"]))]
    fitting = Meter(Budget(max_parameters=limit), model, structure).fit(proposals)
    apply_changes_(model, [p.change for p in fitting])
    assert sum(p.numel() for p in model.parameters()) <= limit
    assert len(model.blocks) == blocks
    assert model.blocks[0].up.out_features >= 4 + grown


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "cnn_batch_norm", "flatten_head", "concat_raw"])
def test_shortened_edits_are_exact_on_the_zoo(name):
    """Copies, splits, and new units with given values, on composite axes too."""
    entry = ZOO[name]
    args, kwargs = entry.inputs()
    structure = trace(entry.build(), *args, **kwargs)
    for make in (
        lambda g: net2wider(g, 3 * g.step, spread=0.5),
        lambda g: split(g, range(3 * g.step)),
        lambda g: widen(g, 3 * g.step),
    ):
        model = entry.build().eval()
        expected = model(*args, **kwargs)
        groups = [g for g in structure.groups.values() if g.obstacle is None and g.size >= 3 * g.step]
        sizes = structure.sizes_in(model)
        apply_(model, [trimmed(make(g), g.size + g.step, sizes) for g in groups])
        torch.testing.assert_close(model(*args, **kwargs), expected, rtol=0, atol=1e-10)
        assert structure.sizes_in(model) == {
            n: s + structure[n].step * (structure[n] in groups) for n, s in sizes.items()
        }


def test_given_values_are_cut_with_their_units():
    """Beside another group on one axis: values of the units that stay are kept, in their order."""
    entry = ZOO["concat_raw"]
    args, kwargs = entry.inputs()
    model = entry.build()
    structure = trace(model, *args, **kwargs)
    group = next(g for g in structure.groups.values() if any(len(a.layout) > 1 for a in g.axes))
    axis = next(a for a in group.axes if len(a.layout) > 1)
    tensor = dict(model.named_parameters())[axis.tensor]
    values = torch.arange(2.0, dtype=torch.float64).reshape([2 if d == axis.dim else 1 for d in range(tensor.ndim)])
    values = values.expand([2 if d == axis.dim else n for d, n in enumerate(tensor.shape)])
    edit = trimmed(widen(group, 2, values={axis.label: values}), group.size + 1, structure.sizes_in(model))
    assert torch.equal(edit.values[axis.label], values.narrow(axis.dim, 0, 1))
    assert not trimmed(widen(group, 2, values={axis.label: values}), group.size, structure.sizes_in(model)).values


def test_shortening_to_nothing_leaves_nothing():
    group = STRUCTURE["0"]
    for edit in (net2wider(group, 4, spread=0.4), split(group, [1, 2]), widen(group, 3)):
        assert is_nothing(trimmed(edit, 6, {"0": 6, "2": 5}))
    with pytest.raises(ValueError, match=r"goes from 6 to 9.* it cannot stop at 10"):
        trimmed(widen(group, 3), 10, {})


def test_a_fingerprint_tells_every_difference():
    group = STRUCTURE["0"]
    generator = torch.Generator().manual_seed(3)
    edits = [
        net2wider(group, 2),
        net2wider(group, 3),
        net2wider(group, 2, generator),
        net2wider(group, 2, spread=0.1),
        widen(group, 2),
        widen(group, 2, values={"0.bias[0]": torch.zeros(2)}),
        widen(group, 2, values={"0.bias[0]": torch.ones(2)}),
    ]
    assert len({fingerprint([e]) for e in edits}) == len(edits)
    assert fingerprint([widen(group, 2)]) == fingerprint([widen(group, 2)])
    assert 0 <= fingerprint(edits) < 2**63


@pytest.mark.parametrize(
    ("num_units", "fraction", "expected"), [(3, None, 3), (None, 0.5, 3), (None, 0.01, 1), (None, 2.0, 12)]
)
def test_units_are_rounded_up_to_the_step(num_units, fraction, expected):
    group = STRUCTURE["0"]
    assert rounded(group, num_units, fraction) == expected


def test_parameters_of_other_sizes_are_counted_without_building_them():
    model = perceptron()
    for first, second in ((1, 1), (6, 5), (11, 3)):
        other = nn.Sequential(nn.Linear(4, first), nn.Linear(first, second), nn.Linear(second, 2))
        expected = sum(p.numel() for p in other.parameters())
        assert count_parameters(model, STRUCTURE, {"0": first, "2": second}) == expected
