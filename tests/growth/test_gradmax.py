"""GradMax's own properties: nothing changes, and no orthogonal fan-outs get a larger gradient."""

import copy
import logging

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.criteria import MeasurementError, Objective
from lightning_grow.growth import GradMax, gradmax
from lightning_grow.structure import StructureError, trace
from lightning_grow.surgery import apply_
from tests.trainer.models import Perceptron, build, loader, trainer


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y = draws(24, 5), draws(24, 6, seed=1)


def mean_square(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


OBJECTIVE = Objective(mean_square, [(X, Y)])


def perceptron(activation):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), activation, nn.Linear(7, 6)).double()


def grown(activation, num_units, **options):
    """Return the model before and after, and the gradients of the new rows (with bias) and columns."""
    model, before = perceptron(activation), perceptron(activation)
    apply_(model, [gradmax(model, trace(model, X)["0"], OBJECTIVE, num_units, **options)])
    mean_square(model, (X, Y)).backward()
    rows = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], dim=1)[7:]
    return before, model, rows, model[2].weight.grad[:, 7:]


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Identity()])
def test_the_gradient_of_new_units_is_the_largest_there_is(activation):
    """T5.1, T5.2, T5.4 and T5.5: outputs, norms, angles and the value of the gradient."""
    before, model, rows, columns = grown(activation, 3)
    torch.testing.assert_close(model(X), before(X), rtol=0, atol=1e-14)
    assert (model[0].weight[7:] == 0).all()
    assert (columns == 0).all()
    fan_out = model[2].weight[:, 7:]
    length = 0.5 * before[2].weight.norm(dim=0).mean()
    torch.testing.assert_close(fan_out.T @ fan_out, length**2 * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)
    matrix = (2 * (before(X) - Y) / Y.numel()).detach().T @ X
    best = length**2 * torch.linalg.svdvals(matrix)[:3].square().sum()
    torch.testing.assert_close(rows[:, :5].square().sum(), best, rtol=1e-6, atol=0)


def test_no_random_orthogonal_fan_outs_do_better():
    """T5.3."""
    before, _, rows, _ = grown(nn.Tanh(), 3, scale=1.0, scale_by="fixed")
    matrix = (2 * (before(X) - Y) / Y.numel()).detach().T @ X
    frames = torch.linalg.qr(draws(1000, 6, 3, seed=2)).Q
    others = (frames.mT @ matrix).square().sum(dim=(1, 2))
    assert rows[:, :5].square().sum() >= others.max()


def test_units_beyond_the_rank_are_random_and_never_repeated():
    """T5.9: a zero fan-in and equal fan-outs would be copies for ever."""
    _, model, _, _ = grown(nn.Tanh(), 9, scale=1.0, scale_by="fixed")
    fan_out = model[2].weight[:, 7:]
    torch.testing.assert_close(fan_out.norm(dim=0), torch.ones(9, dtype=torch.float64))
    cosines = fan_out.T @ fan_out - torch.eye(9, dtype=torch.float64)
    assert cosines.abs().max() < 0.98
    torch.testing.assert_close(fan_out[:, :6].T @ fan_out[:, :6], torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)


def test_behind_relu_a_tiny_fan_in_downhill_gives_them_a_gradient():
    """T5.6: at exactly zero, torch.relu has no derivative, and new units would be dead for ever."""
    with pytest.raises(StructureError, match=r"cannot widen '0': the derivative of its activation is 0 at zero"):
        gradmax(perceptron(nn.ReLU()), trace(perceptron(nn.ReLU()), X)["0"], OBJECTIVE, 2, epsilon=0)
    before, model, rows, _ = grown(nn.ReLU(), 2)
    assert rows.norm(dim=1).min() > 1e-3
    norms = model[0].weight[7:].norm(dim=1)
    usual = torch.cat([before[0].weight, before[0].bias[:, None]], dim=1).norm(dim=1).mean()
    torch.testing.assert_close(norms, 1e-4 * usual.expand(2))
    moved = (model(X) - before(X)).abs().max()
    assert 0 < moved < 1e-3
    assert mean_square(model, (X, Y)) < mean_square(before, (X, Y))


def test_behind_a_sigmoid_it_is_refused_and_a_zero_fan_out_is_not():
    with pytest.raises(StructureError, match="not zero without a fan-in"):
        gradmax(perceptron(nn.Sigmoid()), trace(perceptron(nn.Sigmoid()), X)["0"], OBJECTIVE, 2)
    before, model, rows, columns = grown(nn.Sigmoid(), 2, zero="fan_out")
    torch.testing.assert_close(model(X), before(X), rtol=0, atol=1e-14)
    assert (model[2].weight[:, 7:] == 0).all()
    assert (rows == 0).all()
    assert columns.norm(dim=0).min() > 1e-3


