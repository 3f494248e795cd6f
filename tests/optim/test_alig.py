"""ALI-G's own properties: the rate, the ball, the loss and its two doors, steps that are skipped."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_grow.optim.alig import ALIG
from lightning_grow.optim.borat import BORAT
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_, insert_, prune, split, widen
from tests.optim.table import batch, network, train


def vector(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def step(optimizer, loss):
    """Take a step on a loss that was just computed."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(lambda: loss)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def norm(params):
    return torch.cat([p.detach().flatten() for p in params]).norm().item()


def test_at_zero_loss_nothing_moves_but_momentum():
    """AG-1."""
    w = vector(3.0, 4.0)
    optimizer = ALIG([w], momentum=0.9)
    step(optimizer, w.norm())
    velocity = optimizer.state[w]["momentum_buffer"].clone()
    before = w.detach().clone()
    step(optimizer, 0 * w.sum() + (w.sum() - w.sum().detach()))  # a zero loss, with a gradient
    assert optimizer.param_groups[0]["step_size"] == 0
    torch.testing.assert_close(w.detach() - before, 0.9 * 0.9 * velocity)
    still = vector(3.0, 4.0)
    step(ALIG([still]), still.sum() - still.sum().detach())
    assert still.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_far_above_the_bound_it_is_sgd_with_the_maximal_rate(momentum):
    """AG-2, with Nesterov's form of momentum; a constant rate makes both forms of momentum one."""
    models = network(), network(), network()
    make = ALIG(models[0].parameters(), 1e-3, momentum), ALIG(models[1].parameters(), 1e-3, momentum, True)
    other = torch.optim.SGD(models[2].parameters(), 1e-3, momentum, nesterov=momentum > 0)
    for model, optimizer in zip(models, (*make, other), strict=True):
        train(model, optimizer, 6)
    assert make[0].param_groups[0]["step_size"] == 1e-3
    torch.testing.assert_close(weights(models[0]), weights(models[2]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights(models[1]), weights(models[2]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("power", "left"), [(2, 0.5), (1, 0.0)])
def test_without_a_cap_a_sample_is_half_solved_or_solved(power, left):
    """AG-3: half of the residual of a squared error is left after a step, nothing of that of an absolute error."""
    a, w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), vector(0.3, 0.1, -1.0)
    residual = a @ w - 2
    step(ALIG([w], eps=0.0), residual.abs() if power == 1 else residual.square() / 2)
    torch.testing.assert_close(a @ w - 2, residual * left, rtol=1e-12, atol=1e-12)


def test_the_scale_of_the_loss_does_not_matter_without_a_cap():
    """AG-4."""
    ends = []
    for scale in (1.0, 1e-3, 1e4):
        w = vector(0.3, 0.1)
        for _ in range(3):
            optimizer = ALIG([w], eps=0.0)
            step(optimizer, scale * (w - torch.tensor([1.0, 3.0])).square().sum())
        ends.append(w.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_a_bundle_of_two_pieces(momentum):
    """AG-5 and BO-1: ALI-G without eps."""
    models = network(), network()
    optimizers = (
        ALIG(models[0].parameters(), 1.0, momentum, eps=0.0),
        BORAT(models[1].parameters(), 1.0, 2, momentum),
    )
    rates = []
    for number in range(12):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 1, first=number)
        torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-10, atol=1e-12)
        rates.append(optimizers[0].param_groups[0]["step_size"])
    assert 0 < min(rates) < max(rates) == 1


@pytest.mark.parametrize("foreach", [None, False])
def test_the_ball_holds_from_the_beginning(foreach):
    """AG-6, for each param group a ball of its own."""
    model = network()
    first, rest = list(model.parameters())[:2], list(model.parameters())[2:]
    before = norm(rest)
    optimizer = ALIG([{"params": first, "max_norm": 0.5}, {"params": rest}], 10.0, 0.9, foreach=foreach)
    assert norm(first) == pytest.approx(0.5)
    assert norm(rest) == before
    for number in range(6):
        train(model, optimizer, 1, first=number)
        assert norm(first) <= 0.5 * (1 + 1e-6)
    assert norm(rest) != before


