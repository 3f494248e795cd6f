"""CAM-HD: against a twin that knows nothing but vectors and labels, against autograd, and while networks grow."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_grow.optim import SGDHD, AdamHD
from lightning_grow.optim.camhd import CAMHD
from lightning_grow.optim.layers import Layers
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_, insert_, prune, remove_, split, widen

BASES = ("sgd", "sgdn", "adam")
LEVELS = ("global", "layer", "unit", "parameter")
SUBSETS = [levels for n in range(1, 5) for levels in itertools.combinations(LEVELS, n)]
BETA = {"sgd": 2e-3, "sgdn": 2e-3, "adam": 2e-4}  # so large that rates change at once


def network(dtype=torch.float64, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def labels(level):
    """Return the group of each single parameter of the network."""
    layer = [0] * 20 + [1] * 10 + [2] * 12
    rows = [i // 3 for i in range(15)] + list(range(5)) + [5] * 10 + [6] * 5 + [7] * 5 + [6, 7]
    return torch.tensor({"global": [0] * 42, "layer": layer, "unit": rows, "parameter": range(42)}[level])


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.stack([x.sum(dim=1), x[:, 0]], dim=1)


def loss_of(model, step=0, x=None):
    x, y = batch(step, next(model.parameters()).dtype)
    return 3 * (model(x) - y).square().mean()


def train(model, optimizer, steps=6, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return model


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Twin:
    """The whole method on vectors: each parameter has a label on each level, and a rate for each label."""

    def __init__(self, model, lr, base, levels, weights, beta, delta=0.03, norm="softmax", chain=True, decay=0.0):
        self.model, self.base, self.levels, self.beta, self.delta = model, base, levels, beta, delta
        self.norm, self.chain, self.decay = norm, chain, decay
        self.labels = {k: labels(k) for k in levels}
        self.rates = {k: torch.full((int(self.labels[k].max()) + 1,), lr, dtype=torch.float64) for k in levels}
        self.gamma = torch.tensor(weights, dtype=torch.float64)
        self.logits = self.gamma.log()
        self.u = self.v = self.m = self.s = torch.zeros(42, dtype=torch.float64)
        self.t = 0

    def step(self):
        w = flat(self.model)
        g = torch.cat([p.grad.reshape(-1) for p in self.model.parameters()]) + self.decay * w
        h = g * self.u
        gains = torch.stack([self.rates[k][self.labels[k]] @ h for k in self.levels])
        for k, gamma in zip(self.levels, self.gamma, strict=True):
            sums = torch.zeros_like(self.rates[k]).index_add(0, self.labels[k], h)
            factor = 42 / torch.bincount(self.labels[k]).double() * (gamma if self.chain else 1)
            self.rates[k] = (self.rates[k] + self.beta * factor * sums).clamp(min=0)
        if self.norm == "sum":
            self.gamma = (self.gamma + self.delta * gains).clamp(min=0)
            self.gamma = self.gamma / self.gamma.sum()
        else:
            self.logits = self.logits + self.delta * self.gamma * (gains - self.gamma @ gains)
            self.gamma = self.logits.softmax(dim=0)
        self.u = self.direction(g)
        rate = sum(gamma * self.rates[k][self.labels[k]] for k, gamma in zip(self.levels, self.gamma, strict=True))
        w = w - rate * self.u
        with torch.no_grad():
            nn.utils.vector_to_parameters(w, self.model.parameters())

    def direction(self, g):
        self.t += 1
        if self.base == "sgd":
            return g
        if self.base == "sgdn":
            self.v = 0.9 * self.v + g
            return g + 0.9 * self.v
        self.m = 0.9 * self.m + 0.1 * g
        self.s = 0.999 * self.s + 0.001 * g**2
        return self.m / (1 - 0.9**self.t) / ((self.s / (1 - 0.999**self.t)).sqrt() + 1e-8)


def check_rates(optimizer, twin):
    found = optimizer.rates()
    for k in twin.levels:
        if k == "global":
            torch.testing.assert_close(torch.tensor(found["lr"], dtype=torch.float64), twin.rates[k][0])
        elif k == "layer":
            got = torch.tensor([found[f"layer/{n}"] for n in (0, 1, 3)], dtype=torch.float64)
            torch.testing.assert_close(got, twin.rates[k])
        elif k == "unit":
            torch.testing.assert_close(torch.cat([found[f"unit/{n}"] for n in (0, 1, 3)]), twin.rates[k])
        else:
            names = [n for n, _ in twin.model.named_parameters()]
            got = torch.cat([found[f"parameter/{n}"].reshape(-1) for n in names])
            torch.testing.assert_close(got, twin.rates[k])
    if len(twin.levels) > 1:
        got = torch.tensor([found[f"weight/{k}"] for k in twin.levels], dtype=torch.float64)
        torch.testing.assert_close(got, twin.gamma)
        assert abs(float(got.sum()) - 1) < 1e-12  # CH-6
        assert got.min() >= 0


@pytest.mark.parametrize("levels", SUBSETS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("foreach", [None, False])
def test_it_is_the_twin_on_all_levels(base, levels, foreach):
    weights = torch.arange(1.0, 1 + len(levels), dtype=torch.float64)
    weights = (weights / weights.sum()).tolist()
    model, other = network(), network()
    options = {"base": base, "levels": levels, "weights": weights, "hypergrad_lr": BETA[base]}
    optimizer = CAMHD(model.named_parameters(), 0.01, foreach=foreach, **options)
    twin = Twin(other, 0.01, base, levels, weights, BETA[base])
    for step in range(6):
        for m in (model, other):
            m.zero_grad()
            loss_of(m, step).backward()
        optimizer.step()
        twin.step()
        torch.testing.assert_close(flat(model), flat(other), rtol=1e-9, atol=1e-12)
    check_rates(optimizer, twin)
    for k, rates in twin.rates.items():
        assert (rates - 0.01).abs().max() > 1e-4, f"{k} did nothing"


@pytest.mark.parametrize("variant", [{"norm": "sum"}, {"chain_weights": False}, {"weight_decay": 0.1}])
def test_variants_are_those_of_the_twin(variant):
    model, other, levels = network(), network(), ("global", "layer", "unit")
    optimizer = CAMHD(model.named_parameters(), 0.01, levels=levels, hypergrad_lr=2e-3, **variant)
    names = {"chain_weights": "chain", "weight_decay": "decay", "norm": "norm"}
    twin = Twin(other, 0.01, "sgd", levels, [1 / 3] * 3, 2e-3, **{names[k]: v for k, v in variant.items()})
    for step in range(6):
        for m in (model, other):
            m.zero_grad()
            loss_of(m, step).backward()
        optimizer.step()
        twin.step()
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-9, atol=1e-12)
    check_rates(optimizer, twin)


@pytest.mark.parametrize("base", BASES)
def test_hypergradients_are_those_of_autograd(base):
    """CH-5: of all rates and weights, through one update, by steps so small that nothing else changes."""
    beta = delta = 1e-7
    model, levels = network(), LEVELS
    weights = [0.1, 0.2, 0.3, 0.4]
    optimizer = CAMHD(
        model.named_parameters(), 0.01, base=base, levels=levels, weights=weights, hypergrad_lr=beta, weights_lr=delta
    )
    train(model, optimizer, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    optimizer.step()
    moved = flat(model)
    start = torch.cat([p.reshape(-1) for p in before.values()])
    found = optimizer.rates()
    fused = sum(found[f"weight/{k}"] * spread(found, k) for k in levels)
    u = (start - moved) / fused
    rates = {k: group_rates(found, k).clone().requires_grad_() for k in levels}
    gamma = torch.tensor([found[f"weight/{k}"] for k in levels], dtype=torch.float64, requires_grad=True)
    rate = sum(c * rates[k][labels(k)] for c, k in zip(gamma, levels, strict=True))
    w = start - rate * u
    pieces = dict(zip(before, w.split([p.numel() for p in before.values()]), strict=True))
    x, y = batch(3)
    outputs = functional_call(model, {n: pieces[n].view_as(p) for n, p in before.items()}, (x,))
    loss = 3 * (outputs - y).square().mean()
    expected = torch.autograd.grad(loss, [*rates.values(), gamma])
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    optimizer.step()
    after = optimizer.rates()
    for k, slope in zip(levels, expected, strict=False):
        scale = 42 / torch.bincount(labels(k)).double()
        change = group_rates(after, k) - rates[k].detach()
        torch.testing.assert_close(change / (beta * scale), -slope, rtol=1e-4, atol=1e-6)
    change = torch.tensor([after[f"weight/{k}"] - found[f"weight/{k}"] for k in levels], dtype=torch.float64)
    c = gamma.detach()
    slope = c * (expected[-1] - c @ expected[-1])  # by the logits
    step = -delta * slope
    torch.testing.assert_close(change, c * (step - c @ step), rtol=1e-3, atol=1e-13)


def group_rates(found, level):
    if level == "global":
        return torch.tensor([found["lr"]], dtype=torch.float64)
    if level == "layer":
        return torch.tensor([found[f"layer/{n}"] for n in (0, 1, 3)], dtype=torch.float64)
    if level == "unit":
        return torch.cat([found[f"unit/{n}"] for n in (0, 1, 3)]).double()
    names = [n for n, _ in network().named_parameters()]
    return torch.cat([found[f"parameter/{n}"].reshape(-1) for n in names])


def spread(found, level):
    return group_rates(found, level)[labels(level)]


@pytest.mark.parametrize("options", [{}, {"levels": LEVELS, "weights": (1.0, 0.0, 0.0, 0.0), "weights_lr": 0.0}])
@pytest.mark.parametrize("base", BASES)
def test_all_weight_on_the_global_level_is_hypergradient_descent(base, options):
    """CH-1."""
    options = options or {"levels": ("global",)}
    model, other = network(), network()
    train(model, CAMHD(model.named_parameters(), 0.01, base, hypergrad_lr=BETA[base], foreach=False, **options))
    hd = {
        "sgd": lambda p: SGDHD(p, 0.01, BETA[base], foreach=False),
        "sgdn": lambda p: SGDHD(p, 0.01, BETA[base], momentum=0.9, nesterov=True, foreach=False),
        "adam": lambda p: AdamHD(p, 0.01, BETA[base], foreach=False),
    }[base]
    train(other, hd(other.parameters()))
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("base", BASES)
def test_a_single_layer_is_everything(base):
    """CH-2."""
    ends = []
    for levels in (("global",), ("layer",)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Linear(3, 2).double()
        optimizer = CAMHD(model.named_parameters(), 0.01, base, levels=levels, hypergrad_lr=BETA[base])
        train(model, optimizer)
        ends.append((flat(model), optimizer.param_groups[0]["lr"]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-12, atol=0)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-12)
    assert abs(ends[0][1] - 0.01) > 1e-4


def test_virtual_coupling_is_a_combination():
    """CH-3: by one step from equal rates, with the weights (2 beta lambda, 1 - 2 beta lambda)."""
    strength, ends = 0.3, []
    for options in (
        {"coupling": "virtual", "coupling_strength": strength},
        {"weights": (strength, 1 - strength), "weights_lr": 0.0, "chain_weights": False},
    ):
        model = network()
        optimizer = CAMHD(model.named_parameters(), 0.01, hypergrad_lr=2e-3, **options)
        ends.append(flat(train(model, optimizer, 2)))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


def test_implicit_coupling_solves_its_equation():
    """CH-4: a rate is where the plain step and the gradient of the penalty there lead; at infinity, all are one."""
    ends = {}
    for strength in (0.0, 1.7, math.inf):
        model = network()
        optimizer = CAMHD(
            model.named_parameters(), 0.01, hypergrad_lr=2e-3, coupling="implicit", coupling_strength=strength
        )
        train(model, optimizer, 2)
        ends[strength] = group_rates(optimizer.rates(), "layer"), optimizer.param_groups[0]["lr"]
    plain, (coupled, lr) = ends[0.0][0], ends[1.7]
    torch.testing.assert_close(coupled, plain - 1.7 * (coupled - lr), rtol=1e-12, atol=0)
    torch.testing.assert_close(ends[math.inf][0], torch.full((3,), lr, dtype=torch.float64), rtol=1e-12, atol=0)
    assert plain.std() > 1e-4


@pytest.mark.parametrize("coupling", ["virtual", "implicit"])
def test_a_penalty_draws_every_level_to_the_next_coarser_one(coupling):
    model = network()
    optimizer = CAMHD(
        model.named_parameters(), 0.01, levels=LEVELS, hypergrad_lr=2e-3, coupling=coupling, coupling_strength=1.0
    )
    train(model, optimizer, 3)
    found = optimizer.rates()
    if coupling == "virtual":  # then nothing is left of a level's own: it is the plain step of the coarser one
        assert spread(found, "layer").std() < 1e-12 < spread(found, "unit").std()
    gap = {k: (spread(found, k) - found["lr"]).abs().mean() for k in LEVELS[1:]}
    other = network()
    free = CAMHD(other.named_parameters(), 0.01, levels=LEVELS, hypergrad_lr=2e-3, weights_lr=0.0, chain_weights=False)
    train(other, free, 3)
    for k in LEVELS[1:]:
        assert gap[k] < (spread(free.rates(), k) - free.param_groups[0]["lr"]).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("levels", SUBSETS)
@pytest.mark.parametrize("base", BASES)
def test_without_hypergradients_it_is_the_base(base, levels, dtype):
    """CH-7."""
    model, other = network(dtype), network(dtype)
    train(model, CAMHD(model.named_parameters(), 0.01, base, levels=levels, hypergrad_lr=0.0, weights_lr=0.0), 20)
    plain = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
        "sgdn": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    }[base]
    train(other, plain(other.parameters()), 20)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(flat(model), flat(other), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("levels", [("global", "layer"), LEVELS])
def test_the_order_of_parameters_does_not_matter(levels):
    """CH-8."""
    ends = []
    for reverse in (False, True):
        model = network()
        named = list(model.named_parameters())
        optimizer = CAMHD(named[::-1] if reverse else named, 0.01, levels=levels, hypergrad_lr=2e-3)
        ends.append(flat(train(model, optimizer)))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-11, atol=1e-13)


def test_equal_layers_may_as_well_be_one():
    """CH-8: two layers with equal gradients have the rates, and go the way, that they would have as one layer."""
    ends = []
    for grouping in (None, lambda name: "both"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}).double()
        model["b"].load_state_dict(model["a"].state_dict())
        optimizer = CAMHD(model.named_parameters(), 0.01, hypergrad_lr=2e-3, grouping=grouping)
        for step in range(6):
            optimizer.zero_grad()
            x, y = batch(step)
            sum((layer(x) - y).square().mean() for layer in model.values()).backward()
            optimizer.step()
        ends.append((flat(model), set(optimizer.rates())))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-12, atol=1e-14)
    assert "layer/both" in ends[1][1]
    assert {"layer/a", "layer/b"} <= ends[0][1]


def test_unnamed_vectors_join_the_matrix_before_them():
    named, unnamed = network(), network()
    train(named, CAMHD(named.named_parameters(), 0.01, levels=LEVELS[:2], hypergrad_lr=2e-3))
    optimizer = CAMHD(unnamed.parameters(), 0.01, levels=LEVELS[:2], hypergrad_lr=2e-3)
    train(unnamed, optimizer)
    assert {"layer/0", "layer/1"} <= set(optimizer.rates())
    assert "layer/2" not in optimizer.rates()  # the norm has vectors as long as the matrix before it has rows
    assert not torch.equal(flat(named), flat(unnamed))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("levels", [("layer",), LEVELS])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(base, levels, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        whole = network(dtype)
        train(whole, CAMHD(whole.named_parameters(), 0.01, base, levels=levels, hypergrad_lr=2e-4), 8)
        model = network(dtype)
        optimizer = CAMHD(model.named_parameters(), 0.01, base, levels=levels, hypergrad_lr=2e-4)
        train(model, optimizer, 4)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "file.pt")
        saved = torch.load(tmp_path / "file.pt", weights_only=True)
        fresh = network(dtype, seed=9)
        fresh.load_state_dict(saved["model"])
        again = CAMHD(fresh.named_parameters(), 0.5, base, levels=levels, hypergrad_lr=2e-4)
        again.load_state_dict(saved["optimizer"])
        train(fresh, again, 4, start=4)
        assert torch.equal(flat(fresh), flat(whole))


@pytest.mark.parametrize("levels", [("layer",), LEVELS])
def test_it_can_be_copied_and_pickled(levels):
    model = network()
    optimizer = CAMHD(model.named_parameters(), 0.01, levels=levels, hypergrad_lr=2e-3, grouping=str.upper)
    train(model, optimizer, 3)
    both = {"model": model, "optimizer": optimizer}
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        train(twin["model"], twin["optimizer"], 3, start=3)
        assert twin["optimizer"].grouping is not None
        assert "layer/0.WEIGHT" in twin["optimizer"].rates()
        last = twin
    train(model, optimizer, 3, start=3)
    assert torch.equal(flat(model), flat(last["model"]))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("levels", SUBSETS)
def test_pieces_make_no_difference(base, levels, monkeypatch):
    monkeypatch.setattr("lightning_grow.optim.agreement.CHUNK", 4)
    monkeypatch.setattr("lightning_grow.optim.agreement.SMALL", 1)
    ends = []
    for foreach in (None, False):
        model = network()
        optimizer = CAMHD(model.named_parameters(), 0.01, base, levels, hypergrad_lr=BETA[base], foreach=foreach)
        ends.append(flat(train(model, optimizer)))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("base", BASES)
def test_other_layouts_of_memory_make_no_difference(base):
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2)).double().to(memory_format=layout)
        optimizer = CAMHD(model.named_parameters(), 0.01, base, LEVELS, hypergrad_lr=BETA[base])
        for step in range(4):
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            model(x.to(memory_format=layout)).square().mean().backward()
            optimizer.step()
        ends.append(flat(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-13)


def test_decoupled_weight_decay_shrinks_each_weight_by_its_own_rate():
    model, other = network(), network()
    options = {"levels": LEVELS, "hypergrad_lr": 2e-3}
    first = CAMHD(model.named_parameters(), 0.01, weight_decay=0.5, decoupled_weight_decay=True, **options)
    second = CAMHD(other.named_parameters(), 0.01, **options)
    train(model, first, 1)
    train(other, second, 1)
    torch.testing.assert_close(flat(model), flat(other) - 0.5 * 0.01 * flat(network()), rtol=1e-12, atol=1e-14)


def test_maximize_climbs_as_the_negative_descends():
    model, other = network(), network()
    train(model, CAMHD(model.named_parameters(), 0.01, levels=LEVELS, hypergrad_lr=2e-3))
    optimizer = CAMHD(other.named_parameters(), 0.01, levels=LEVELS, hypergrad_lr=2e-3, maximize=True)
    for step in range(6):
        optimizer.zero_grad()
        (-loss_of(other, step)).backward()
        optimizer.step()
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-12, atol=1e-14)


def test_bounds_hold_on_all_levels():
    model = network()
    optimizer = CAMHD(model.named_parameters(), 0.01, levels=LEVELS, hypergrad_lr=1.0, lr_min=0.005, lr_max=0.02)
    train(model, optimizer)
    for level in LEVELS:
        rates = spread(optimizer.rates(), level)
        assert rates.min() >= 0.005
        assert rates.max() <= 0.02
        assert rates.max() > 0.019


def test_rates_change_by_no_more_than_a_share():
    model = network()
    optimizer = CAMHD(model.named_parameters(), 0.01, levels=LEVELS, hypergrad_lr=1.0, max_change=0.5)
    train(model, optimizer, 2)
    for level in LEVELS:
        change = (spread(optimizer.rates(), level) - 0.01).abs().max()
        assert float(change) == pytest.approx(0.005)


def test_a_rate_of_zero_begins_to_rise():
    model = network()
    optimizer = CAMHD(model.named_parameters(), 0.0, levels=LEVELS, hypergrad_lr=1e-3, max_change=0.5)
    before = loss_of(model).item()
    train(model, optimizer, 8)
    assert optimizer.param_groups[0]["lr"] > 0
    assert loss_of(model).item() < before


@pytest.mark.parametrize("levels", [("global",), ("layer",), LEVELS])
def test_a_rate_written_by_hand_changes_all_in_proportion(levels):
    model = network()
    optimizer = CAMHD(model.named_parameters(), 0.01, levels=levels, hypergrad_lr=2e-3)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["hypergrad_lr"] = 0.0
    before = optimizer.rates()
    optimizer.param_groups[0]["lr"] *= 2
    train(model, optimizer, 1)
    for name, rate in optimizer.rates().items():
        if not name.startswith("weight"):
            expected = 2 * torch.as_tensor(before[name], dtype=torch.float64)
            torch.testing.assert_close(torch.as_tensor(rate, dtype=torch.float64), expected)


def test_without_a_global_level_the_rate_of_the_group_is_the_mean():
    for levels in (("layer",), ("unit", "parameter"), ("parameter",)):
        model = network()
        optimizer = CAMHD(model.named_parameters(), 0.01, levels=levels, hypergrad_lr=2e-3)
        train(model, optimizer)
        mean = spread(optimizer.rates(), levels[0]).mean()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(float(mean), rel=1e-9)


def test_frozen_parameters_take_no_part():
    """Neither in the number of parameters: a small head on a large frozen network has the rates it has alone."""
    alone, both = nn.Linear(5, 2).double(), network()
    alone.load_state_dict(both[3].state_dict())
    for layer in both[:3]:
        layer.requires_grad_(False)
    features = {step: both[:3](batch(step)[0]) for step in range(4)}
    for model, head in ((alone, alone), (both, both[3])):
        optimizer = CAMHD(model.named_parameters(), 0.01, levels=LEVELS, hypergrad_lr=2e-3)
        for step in range(4):
            optimizer.zero_grad()
            (head(features[step]) - batch(step)[1]).square().mean().backward()
            optimizer.step()
    assert torch.equal(flat(alone), flat(both[3]))


def test_gradients_that_come_and_go():
    model = network()
    optimizer = CAMHD(model.named_parameters(), 0.01, levels=LEVELS, hypergrad_lr=2e-3)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        before = flat(model[3])
        if step == 2:
            model[3].zero_grad()
        optimizer.step()
        assert torch.equal(before, flat(model[3])) == (step == 2)
    assert flat(model).isfinite().all()


def test_gradients_written_in_place_are_noticed():
    ends = []
    for copy_grad, set_to_none in ((True, True), (False, True), (True, False), (False, False)):
        model = network()
        optimizer = CAMHD(model.named_parameters(), 0.01, hypergrad_lr=2e-3, copy_grad=copy_grad)
        for step in range(5):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model, step).backward()
            optimizer.step()
        ends.append((flat(model), optimizer.param_groups[0]["lr"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][0], ends[2][0])
    assert abs(ends[3][1] - ends[0][1]) < 0.02  # a step or two without a hypergradient, then copies


def train_case(model, optimizer, inputs, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).sin().square().mean().backward()
        optimizer.step()


def grown_case(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        x = torch.randn(16, 3).double()
    optimizer = CAMHD(model.named_parameters(), 0.02, hypergrad_lr=2e-3, **({"levels": LEVELS} | options))
    train_case(model, optimizer, x)
    return model, optimizer, x


@pytest.mark.parametrize("base", BASES)
def test_units_take_their_rates_along_when_the_network_changes(base):
    model, optimizer, x = grown_case(base=base)
    group = trace(model, x)["0"]
    before = optimizer.rates()
    apply_(model, [split(group, [4])], optimizers=[optimizer])
    units = optimizer.state[model[0].weight]["lr_unit"].reshape(-1)
    expected = before["unit/0"][[0, 1, 2, 3, 4, 4, 5]] if units.shape == (7,) else None
    places = [i for i in range(7) if units[i] == before["unit/0"][4]]
    assert expected is not None
    assert len(places) == 2
    assert set(units.tolist()) == set(before["unit/0"].tolist())

    before = optimizer.rates()
    apply_(model, [widen(trace(model, x)["0"], 2)], optimizers=[optimizer])
    units = optimizer.state[model[0].weight]["lr_unit"].reshape(-1)
    assert torch.equal(units[:7], before["unit/0"])
    torch.testing.assert_close(units[7:], before["unit/0"].mean().expand(2))
    columns = optimizer.state[model[2].weight]["lr_parameter"]
    assert columns.shape == (6, 9)
    torch.testing.assert_close(columns[:, 7:], columns[:, :7].mean(dim=1, keepdim=True).expand(6, 2))

    train_case(model, optimizer, x, 1)
    before = optimizer.rates()
    apply_(model, [prune(trace(model, x)["0"], [1, 3])], optimizers=[optimizer])
    units = optimizer.state[model[0].weight]["lr_unit"].reshape(-1)
    assert torch.equal(units, before["unit/0"][[0, 2, 4, 5, 6, 7, 8]])
    layer = optimizer.rates()["layer/0"]
    assert layer == before["layer/0"]
    train_case(model, optimizer, x)
    assert flat(model).isfinite().all()
    assert optimizer.rates()["unit/0"].shape == (7,)


def test_a_permutation_of_units_commutes_with_training():
    from lightning_grow.surgery import Edit

    ends = []
    for early in (True, False):
        model, optimizer, x = grown_case()
        edit = Edit(trace(model, x)["0"], (3, 0, 5, 1, 2, 4))
        if early:
            apply_(model, [edit], optimizers=[optimizer])
        train_case(model, optimizer, x)
        if not early:
            apply_(model, [edit], optimizers=[optimizer])
        ends.append((flat(model), optimizer.rates()))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(ends[0][1]["unit/0"], ends[1][1]["unit/0"], rtol=1e-10, atol=1e-13)


def test_shapes_of_the_moment_say_how_large_groups_are():
    """N/|G|: after growth, the next step is that of an optimizer built for the larger network with the same state."""
    model, optimizer, x = grown_case()
    apply_(model, [widen(trace(model, x)["0"], 3)], optimizers=[optimizer])
    twin = copy.deepcopy(model)
    fresh = CAMHD(twin.named_parameters(), 0.5, levels=LEVELS, hypergrad_lr=2e-3)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, fresh)):
        train_case(m, o, x, 3)
    assert torch.equal(flat(model), flat(twin))


def test_a_width_of_one_may_grow():
    """State of shape (out, 1) beside a weight of that shape would be taken for one number per parameter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 4)).double(), torch.randn(8, 3).double()
    optimizer = CAMHD(model.named_parameters(), 0.02, levels=("global", "unit"), hypergrad_lr=2e-3)
    train_case(model, optimizer, x)
    before = optimizer.rates()["unit/2"]
    apply_(model, [widen(trace(model, x)["0"], 2)], optimizers=[optimizer])
    optimizer.param_groups[0]["hypergrad_lr"] = 0.0
    train_case(model, optimizer, x, 1)
    assert torch.equal(optimizer.rates()["unit/2"], before)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("named", [True, False])
