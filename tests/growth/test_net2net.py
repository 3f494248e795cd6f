"""Net2Net's own properties: counts of copies, gradients of copies, how copies part, what deepening refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_grow.growth import Net2Net, net2deeper, net2wider, with_noise
from lightning_grow.structure import StructureError, trace
from lightning_grow.structure.axes import Stack
from lightning_grow.surgery import apply_
from lightning_grow.trainer.proposal import trimmed
from tests.zoo import ZOO

X = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def perceptron(norm=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = [nn.BatchNorm1d(6)] if norm else []
        return nn.Sequential(nn.Linear(4, 6), *inner, nn.Tanh(), nn.Linear(6, 2)).double()


STRUCTURE = trace(perceptron(), X)
GROUP = STRUCTURE["0"]


def copies(edit):
    """Return, for each unit before, the places of its copies after the edit."""
    return {u: [j for j, source in enumerate(edit.index) if source == u] for u in range(edit.group.size)}


@pytest.mark.parametrize("spread", [0.0, 0.5])
@torch.no_grad()
def test_fan_out_of_the_copies_adds_up_to_that_of_the_unit(spread):
    """T1.2: copies count the original, too."""
    model = perceptron()
    before = model[2].weight.clone()
    edit = net2wider(GROUP, 9, spread=spread)
    apply_(model, [edit])
    for unit, places in copies(edit).items():
        torch.testing.assert_close(model[2].weight[:, places].sum(dim=1), before[:, unit], rtol=1e-14, atol=0)
        if spread == 0:
            assert len({edit.share[place] for place in places}) == 1
            assert edit.share[places[0]] == 1 / len(places)


@pytest.mark.parametrize("name", ["mlp", "cnn_batch_norm", "concat_raw", "residual_cnn", "flatten_head"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_wider_keeps_the_function(name, train):
    """T1.1: also in train mode, for batch statistics are per channel."""
    entry = ZOO[name]
    model = entry.build().train(train)
    args, kwargs = entry.inputs()
    structure = trace(model, *args, **kwargs)
    expected = copy.deepcopy(model)(*args, **kwargs)
    groups = [g for g in structure.groups.values() if g.obstacle is None]
    assert groups
    apply_(model, [net2wider(g, 2 * g.step, spread=0.3) for g in groups])
    torch.testing.assert_close(model(*args, **kwargs), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_every_unit_copied_once_is_exact_under_layer_norm_too():
    """T1.5: with equal counts the mean and the variance over the units stay, so the obstacle may be overruled."""
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()
    group = trace(model, X)["0"]
    with pytest.raises(StructureError, match="Cannot widen '0' and keep the function"):
        net2wider(group, 6)
    expected = model(X)
    edit = net2wider(group, 6, preserve=False)
    even = type(edit)(group, (*range(6), *range(6)), (0.5,) * 12)
    apply_(model, [even])
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-10)


def test_parameters_are_as_many_as_the_formula_says():
    """T1.8."""
    model = perceptron()
    before = sum(p.numel() for p in model.parameters())
    apply_(model, [net2wider(GROUP, 5)])
    assert sum(p.numel() for p in model.parameters()) == before + 5 * (4 + 1 + 2)


def test_gradients_of_copies_are_those_of_the_unit_and_their_share():
    """T1.4: outgoing copies have the unit's gradient, incoming ones their share of it."""
    model = perceptron(norm=True)
    wide = copy.deepcopy(model)
    edit = net2wider(trace(perceptron(norm=True), X)["0"], 7, spread=0.4)
    apply_(wide, [edit])
    for m in (model, wide):
        F.mse_loss(m(X), Y).backward()
    index, share = torch.tensor(edit.index), torch.tensor(edit.share, dtype=torch.float64)
    torch.testing.assert_close(wide[3].weight.grad, model[3].weight.grad[:, index], rtol=0, atol=1e-14)
    torch.testing.assert_close(wide[0].weight.grad, model[0].weight.grad[index] * share[:, None], rtol=0, atol=1e-14)
    torch.testing.assert_close(wide[1].weight.grad, model[1].weight.grad[index] * share, rtol=0, atol=1e-14)


def test_momentum_follows_so_that_the_next_step_is_the_same():
    """T0.4: the state of the copies is what it would be had they been there from the start."""
    model = perceptron()
    edit = net2wider(GROUP, 5)
    index, share = torch.tensor(edit.index), torch.tensor(edit.share, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    F.mse_loss(model(X), Y).backward()
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[model[0].weight].items()}
    outgoing = optimizer.state[model[2].weight]["exp_avg"].clone()
    apply_(model, [edit], [optimizer])
    after = optimizer.state[model[0].weight]
    torch.testing.assert_close(after["exp_avg"], before["exp_avg"][index] * share[:, None])
    torch.testing.assert_close(after["exp_avg_sq"], before["exp_avg_sq"][index] * share[:, None] ** 2)
    torch.testing.assert_close(optimizer.state[model[2].weight]["exp_avg"], outgoing[:, index])