def test_a_constant_gradient_is_amplified_by_momentum():
    """AG-7."""
    w = vector(0.0)
    optimizer = ALIG([w], 1e-3, 0.9)
    for _ in range(200):
        before = w.item()
        step(optimizer, 100 + 2 * w.sum())
    assert w.item() - before == pytest.approx(-1e-3 * 2 / (1 - 0.9), rel=1e-6)


def test_a_lower_bound_is_where_descent_ends():
    w = vector(1.0)
    optimizer = ALIG([w], lower_bound=0.5, eps=0.0)
    for _ in range(60):
        step(optimizer, 0.5 + w.square().sum())
    assert abs(w.item()) < 1e-7
    below = vector(1.0)
    step(ALIG([below], lower_bound=5.0), below.square().sum())
    assert below.item() == 1


def test_decay_is_not_part_of_the_rate():
    """The rate is that without decay; the parameters shrink by rate times decay before the step."""
    plain, decayed = vector(2.0, 1.0), vector(2.0, 1.0)
    optimizers = ALIG([plain]), ALIG([decayed], weight_decay=0.1)
    for w, optimizer in zip((plain, decayed), optimizers, strict=True):
        step(optimizer, w.square().sum())
    rate = optimizers[0].param_groups[0]["step_size"]
    assert optimizers[1].param_groups[0]["step_size"] == rate
    start = torch.tensor([2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(decayed.detach(), (1 - 0.1 * rate) * start - rate * 2 * start)


def test_groups_share_a_gradient_norm_and_have_caps_of_their_own():
    w, v = vector(1.0), vector(1.0)
    optimizer = ALIG([{"params": [w], "lr": None}, {"params": [v], "lr": 0.01}], eps=0.0)
    step(optimizer, w.square().sum() + v.square().sum())
    assert [group["step_size"] for group in optimizer.param_groups] == [0.25, 0.01]
    assert math.isinf(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("change", ["widen", "split", "prune", "insert"])
def test_the_ball_grows_with_the_network(change):
    """Section E: the ratio of radius and norm is kept, so that the next projection preserves the function, too."""
    block = nn.Sequential(nn.Linear(6, 6), nn.Identity())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2)).double()
        deep = nn.Sequential(nn.Linear(4, 6), nn.Sequential(block, copy.deepcopy(block)), nn.Linear(6, 2)).double()
    model = deep if change == "insert" else model
    radius = 0.8 * norm(model.parameters())
    optimizer = ALIG(model.parameters(), 0.1, 0.9, max_norm=radius)
    x, y = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 2

    def trained():
        step(optimizer, nn.functional.cross_entropy(model(x), y))

    trained()
    before, outputs = norm(model.parameters()), model(x).detach()
    if change == "insert":
        structure = trace(model, x)
        insert_(model, next(iter(structure.stacks.values())), 1, [optimizer])
    else:
        group = trace(model, x)["0"]
        edit = {"widen": widen(group, 3), "split": split(group, [0, 1]), "prune": prune(group, [0])}[change]
        apply_(model, [edit], [optimizer])
    after = norm(model.parameters())
    assert after != before
    if change in ("widen", "split"):
        torch.testing.assert_close(model(x).detach(), outputs)
    expected = radius * after / before
    optimizer.zero_grad()
    optimizer.set_loss(0.0)  # no step along the gradient: what is left is momentum, and the projection
    optimizer.step()
    assert optimizer.param_groups[0]["max_norm"] == pytest.approx(expected)
    assert norm(model.parameters()) <= expected * (1 + 1e-9)
    trained()
    assert optimizer.param_groups[0]["max_norm"] == pytest.approx(expected)


def test_new_entries_of_the_momentum_are_zero():
    model = network()
    optimizer = ALIG(model.parameters(), 0.1, 0.9)
    train(model, optimizer, 3)
    before = optimizer.state[model[4].weight]["momentum_buffer"].clone()
    apply_(model, [widen(trace(model, batch()[0])["4"], 2)], [optimizer])
    after = optimizer.state[model[4].weight]["momentum_buffer"]
    assert torch.equal(after[:6], before)
    assert (after[6:] == 0).all()


def test_a_loss_that_was_set_counts_more_than_that_of_the_closure():
    ends = []
    for value in (None, 0.5, torch.tensor([0.5]), 5.0):
        w = vector(2.0)
        optimizer = ALIG([w])
        loss = w.square().sum() / 8
        loss.backward()
        optimizer.set_loss(value)
        optimizer.step(lambda loss=loss: loss)
        ends.append(w.item())
    assert ends[0] == ends[1] == ends[2] != ends[3]
    with pytest.raises(ValueError, match=r"one number, found a tensor of shape \(2,\)"):
        optimizer.set_loss(torch.ones(2))


def test_a_loss_goes_with_its_gradients():
    """Set before or after `zero_grad`, it counts once; after a backward pass without a step, it is forgotten."""
    w = vector(2.0)
    optimizer = ALIG([w])
    loss = w.square().sum()
    optimizer.set_loss(loss)
    optimizer.zero_grad()
    loss.backward()
    optimizer.zero_grad()  # an overflow, say: no step was taken
    (3 * w.sum()).backward()
    with pytest.raises(RuntimeError, match=r"ALIG needs the loss.*set_loss.*LossFeed"):
        optimizer.step()
    assert w.item() == 2
    optimizer.set_loss(6.0)
    optimizer.step()
    assert w.item() == pytest.approx(0, abs=1e-4)
    with pytest.raises(RuntimeError, match="needs the loss"):
        optimizer.step()


def test_without_gradients_and_loss_nothing_happens():
    w = vector(2.0)
    optimizer = ALIG([w])
    assert optimizer.step() is None
    assert (w.item(), optimizer.skipped) == (2, 0)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "gradient"])
