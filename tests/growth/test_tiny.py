"""TINY's own properties: what is left of the bottleneck, the best step of present weights, where it does nothing."""

import logging
from dataclasses import replace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.criteria import Objective, bottlenecks
from lightning_grow.criteria.bottleneck import with_best_signs
from lightning_grow.criteria.new_units import NewUnits
from lightning_grow.growth import Tiny, tiny
from lightning_grow.structure import StructureError, trace
from lightning_grow.surgery import apply_
from tests.trainer.models import Perceptron, build, loader, trainer
from tests.zoo import ZOO


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded(*layers):
    """Return a model; a second call with the same layers resets them to the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*layers).double()
        for layer in model:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return model


X, Y = draws(40, 5), draws(40, 4, seed=1)


def squares(model, batch):
    """Half the squared error of a sample, so that the loss wants to move its output to the target at once."""
    return (model(batch[0]) - batch[1]).square().flatten(1).sum(dim=1).mean() / 2


OBJECTIVE = Objective(squares, [(X, Y)])


def perceptron(activation=None, hidden=3, bias=True):
    return seeded(nn.Linear(5, hidden, bias=bias), activation or nn.Identity(), nn.Linear(hidden, 4, bias=bias))


def bottleneck(model, objective=OBJECTIVE, x=X, **options):
    return bottlenecks(model, [trace(model, x)["0"]], objective, **options)[1]["0"]


def with_ones(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


@pytest.mark.parametrize("bias", [True, False])
def test_the_step_is_the_least_squares_solution_and_what_is_left_is_orthogonal(bias):
    """T6.2."""
    model = perceptron(nn.Tanh(), bias=bias)
    found = bottleneck(model, with_bias=bias)
    wanted = (Y - model(X)).detach()
    hidden = torch.tanh(model[0](X)).detach()
    b1 = with_ones(hidden) if bias else hidden
    solution = torch.linalg.lstsq(b1, wanted).solution
    torch.testing.assert_close(found.update, solution[:3].T, rtol=1e-8, atol=1e-10)
    left = wanted - b1 @ solution
    assert (b1.T @ left).abs().max() < 1e-10
    assert found.goal == pytest.approx(float(wanted.square().sum() / 40), rel=1e-10)
    assert found.before == pytest.approx(float(left.square().sum() / 40), rel=1e-8)


LINEAR = {
    "linear": lambda: (seeded(nn.Linear(5, 3), nn.Linear(3, 4)), X, Y),
    "tokens": lambda: (seeded(nn.Linear(5, 3), nn.Linear(3, 4)), draws(8, 6, 5), draws(8, 6, 4, seed=1)),
    "one_tap": lambda: (
        seeded(nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(3, 4, 1)),
        draws(6, 2, 7, 6),
        draws(6, 4, 4, 3, seed=1),
    ),
    "taps": lambda: (
        seeded(nn.Conv2d(2, 3, 3, 1, 1), nn.Conv2d(3, 4, 3, 2, 1)),
        draws(6, 2, 7, 6),
        draws(6, 4, 4, 3, seed=1),
    ),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("num_units", [1, 3])
def test_the_bottleneck_falls_by_the_gains(name, num_units):
    """T6.1, read off the outputs of the edited model; with several taps it falls at least as far."""
    model, x, y = LINEAR[name]()
    found = bottleneck(model, Objective(squares, [(x, y)]), x, with_bias=False)
    wanted = (y - model(x)).detach()
    edited, _, _ = LINEAR[name]()
    apply_(edited, [found.edit(edited, num_units, update=True)])
    left = float((y - edited(x)).detach().square().sum() / len(x))
    served = found.goal - found.before
    assert found.goal == pytest.approx(float(wanted.square().sum() / len(x)), rel=1e-10)
    expected = found.after(num_units)
    assert left <= expected * (1 + 1e-8)
    assert left < found.before
    assert served >= 0
    if name != "taps":
        # the step of present weights and the new units add up: each works on what the other cannot reach
        assert left == pytest.approx(expected, rel=1e-8)


def test_all_units_leave_what_the_best_linear_map_leaves():
    """T6.4: with an identity as activation, new units of full rank make up for any bottleneck that inputs can serve."""
    model = perceptron(nn.Identity())
    found = bottleneck(model)
    wanted = (Y - model(X)).detach()
    best = wanted - with_ones(X) @ torch.linalg.lstsq(with_ones(X), wanted).solution
    assert found.after(len(found.values)) == pytest.approx(float(best.square().sum() / 40), rel=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_without_covariance_and_projection_directions_are_those_of_gradmax(name):
    """T6.3: the singular pairs of the form, measured in an entirely different way; borders of convolutions included."""
    model, x, y = LINEAR[name]()
    for module in model:
        module.bias = None
    objective = Objective(squares, [(x, y)])
    found = bottleneck(model, objective, x, whiten=False, project=False)
    new = NewUnits(model, [trace(model, x)["0"]], objective)
    pairs = new.leading({"0": 2}, oversampling=40)["0"]
    torch.testing.assert_close(found.values[:2], pairs.values, rtol=1e-5, atol=0)
    cosines = nn.functional.cosine_similarity(found.fan_out[:2].flatten(1), pairs.fan_out).abs()
    torch.testing.assert_close(cosines, torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)
    signed = found.fan_out[:2].flatten(1)
    aligned = nn.functional.cosine_similarity(signed, pairs.fan_out) * nn.functional.cosine_similarity(
        found.fan_in[:2], pairs.fan_in
    )
    torch.testing.assert_close(aligned, -torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_loss_falls_at_first_by_the_gains():
    """The derivative by the amplitude, for an activation that is the identity."""
    model = perceptron(nn.Identity())
    found = bottleneck(model)
    small = 1e-6
    edited = perceptron(nn.Identity())
    apply_(edited, [found.edit(edited, 2, small)])
    slope = float(OBJECTIVE.value(edited) - OBJECTIVE.value(model)) / small
    assert slope == pytest.approx(-float(found.gains[:2].sum()), rel=1e-4)


def test_with_amplitude_zero_nothing_changes():
    """T6.5."""
    model, before = perceptron(nn.Tanh()), perceptron(nn.Tanh())
    apply_(model, [bottleneck(model).edit(model, 2, 0.0, update=True)])
    torch.testing.assert_close(model(X), before(X), rtol=0, atol=1e-14)


def test_nothing_is_added_where_present_weights_can_do_everything():
    """T6.6: the goal lies in the span of what the layer reads."""
    model = perceptron(nn.Tanh())
    target = (model(X) + with_ones(torch.tanh(model[0](X))) @ draws(4, 4, seed=2)).detach()
    objective = Objective(squares, [(X, target)])
    found = bottleneck(model, objective)
    assert found.before < 1e-20 * found.goal or found.before < 1e-12
    assert len(found.values) == 0
    assert tiny(model, trace(model, X)["0"], objective, 2).is_identity


def test_inputs_that_depend_on_each_other_do_no_harm():
    """T6.7."""
    model = perceptron(nn.Tanh())
    flat = X.clone()
    flat[:, 3:] = flat[:, :2]
    found = bottleneck(model, Objective(squares, [(flat, Y)]))
    for tensor in (found.values, found.fan_in, found.fan_out, found.update):
        assert torch.isfinite(tensor).all()
    assert found.fan_in.norm(dim=1).max() < 1e3
    few = bottleneck(model, Objective(squares, [(flat[:2], Y[:2])]))
    assert torch.isfinite(few.fan_in).all()


def test_the_same_samples_in_several_batches_give_the_same():
    """The gradient of a mean loss has one over the batch's size in it, the wish of a sample has not."""
    model = perceptron(nn.Tanh())
    whole = bottleneck(model)
    halves = bottleneck(model, Objective(squares, [(X[:20], Y[:20]), (X[20:], Y[20:])]))
    assert halves.goal == pytest.approx(whole.goal, rel=1e-12)
    torch.testing.assert_close(halves.values, whole.values)
    torch.testing.assert_close(halves.fan_in, whole.fan_in)


