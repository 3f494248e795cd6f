"""Candidates: present, they change nothing at amplitude 0; their effects add up; what is kept does what was tried."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_grow.criteria import MeasurementError, Objective
from lightning_grow.criteria.candidates import Candidates, searchable
from lightning_grow.structure import StructureError, trace
from lightning_grow.surgery import apply_
from tests.zoo import ZOO

NAMES = ["cnn_batch_norm", "residual_cnn", "concat_raw", "lstm", "unrolled_rnn_cell", "gated_ffn", "attention_of_heads"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensor_in(output):
    return output if isinstance(output, torch.Tensor) else tensor_in(output[0])


@functools.cache
def traced(name):
    model = ZOO[name].build().double().eval()
    args, kwargs = ZOO[name].inputs()
    return model, args, kwargs, trace(model, *args, **kwargs)


def of_zoo(name):
    """Return a model of the zoo, its groups that can be searched, and a loss on its own inputs."""
    model, args, kwargs, structure = traced(name)
    model = copy.deepcopy(model)

    def loss(m, inputs):
        output = tensor_in(m(*inputs[0], **inputs[1])).double()
        target = torch.randn(output.shape, generator=generator(7), dtype=torch.float64)
        return (output - target).square().mean()

    groups = searchable(model, tuple(structure.groups.values()))
    assert groups
    return model, groups, Objective(loss, [(args, kwargs)])


def perceptron(inner=8, activation=nn.Tanh):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, inner), activation(), nn.Linear(inner, 3)).double()


X = torch.randn(64, 4, dtype=torch.float64, generator=generator(3))
Y = torch.randn(64, 3, dtype=torch.float64, generator=generator(4))


def squared(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


OBJECTIVE = Objective(squared, [(X[:32], Y[:32]), (X[32:], Y[32:])])


@pytest.mark.parametrize("name", NAMES)
def test_at_amplitude_0_candidates_are_silent(name):
    model, groups, objective = of_zoo(name)
    found = Candidates(model, groups, objective, generator(), num_new=3)
    assert abs(found.change(0.0)) < 1e-12
    assert abs(found.change(1.0)) > 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_does_what_was_tried(name):
    """With all candidates of one group kept, the model loses exactly what the over-grown copy lost."""
    model, groups, objective = of_zoo(name)
    for group in groups:
        found = Candidates(model, [group], objective, generator(), num_new=2)
        found.train_(2)
        (effects,) = found.effects(1).values()
        edit = found.edit(group.name, range(len(effects.splits)), range(len(effects.new)))
        grown = copy.deepcopy(model)
        apply_(grown, [edit])
        assert edit.new_size == 2 * group.size + len(effects.new)
        assert objective.value(grown) - objective.value(model) == pytest.approx(found.change(), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_effects_add_up_to_the_change(name, monkeypatch):
    """Splits alone, and new units alone; smooth, for kinks are not integrated well by a few midpoints."""
    model, groups, objective = of_zoo(name)
    monkeypatch.setattr(torch, "relu", torch.tanh)
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: torch.tanh(x))
    monkeypatch.setattr(F, "max_pool2d", F.avg_pool2d)
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d):
            module.forward = functools.partial(F.avg_pool2d, kernel_size=module.kernel_size, stride=module.stride)
    for arguments in ({"num_new": 0}, {"num_new": 3, "splits": False}):
        found = Candidates(model, groups, objective, generator(), radius=0.05, **arguments)
        total = sum(float(e.splits.sum() + e.new.sum()) for e in found.effects(8).values())
        assert total == pytest.approx(found.change(), rel=2e-3, abs=1e-9), arguments


@torch.no_grad()
def test_what_a_kept_new_unit_has_in_a_norm_does_not_depend_on_what_else_is_kept():
    """Once, its running statistics were the mean over all copies, and so others than those that were searched with."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    model[1].running_mean.copy_(torch.arange(5.0))
    found = Candidates(model, [trace(model, X)["0"]], OBJECTIVE, generator(), num_new=2)
    edit = found.edit("0", [0, 1], [1])
    apply_(model, [edit])
    assert edit.index == (0, 1, 2, 3, 4, -1, 0, 1)
    assert model[1].running_mean.tolist() == [0, 1, 2, 3, 4, 2, 0, 1]