def test_a_step_that_cannot_be_taken_is_skipped_and_counted(bad, foreach, caplog):
    w = vector(3.0, 4.0)
    optimizer = ALIG([w], momentum=0.9, max_norm=100.0, max_skips=2, foreach=foreach)
    step(optimizer, w.norm())
    before, state = w.detach().clone(), copy.deepcopy(optimizer.state[w])

    def spoilt():
        optimizer.zero_grad()
        loss = w.norm()
        loss.backward()
        if bad == "gradient":
            w.grad[0] = math.inf
            return loss
        return None if bad is None else loss * bad

    for _ in range(2):
        optimizer.step(spoilt)
    assert torch.equal(w, before)
    assert torch.equal(optimizer.state[w]["momentum_buffer"], state["momentum_buffer"])
    assert optimizer.skipped == 2
    assert caplog.text.count("ALIG skips a step") == 1
    step(optimizer, w.norm() + 1)
    assert not torch.equal(w, before)
    for _ in range(2):
        optimizer.step(spoilt)  # the count in a row began again
    with pytest.raises(RuntimeError, match="ALIG skipped 3 steps in a row"):
        optimizer.step(spoilt)
    again = ALIG([vector(0.0, 0.0)], momentum=0.9)
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped == optimizer.skipped == 5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -0.1),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1.0),
        ("max_norm", 0.0),
        ("eps", -1e-9),
        ("lower_bound", math.inf),
        ("max_skips", -1),
        ("max_skips", 2.5),
    ],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"Expected .*`{option}`"):
        ALIG([vector(1.0)], **{option: value})


def test_climbing_is_refused():
    with pytest.raises(ValueError, match=r"ALIG does not support `maximize=True`.*negative objective"):
        ALIG([vector(1.0)], maximize=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "adjusted_momentum": True, "weight_decay": 0.01, "max_norm": 2.0}],
)
def test_the_fast_form_is_the_plain_loop(options):
    ends = []
    for foreach in (None, False):
        model = network()
        train(model, ALIG(model.parameters(), 0.5, foreach=foreach, **options), 8)
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-11, atol=1e-13)
