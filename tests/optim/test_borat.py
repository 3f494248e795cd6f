"""BORAT's own properties: the dual, the bundle, and what happens to it on the way."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from lightning_grow.optim.borat import BORAT
from lightning_grow.optim.bundle import bundle_weights, enumerated_weights
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_, insert_, prune, remove_, split, widen
from tests.optim.table import batch, network, train


def problem(pieces, seed, dim=6, repeat=False):
    """Return gradients ``(pieces, dim)``, the first of them zero, heights, and the rate."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(pieces, dim, generator=generator, dtype=torch.float64)
    g[0] = 0
    if repeat:
        g[-1] = g[1]
    heights = torch.cat([torch.zeros(1, dtype=torch.float64), torch.randn(pieces - 1, generator=generator).double()])
    return g, heights, float(10 ** (torch.rand((), generator=generator) * 3 - 2))


def dual(a, gram, heights):
    return heights @ a - a @ gram @ a / 2


def primal(a, g, heights, lr):
    delta = -lr * a @ g
    return delta.square().sum() / (2 * lr) + (heights + g @ delta).max()


def another_solution(q, b):
    """Return what sequential quadratic programming finds."""
    return minimize(
        lambda x: x @ q @ x / 2 - b @ x,
        np.full(len(b), 1 / len(b)),
        jac=lambda x: q @ x - b,
        bounds=[(0, 1)] * len(b),
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("pieces", [2, 3, 4, 5, 7])
def test_the_dual_is_solved_exactly(pieces, repeat):
    """BO-3 and BO-4, in float64: on the simplex, no gap to the primal problem, and no other solver does better."""
    for seed in range(20):
        g, heights, lr = problem(pieces, seed, repeat=repeat and pieces > 2)
        gram = lr * g @ g.T
        a = bundle_weights(gram, heights)
        assert (a >= 0).all()
        assert a.sum().item() == pytest.approx(1, abs=1e-14)
        best = dual(a, gram, heights)
        torch.testing.assert_close(primal(a, g, heights, lr), best, rtol=1e-10, atol=1e-10)
        other = another_solution(gram.numpy(), heights.numpy())
        assert other.success or other.status == 8  # no further progress at this precision
        assert best.item() == pytest.approx(-other.fun, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("pieces", [2, 3])
def test_closed_forms_are_the_enumeration(pieces):
    """BO-8."""
    for seed in range(300):
        g, heights, lr = problem(pieces, seed, dim=1 + seed % 4)
        gram = lr * g @ g.T
        closed, tried = bundle_weights(gram, heights), enumerated_weights(gram, heights)
        torch.testing.assert_close(dual(closed, gram, heights), dual(tried, gram, heights), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_a_problem_does_not_matter(scale):
    g, heights, lr = problem(5, 0)
    gram = lr * g @ g.T
    torch.testing.assert_close(bundle_weights(scale * gram, scale * heights), bundle_weights(gram, heights))


def test_without_gradients_the_highest_piece_is_the_answer():
    assert enumerated_weights(torch.zeros(3, 3).double(), torch.tensor([0.0, 2.0, 1.0]).double()).tolist() == [0, 1, 0]


def test_a_piece_more_raises_the_dual():
    """BO-4."""
    for seed in range(20):
        g, heights, lr = problem(6, seed)
        gram = lr * g @ g.T
        values = [
            dual(bundle_weights(gram[:n, :n], heights[:n]), gram[:n, :n], heights[:n]).item() for n in range(2, 7)
        ]
        assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(values))


def bundle_by_hand(model, numbers, lr, same=None):
    """Return the step of a bundle, from the auxiliary points themselves; and the tangents."""
    model = copy.deepcopy(model)
    params = list(model.parameters())
    start = weights(model)
    heights, gradients = [torch.zeros((), dtype=torch.float64)], [torch.zeros_like(start)]
    for number in numbers:
        x, y = batch(seed=number)
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        g = torch.cat([p.grad.flatten() for p in params])
        gradients.append(g)
        heights.append(loss.detach() - g @ (weights(model) - start))
        matrix, b = torch.stack(gradients), torch.stack(heights)
        delta = -lr * enumerated_weights(lr * matrix @ matrix.T, b) @ matrix
        nn.utils.vector_to_parameters(start + delta, params)
    return delta, matrix, b


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("pieces", [3, 4, 5])
def test_a_bundle_is_what_its_auxiliary_points_say(pieces, foreach):
    """The plain twin keeps the auxiliary points; three bundles with momentum. With BO-6 and BO-7 on each."""
    model, lr, momentum = network(), 2.0, 0.9
    optimizer = BORAT(model.parameters(), lr, pieces, momentum, foreach=foreach)
    velocity = 0
    for number in range(3):
        start = weights(model)
        numbers = range(number * (pieces - 1), (number + 1) * (pieces - 1))
        delta, g, b = bundle_by_hand(model, numbers, lr)
        train(model, optimizer, pieces - 1, first=numbers[0])
        velocity = momentum * velocity + delta
        torch.testing.assert_close(weights(model), start + delta + momentum * velocity, rtol=1e-9, atol=1e-11)
        assert optimizer.at_bundle_boundary
        assert (b + g @ delta).max() + delta.square().sum() / (2 * lr) <= b.max() + 1e-12
        assert delta.norm() <= lr * g.norm(dim=1).max() * (1 + 1e-12)


def test_a_repeated_tangent_changes_nothing():
    """BO-5: the same batch at the same point, where the first piece left the parameters at the start."""
    ends = []
    for pieces in (2, 3):
        w = nn.Parameter(torch.tensor([2.0, 1.0], dtype=torch.float64))
        optimizer = BORAT([w], 0.05, pieces, 0.0)
        for _ in range(pieces - 1):
            optimizer.zero_grad()
            loss = w[0] + 2 * w[1]  # linear: its tangent is the same everywhere
            loss.backward()
            optimizer.set_loss(loss)
            optimizer.step()
        ends.append(w.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_at_zero_loss_a_bundle_does_not_move(pieces):
    """BO-2."""
    w = nn.Parameter(torch.tensor([2.0, 1.0], dtype=torch.float64))
    optimizer = BORAT([w], 1.0, pieces)
    for number in range(2 * (pieces - 1)):
        optimizer.zero_grad()
        (w * (number + 1)).sum().backward()
        optimizer.set_loss(0.0)
        optimizer.step()
    assert w.tolist() == [2.0, 1.0]


def test_scaling_the_loss_is_scaling_the_rate():
    """BO-9."""
    ends = []
    for scale in (1.0, 1e3):
        model = network()
        optimizer = BORAT(model.parameters(), 1.0 / scale, 3)
        for number in range(4):
            x, y = batch(seed=number)
            optimizer.zero_grad()
            loss = scale * nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step(lambda loss=loss: loss)
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)


def test_groups_share_a_bundle_with_rates_of_their_own():
    """A rate of zero freezes a group; equal rates are one group."""
    models = network(), network(), network()
    halves = [(list(m.parameters())[:3], list(m.parameters())[3:]) for m in models]
    together = BORAT(models[0].parameters(), 0.5, 3)
    parted = BORAT([{"params": h} for h in halves[1]], 0.5, 3)
    frozen = BORAT([{"params": halves[2][0], "lr": 0.0}, {"params": halves[2][1]}], 0.5, 3)
    for model, optimizer in zip(models, (together, parted, frozen), strict=True):
        train(model, optimizer, 6)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-10, atol=1e-12)
    fresh = list(network().parameters())
    assert all(torch.equal(p, q) for p, q in zip(halves[2][0], fresh[:3], strict=True))
    assert not torch.equal(halves[2][1][0], fresh[3])


@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy"])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_run_goes_on_bit_by_bit_from_within_a_bundle(after, way):
    """BO-11."""
    model = network(torch.float32)
    optimizer = BORAT(model.parameters(), 0.5, 5, max_norm=9.0)
    train(model, optimizer, 4 + after)
    assert optimizer.at_bundle_boundary == (after == 4)
    if way == "deepcopy":
        other, again = copy.deepcopy((model, optimizer))
    else:
        other, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        again = BORAT(other.parameters(), 0.1, 5)
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        again.load_state_dict(state)
    train(model, optimizer, 7, first=4 + after)
    train(other, again, 7, first=4 + after)
    assert torch.equal(weights(model), weights(other))


def test_flush_goes_back_to_the_start_and_forgets_the_bundle():
    model = network()
    optimizer = BORAT(model.parameters(), 0.5, 4)
    train(model, optimizer, 3)
    start, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    assert optimizer.at_bundle_boundary
    train(model, optimizer, 2, first=3)
    assert not optimizer.at_bundle_boundary
    assert not torch.equal(weights(model), start)
    optimizer.flush()
    torch.testing.assert_close(weights(model), start, rtol=1e-13, atol=1e-13)
    start = weights(model)
    assert optimizer.at_bundle_boundary
    assert optimizer.state_dict()["state"].keys() == state.keys()
    assert all(set(s) == {"momentum_buffer"} for s in optimizer.state.values())
    optimizer.flush()
    assert torch.equal(weights(model), start)


def test_at_a_boundary_there_is_nothing_but_momentum():
    model = network()
    optimizer = BORAT(model.parameters(), 0.5, 3, momentum=0.0)
    train(model, optimizer, 2)
    assert not optimizer.state
    train(model, optimizer, 1, first=2)
    for p in model.parameters():
        assert optimizer.state[p].keys() == {"bundle_grad_0"}
        assert optimizer.state[p]["bundle_grad_0"] is p.grad


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("copy_grad", [False, True])
def test_gradients_that_are_overwritten_in_mid_bundle_are_noticed_and_copied_from_then_on(copy_grad, foreach):
    """The bundle in which it is noticed begins anew where the parameters are, as one in which all were copied does."""
    model, twin = network(), network()
    optimizer = BORAT(model.parameters(), 0.5, 3, copy_grad=copy_grad, foreach=foreach)
    train(model, optimizer, 1, set_to_none=False)
    twin.load_state_dict(model.state_dict())
    other = BORAT(twin.parameters(), 0.5, 3, foreach=foreach)
    first = 1
    if copy_grad:
        train(twin, other, 0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 5, first=first, set_to_none=False)
    train(twin, other, 5, first=first)
    assert optimizer.param_groups[0]["copy_grad"]
    assert torch.equal(weights(model), weights(twin))


def test_a_parameter_may_be_without_a_gradient_in_part_of_a_bundle():
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = BORAT([a, b], 10.0, 4, 0.0)
    for number in range(3):
        optimizer.zero_grad()
        loss = (a.sum() if number != 1 else b.sum()).abs()
        loss.backward()
        optimizer.step(lambda loss=loss: loss)
    torch.testing.assert_close(torch.stack([a.sum(), b.sum()]).detach(), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "gradient"])
