"""Signed splitting: the schemes keep their constraints, gain what they should, and reduce to positive splits."""

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.criteria import Extremes, Objective, Offspring, Overgrown, Splits, exact, offspring_edit
from lightning_grow.growth import SignedSplitting, signed_scheme, signed_splits, steepest_splits
from lightning_grow.growth.signed_splitting import best_schemes
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_
from lightning_grow.trainer.proposal import trimmed
from tests.trainer.models import Perceptron, build, loader, trainer

X = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OBJECTIVE = Objective(lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), [(X, Y)])
SPECTRA = [(-1.0, 2.0), (-1.0, 4.0), (-2.0, 0.5), (0.5, 2.0), (-2.0, -0.5), (-1.0, 0.0), (0.0, 1.0)]


def mlp(seed=2, activation=nn.Tanh, hidden=5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, hidden), activation(), nn.Linear(hidden, 2)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.7)
        return model


def groups_of(model):
    return list(trace(model, X).groups.values())


def changed(model, edits, objective=OBJECTIVE):
    return objective.value(Overgrown(model, edits).model) - objective.value(Overgrown(model, []).model)


def value_of(scheme, low, high):
    """Return Q from the offspring themselves."""
    return sum(s.weight * (s.lowest**2 * low + s.highest**2 * high) for s in scheme.shares)


@pytest.mark.parametrize("c", [1.0, 1.5, 3.0, 5.0])
@pytest.mark.parametrize("ways", [2, 3, 4])
@pytest.mark.parametrize("spectrum", SPECTRA, ids=str)
def test_schemes_keep_their_constraints(spectrum, ways, c):
    """[D]: sum w = 1, sum |w| <= c, sum w d = 0, |d| <= 1, and Q is what it is said to be."""
    scheme = signed_scheme(*spectrum, ways, c)
    assert scheme.value <= 0
    assert value_of(scheme, *spectrum) == pytest.approx(scheme.value, abs=1e-12)
    assert len(scheme.shares) <= ways
    if scheme.shares:
        weights = [share.weight for share in scheme.shares]
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        assert sum(map(abs, weights)) <= c + 1e-12
        assert sum(s.weight * s.lowest for s in scheme.shares) == pytest.approx(0, abs=1e-12)
        assert sum(s.weight * s.highest for s in scheme.shares) == pytest.approx(0, abs=1e-12)
        assert max(s.lowest**2 + s.highest**2 for s in scheme.shares) <= 1 + 1e-12
        assert all(sum(weights[:k]) > 0 for k in range(1, len(weights)))  # shortened edits can hand shares back


def test_values_for_c_of_3():
    """[D]: the table of the derivation, with the mixed scheme of three where it is best, and where it is not."""
    values = {(s, m): signed_scheme(*s, m).value for s in SPECTRA for m in (2, 3, 4)}
    assert [values[(-1.0, 2.0), m] for m in (2, 3, 4)] == pytest.approx([-1, -2.5, -4])
    assert [values[(-1.0, 4.0), m] for m in (2, 3, 4)] == pytest.approx([-2, -4, -6])
    assert [values[(0.5, 2.0), m] for m in (2, 3, 4)] == pytest.approx([-1, -2, -2])  # a fourth would lose
    assert [values[(-2.0, -0.5), m] for m in (2, 3, 4)] == pytest.approx([-2, -4, -4])
    mixed = signed_scheme(-1.0, 2.0, 3)
    assert any(share.lowest and share.highest for share in mixed.shares)


def test_signs_swap_the_ends():
    """[D]: -S is S with the ends exchanged, up to (c-1)/(c+1)."""
    for c in (1.5, 3.0):
        ratio = (c - 1) / (c + 1)
        for magnitude in (0.3, 2.0):
            lower, upper = signed_scheme(-magnitude, 0.0, 2, c), signed_scheme(0.0, magnitude, 2, c)
            assert upper.value == pytest.approx(ratio * lower.value)
            three = signed_scheme(0.0, magnitude, 3, c).value / signed_scheme(-magnitude, 0.0, 3, c).value
            assert three == pytest.approx(ratio)


