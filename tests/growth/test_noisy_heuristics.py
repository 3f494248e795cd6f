"""Noisy heuristics: what is added does not show, what goes is not missed, and rules are what they are said to be."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.criteria import Objective, UnitVectors, significance
from lightning_grow.growth import NoisyHeuristics
from lightning_grow.growth.noisy_heuristics import (
    Fall,
    _held,
    decay_factor,
    fade_,
    fitted_fall,
    is_large,
    layer_size,
    neighbours,
    new_balance,
    random_units,
    shares,
    unfit_units,
)
from lightning_grow.structure import StructureError, trace
from lightning_grow.surgery import apply_, prune
from tests.trainer.models import Perceptron, Residual, build, loader, trainer
from tests.zoo import ZOO


def seeded(number=0):
    return torch.Generator().manual_seed(number)


X = torch.randn(40, 4, dtype=torch.float64, generator=seeded())
Y = (X[:, 0] * X[:, 1] > 0).long()


def perceptron(activation=nn.ReLU):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = [nn.Linear(4, 8), activation(), nn.Linear(8, 6), activation()]
        return nn.Sequential(*inner, nn.Linear(6, 2)).double()


OBJECTIVE = Objective(lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(X[:20], Y[:20]), (X[20:], Y[20:])])


def groups_of(model):
    return list(trace(model, X).groups.values())


# -- adding and taking away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn_batch_norm", "residual_cnn", "concat_raw", "flatten_head"])
@torch.no_grad()
def test_added_units_do_not_show(name):
    """T6.1; the reduction to network morphism with a silent fan-out."""
    entry = ZOO[name]
    model = entry.build()
    args, kwargs = entry.inputs()
    structure = trace(model, *args, **kwargs)
    expected = copy.deepcopy(model)(*args, **kwargs)
    groups = [g for g in structure.groups.values() if g.obstacle is None]
    apply_(model, [random_units(model, group, 2 * group.step, seeded()) for group in groups])
    torch.testing.assert_close(model(*args, **kwargs), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_new_weights_are_uniform_and_biases_zero():
    model = perceptron()
    apply_(model, [random_units(model, groups_of(model)[1], 2000, seeded())])
    weight, bias = model[2].weight[6:], model[2].bias[6:]
    assert torch.equal(bias, torch.zeros_like(bias))
    assert weight.abs().max() <= 8**-0.5
    assert abs(float(weight.var()) - 1 / (3 * 8)) < 2e-3
    assert torch.equal(model[4].weight[:, 6:], torch.zeros_like(model[4].weight[:, 6:]))


@torch.no_grad()
def test_faded_units_can_be_cut_out_unseen():
    """T6.1: after a full decay; without it, their removal shows."""
    model = perceptron()
    group = groups_of(model)[0]
    fading = _held(model, group, [1, 5])
    gone = copy.deepcopy(model)
    apply_(gone, [prune(group, [1, 5])])
    assert (gone(X) - model(X)).abs().max() > 1e-2
    fade_(model, group, fading, 0.0)
    faded = model(X)
    apply_(model, [random_units(model, group, 3, seeded(), without=[1, 5])])
    assert model[0].out_features == 9
    torch.testing.assert_close(model(X), faded, rtol=0, atol=1e-12)


@torch.no_grad()
def test_fading_sets_the_fan_out_and_holds_the_rest():
    model = perceptron()
    group = groups_of(model)[1]
    fading = _held(model, group, [2])
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=seeded()))
    after = copy.deepcopy(model)
    fade_(model, group, fading, 0.25)
    torch.testing.assert_close(model[4].weight[:, 2], 0.25 * before[4].weight[:, 2])
    assert torch.equal(model[2].weight[2], before[2].weight[2])
    assert torch.equal(model[2].bias[2], before[2].bias[2])
    others = [unit for unit in range(6) if unit != 2]
    assert torch.equal(model[2].weight[others], after[2].weight[others])
    assert torch.equal(model[4].weight[:, others], after[4].weight[:, others])


def test_fading_is_slow_at_the_end():
    """T6.6."""
    factors = [decay_factor(t, 10) for t in range(11)]
    assert factors[0] == 1
    assert factors[-1] == 0
    steps = [a - b for a, b in itertools.pairwise(factors)]
    assert all(step > 0 for step in steps)
    assert all(a > b for a, b in itertools.pairwise(steps))
    assert decay_factor(12, 10) == 0


def test_groups_with_an_obstacle_are_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    with pytest.raises(StructureError, match="keep the function"):
        random_units(model, groups_of(model)[0], 1, seeded())


# -- layers -----------------------------------------------------------------------------------------------------------


def test_the_layer_rule():
    """T6.2, T6.3."""
    for i, o in ((3, 90), (8, 8), (784, 10)):
        assert layer_size(i, o) == layer_size(o, i)
        assert min(i, o) <= round(layer_size(i, o), 9) <= max(i, o)
        assert layer_size(7 * i, 7 * o) == pytest.approx(7 * layer_size(i, o))
    assert not is_large(9, 8, 8)
    assert is_large(10, 8, 8)
    assert neighbours(perceptron(), groups_of(perceptron())[0]) == (4, 6)


def test_new_units_go_where_units_stayed():
    groups = groups_of(perceptron())
    drawn = shares(groups, 4000, {"0": 5.0, "2": -5.0}, seeded())
    assert sum(drawn.values()) == 4000
    softplus = [math.log1p(math.exp(d)) for d in (5.0, -5.0)]
    expected = 4000 * (0.7 * softplus[0] / sum(softplus) + 0.3 * 0.5)
    assert abs(drawn["0"] - expected) < 60
    even = shares(groups, 4000, {"0": 5.0, "2": -5.0}, seeded(), by_balance=0.0)
    assert abs(even["0"] - 2000) < 120
    assert new_balance({"a": 10.0}, {"a": 0, "b": 5}) == pytest.approx({"a": 8.0, "b": 1.0})


# -- who is fit -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_gates_sample_by_sample():
    """Effects of a gate on each unit, one sample at a time, by autograd."""
    model = perceptron(nn.Tanh)
    scores = significance(model, groups_of(model), OBJECTIVE)
    assert float(torch.cat(list(scores.values())).mean()) == pytest.approx(1)
    expected = {"0": torch.zeros(8, dtype=torch.float64), "2": torch.zeros(6, dtype=torch.float64)}
    for x, y in zip(X, Y, strict=True):
        gates = {"0": torch.ones(8).double().requires_grad_(), "2": torch.ones(6).double().requires_grad_()}
        hidden = model[1](model[0](x)) * gates["0"]
        loss = F.cross_entropy(model[4](model[3](model[2](hidden)) * gates["2"]), y)
        for name, slope in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            expected[name] += slope.abs()
    scale = torch.cat(list(expected.values())).mean()
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name] / scale)


def test_channels_sum_over_positions_within_a_sample():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 1)).double()
    images = torch.randn(6, 1, 5, 5, dtype=torch.float64, generator=seeded())
    group = trace(model, images)["0"]

    def loss_of(net, x):
        return F.cross_entropy(net(x).mean(dim=(2, 3)), torch.zeros(len(x), dtype=torch.long))

    found = significance(model, [group], Objective(loss_of, [images]))["0"]
    expected = torch.zeros(3, dtype=torch.float64)
    for image in images:
        gate = torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)
        logits = model[2](model[1](model[0](image[None])) * gate).mean(dim=(2, 3))
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, torch.zeros(1, dtype=torch.long)), gate)
        expected += slope.flatten().abs()
    torch.testing.assert_close(found, expected / expected.mean())


@pytest.mark.parametrize("form", ["loss", "outputs"])
@torch.no_grad()
def test_rectifiers_that_are_never_or_always_on_score_nothing(form):
    """T6.4: and what scores nothing always goes."""
    model = perceptron()
    model[0].weight[3], model[0].bias[3] = 0, -1
    model[0].weight[4], model[0].bias[4] = 0.01, 5
    groups = groups_of(model)
    scores = significance(model, groups, OBJECTIVE, form)
    assert scores["0"][3] == 0
    assert scores["0"][4] == 0
    gone = unfit_units({g.name: (g, scores[g.name]) for g in groups}, 0)
    assert {3, 4} <= set(gone["0"])


def test_only_rectifiers_are_asked_how_often_they_are_on():
    model = perceptron(nn.Tanh)
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 0.01, 5
    assert significance(model, groups_of(model), OBJECTIVE)["0"][4] > 0


def scored(*values):
    model = nn.Sequential(nn.Linear(4, len(values)), nn.ReLU(), nn.Linear(len(values), 2)).double()
    group = groups_of(model)[0]
    return {"0": (group, torch.tensor(values, dtype=torch.float64))}


def test_who_goes():
    """T6.5."""
    scores = scored(0.005, 0.3, 0.02, 0.4, 2.0, 3.0, 0.0)
    assert unfit_units(scores, 0) == {"0": [0, 6]}  # not above the lower threshold
    assert unfit_units(scores, 5, add_to_remove_ratio=2.0) == {"0": [0, 2, 6]}  # ceil(5 / 2)
    assert unfit_units(scores, 99, add_to_remove_ratio=1.0) == {"0": [0, 1, 2, 3, 6]}  # all below the upper one
    assert unfit_units(scores, 99, least_units={"0": 5}) == {"0": [0, 6]}
    assert unfit_units(scored(0.0, 0.0, 0.0), 9) == {"0": [0, 1]}
    some = [len(unfit_units(scores, 0, random_share=0.5, generator=seeded(n))["0"]) for n in range(40)]
    assert len(set(some)) > 1
    assert 3.5 < sum(some) / 40 < 5.5  # two, and half of the other five
    with pytest.raises(ValueError, match="threshold_min <= threshold_max"):
        unfit_units(scores, 1, threshold_min=0.6)


def test_with_equal_ratio_and_open_thresholds_as_many_go_as_came():
    """T6.7."""
    scores = scored(*torch.rand(20, generator=seeded()).tolist())
    for added in (1, 4, 7):
        gone = unfit_units(scores, added, add_to_remove_ratio=1.0, threshold_max=math.inf, threshold_min=-1.0)
        assert len(gone["0"]) == added


# -- a loss that has fallen -------------------------------------------------------------------------------------------


def fits(curve):
    fit, found = Fall(), []
    for _ in range(3):
        fit = fitted_fall([curve(n / 300) for n in range(301)], fit)
        found.append(fit)
    return found


def test_an_early_fall_is_over_and_a_steady_one_is_not():
    """T6.8, with the dossier's coefficients."""
    first, _, third = fits(lambda x: 2 + 3 * math.exp(-10 * x) * (1 - x))
    assert first.is_over
    assert third.is_over
    assert -8.6 < first.c0 < -6.5
    assert third.c0 == pytest.approx(-10, abs=1)
    for fit in fits(lambda x: 5 - 2 * x):
        assert not fit.is_over
        assert abs(fit.c0) < 0.4