def test_a_bundle_waits_where_a_batch_cannot_be_used(bad):
    ends = []
    for is_bad in (False, True):
        model = network()
        optimizer = BORAT(model.parameters(), 0.5, 4, max_skips=2)
        train(model, optimizer, 2)
        before = weights(model)
        if is_bad:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch()[0]), batch()[1])
            loss.backward()
            if bad == "gradient":
                model[0].weight.grad[0, 0, 0, 0] = math.nan
            value = loss if bad == "gradient" else None if bad is None else loss * bad
            optimizer.step(lambda value=value: value)
            assert torch.equal(weights(model), before)
            assert optimizer.skipped == 1
        model[1].reset_running_stats()
        train(model, optimizer, 4, first=2)
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_the_ball_holds_at_boundaries():
    model = network()
    optimizer = BORAT(model.parameters(), 5.0, 3, max_norm=1.0)
    for number in range(6):
        train(model, optimizer, 1, first=number)
        assert not optimizer.at_bundle_boundary or weights(model).norm() <= 1 + 1e-9


def deep():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.Identity()) for _ in range(3)]
        return nn.Sequential(nn.Linear(4, 6), nn.Sequential(*blocks), nn.Linear(6, 3)).double()


X = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 3


def mini_batch(model, optimizer, number):
    x, y = X[4 * number :][:4], Y[4 * number :][:4]

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return optimizer.step(closure)