def test_the_error_of_the_integral_falls_with_the_square_of_the_points():
    model = perceptron()
    found = Candidates(model, [trace(model, X)["0"]], OBJECTIVE, generator(), num_new=4, radius=0.5)
    change = found.change()
    errors = {n: abs(sum(float(v.sum()) for v in found.effects(n)["0"]) - change) for n in (2, 4, 8)}
    assert 3.5 < errors[2] / errors[4] < 4.5
    assert 3.5 < errors[4] / errors[8] < 4.5
    small = Candidates(model, [trace(model, X)["0"]], OBJECTIVE, generator(), num_new=4, radius=0.05)
    assert sum(float(v.sum()) for v in small.effects(3)["0"]) == pytest.approx(small.change(), rel=0.01)


def splitting_matrix(model, unit):
    """Return the splitting matrix of a hidden tanh unit by its formula: sum of g phi''(z) x x^T."""
    x = torch.cat([X, torch.ones(len(X), 1, dtype=torch.float64)], dim=1)
    t = torch.tanh(model[0](X)[:, unit]).detach()
    g = (2 * (model(X) - Y) / Y.numel()).detach() @ model[2].weight.detach()[:, unit]
    return (g * -2 * t * (1 - t**2) * x.T) @ x


def test_directions_trained_to_the_end_are_those_of_the_steepest_split():
    """Dossier test 4: the lowest eigenvector of the unit's splitting matrix, and half of its eigenvalue."""
    model = perceptron()
    group = trace(model, X)["0"]
    found = Candidates(model, [group], Objective(squared, [(X, Y)]), generator(), num_new=0, radius=0.01)
    found.train_(400, lr=0.1)
    effects = found.effects(3)["0"].splits
    for unit in range(group.size):
        values, vectors = torch.linalg.eigh(splitting_matrix(model, unit))
        if values[0] > -1e-3 or values[1] - values[0] < 0.1 * abs(values[0]):
            continue
        cosine = abs(float(vectors[:, 0] @ found.directions("0")[unit]))
        assert cosine > 0.999, unit
        predicted = float(found.radii("0")[unit] ** 2 / 2 * values[0])
        assert float(effects[unit]) == pytest.approx(predicted, rel=0.03)


def test_the_derivative_at_0_cannot_see_a_split():
    """Which is why effects are integrals: a split is even in its amplitude."""
    model = perceptron()
    found = Candidates(model, [trace(model, X)["0"]], OBJECTIVE, generator(), num_new=4)
    large = found.effects(1)["0"]
    tiny = Candidates(model, [trace(model, X)["0"]], OBJECTIVE, generator(), num_new=4, radius=1e-4).effects(1)["0"]
    assert large.splits.abs().max() > 1e-5
    assert tiny.splits.abs().max() < 1e-8
    assert tiny.new.abs().max() > 1e-6