def test_behind_a_rectifier_each_unit_has_the_sign_that_lowers_the_loss():
    """Measured unit by unit on the model, at a small amplitude; what raises the loss with both signs is gone."""
    model = perceptron(nn.ReLU(), hidden=2)
    group = trace(model, X)["0"]
    found = bottlenecks(model, [group], OBJECTIVE)[1]
    k = len(found["0"].values)
    chosen = with_best_signs(model, found, {"0": k}, OBJECTIVE)["0"]

    def change(fan_in, fan_out, amplitude=1e-6):
        grown = perceptron(nn.ReLU(), hidden=2)
        apply_(grown, [replace(found["0"], fan_in=fan_in, fan_out=fan_out).edit(model, 1, amplitude)])
        return OBJECTIVE.value(grown) - OBJECTIVE.value(model)

    expected = []
    for unit in range(k):
        a, b = found["0"].fan_in[unit : unit + 1], found["0"].fan_out[unit : unit + 1]
        best = min((1.0, -1.0), key=lambda sign: change(sign * a, sign * b))
        if change(best * a, best * b) < 0:
            expected.append(best * a)
    assert 0 < len(expected) == len(chosen.values)
    torch.testing.assert_close(chosen.fan_in, torch.cat(expected))
    other = replace(found["0"], fan_in=-found["0"].fan_in, fan_out=-found["0"].fan_out)
    again = with_best_signs(model, {"0": other}, {"0": k}, OBJECTIVE)["0"]
    torch.testing.assert_close(again.fan_in, chosen.fan_in)
    torch.testing.assert_close(again.fan_out, chosen.fan_out)