CHANGES = {
    "widen": lambda model, optimizers: apply_(model, [widen(trace(model, X)["0"], 2)], optimizers),
    "split": lambda model, optimizers: apply_(model, [split(trace(model, X)["0"], [1])], optimizers),
    "prune": lambda model, optimizers: apply_(model, [prune(trace(model, X)["0"], [1])], optimizers),
    "insert": lambda model, optimizers: insert_(model, next(iter(trace(model, X).stacks.values())), 1, optimizers),
    "remove": lambda model, optimizers: remove_(model, next(iter(trace(model, X).stacks.values())), 1, optimizers),
}


def grown_in_mid_bundle(change, flush=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flat = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model = deep() if change in ("insert", "remove") else flat
    optimizer = BORAT(model.parameters(), 0.5, 4)
    for number in (0, 1, 2, 3):  # a bundle, and one piece of the next
        mini_batch(model, optimizer, number)
    assert not optimizer.at_bundle_boundary
    torch.manual_seed(0)  # new units are drawn alike
    CHANGES[change](model, [optimizer])
    if flush:
        optimizer.flush()
    return model, optimizer


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_in_mid_bundle_a_flush_leaves_the_network_where_it_is(change):
    there, _ = grown_in_mid_bundle(change)
    flushed, optimizer = grown_in_mid_bundle(change, flush=True)
    assert torch.equal(weights(there), weights(flushed))
    assert optimizer.at_bundle_boundary


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_mid_bundle_begins_a_bundle_where_the_network_is(change):
    """The next batch is the first piece of a bundle from the changed network, with the momentum that there was."""
    model, optimizer = grown_in_mid_bundle(change)
    twin = copy.deepcopy(model)
    fresh = BORAT(twin.parameters(), 0.5, 4)
    buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in model.parameters()]
    for p, buffer in zip(twin.parameters(), buffers, strict=True):
        if buffer is not None:
            assert buffer.shape == p.shape
            fresh.state[p]["momentum_buffer"] = buffer.clone()
    for number in range(3):
        losses = mini_batch(model, optimizer, number), mini_batch(twin, fresh, number)
        assert losses[0] == losses[1]
        assert optimizer.at_bundle_boundary == (number == 2)
    assert torch.equal(weights(model), weights(twin))