@pytest.mark.parametrize("spectrum", SPECTRA, ids=str)
@pytest.mark.parametrize("ways", [2, 3, 4])
def test_no_drawn_split_is_better(spectrum, ways):
    """Any offspring that keep the constraints."""
    c, generator = 3.0, torch.Generator().manual_seed(ways)
    best = signed_scheme(*spectrum, ways, c).value
    values = torch.tensor(spectrum, dtype=torch.float64)
    for _ in range(2000):
        weights = torch.randn(ways, generator=generator, dtype=torch.float64)
        weights = weights / weights.sum()
        offsets = torch.randn(ways, 2, generator=generator, dtype=torch.float64)
        offsets = offsets - weights @ offsets  # as the weights add up to 1, the weighted mean is 0 then
        offsets = offsets / offsets.norm(dim=1).max()
        if float(weights.abs().sum()) <= c:
            assert float((weights * (offsets**2 @ values)).sum()) >= best - 1e-12


@pytest.mark.parametrize("ways", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_changes_as_predicted(ways, seed):
    """[D]: within 3 % at 0.025, for units with a value below -0.1."""
    model = mlp(seed)
    (group,) = groups_of(model)
    ends = exact(Splits(model, [group], OBJECTIVE, 1e-4))[group.name]
    seen = 0
    for unit in range(group.size):
        scheme = signed_scheme(float(ends.lowest[unit]), float(ends.highest[unit]), ways)
        if scheme.value < -0.1:
            low, high = ends.lowest_vectors[unit], ends.highest_vectors[unit]
            parts = [Offspring(s.weight, 0.025 * (s.lowest * low + s.highest * high)) for s in scheme.shares]
            assert float(torch.stack([p.weight * p.offset for p in parts]).sum(0).abs().max()) < 1e-12
            change = changed(model, [offspring_edit(model, group, {unit: parts})])
            assert change == pytest.approx(0.5 * 0.025**2 * scheme.value, rel=0.03)
            seen += 1
    assert seen


def test_with_c_of_1_it_is_splitting_steepest_descent():
    """[D]."""
    model = mlp()
    plain = steepest_splits(model, groups_of(model), OBJECTIVE, 3, form="exact")
    signed = signed_splits(model, groups_of(model), OBJECTIVE, 3, c=1.0, form="exact")
    assert len(plain) == len(signed) == 1
    for (one, expected), (other, gain) in zip(plain, signed, strict=True):
        assert one.index == other.index
        assert one.share == other.share
        assert gain == pytest.approx(expected)
        for label in one.shifts:
            torch.testing.assert_close(one.shifts[label], other.shifts[label])


def test_it_descends_where_positive_splits_are_stuck():
    """[D]: softplus curves upwards and the output is too large, so every splitting matrix is positive."""
    model = mlp(activation=nn.Softplus, hidden=3)
    model[2].weight.data.abs_()
    objective = Objective(lambda m, batch: m(batch).mean(), [X])
    assert bool((exact(Splits(model, groups_of(model), objective))["0"].lowest > 0).all())
    assert steepest_splits(model, groups_of(model), objective, 3) == []
    for ways in ([2], [3], [4], [2, 3, 4]):
        edits = signed_splits(model, groups_of(model), objective, 3, ways=ways)
        assert changed(model, [edit for edit, _ in edits], objective) < 0


def curvature_of(*spectra, radius=1.0):
    """Return splits and curvature of a made-up group, for the selection alone."""
    splits = Splits(mlp(hidden=len(spectra)), groups_of(mlp(hidden=len(spectra))), OBJECTIVE)
    splits.radii["0"] = torch.full((len(spectra),), radius, dtype=torch.float64)
    low, high = (torch.tensor(end, dtype=torch.float64) for end in zip(*spectra, strict=True))
    return splits, {"0": Extremes(low, torch.zeros(len(low), 5), high, torch.zeros(len(low), 5))}


@pytest.mark.parametrize("num_units", range(1, 10))
def test_gain_per_added_unit_decides(num_units):
    """Greedy is what the best of all choices gains, where the units that may be added are used up."""
    spectra = [(-1.0, 2.0), (0.5, 3.0), (-2.0, 0.0)]
    splits, curvature = curvature_of(*spectra)
    chosen = best_schemes(splits, curvature, num_units)["0"]
    options = [
        {0: 0.0} | {len(s.shares) - 1: -s.value / 2 for m in (2, 3, 4) for s in [signed_scheme(*spectrum, m)]}
        for spectrum in spectra
    ]
    added = sum(len(scheme.shares) - 1 for scheme in chosen.values())
    gain = sum(-scheme.value / 2 for scheme in chosen.values())
    assert added <= num_units
    best = max(
        a + b + c
        for i, a in options[0].items()
        for j, b in options[1].items()
        for k, c in options[2].items()
        if i + j + k <= added
    )
    assert gain == pytest.approx(best)


def test_costs_share_out_and_the_greedy_stops_at_the_limit():
    splits, curvature = curvature_of((-1.0, 2.0), (-0.5, 1.0))
    assert best_schemes(splits, curvature, 99, costs={"0": 2.0}, max_cost=1.9) == {}
    found = best_schemes(splits, curvature, 99, costs={"0": 2.0}, max_cost=6.0)["0"]
    assert sum(len(scheme.shares) - 1 for scheme in found.values()) == 3


@pytest.mark.parametrize("size", [6, 7, 8])
@torch.no_grad()
def test_an_edit_that_is_shortened_keeps_the_function_of_what_it_drops(size):
    """A unit that has lost an offspring is not split at all: its others have no offset, and its whole fan-out."""
    model = mlp()
    ((edit, _),) = signed_splits(model, groups_of(model), OBJECTIVE, 4, ways=[3, 4])
    shorter = trimmed(edit, size, {"0": 5})
    lost = set(edit.index[size:])
    kept = {unit for unit in edit.index[5:] if unit not in lost}
    expected = model(X)
    if not kept:
        apply_(model, [shorter])
        torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)
    else:
        assert all(bool((shorter.shifts["0.bias[0]"][torch.tensor(shorter.index) == unit] == 0).all()) for unit in lost)
        assert -0.1 < changed(model, [shorter]) < 0