def test_without_an_activation_signs_mean_nothing_and_stay():
    model = perceptron()
    found = bottlenecks(model, [trace(model, X)["0"]], OBJECTIVE)[1]
    chosen = with_best_signs(model, found, {"0": 2}, OBJECTIVE)["0"]
    torch.testing.assert_close(chosen.fan_in, found["0"].fan_in[:2], rtol=0, atol=0)
    torch.testing.assert_close(chosen.fan_out, found["0"].fan_out[:2], rtol=0, atol=0)


@pytest.mark.parametrize("update_existing", [False, True])
def test_the_line_search_lowers_the_loss_or_adds_nothing(update_existing):
    model = perceptron(nn.ReLU())
    group = trace(model, X)["0"]
    edit = tiny(model, group, OBJECTIVE, 2, update_existing=update_existing)
    edited = perceptron(nn.ReLU())
    apply_(edited, [edit])
    assert OBJECTIVE.value(edited) < OBJECTIVE.value(model)
    same = torch.equal(edited[2].weight[:, :3], model[2].weight)
    assert same != update_existing
    for name in ("0.weight", "0.bias"):
        assert torch.equal(edited.get_parameter(name)[:3], model.get_parameter(name)), name
    assert torch.equal(edited[2].bias, model[2].bias)
    assert tiny(model, group, OBJECTIVE, 2, amplitudes=[1e9]).is_identity


