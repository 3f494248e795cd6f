"""Gauss-Newton morphisms: the curvature is the right one, predictions hold, what cannot be is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.criteria import GaussNewtonModel, MeasurementError, Objective, Splits
from lightning_grow.criteria.overgrown import Overgrown
from lightning_grow.criteria.second_order import unseen_groups
from lightning_grow.growth import GaussNewton
from lightning_grow.growth.gauss_newton import (
    backed_off,
    exchanged,
    gauss_newton,
    gauss_newton_splits,
    split_edit,
)
from lightning_grow.structure import StructureError, trace
from lightning_grow.surgery import apply_, prune
from tests.zoo import ZOO


def seeded(number=0):
    return torch.Generator().manual_seed(number)


X = torch.randn(40, 4, dtype=torch.float64, generator=seeded())
Y = (X[:, 0] * X[:, 1] + 0.3 * X[:, 2] > 0).long()


def perceptron(activation=nn.ReLU, outputs=3, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = [nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation()]
        return nn.Sequential(*inner, nn.Linear(5, outputs)).double()


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


OBJECTIVE = Objective(cross_entropy, [(X[:20], Y[:20]), (X[20:], Y[20:])])


def around(model, objective=OBJECTIVE, **arguments):
    groups = list(trace(model, objective.batches[0][0]).groups.values())
    return GaussNewtonModel(model, groups, objective, seeded(), **arguments)


def offsets_of(approximation, scale=1.0, seed=3):
    generator = seeded(seed)
    fan_ins = {name: approximation.fan_in(name) for name in approximation.groups}
    return {n: scale * torch.randn(v.shape, dtype=v.dtype, generator=generator) for n, v in fan_ins.items()}


# -- the approximation ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_offset_keeps_the_function_and_predicts_nothing():
    """T5.1."""
    model = perceptron()
    approximation = around(model)
    for name, effects in approximation.splits(offsets_of(approximation, 0.0)).items():
        assert effects.change.abs().max() < 1e-16, name
    group = approximation.groups["0"]
    edit = split_edit(model, group, {1: torch.zeros(5, dtype=torch.float64), 4: torch.zeros(5, dtype=torch.float64)})
    expected = model(X)
    apply_(model, [edit])
    assert model[0].out_features == 8
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-13)


def test_the_sign_of_an_offset_does_not_matter():
    """T5.2."""
    approximation = around(perceptron())
    offsets = offsets_of(approximation)
    one = approximation.splits(offsets)
    other = approximation.splits({name: -offset for name, offset in offsets.items()})
    for name in one:
        torch.testing.assert_close(one[name].change, other[name].change, rtol=1e-12, atol=1e-14)


def outer_gradients(model):
    """Return activations and gradients of the mean loss at them, of the last hidden layer, for a batch of all."""
    hidden = model[:-1](X).detach().requires_grad_()
    logits = model[-1](hidden)
    (delta,) = torch.autograd.grad(F.cross_entropy(logits, Y), hidden)
    return hidden.detach(), delta, logits.detach().softmax(-1)


def test_splits_of_rectifiers_have_a_closed_form():
    r"""T5.3: the activation rises by max(0, |theta x| - |z|) / 2."""
    model = perceptron()
    approximation = around(model, Objective(cross_entropy, [(X, Y)]))
    offsets = offsets_of(approximation)
    read = model[:2](X).detach()
    z = model[2](read).detach()
    t = read @ offsets["2"][:, :6].T + offsets["2"][:, 6]
    rise = (t.abs() - z.abs()).clamp(min=0) / 2
    _, delta, _ = outer_gradients(model)
    torch.testing.assert_close(approximation.splits(offsets)["2"].linear, (delta * rise).sum(dim=0))


@pytest.mark.parametrize("labels", ["exact", "signs", "sampled"])
def test_the_curvature_is_that_of_the_models_own_labels(labels):
    """T5.4: for the last hidden layer sum_c p_c V_ck^2 - (sum_c p_c V_ck)^2 in closed form."""
    model = perceptron()
    objective = Objective(cross_entropy, [(X, Y)])
    approximation = around(model, objective, labels=labels, num_draws=1 if labels == "exact" else 1000)
    a, _, p = outer_gradients(model)
    v = model[-1].weight.detach()
    curvature = p @ v.square() - (p @ v).square()
    expected = (curvature * a.square()).mean(dim=0)
    tolerance = {"rtol": 1e-10, "atol": 1e-14} if labels == "exact" else {"rtol": 0.1, "atol": 1e-6}
    torch.testing.assert_close(approximation.removals()["2"].quadratic, expected, **tolerance)


def hessian_along(model, objective_of, outputs_of, group, unit):
    """Return the Gauss-Newton curvature of the loss along a gate on a unit, by differentiating twice."""
    base = outputs_of(model).detach()
    gone = copy.deepcopy(model)
    step = 1e-4

    def shifted(share):
        trial = copy.deepcopy(gone)
        with torch.no_grad():
            for axis in group.with_role("consumed"):
                trial.get_parameter(axis.tensor).select(axis.dim, unit).mul_(1 + share)
        return outputs_of(trial).detach()

    slope = (shifted(step) - shifted(-step)) / (2 * step)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = objective_of(base + t * slope)
    (first,) = torch.autograd.grad(loss, t, create_graph=True)
    return float(torch.autograd.grad(first, t)[0])


LOSSES = {
    "cross_entropy": lambda f: F.cross_entropy(f, Y),
    "weighted": lambda f: 0.5 * F.cross_entropy(f, Y, weight=torch.tensor([1.0, 3.0, 0.5]).double()),
    "smoothed": lambda f: F.cross_entropy(f, Y, label_smoothing=0.2),
    "summed": lambda f: F.cross_entropy(f, Y, reduction="sum"),
    "row by row": lambda f: (F.cross_entropy(f, Y, reduction="none") * torch.linspace(0, 1, 40)).mean(),
    "ignoring": lambda f: F.cross_entropy(f, torch.where(torch.arange(40) < 9, -100, Y)),
    "probabilities": lambda f: F.cross_entropy(f, F.one_hot(Y, 3).double() * 0.7 + 0.1),
    "nll": lambda f: F.nll_loss(f.log_softmax(-1), Y),
    "mse": lambda f: F.mse_loss(f, F.one_hot(Y, 3).double()),
    "halved mse": lambda f: 0.5 * F.mse_loss(f, F.one_hot(Y, 3).double(), reduction="sum") / 40,
    "binary": lambda f: F.binary_cross_entropy_with_logits(f, F.one_hot(Y, 3).double()),
    "rare positives": lambda f: F.binary_cross_entropy_with_logits(
        f, F.one_hot(Y, 3).double(), pos_weight=torch.tensor([1.0, 2.0, 5.0]).double()
    ),
    "two losses": lambda f: F.cross_entropy(f, Y) + 0.3 * F.mse_loss(f, torch.zeros_like(f)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_curvature_is_exact_for_every_known_loss(loss):
    """The second derivative of the loss along what a unit does to the outputs, linearised."""
    model = perceptron()
    approximation = around(model, Objective(lambda m, x: loss(m(x)), [X]), labels="exact")
    found = approximation.removals()
    for name, group in approximation.groups.items():
        expected = [hessian_along(model, loss, lambda m: m(X), group, unit) for unit in range(group.size)]
        torch.testing.assert_close(found[name].quadratic.tolist(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["cnn_batch_norm", "flatten_head", "concat_raw", "residual_cnn"])
def test_convolutions_sum_over_positions_inside_the_square(name):
    """The same second derivative, for channels that are read at many places, by several layers."""
    entry = ZOO[name]
    model = entry.build().eval()
    args, kwargs = entry.inputs()

    def outputs_of(m):
        return m(*args, **kwargs).flatten(1)

    def loss(f):
        return F.cross_entropy(f, torch.zeros(len(f), dtype=torch.long))

    structure = trace(model, *args, **kwargs)
    groups = [g for g in structure.groups.values() if g.obstacle is None]
    objective = Objective(lambda m, _: loss(outputs_of(m)), [None])
    found = GaussNewtonModel(model, groups, objective, seeded(), labels="exact").removals()
    for group in groups:
        gate = group.with_role("consumed")
        if len(gate) == 1 and model.get_parameter(gate[0].tensor).shape[gate[0].dim] == group.size:
            expected = hessian_along(model, loss, outputs_of, group, 0)
            torch.testing.assert_close(float(found[group.name].quadratic[0]), expected, rtol=1e-5, atol=1e-9)


def test_positions_of_a_sequence_have_labels_of_their_own():
    """Curvature adds up over positions: labels of two positions are independent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = X.reshape(8, 5, 4), Y.reshape(8, 5)
    flat = around(model, Objective(cross_entropy, [(X, Y)]), labels="exact").removals()["0"].quadratic
    objective = Objective(lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()), [(x, y)] * 100)
    group = trace(model, x)["0"]
    found = GaussNewtonModel(model, [group], objective, seeded(), labels="exact").removals()["0"].quadratic
    torch.testing.assert_close(found, flat, rtol=0.2, atol=0)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
