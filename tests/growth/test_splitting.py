"""Splitting steepest descent: what it predicts comes true, and where it has nothing to say it says so."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.criteria import Objective, Offspring, Overgrown, Splits, exact, offspring_edit
from lightning_grow.growth import SplittingSteepestDescent, split_gains, steepest_splits
from lightning_grow.growth import splitting as module_of_method
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_
from tests.trainer.models import Perceptron, build, loader, trainer

X = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OBJECTIVE = Objective(lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), [(X, Y)])


def model_of(*layers, seed=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(*(layer() for layer in layers)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.7)
        return model


def mlp(activation=nn.Tanh, seed=2):
    return model_of(lambda: nn.Linear(4, 5), activation, lambda: nn.Linear(5, 2), seed=seed)


def deep(seed=2):
    return model_of(
        lambda: nn.Linear(4, 5), nn.Tanh, lambda: nn.Linear(5, 6), nn.SiLU, lambda: nn.Linear(6, 2), seed=seed
    )


def groups_of(model, x=X):
    return list(trace(model, x).groups.values())


def changed(model, edits, objective=OBJECTIVE):
    """Return by how much the loss changes."""
    return objective.value(Overgrown(model, edits).model) - objective.value(Overgrown(model, []).model)


def pair(group, model, unit, eps, direction):
    return offspring_edit(model, group, {unit: [Offspring(0.5, eps * direction), Offspring(0.5, -eps * direction)]})


def best_unit(model):
    """Return the group whose unit has the lowest eigenvalue, that unit, and the pair."""
    curvature = exact(Splits(model, groups_of(model), OBJECTIVE, 1e-4))
    name = min(curvature, key=lambda name: float(curvature[name].lowest.min()))
    unit = int(curvature[name].lowest.argmin())
    group = trace(model, X)[name]
    return group, unit, float(curvature[name].lowest[unit]), curvature[name].lowest_vectors[unit]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_the_predicted_gain_comes_true_to_second_order(seed):
    """[D]: odd orders cancel, so the relative error falls with the square of the radius."""
    model = deep(seed)
    group, unit, value, vector = best_unit(model)
    assert value < -0.02
    errors = [
        changed(model, [pair(group, model, unit, eps, vector)]) / (0.5 * eps**2 * value) - 1
        for eps in (0.05, 0.025, 0.02)
    ]
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert abs(errors[2]) < 0.01


@pytest.mark.parametrize("form", ["exact", "lanczos", "rayleigh"])
def test_what_the_function_returns_comes_true(form):
    model = deep()
    edits = steepest_splits(model, groups_of(model), OBJECTIVE, 4, form=form, radius=0.05, steps=20)
    expected = sum(gain for _, gain in edits)
    assert sum(len(edit.index) - edit.group.size for edit, _ in edits) == 4
    assert changed(model, [edit for edit, _ in edits]) == pytest.approx(-expected, rel=0.03)


def test_gains_add_up_across_layers():
    """[D]: within 1 %."""
    model = deep()
    curvature = exact(Splits(model, groups_of(model), OBJECTIVE, 1e-4))
    edits = []
    for group in groups_of(model):
        ends, unit = curvature[group.name], int(curvature[group.name].lowest.argmin())
        edits.append(pair(group, model, unit, 0.02, ends.lowest_vectors[unit]))
    assert len(edits) == 2
    assert changed(model, edits) == pytest.approx(sum(changed(model, [edit]) for edit in edits), rel=0.01)


def test_no_other_direction_gains_more():
    """[D]: the Rayleigh bound."""
    model = deep()
    group, unit, value, vector = best_unit(model)
    best = changed(model, [pair(group, model, unit, 0.02, vector)])
    assert best == pytest.approx(0.5 * 0.02**2 * value, rel=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        drawn = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
        assert changed(model, [pair(group, model, unit, 0.02, drawn / drawn.norm())]) >= best * 1.001


def test_fan_out_columns_add_up_to_that_of_the_unit():
    """[D]."""
    model = mlp()
    before = model[2].weight.detach().clone()
    ((edit, _),) = steepest_splits(model, groups_of(model), OBJECTIVE, 3)
    apply_(model, [edit])
    for unit in range(5):
        places = [place for place, source in enumerate(edit.index) if source == unit]
        torch.testing.assert_close(model[2].weight[:, places].sum(1), before[:, unit], rtol=1e-14, atol=0)


def test_where_a_layer_and_the_next_are_split_the_moved_input_is_shared():
    """A duplicated input takes part of the weight and of the offset in the same shares (0.5 each)."""
    model = deep()
    first, second = groups_of(model)
    curvature = exact(Splits(model, [first, second], OBJECTIVE, 1e-3))
    edits = [pair(g, model, 0, 0.1, curvature[g.name].lowest_vectors[0]) for g in (first, second)]
    offset = 0.1 * curvature["2"].lowest_vectors[0]
    before = model[2].weight.detach().clone()
    apply_(model, edits)
    expected = before[0] + offset[:5]
    torch.testing.assert_close(model[2].weight[0, 1:5], expected[1:])
    torch.testing.assert_close(model[2].weight[0, [0, 5]], expected[0].repeat(2) / 2)


def test_units_that_no_split_would_better_are_left_alone():
    """[D]: a positive matrix is splitting-stable; a linear unit has none."""
    assert steepest_splits(mlp(nn.Identity), groups_of(mlp(nn.Identity)), OBJECTIVE, 3) == []
    model = stable()
    objective = stable_objective()
    assert steepest_splits(model, groups_of(model, X[:, :1]), objective, 3, form="exact") == []


def stable():
    """Return a model in which g f'' is positive on all samples: softplus curves upwards, the output is too large."""
    model = model_of(lambda: nn.Linear(1, 3), nn.Softplus, lambda: nn.Linear(3, 1))
    model[2].weight.data.abs_()
    return model


def stable_objective():
    return Objective(lambda m, batch: m(batch).mean(), [X[:, :1]])


def test_equal_costs_choose_what_no_costs_choose():
    """[D]: the energy-aware form reduces to the plain one."""
    model = deep()
    plain = steepest_splits(model, groups_of(model), OBJECTIVE, 4)
    equal = steepest_splits(model, groups_of(model), OBJECTIVE, 99, costs={"0": 2.5, "2": 2.5}, max_cost=10.0)
    assert [edit.index for edit, _ in equal] == [edit.index for edit, _ in plain]
    gains = split_gains(splits := Splits(model, groups_of(model), OBJECTIVE, 0.1), exact(splits))
    together = torch.cat([gain for _, gain in gains.values()])
    whole = steepest_splits(model, groups_of(model), OBJECTIVE, 4, form="exact")
    assert sum(gain for _, gain in whole) == pytest.approx(float(together.topk(4).values.sum()))


@pytest.mark.parametrize("budget", [4.0, 7.0, 11.0])
def test_a_dearer_layer_never_gets_more(budget):
    """[D]."""
    model = deep()

    def taken(cost):
        edits = steepest_splits(
            model, groups_of(model), OBJECTIVE, 99, costs={"0": cost, "2": 1.0}, max_cost=budget, form="exact"
        )
        return {edit.group.name: len(edit.index) - edit.group.size for edit, _ in edits}.get("0", 0)

    counts = [taken(cost) for cost in (0.5, 1.0, 2.0, 4.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_the_radius_is_relative_to_the_fan_in():
    """Batch norm makes the length of a fan-in vector meaningless; an absolute radius would not be."""
    model = model_of(lambda: nn.Linear(4, 5), lambda: nn.BatchNorm1d(5), nn.Tanh, lambda: nn.Linear(5, 2))
    larger = copy.deepcopy(model)
    larger[0].weight.data *= 10
    larger[0].bias.data *= 10
    larger[1].running_mean *= 10
    larger[1].running_var.fill_(100 * (1 + model[1].eps) - model[1].eps)
    gains = [sum(gain for _, gain in steepest_splits(m, groups_of(m), OBJECTIVE, 3, steps=5)) for m in (model, larger)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-6)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_offspring_part(optimizer):
    model = mlp()
    ((edit, _),) = steepest_splits(model, groups_of(model), OBJECTIVE, 1, radius=0.05)
    apply_(model, [edit])
    unit = edit.index[5]

    def distance():
        return float((model[0].weight[unit] - model[0].weight[5]).detach().norm())

    before = distance()
    descent = optimizer(model.parameters(), lr=0.01)
    for _ in range(100):
        descent.zero_grad()
        F.mse_loss(model(X), Y).backward()
        descent.step()
    assert distance() > 1.05 * before


# -- as a callback ------------------------------------------------------------------------------------------------


def fit(folder, callback, module=None, **arguments):
    module = module or build(Perceptron)
    trainer(folder, callback, max_epochs=2, **arguments).fit(module, loader())
    return module


def test_an_event_has_the_gain_that_it_expects(tmp_path):
    callback = SplittingSteepestDescent(every_n_steps=2, num_units=3)
    module = fit(tmp_path, callback)
    assert {event.step for event in callback.record.events} == {10}
    assert sum(event.after - event.before for event in callback.record.events) == 3
    assert all(event.predicted > 0 for event in callback.record.events)
    assert module.fc1.out_features + module.fc2.out_features == 6 + 5 + 3


def test_without_a_number_three_tenths_of_all_units_are_added(tmp_path):
    callback = SplittingSteepestDescent(every_n_steps=2)
    module = fit(tmp_path, callback)
    assert module.fc1.out_features + module.fc2.out_features == 6 + 5 + round(0.3 * 11)


def test_frozen_groups_are_left_alone_and_training_goes_on(tmp_path, caplog):
    module = build(Perceptron)
    for parameter in (*module.fc1.parameters(), *module.fc2.parameters()):
        parameter.requires_grad_(False)
    callback = SplittingSteepestDescent(every_n_steps=2)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, callback, module)
    assert not callback.record.events
    assert "nothing to do" in caplog.text
    assert module.steps_run == 12


def test_a_loss_that_is_not_finite_calls_the_event_off(tmp_path, caplog):
    class Broken(Perceptron):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if self.training or self.steps_run < 5 else loss * float("nan")  # once it is traced

    module = build(Broken)
    callback = SplittingSteepestDescent(every_n_steps=2)
    fit(tmp_path, callback, module)
    assert not callback.record.events
    assert "SplittingSteepestDescent changes nothing this time: The loss, or its gradient, is not finite" in caplog.text
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


def test_where_all_units_are_stable_the_event_says_so(tmp_path, caplog):
    class Linear(Perceptron):
        def forward(self, x):
            return self.head(self.fc2(self.norm(self.fc1(x))))

    callback = SplittingSteepestDescent(every_n_steps=2)
    fit(tmp_path, callback, build(Linear))
    assert not callback.record.events
    assert "no unit gains anything by becoming two (see `SignedSplitting`)" in caplog.text


def test_the_exact_form_leaves_large_layers_alone_and_names_the_other(tmp_path, caplog, monkeypatch):
    small = module_of_method.fits_in_memory
    monkeypatch.setattr(module_of_method, "fits_in_memory", lambda model, group: small(model, group, 1500))
    callback = SplittingSteepestDescent(form="exact", every_n_steps=2, num_units=2)
    fit(tmp_path, callback)
    assert {event.group for event in callback.record.events} == {"fc1"}  # 6 * 5 * 5 numbers; fc2 has 5 * 7 * 7
    assert "leaves 'fc2' alone: their splitting matrices would be too large. Use form='lanczos'." in caplog.text


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("`form` to be one of exact, lanczos, rayleigh, found 'fast'", {"form": "fast"}),
        ("`radius` should be above 0", {"radius": 0.0}),
        ("`steps` should be at least 1", {"steps": 0}),
        ("`cost` should be", {"cost": "energy"}),
    ],
)
def test_wrong_arguments_are_refused_at_once(match, arguments):
    with pytest.raises(MisconfigurationException, match=match):
        SplittingSteepestDescent(**arguments)


def test_the_function_refuses_what_the_callback_refuses():
    with pytest.raises(ValueError, match="Expected `form`"):
        steepest_splits(mlp(), groups_of(mlp()), OBJECTIVE, 1, form="fast")
    with pytest.raises(ValueError, match="`num_units` of at least 1"):
        steepest_splits(mlp(), groups_of(mlp()), OBJECTIVE, 0)