def test_a_batch_norm_lets_new_units_through():
    """Its statistics are those of the new units, its gain and bias undo them: in both modes, the units do the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, momentum=0.0), nn.Identity(), nn.Linear(3, 4)).double()
    group = trace(model, X)["0"]
    found = bottlenecks(model, [group], OBJECTIVE)[1]["0"]
    before = {train: model.train(train)(X).detach() for train in (False, True)}
    apply_(model, [found.edit(model, 2)])
    moved = {train: model.train(train)(X).detach() - before[train] for train in (False, True)}
    expected = with_ones(X) @ found.fan_in[:2].T @ found.fan_out[:2]
    torch.testing.assert_close(moved[False], expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(moved[True], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "group", "why"),
    [
        ("gated_ffn", "gate", "made by 2 layers"),
        ("flatten_head", "second", "used by 2"),
        ("concat_raw", "hidden", "share an axis with others"),
        ("lstm", "cell", "used by 2"),
        ("depthwise_separable", "6", "made by 2 layers"),
        ("conv1d_and_transposed", "0", "neither a Linear nor a Conv2d"),
        ("cnn_batch_norm", "4", "not two layers of the same kind"),
        ("layer_norm", None, ""),
    ],
)
def test_other_groups_are_refused_with_the_reason(name, group, why):
    entry = ZOO[name]
    model, (args, kwargs) = entry.build(), entry.inputs()
    structure = trace(model, *args, **kwargs)
    chosen = structure[group] if group else next(g for g in structure.groups.values() if g.obstacle)
    objective = Objective(lambda m, _: m(*args, **kwargs).square().mean(), [None])
    with pytest.raises(StructureError, match=f"No bottleneck can be measured at '{chosen.name}'.*{why}"):
        bottlenecks(model, [chosen], objective)
    told = {}
    assert bottlenecks(model, [chosen], objective, on_refusal=told.__setitem__)[1] == {}
    assert list(told) == [chosen.name]


def test_layers_that_run_twice_or_resample_are_refused():
    model = seeded(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Conv2d(3, 4, 1))
    x = draws(2, 2, 8, 8)
    objective = Objective(lambda m, b: m(b).square().mean(), [x])
    with pytest.raises(StructureError, match="'2' does not read what '0' returns, place by place"):
        bottlenecks(model, [trace(model, x)["0"]], objective)
    model = perceptron(nn.Tanh())
    twice = Objective(lambda m, b: (m(b[0]) - m(-b[0])).square().mean(), [(X, Y)])
    with pytest.raises(StructureError, match="'2' runs 2 times in one pass"):
        bottlenecks(model, [trace(model, X)["0"]], twice)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_units": 0}, "positive multiple of 1"),
        ({"num_units": 1, "amplitudes": []}, "`amplitudes` above 0"),
        ({"num_units": 1, "amplitudes": [0.0]}, "`amplitudes` above 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    model = perceptron(nn.Tanh())
    with pytest.raises(ValueError, match=message):
        tiny(model, trace(model, X)["0"], OBJECTIVE, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amplitudes": [0.0]}, "`amplitudes` should be some numbers above 0"),
        ({"singular_threshold": 1.0}, "should be between 0 and 1"),
        ({"cost": "money"}, "`cost` should be"),
    ],
)
def test_wrong_arguments_of_the_callback_are_named(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        Tiny(**arguments)


def run(folder, callback, module):
    trainer(folder, callback, max_epochs=2).fit(module, loader())
    return callback.record.events


def test_all_groups_share_the_units_and_the_gain_is_predicted(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_grow.growth.tiny"):
        events = run(tmp_path, Tiny(at_steps=[2], num_units=2), build(Perceptron))
    assert sum(event.after - event.before for event in events) == 2
    assert all(event.predicted > 0 for event in events)
    assert any("bottleneck" in record.message for record in caplog.records)


def test_the_event_is_called_off_where_no_amplitude_helps(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_grow.growth.tiny"):
        assert run(tmp_path, Tiny(at_steps=[2], amplitudes=[1e12]), build(Perceptron)) == []
    assert any("no amplitude lowers the loss" in record.message for record in caplog.records)


def test_with_a_cost_cheap_units_come_first(tmp_path):
    def dear(_model, group):
        return 1e9 if group.name == "fc2" else 1.0

    events = run(tmp_path, Tiny(at_steps=[2], num_units=2, cost=dear), build(Perceptron))
    assert [event.group for event in events] == ["fc1"]