# -- as a callback ------------------------------------------------------------------------------------------------


def test_no_more_units_than_asked_for(tmp_path):
    callback = SignedSplitting(every_n_steps=2, num_units=4)
    module = build(Perceptron)
    trainer(tmp_path, callback, max_epochs=2).fit(module, loader())
    assert callback.record.events
    assert all(event.predicted > 0 for event in callback.record.events)
    assert 6 + 5 < module.fc1.out_features + module.fc2.out_features <= 6 + 5 + 4


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("`c` of at least 1, found 0.5", {"c": 0.5}),
        ("`ways` to be some of 2, 3 and 4, found \\[\\]", {"ways": []}),
        ("`ways` to be some of 2, 3 and 4, found \\[5\\]", {"ways": [5]}),
        ("`form` to be one of", {"form": "fast"}),
        ("`radius` should be above 0", {"radius": -1.0}),
        ("`steps` should be at least 1", {"steps": 0}),
    ],
)
def test_wrong_arguments_are_refused_at_once(match, arguments):
    with pytest.raises(MisconfigurationException, match=match):
        SignedSplitting(**arguments)


def test_the_functions_refuse_what_the_callback_refuses():
    with pytest.raises(ValueError, match="`ways` of 2, 3 or 4, found 5"):
        signed_scheme(-1.0, 1.0, 5)
    with pytest.raises(ValueError, match="`c` of at least 1"):
        signed_scheme(-1.0, 1.0, 2, 0.0)
    with pytest.raises(ValueError, match="`num_units` of at least 1"):
        signed_splits(mlp(), groups_of(mlp()), OBJECTIVE, 0)
