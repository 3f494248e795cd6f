"""Hypergradient descent's own properties: the derivative, when the rate rises, gradients that are kept."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from lightning_grow.optim import SGDHD, SGDNHD, AdamHD
from lightning_grow.optim.kept import KEY
from lightning_grow.optim.tensors import dot, squared_norm, subtract_
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_, insert_, widen
from tests.optim.table import batch, network, train

KINDS = {
    "sgd": (SGDHD, {}),
    "decay": (SGDHD, {"weight_decay": 0.1}),
    "momentum": (SGDHD, {"momentum": 0.8, "dampening": 0.2}),
    "nesterov": (SGDNHD, {"momentum": 0.8}),
    "adam": (AdamHD, {}),
    "adam_decay": (AdamHD, {"weight_decay": 0.1}),
}


def quadratic(w, curvature=2.0):
    return curvature * w.square().sum() / 2


def step(optimizer, w, loss=quadratic):
    optimizer.zero_grad()
    value = loss(w)
    value.backward()
    optimizer.step()
    return value.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("foreach", [None, False])
def test_the_rate_moves_by_the_derivative_of_the_loss(kind, foreach):
    """HD-3: of the loss after the last step, as a function of its rate; weight decay belongs to the loss."""
    cls, options = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(3, 5, dtype=torch.float64, generator=generator))
    target = torch.randn(3, 5, dtype=torch.float64, generator=generator)

    def loss(w):
        return (w - target).pow(4).sum() / 10

    optimizer = cls([w], lr=0.01, hypergrad_lr=1e-4, foreach=foreach, **options)
    for _ in range(3):
        step(optimizer, w, loss)
    before, rate = w.detach().clone(), optimizer.param_groups[0]["lr"]
    step(optimizer, w, loss)
    used = optimizer.param_groups[0]["lr"]
    direction = (before - w.detach()) / used
    rate = torch.tensor(used, dtype=torch.float64, requires_grad=True)
    moved = before - rate * direction
    decayed = loss(moved) + options.get("weight_decay", 0.0) * moved.square().sum() / 2
    (derivative,) = torch.autograd.grad(decayed, rate)
    step(optimizer, w, loss)
    assert optimizer.param_groups[0]["lr"] - used == pytest.approx(-1e-4 * derivative.item(), rel=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_leaves_the_rate_alone(kind):
    """HD-2."""
    cls, options = KINDS[kind]
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = cls([w], lr=0.01, hypergrad_lr=1e-3, **options)
    step(optimizer, w)
    assert optimizer.param_groups[0]["lr"] == 0.01
    step(optimizer, w)
    assert optimizer.param_groups[0]["lr"] > 0.01


@pytest.mark.parametrize("rate", [0.1, 0.45, 0.55, 0.9])
def test_on_a_parabola_the_rate_rises_up_to_one_over_the_curvature(rate):
    """HD-4."""
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = SGDHD([w], lr=rate, hypergrad_lr=1e-6)
    step(optimizer, w)
    step(optimizer, w)
    assert (optimizer.param_groups[0]["lr"] > rate) == (rate < 0.5)


def test_it_starts_from_a_rate_of_zero():
    """HD-5."""
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = SGDHD([w], lr=0.0, hypergrad_lr=1e-3)
    losses = [step(optimizer, w) for _ in range(100)]
    assert losses[-1] < losses[0] / 100


def test_the_rate_stays_within_its_bounds():
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = SGDHD([w], lr=0.1, hypergrad_lr=1.0, lr_min=0.05, lr_max=0.2)
    rates = []
    for _ in range(20):
        step(optimizer, w, lambda w: quadratic(w, 12.0))
        rates.append(optimizer.param_groups[0]["lr"])
    assert {min(rates), max(rates)} == {0.05, 0.2}


def test_the_multiplicative_rule_does_not_know_the_scale_of_the_loss():
    """A scaled loss with a rate that is scaled back goes the same way: factors of the rate are equal."""
    factors = []
    for scale in (1.0, 50.0):
        w = nn.Parameter(torch.tensor([1.0, -3.0], dtype=torch.float64))
        optimizer = SGDNHD([w], lr=0.02 / scale, hypergrad_lr=0.1, rule="multiplicative")
        for _ in range(4):
            step(optimizer, w, lambda w, scale=scale: scale * (w[0] ** 2 + 3 * w[1] ** 2))
        factors.append(optimizer.param_groups[0]["lr"] * scale / 0.02)
    assert factors[0] == pytest.approx(factors[1], rel=1e-10)
    assert factors[0] != pytest.approx(1, rel=0.1)


def test_groups_have_rates_of_their_own_or_move_together():
    def rates(**options):
        model = network()
        parameters = list(model.parameters())
        optimizer = SGDHD([{"params": parameters[:3]}, {"params": parameters[3:]}], 0.01, 1e-3, **options)
        train(model, optimizer, 4)
        return [group["lr"] for group in optimizer.param_groups]

    own, together = rates(), rates(shared=True)
    assert own[0] != own[1]
    assert together[0] == together[1]
    model = network()
    one = SGDHD(model.parameters(), 0.01, 1e-3)
    train(model, one, 4)
    assert together[0] == pytest.approx(one.param_groups[0]["lr"], rel=1e-12)


@pytest.mark.parametrize("how", ["zeroed in place", "never zeroed", "one buffer"])
@pytest.mark.parametrize("cls", [SGDHD, SGDNHD])
def test_gradients_that_are_overwritten_are_noticed_and_copied_from_then_on(how, cls):
    """The step at which it is noticed leaves the rate alone."""

    def run(copy_grad):
        w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = cls([w], lr=0.01, hypergrad_lr=1e-3, copy_grad=copy_grad)
        static, changes = torch.zeros_like(w), []
        for _ in range(6):
            if how == "one buffer":
                with torch.no_grad():
                    static.copy_(2 * w)
                w.grad = static.view_as(static)
            else:
                if how == "zeroed in place":
                    optimizer.zero_grad(set_to_none=False)
                quadratic(w).backward()
            before = optimizer.param_groups[0]["lr"]
            optimizer.step()
            changes.append(optimizer.param_groups[0]["lr"] - before)
        return changes

    noticed, copied = run(False), run(True)
    assert noticed[1] == 0 < copied[1]
    assert all(change != 0 for change in noticed[2:])


def test_copies_are_never_written_into_gradients_of_others():
    """One parameter's gradient is overwritten; that of the other, kept by reference until then, is somebody's."""
    w, v = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = SGDHD([w, v], lr=0.01, hypergrad_lr=1e-3)
    static, first = torch.full((2,), 3.0, dtype=torch.float64), torch.full((2,), 5.0, dtype=torch.float64)
    w.grad, v.grad = static, first
    optimizer.step()
    static.add_(1)
    v.grad = torch.full((2,), 7.0, dtype=torch.float64)
    for _ in range(2):
        optimizer.step()
    assert (first == 5).all()
    assert (optimizer.state[v][KEY] == 7).all()
    assert optimizer.state[v][KEY] is not v.grad


def test_a_pickled_optimizer_copies_gradients_as_before():
    for copies in (False, True):
        optimizer = SGDHD([nn.Parameter(torch.ones(2))], copy_grad=copies, shared=True)
        again = pickle.loads(pickle.dumps(optimizer))
        assert (again.param_groups[0]["copy_grad"], again.shared) == (copies, True)


def test_gradients_do_not_outlive_a_resize():
    model = network()
    optimizer = SGDHD(model.parameters(), lr=0.01, hypergrad_lr=1e-3)
    train(model, optimizer, 2)
    alive = weakref.ref(optimizer.state[model[4].weight][KEY])
    apply_(model, [widen(trace(model, batch()[0])["4"], 3)], optimizers=[optimizer])
    optimizer.zero_grad()
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("cls", [AdamHD, SGDNHD])
def test_state_that_is_laid_out_otherwise_is_not_mixed_up(cls):
    """A kernel that goes through memory in a line takes what is laid out alike only."""
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(torch.arange(48, dtype=torch.float64).reshape(2, 3, 2, 4).sin())
        optimizer = cls([p], lr=0.01)
        for number in range(4):
            p.grad = (p.detach() * (number + 1)).cos()
            optimizer.step()
            for name, value in optimizer.state[p].items():
                if torch.is_tensor(value) and value.ndim == 4:
                    optimizer.state[p][name] = value.contiguous(memory_format=layout)
        weights.append(p.detach())
    torch.testing.assert_close(weights[0], weights[1])


def test_by_default_gradients_are_kept_by_reference():
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SGDHD([w], lr=0.01, hypergrad_lr=1e-3)
    step(optimizer, w)
    assert optimizer.state[w][KEY] is w.grad


@pytest.mark.parametrize("cls", [SGDHD, AdamHD])
def test_a_scheduler_is_refused_and_a_rate_by_hand_is_not(cls):
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = cls([w], lr=0.01)
    optimizer.param_groups[0]["lr"] = 0.5
    step(optimizer, w)
    assert optimizer.param_groups[0]["lr"] == 0.5
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(RuntimeError, match="scheduler writes the rate"):
        step(optimizer, w)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (SGDHD, {"hypergrad_lr": -1.0}, "`hypergrad_lr` of at least 0"),
        (SGDHD, {"lr": 2.0, "lr_max": 1.0}, "`lr` from `lr_min` to `lr_max`"),
        (SGDHD, {"lr_min": 2.0, "lr_max": 1.0}, "finite `lr_min` of at most `lr_max`"),
        (SGDHD, {"lr": math.nan}, "`lr` from"),
        (SGDHD, {"momentum": 1.0}, r"`momentum` in \[0, 1\)"),
        (SGDHD, {"nesterov": True}, "Nesterov's momentum needs"),
        (SGDHD, {"rule": "geometric"}, "'additive' or 'multiplicative'"),
        (SGDHD, {"rule": "multiplicative", "lr": 0.0}, "`lr` above 0"),
        (AdamHD, {"betas": (0.9, 1.0)}, r"`betas\[1\]` in \[0, 1\)"),
        (AdamHD, {"eps": -1.0}, "`eps` of at least 0"),
    ],
)
def test_wrong_options_are_named(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_new_units_say_nothing_about_the_rate_in_their_first_step(kind):
    """What is remembered of them is zero: the rate moves as it would have without them (the function is kept)."""
    cls, options = KINDS[kind]
    options = {key: value for key, value in options.items() if key != "weight_decay"}
    rates = []
    for grows in (False, True):
        model = network()
        optimizer = cls(model.parameters(), lr=0.01, hypergrad_lr=1e-3, **options)
        train(model, optimizer, 3)
        if grows:
            apply_(model, [widen(trace(model, batch()[0])["4"], 3)], optimizers=[optimizer])
        train(model, optimizer, 1, first=3)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[1] == pytest.approx(rates[0], rel=1e-9)


def test_a_block_more_begins_with_the_rate_of_the_moment():
    blocks = nn.Sequential(*(Residual() for _ in range(2))).double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = SGDNHD(blocks.parameters(), lr=0.01, hypergrad_lr=1e-3)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (blocks(x) - 1).square().mean().backward()
            optimizer.step()

    run(3)
    rate, before = optimizer.param_groups[0]["lr"], blocks(x).detach()
    (stack,) = trace(blocks, x).stacks.values()
    insert_(blocks, stack, 1, optimizers=[optimizer])
    torch.testing.assert_close(blocks(x), before)
    assert optimizer.param_groups[0]["lr"] == rate
    run(2)
    assert optimizer.param_groups[0]["lr"] != rate
    assert len(optimizer.param_groups[0]["params"]) == 12


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return x + self.other(torch.tanh(self.one(x)))


# -- sums and steps ---------------------------------------------------------------------------------------------------


def lists(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 3, 4, 4), ()]
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    found[2] = found[2].to(memory_format=torch.channels_last)
    return [*found, found[0].T, found[0][:, ::2]]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_products_and_norms_are_those_of_all_entries(dtype, rtol):
    xs, ys = lists(dtype), [y.flip(0) if y.ndim else y for y in lists(dtype)]
    expected = sum((x.double() * y.double()).sum() for x, y in zip(xs, ys, strict=True))
    assert dot(xs, ys).item() == pytest.approx(expected.item(), rel=rtol)
    assert squared_norm(xs).item() == pytest.approx(sum(x.double().square().sum() for x in xs).item(), rel=rtol)
    assert dot([], []) == squared_norm([]) == 0


def test_half_precision_is_added_up_in_float32():
    x = torch.full((4096,), 1.0, dtype=torch.bfloat16)  # added up in bfloat16, ones stop counting at 256
    assert dot([x], [x]).item() == 4096
    assert squared_norm([x]).item() == 4096


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5, dtype=torch.float64)])
def test_a_step_is_the_difference(rate):
    params, directions = lists(), copy.deepcopy(lists())
    subtract_(params[:4], directions[:4], rate)
    for p, old, d in zip(params[:4], lists(), directions, strict=False):
        torch.testing.assert_close(p, old - 0.5 * d)