def test_short_offsets_have_the_splitting_matrix(activation):
    r"""T5.9: the linear term is theta S theta / 2, up to a relative error of the order of theta squared."""
    model = perceptron(activation)
    approximation = around(model)
    splits = Splits(model, list(approximation.groups.values()), OBJECTIVE, radius=1e-4)
    directions = splits.directions(seeded())
    products = splits.products(directions)
    errors = []
    for scale in (1e-1, 1e-2):
        effects = approximation.splits({name: scale * v for name, v in directions.items()})
        found = torch.cat([effects[name].linear for name in directions])
        limit = torch.cat([(directions[n] * products[n]).sum(dim=1) / 2 * scale**2 for n in directions])
        errors.append(float((found - limit).norm() / limit.norm()))
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] > 50


def test_slopes_are_the_derivative_of_what_is_predicted():
    approximation = around(perceptron(nn.Tanh))
    offsets = offsets_of(approximation, 0.5)
    slopes = approximation.slopes(offsets)
    direction = offsets_of(approximation, 1e-6, seed=4)
    for name in offsets:
        up = approximation.splits({name: offsets[name] + direction[name]})[name].change
        down = approximation.splits({name: offsets[name] - direction[name]})[name].change
        torch.testing.assert_close((up - down) / 2, (slopes[name] * direction[name]).sum(dim=1), rtol=1e-5, atol=1e-14)