@pytest.mark.parametrize(("zero", "gain"), [("fan_in", 1e-5**0.5), ("fan_out", 1.0)])
def test_a_batch_norm_multiplies_what_is_small_by_little_and_what_is_not_by_one(zero, gain):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6)).double()
    before = {mode: copy.deepcopy(model).train(mode)(X).detach() for mode in (False, True)}
    apply_(model, [gradmax(model, trace(model, X)["0"], OBJECTIVE, 2, zero=zero)])
    torch.testing.assert_close(model[1].weight.detach()[6:], torch.full((2,), gain, dtype=torch.float64))
    for mode, y in before.items():
        torch.testing.assert_close(copy.deepcopy(model).train(mode)(X), y)


def test_a_zero_fan_out_is_the_optimum_of_linear_units_seen_from_the_other_side():
    before, model, _, columns = grown(nn.Identity(), 2, zero="fan_out", scale=1.0, scale_by="fixed")
    torch.testing.assert_close(model[0].weight[7:].norm(dim=1), torch.ones(2, dtype=torch.float64))
    matrix = (2 * (before(X) - Y) / Y.numel()).detach().T @ X
    best = torch.linalg.svdvals(matrix)[:2].square().sum()
    torch.testing.assert_close(columns.square().sum(), best, rtol=1e-6, atol=0)


def test_a_loss_that_does_not_depend_on_the_units_is_an_error():
    model = perceptron(nn.Tanh())
    objective = Objective(lambda m, x: 0 * m(x).sum(), [X])
    with pytest.raises(MeasurementError, match="would get no gradient at all"):
        gradmax(model, trace(model, X)["0"], objective, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_units": 0}, "positive multiple of 1"),
        ({"num_units": 1, "scale": 0.0}, "`scale` above 0"),
        ({"num_units": 1, "epsilon": -1.0}, "`epsilon` of at least 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    model = perceptron(nn.Tanh())
    with pytest.raises(ValueError, match=message):
        gradmax(model, trace(model, X)["0"], OBJECTIVE, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.0}, "`scale` should be above 0"),
        ({"scale_by": "mean"}, "`scale_by` should be one of mean_norm, fixed, found 'mean'"),
        ({"zero": "both"}, "`zero` should be one of fan_in, fan_out, found 'both'"),
        ({"epsilon": 1.0}, r"`epsilon` should be in \[0, 1\)"),
        ({"passes": 1}, "`passes` at least 2"),
        ({"cost": "money"}, "`cost` should be"),
    ],
)
def test_wrong_arguments_of_the_callback_are_named(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        GradMax(**arguments)


def sizes_after(folder, callback):
    module = build(Perceptron)
    trainer(folder, callback, max_epochs=2).fit(module, loader())
    return {event.group: event.after for event in callback.record.events}


def test_each_group_gets_as_many_or_all_share_them(tmp_path):
    """With ``together``, units go where their gradient will be largest."""
    assert sizes_after(tmp_path, GradMax(at_steps=[2], num_units=2)) == {"fc1": 8, "fc2": 7}
    assert sizes_after(tmp_path, GradMax(at_steps=[2])) == {"fc1": 8, "fc2": 6}
    shared = sizes_after(tmp_path, GradMax(at_steps=[2], num_units=2, together=True))
    before = {"fc1": 6, "fc2": 5}
    assert sum(after - before[name] for name, after in shared.items()) == 2


def test_with_a_cost_cheap_units_come_first(tmp_path):
    def dear(_model, group):
        return 1e9 if group.name == "fc2" else 1.0

    assert sizes_after(tmp_path, GradMax(at_steps=[2], num_units=2, together=True, cost=dear)) == {"fc1": 8}


def test_groups_that_cannot_are_left_alone_and_named_once(tmp_path, caplog):
    callback = GradMax(at_steps=[2, 8], num_units=1, epsilon=0.0)
    callback.window_batches = 2
    with caplog.at_level(logging.INFO, logger="lightning_grow.growth.gradmax"):
        assert sizes_after(tmp_path, callback) == {"fc2": 7}
    told = [r.message for r in caplog.records if "leaves 'fc1' alone: the derivative of its activation" in r.message]
    assert len(told) == 1