def test_too_little_to_fit_leaves_the_fit_as_it_was():
    last = Fall(-3.0, 1.0, 0.0)
    assert fitted_fall([], last) == last
    assert fitted_fall([1.0] * 50, last) == last
    assert fitted_fall([1.0, *range(40, 32, -1)], last) == last  # eight after the largest
    assert fitted_fall([], None) == Fall()


# -- in a run ---------------------------------------------------------------------------------------------------------


def test_units_fade_while_training_goes_on(tmp_path):
    """Their fan-out follows the curve step by step, then they are cut out and others come."""
    seen = []

    class Look(NoisyHeuristics):
        def on_train_batch_end(self, run, module, *arguments):
            super().on_train_batch_end(run, module, *arguments)
            for name, fading in self._fading.items():
                named = dict(module.named_parameters())
                now = UnitVectors(module, self.structure[name], "consumed").of(named)[fading.units]
                factor = decay_factor(self._faded_steps, self.num_decay_steps)
                torch.testing.assert_close(now, factor * fading.fan_out)
                seen.append((self._faded_steps, name))

    callback = Look(
        every_n_steps=4, stop=10, num_units=3, num_decay_steps=5, window_batches=1, threshold_max=9.0, random_share=0.0
    )
    module = build(Perceptron, hidden=8)
    trainer(tmp_path, callback, max_epochs=6).fit(module, loader())
    assert {step for step, _ in seen} >= {0, 1, 2, 3, 4, 5}
    cut = [e for e in callback.record.events if e.step > 10]
    assert cut
    assert not callback._fading