def test_a_rate_that_changes_in_mid_bundle_leaves_its_start_where_it_was():
    model = network()
    optimizer = BORAT(model.parameters(), 0.5, 4)
    start = weights(model)
    train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.01
    train(model, optimizer, 1, first=1)
    optimizer.flush()
    torch.testing.assert_close(weights(model), start, rtol=1e-13, atol=1e-13)


def test_a_group_added_in_mid_bundle_begins_a_new_one():
    model, extra = network(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = BORAT(model.parameters(), 0.5, 3)
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": [extra]})
    train(model, optimizer, 1, first=1)
    assert not optimizer.at_bundle_boundary
    train(model, optimizer, 1, first=2)
    assert optimizer.at_bundle_boundary


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("lr", math.inf), ("num_pieces", 1), ("num_pieces", 11), ("momentum", 1.0), ("max_norm", -1.0)],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"Expected .*`{option}`"):
        BORAT([nn.Parameter(torch.ones(1))], **{option: value})


def test_groups_with_bundles_of_different_size_are_refused():
    groups = [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))], "num_pieces": 4}]
    with pytest.raises(ValueError, match="share one bundle, but `num_pieces` is 3 in the first and 4 in another"):
        BORAT(groups)


def test_too_large_a_rate_is_where_it_pays():
    """BO-10, shortened: at a rate of 1, SGD ends at guessing, three pieces reach zero loss."""

    def loss_of(make, seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
        x = torch.randn(512, 20, generator=generator)
        y = (x @ torch.randn(20, 5, generator=generator)).argmax(dim=1)
        optimizer = make(model.parameters())
        for _ in range(25):
            for at in torch.randperm(512, generator=generator).split(32):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x[at]), y[at])
                loss.backward()
                optimizer.step(lambda loss=loss: loss)
        return nn.functional.cross_entropy(model(x), y).item()

    bundles = [loss_of(lambda params: BORAT(params, 1.0, 3), seed) for seed in range(2)]
    descents = [loss_of(lambda params: torch.optim.SGD(params, 1.0, 0.9), seed) for seed in range(2)]
    assert max(bundles) < 1e-2
    assert min(descents) > 1