@pytest.mark.parametrize(
    ("spread", "noise", "part"),
    [(0.0, 0.0, False), (0.4, 0.0, True), (0.0, 0.05, True)],
    ids=["plain", "spread", "noise"],
)
def test_copies_part_only_if_something_tells_them_apart(spread, noise, part):
    """T1.3: exact twins stay twins under Adam."""
    model = perceptron()
    edit = net2wider(GROUP, 6, spread=spread)
    apply_(model, [with_noise(edit, model, noise, torch.Generator().manual_seed(2))])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()
        optimizer.step()
    distances = [
        float((model[0].weight[places[0]] - model[0].weight[place]).detach().abs().max())
        for places in copies(edit).values()
        for place in places[1:]
    ]
    assert distances
    assert (max(distances) > 1e-3) == part
    if not part:
        assert max(distances) < 1e-5


@torch.no_grad()
def test_noise_is_on_incoming_weights_of_the_copies_alone():
    model = perceptron()
    edit = net2wider(GROUP, 4)
    noisy = with_noise(edit, model, 0.1, torch.Generator().manual_seed(2))
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    apply_(plain, [edit])
    apply_(other, [noisy])
    moved = other[0].weight - plain[0].weight
    assert torch.equal(moved[:6], torch.zeros(6, 4, dtype=torch.float64))
    assert (moved[6:] != 0).all()
    assert 0.02 < float(moved[6:].std() / model[0].weight.std()) < 0.2
    torch.testing.assert_close(other[0].bias, plain[0].bias, rtol=0, atol=0)
    torch.testing.assert_close(other[2].weight, plain[2].weight, rtol=0, atol=1e-15)
    assert with_noise(edit, model, 0.0, torch.Generator()) is edit


def test_copies_are_drawn_from_the_own_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = net2wider(GROUP, 5, torch.Generator().manual_seed(1), spread=0.2)
    assert torch.equal(torch.rand(1), expected)
    again = net2wider(GROUP, 5, torch.Generator().manual_seed(1), spread=0.2)
    other = net2wider(GROUP, 5, torch.Generator().manual_seed(2), spread=0.2)
    assert (first.index, first.share) == (again.index, again.share)
    assert first.index != other.index
    assert net2wider(GROUP, 5).index == net2wider(GROUP, 5).index


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_units": 0}, "positive multiple of 1"), ({"num_units": 2, "spread": 1.0}, r"`spread` in \[0, 1\)")],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        net2wider(GROUP, **arguments)


def test_deeper_refuses_what_cannot_start_as_the_identity():
    """T1.7."""
    stack = Stack("blocks", ("blocks.0",), obstacle="a Tanh follows each block, and tanh(tanh(x)) is not tanh(x)")
    with pytest.raises(StructureError, match=r"Cannot deepen 'blocks'.*tanh"):
        net2deeper(stack)
    with pytest.raises(ValueError, match="position from 0 to 1"):
        net2deeper(Stack("blocks", ("blocks.0",)), at=2)
    assert net2deeper(Stack("blocks", ("blocks.0",))).at == 1


def test_the_callback_leaves_groups_with_an_obstacle_alone():
    from lightning_grow.trainer import Occasion

    model = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    structure = trace(model, X)
    occasion = Occasion(model, structure, tuple(structure.groups.values()), (), {}, step=3, seed=0)
    proposals = Net2Net(every_n_steps=1).propose(occasion)
    assert [(p.change.group.name, len(p.change.index)) for p in proposals] == [("3", 7)]


@torch.no_grad()
def test_a_noisy_edit_that_is_shortened_gives_fan_out_back():
    """Once, a budget that dropped noisy copies left their parents with less than their whole fan-out."""
    model = perceptron()
    noisy = with_noise(net2wider(GROUP, 4), model, 0.1, torch.Generator().manual_seed(2))
    nothing = trimmed(noisy, GROUP.size, {GROUP.name: GROUP.size})
    assert nothing.is_identity
    shorter, x = trimmed(noisy, GROUP.size + 2, {GROUP.name: GROUP.size}), torch.randn(5, 4, dtype=torch.float64)
    before, columns = model(x), model[2].weight.sum(1)
    apply_(model, [shorter])
    torch.testing.assert_close(model[2].weight.sum(1), columns)
    assert float((model(x) - before).abs().max()) < 0.5
