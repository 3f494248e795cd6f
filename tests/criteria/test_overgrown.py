"""Candidates in a copy: its gradients answer for all of them, and the model does not notice."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_grow.criteria import Objective, Overgrown, apart
from lightning_grow.structure import trace
from lightning_grow.surgery import split, widen
from tests.zoo import ZOO

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OBJECTIVE = Objective(lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), [(X, Y)])


def mlp():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()


STRUCTURE = trace(mlp(), X)


def test_the_model_is_not_changed():
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wide = Overgrown(model, [widen(STRUCTURE["0"], 3)])
    wide.write_("0", "consumed", torch.ones(9, 5, dtype=torch.float64))
    wide.gradients(OBJECTIVE)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        n: t.shape for n, t in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[0].weight.grad is None


def test_without_edits_it_is_a_copy():
    model = mlp()
    twin = Overgrown(model, []).model
    assert twin is not model
    assert torch.equal(twin(X), model(X))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


def test_silent_units_change_nothing_and_have_a_gradient():
    """What a new unit would be worth is seen in the gradient of its fan-out, before it does anything."""
    model = mlp()
    wide = Overgrown(model, [widen(STRUCTURE["0"], 3)])
    loss, gradients = wide.gradients(OBJECTIVE)
    assert loss == pytest.approx(OBJECTIVE.value(mlp()))
    assert not wide.vectors("0", "consumed")[6:].any()
    assert bool(gradients["0", "consumed"][6:].norm(dim=1).gt(0).all())
    assert gradients["0", "produced"].shape == (9, 5)
    assert not gradients["0", "produced"][6:].any()  # behind a fan-out of zero nothing is felt


def test_gradients_are_those_of_finite_differences():
    wide = Overgrown(mlp(), [split(STRUCTURE["0"], [1]), split(STRUCTURE["2"], [0, 3])])
    _, gradients = wide.gradients(OBJECTIVE)
    generator = torch.Generator().manual_seed(3)
    for (group, role), gradient in gradients.items():
        vectors = wide.vectors(group, role).clone()
        offset = torch.randn(vectors.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            wide.write_(group, role, vectors + sign * 1e-5 * offset)
            values.append(OBJECTIVE.value(wide.model))
        wide.write_(group, role, vectors)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((gradient * offset).sum()), rel=1e-5)


def test_only_the_roles_that_are_asked_for():
    wide = Overgrown(mlp(), [widen(STRUCTURE["0"], 1)])
    assert set(wide.gradients(OBJECTIVE, roles=("consumed",))[1]) == {("0", "consumed")}


def test_what_is_frozen_has_no_gradient():
    model = mlp()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    assert set(Overgrown(model, [widen(STRUCTURE["0"], 1)]).gradients(OBJECTIVE)[1]) == {("0", "consumed")}


@pytest.mark.parametrize(
    "name", ["mlp", "residual_cnn", "unet", "attention_of_heads", "dense_connections", "concat_raw"]
)
def test_lots_are_apart_and_complete(name):
    entry = ZOO[name]
    args, kwargs = entry.inputs()
    groups = list(trace(entry.build(), *args, **kwargs).groups.values())
    lots = apart(groups)
    assert sorted(group.name for lot in lots for group in lot) == sorted(group.name for group in groups)
    for lot in lots:
        tensors = [{axis.tensor for axis in group.axes} for group in lot]
        assert sum(map(len, tensors)) == len(set().union(*tensors))