def test_a_new_unit_of_small_amplitude_has_its_first_order_effect():
    """Dossier test 5: the product of the gradient at the consumer with what the unit sends there."""
    model = perceptron()
    group = trace(model, X)["0"]
    found = Candidates(model, [group], Objective(squared, [(X, Y)]), generator(), num_new=5, radius=1e-6, splits=False)
    effects = found.effects(1)["0"]
    assert effects.splits.shape == (0,)
    edit = found.edit("0", [], range(5))
    hidden = torch.tanh(X @ edit.values["0.weight[0]"].T + edit.values["0.bias[0]"])
    delta = (2 * (model(X) - Y) / Y.numel()).detach()
    first_order = ((delta.T @ hidden) * edit.values["2.weight[1]"]).sum(dim=0)
    torch.testing.assert_close(effects.new, first_order, rtol=1e-4, atol=0)

    found.train_(300, lr=0.1, penalty=0.0)
    edit = found.edit("0", [], range(5))
    hidden = torch.tanh(X @ edit.values["0.weight[0]"].T + edit.values["0.bias[0]"])
    steepest = -(delta.T @ hidden)
    cosines = torch.nn.functional.cosine_similarity(steepest, edit.values["2.weight[1]"], dim=0)
    assert (cosines > 0.999).all()


def test_training_lowers_what_the_candidates_do_to_the_loss():
    model = perceptron(activation=nn.ReLU)
    found = Candidates(model, [trace(model, X)["0"]], OBJECTIVE, generator())
    before = found.change()
    found.train_(100)
    assert found.change() < before - 0.01


def test_units_that_are_linear_have_nothing_to_split():
    model = perceptron(activation=nn.Identity).float()
    objective = Objective(squared, [(X.float(), Y.float())])
    found = Candidates(model, [trace(model, X.float())["0"]], objective, generator(), num_new=0)
    found.train_(10)
    assert (found.effects()["0"].splits.abs() < 1e-7).all()


def test_copies_begin_with_the_fan_in_of_units_that_there_are():
    model = perceptron()
    found = Candidates(model, [trace(model, X)["0"]], OBJECTIVE, generator(), num_new=4, copies=2, splits=False)
    edit = found.edit("0", [], range(4))
    distances = torch.cdist(edit.values["0.weight[0]"], model[0].weight.detach()).amin(dim=1)
    assert (distances[:2] < 1e-12).all()
    assert (distances[2:] > 1e-3).all()


def test_the_search_leaves_the_model_and_the_random_state_alone():
    model = perceptron()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    found = Candidates(model, [trace(model, X)["0"]], OBJECTIVE, generator())
    found.train_(3)
    found.effects()
    assert found.edit("0", [], []).is_identity
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_searched_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    group = trace(model, X)["0"]
    with pytest.raises(StructureError, match="Cannot grow '0' and keep the function"):
        Candidates(model, [group], OBJECTIVE, generator())
    assert searchable(model, [group]) == []
    model = perceptron()
    group = trace(model, X)["0"]
    model[0].requires_grad_(False)
    with pytest.raises(MeasurementError, match="fan-in of '0' is frozen"):
        Candidates(model, [group], OBJECTIVE, generator())
    assert searchable(model, [group]) == []
    model = perceptron()
    model[2].requires_grad_(False)
    with pytest.raises(MeasurementError, match="fan-out of '0' is frozen"):
        Candidates(model, [group], OBJECTIVE, generator())


@pytest.mark.parametrize("batches", [[], [(X, Y * float("nan"))]], ids=["none", "nan"])
def test_a_loss_that_cannot_be_measured_is_said(batches):
    model = perceptron()
    found = Candidates(model, [trace(model, X)["0"]], Objective(squared, batches), generator())
    with pytest.raises(MeasurementError):
        found.train_(1)
    with pytest.raises(MeasurementError):
        found.effects()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"radius": 0.0}, "`radius` above 0"), ({"num_new": -1}, "`num_new` and `copies` of at least 0")],
)
def test_wrong_arguments_are_named(arguments, message):
    model = perceptron()
    group = trace(model, X)["0"]
    with pytest.raises(ValueError, match=message):
        Candidates(model, [group], OBJECTIVE, generator(), **arguments)
    found = Candidates(model, [group], OBJECTIVE, generator(), num_new=2)
    with pytest.raises(ValueError, match="`points` of at least 1"):
        found.effects(0)
    with pytest.raises(ValueError, match="8 splits and 2 new units"):
        found.edit("0", [8], [])