def test_without_removal_it_is_growth_alone(tmp_path):
    """T6.7: a group only gains, by what is asked for in all."""
    callback = NoisyHeuristics(every_n_steps=3, num_units=2, removes=False, window_batches=1)
    trainer(tmp_path, callback, max_epochs=3).fit(build(Perceptron), loader())
    by_step = {}
    for event in callback.record.events:
        by_step[event.step] = by_step.get(event.step, 0) + event.after - event.before
    assert set(by_step.values()) == {2}


def test_large_layers_make_a_stack_deeper(tmp_path):
    callback = NoisyHeuristics(every_n_steps=4, num_units=1, removes=False, window_batches=1, deepen=True, stop=4)
    small, large = build(Residual, hidden=4), build(Residual, hidden=9)
    trainer(tmp_path, callback, max_epochs=2).fit(small, loader())
    assert len(small.blocks) == 2
    again = NoisyHeuristics(
        every_n_steps=4, num_units=1, removes=False, window_batches=1, deepen=True, stop=4, verify=True
    )
    trainer(tmp_path, again, max_epochs=2).fit(large, loader())
    assert len(large.blocks) == 3
    assert all(event.difference < 1e-5 for event in again.record.events)


@pytest.mark.parametrize(
    "wrong",
    [
        {"add_to_remove_ratio": 0.0},
        {"threshold_min": 1.0},
        {"random_share": 1.0},
        {"num_decay_steps": -1},
        {"form": "entropy"},
        {"by_balance": 1.5},
        {"window_batches": 0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(MisconfigurationException, match=f"`{next(iter(wrong))}` should be"):
        NoisyHeuristics(**wrong)