def test_batches_are_averaged_like_one_large_batch():
    model = perceptron()
    parts, whole = around(model), around(model, Objective(cross_entropy, [(X, Y)]))
    offsets = offsets_of(parts)
    for name, effects in parts.splits(offsets).items():
        torch.testing.assert_close(effects.linear, whole.splits(offsets)[name].linear)
        torch.testing.assert_close(effects.quadratic, whole.splits(offsets)[name].quadratic)


# -- what comes of it -------------------------------------------------------------------------------------------------


def ranks(values):
    v = torch.as_tensor(values, dtype=torch.float64)
    below, equal = v[:, None] > v[None], v[:, None] == v[None]
    return below.sum(dim=1) + (equal.sum(dim=1) - 1) / 2.0


def spearman(one, other):
    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1])


def trained(seed):
    model = perceptron(seed=seed, outputs=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model, (X, Y)).backward()
        optimizer.step()
    model.zero_grad()
    return model


def test_predictions_rank_splits_and_removals():
    """T5.5 and T5.6: medians over five trained nets, with the exact mean over labels."""
    objective = Objective(cross_entropy, [(X, Y)])
    by_split, by_removal = [], []
    for seed in range(5):
        model = trained(seed)
        approximation = around(model, objective)
        base = objective.value(model)
        splits = gauss_newton_splits(approximation, seeded(), steps=40, restarts=1)
        removals = approximation.removals()
        predicted, true, rise, risen = [], [], [], []
        for name, group in approximation.groups.items():
            for unit in range(group.size):
                edit = split_edit(model, group, {unit: splits[name].offsets[unit]})
                true.append(round(base - objective.value(Overgrown(model, [edit]).model), 12))
                predicted.append(float(splits[name].gains[unit]))
                risen.append(objective.value(Overgrown(model, [prune(group, [unit])]).model) - base)
                rise.append(float(removals[name].change[unit]))
        by_split.append(spearman(predicted, true))
        by_removal.append(spearman(rise, risen))
    assert sorted(by_split)[2] > 0.6, by_split
    assert sorted(by_removal)[2] > 0.6, by_removal