def test_new_layers_begin_with_the_global_rate(named):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 2)).double()
        x = torch.randn(16, 3).double()
    params = model.named_parameters() if named else model.parameters()
    optimizer = CAMHD(params, 0.02, levels=LEVELS, hypergrad_lr=2e-3)
    train_case(model, optimizer, x)
    structure = trace(model, x)
    (stack,) = structure.stacks.values()
    known = {id(p) for p in model.parameters()}
    insert_(model, stack, 1, optimizers=[optimizer])
    group = optimizer.param_groups[0]
    lr, group["hypergrad_lr"] = group["lr"], 0.0
    train_case(model, optimizer, x, 1)
    new = [p for p in model.parameters() if id(p) not in known]
    assert len(new) == 4
    for p in new:
        state = optimizer.state[p]
        assert state["lr_layer"] == lr
        torch.testing.assert_close(state["lr_parameter"], torch.full_like(p, lr))
        if p.ndim > 1:
            torch.testing.assert_close(state["lr_unit"], torch.full_like(state["lr_unit"], lr))
    others = {optimizer.state[p]["lr_layer"] for p in model.parameters() if id(p) in known}
    assert len(others) == 6
    assert lr not in others
    if named:
        assert group["param_names"] == [name for name, _ in model.named_parameters()]
        assert "layer/1.1.up" in optimizer.rates()
    (stack,) = trace(model, x).stacks.values()
    remove_(model, stack, 0, optimizers=[optimizer])
    train_case(model, optimizer, x, 1)
    assert flat(model).isfinite().all()
    if named:
        assert group["param_names"] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "rmsprop"}, "`base` to be one of 'sgd', 'sgdn', 'adam', found 'rmsprop'"),
        ({"levels": ()}, "`levels` to be one or several"),
        ({"levels": "global"}, "`levels` to be one or several"),
        ({"levels": ("global", "module")}, "`levels` to be one or several"),
        ({"levels": ("layer", "layer")}, "each once"),
        ({"weights": (0.5, 0.6)}, "`weights` of at least 0 with the sum 1"),
        ({"weights": (1.5, -0.5)}, "`weights` of at least 0 with the sum 1"),
        ({"weights": (1.0,)}, "one for each of the 2 levels"),
        ({"hypergrad_lr": -1.0}, "`hypergrad_lr` of at least 0"),
        ({"weights_lr": -1.0}, "`weights_lr` of at least 0"),
        ({"weights_lr": float("nan")}, "`weights_lr` of at least 0"),
        ({"norm": "max"}, "`norm` to be one of 'softmax', 'sum'"),
        ({"coupling": "explicit"}, "`coupling` to be one of"),
        (
            {"coupling": "virtual", "coupling_strength": 1.5},
            r"`coupling_strength` in \[0, 1\] with the virtual coupling",
        ),
        ({"coupling_strength": -1.0}, "`coupling_strength` of at least 0"),
        ({"momentum": 1.0}, r"`momentum` in \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"`betas\[1\]` in \[0, 1\)"),
        ({"eps": -1.0}, "`eps` of at least 0"),
        ({"weight_decay": -1.0}, "`weight_decay` of at least 0"),
        ({"lr": -1.0}, "`lr` from `lr_min` to `lr_max`"),
        ({"lr": math.inf}, "`lr` from `lr_min` to `lr_max`"),
        ({"lr_min": 1.0, "lr_max": 0.5}, "`lr_min` of at most `lr_max`"),
        ({"max_change": 0.0}, "`max_change` above 0"),
        ({"capturable": True}, "`capturable=True`"),
        ({"differentiable": True}, "`differentiable=True`"),
        ({"grouping": str.upper}, r"pass `model.named_parameters\(\)`"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CAMHD(network().parameters(), **options)


def test_a_scheduler_is_refused():
    model = network()
    optimizer = CAMHD(model.named_parameters(), 0.01)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="A learning-rate scheduler writes the rate of CAMHD"):
        optimizer.step()


def test_groups_have_options_of_their_own_and_are_independent():
    model, other = network(), network()
    groups = [
        {"params": list(model[0].named_parameters()), "levels": ("unit", "global"), "weights": (0.2, 0.8)},
        {"params": [(f"3.{n}", p) for n, p in model[3].named_parameters()], "base": "adam", "lr": 0.02},
    ]
    optimizer = CAMHD(groups, 0.01)
    train(model, optimizer)
    assert optimizer.param_groups[0]["levels"] == ("global", "unit")
    assert [g["hypergrad_lr"] for g in optimizer.param_groups] == [1e-3, 1e-8]
    assert {"lr/0", "lr/1", "unit//0", "layer/3/1", "weight/global/0", "weight/layer/1"} <= set(optimizer.rates())
    assert torch.equal(flat(model[1]), flat(other[1]))


def test_a_tensor_serves_as_rate():
    model, other = network(), network()
    train(model, CAMHD(model.named_parameters(), torch.tensor(0.01, dtype=torch.float64), levels=LEVELS))
    train(other, CAMHD(other.named_parameters(), 0.01, levels=LEVELS))
    assert torch.equal(flat(model), flat(other))


def test_each_matrix_of_a_layer_has_units_with_its_own_bias():
    lstm = nn.LSTM(3, 2)
    names, params = zip(*lstm.named_parameters(), strict=True)
    layers = Layers(params, names)
    assert layers.names == [""]
    assert [[names[i] for i in units.members] for units in layers.unit_groups] == [
        ["weight_ih_l0", "bias_ih_l0"],
        ["weight_hh_l0", "bias_hh_l0"],
    ]