@torch.no_grad()
def test_dead_units_and_units_that_nothing_hears_are_never_split():
    """T5.7, T5.8."""
    model = perceptron()
    model[0].weight[2] = 0
    model[0].bias[2] = -1.0
    model[4].weight[:, 3] = 0
    splits = gauss_newton_splits(around(model), seeded(), steps=30)
    assert splits["2"].gains[3] == 0
    dead = gauss_newton_splits(around(model), seeded(), steps=30, max_length=0.5, start_length=0.1)
    assert dead["0"].gains[2] == 0
    edits = gauss_newton(model, list(trace(model, X).groups.values()), OBJECTIVE, 11, steps=30)
    counts = {edit.group.name: [edit.index.count(unit) for unit in range(edit.group.size)] for edit, _ in edits}
    assert counts["2"][3] == 1  # a longer offset than the one above may wake a dead unit, but none is heard here


def test_learning_lowers_what_is_predicted():
    approximation = around(trained(0))
    short = gauss_newton_splits(approximation, seeded(), steps=1, restarts=1)
    long = gauss_newton_splits(approximation, seeded(), steps=40, restarts=1)
    assert sum(m.gains.sum() for m in long.values()) > sum(m.gains.sum() for m in short.values())


@pytest.mark.parametrize("max_length", [0.4, 1.0])
def test_offsets_stay_within_their_bound(max_length):
    approximation = around(trained(0))
    found = gauss_newton_splits(approximation, seeded(), steps=40, restarts=1, max_length=max_length, lr=0.5)
    for name, morphisms in found.items():
        lengths = morphisms.offsets.norm(dim=1) / approximation.fan_in(name).norm(dim=1)
        assert lengths.max() <= max_length * (1 + 1e-9)


def test_the_loss_falls_and_no_more_units_come_than_asked_for():
    """T5.10, and the true loss falls on what was held out."""
    model = trained(1)
    groups = list(trace(model, X).groups.values())
    objective = Objective(cross_entropy, [(X, Y), (X[:30], Y[:30])])
    for num_units in (1, 3):
        edits = gauss_newton(model, groups, objective, num_units, steps=30)
        grown = copy.deepcopy(model)
        apply_(grown, [edit for edit, _ in edits])
        assert 0 < sum(e.new_size - e.group.size for e, _ in edits) <= num_units
        held_out = objective.batches[1]
        assert cross_entropy(grown, held_out) < cross_entropy(model, held_out)
        assert all(gain > 0 for _, gain in edits)


def test_what_raises_the_true_loss_is_halved_or_dropped():
    model = trained(2)
    structure = trace(model, X)
    groups = dict(structure.groups)
    wild = {name: 30 * torch.randn(g.size, {"0": 5, "2": 7}[name], dtype=torch.float64) for name, g in groups.items()}
    chosen = {name: list(range(g.size)) for name, g in groups.items()}
    kept = backed_off(model, groups, chosen, wild, OBJECTIVE)
    base = OBJECTIVE.value(copy.deepcopy(model))
    assert sum(len(units) for units in kept.values()) < 11
    for name, units in kept.items():
        for unit, offset in units.items():
            halvings = torch.log2(wild[name][unit].norm() / offset.norm())
            assert float(halvings) in [0, 1, 2, 3, 4, 5, 6]
    if kept:
        edits = [split_edit(model, groups[name], units) for name, units in kept.items()]
        assert OBJECTIVE.value(Overgrown(model, edits).model) < base


def test_a_useless_unit_goes_in_exchange_for_a_split():
    model = trained(1)
    with torch.no_grad():
        model[2].weight[:, 0] = 0  # nothing hears unit 0 of the first layer
    approximation = around(model)
    gains = {name: torch.full((g.size,), 0.1) for name, g in approximation.groups.items()}
    splits = {"2": {1: torch.ones(7, dtype=torch.float64)}}
    rises = {name: effects.change for name, effects in approximation.removals().items()}
    assert rises["0"][0] == 0
    rises["2"][1] = float("inf")  # it splits
    name = min(rises, key=lambda n: float(rises[n].min()))
    least = {name: [int(rises[name].argmin())]}
    assert exchanged(approximation, splits, gains, 1, {}) == least
    assert exchanged(approximation, splits, gains, 5, {}) == least  # one split, one exchange
    assert name not in exchanged(approximation, splits, gains, 1, {name: approximation.groups[name].size})
    low = {n: torch.full((g.size,), -9.0) for n, g in approximation.groups.items()}
    assert exchanged(approximation, splits, low, 5, {}) == {}
    assert exchanged(approximation, {}, gains, 1, {}) == {}
    offset = torch.randn(7, dtype=torch.float64, generator=seeded())
    group = approximation.groups["2"]
    one, both = copy.deepcopy(model), copy.deepcopy(model)
    apply_(one, [split_edit(model, group, {1: offset})])
    apply_(both, [split_edit(model, group, {1: offset}, without=[0])])
    assert torch.equal(one[2].weight[1:], both[2].weight)
    assert torch.equal(one[4].weight[:, 1:], both[4].weight)


def test_equal_draws_give_equal_edits():
    model = trained(0)
    groups = list(trace(model, X).groups.values())
    one, other = (gauss_newton(model, groups, OBJECTIVE, 3, seeded(), steps=10, num_draws=1) for _ in range(2))
    for (a, gain), (b, same) in zip(one, other, strict=True):
        assert (a.index, gain) == (b.index, same)
        for label, shift in a.shifts.items():
            assert torch.equal(shift, b.shifts[label])


def test_what_else_is_drawn_does_not_depend_on_the_batches():
    """Processes with batches of other sizes draw the same directions."""
    model, states = perceptron(), []
    for size in (10, 40):
        generator = seeded()
        groups = list(trace(model, X).groups.values())
        GaussNewtonModel(model, groups, Objective(cross_entropy, [(X[:size], Y[:size])]), generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda f: f.square().mean(), "no labels, or they are hidden"),
        (lambda f: F.mse_loss(f, f * 2), "labels of the loss are computed"),
        (lambda f: -F.cross_entropy(f, Y), "negative weight"),
        (lambda f: F.cross_entropy(f, Y) * float("nan"), "not finite"),
    ],
)
def test_a_loss_without_usable_labels_is_refused(loss, message):
    model = perceptron()
    objective = Objective(lambda m, x: loss(m(x)), [X])
    groups = list(trace(model, X).groups.values())
    with pytest.raises(MeasurementError, match=message):
        gauss_newton(model, groups, objective, 1)


def test_a_likelihood_of_another_kind_does_not_count():
    with pytest.raises(MeasurementError, match="a mse loss"):
        around(perceptron(), likelihood="mse")


def test_groups_that_others_read_are_refused_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.make = nn.Linear(4, 6)
            self.more = nn.Linear(6, 5)
            self.last = nn.Parameter(torch.randn(5, 2))

        def forward(self, x):
            return torch.einsum("nk,kc->nc", self.more(self.make(x).tanh()).tanh(), self.last)

    model = Odd().double()
    structure = trace(model, X)
    groups = list(structure.groups.values())
    assert len(groups) == 2
    assert unseen_groups(model, groups, OBJECTIVE) == ["more"]
    with pytest.raises(StructureError, match="what more contribute: something other than linear"):
        gauss_newton(model, groups, OBJECTIVE, 1)


def test_frozen_fan_ins_and_obstacles_are_refused():
    model = perceptron()
    groups = list(trace(model, X).groups.values())
    model[0].requires_grad_(False)
    with pytest.raises(MeasurementError, match="fan-in of '0' is frozen"):
        gauss_newton(model, groups, OBJECTIVE, 1)
    normed = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    with pytest.raises(StructureError, match="keep the function"):
        gauss_newton(normed, list(trace(normed, X).groups.values()), OBJECTIVE, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"likelihood": "poisson"}, {"steps": 0}, {"restarts": 0}, {"num_draws": 0}, {"num_pruned": -1},
        {"window_batches": 0},
        {"damping": -1.0}, {"cost": "euros"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(MisconfigurationException, match=f"`{next(iter(wrong))}` should be"):
        GaussNewton(**wrong)


def test_the_model_is_left_as_it_was():
    model = trained(0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    gauss_newton(model, list(trace(model, X).groups.values()), OBJECTIVE, 2, steps=5, num_pruned=1)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
