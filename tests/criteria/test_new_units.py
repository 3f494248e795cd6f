"""Forms of units that are not there yet, against what they are for known layers, and against autograd for any."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grow.criteria import Objective, UnitVectors
from lightning_grow.criteria.new_units import NewUnits
from lightning_grow.criteria.transparent import refusal, transparent_values
from lightning_grow.structure import StructureError, trace
from lightning_grow.surgery import apply_, widen
from tests.zoo import ZOO


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y = draws(24, 5), draws(24, 6, seed=1)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def perceptron(activation):
    return seeded(lambda: nn.Sequential(nn.Linear(5, 7), activation, nn.Linear(7, 6)))


def mean_square(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def matrix(model, x=X, y=Y):
    """The gradient of the mean loss at the output, times the input: ``M`` of a perceptron."""
    return (2 * (model(x) - y) / y.numel()).detach().T @ x


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)


class Maximum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("activation", "slope", "at_zero"),
    [
        (nn.Tanh(), 1.0, 1.0),
        (nn.Identity(), 1.0, 1.0),
        (nn.GELU(), 0.5, 1.0),
        (nn.SiLU(), 0.5, 1.0),
        (nn.Sigmoid(), 0.25, 1.0),
        (nn.ReLU(), 1.0, 0.0),
        (Clamp(), 1.0, 2.0),
        (Maximum(), 0.5, 1.0),
        (nn.LeakyReLU(0.5), 0.5, 2 / 3),
    ],
)
def test_the_form_is_the_slope_times_the_matrix(activation, slope, at_zero):
    """For activations with a kink, too; `look` tells what units would get at exactly zero."""
    model = perceptron(activation)
    new = NewUnits(model, [trace(model, X)["0"]], Objective(mean_square, [(X, Y)]))
    form = new.form("0")
    torch.testing.assert_close(form[:, :5], slope * matrix(model), rtol=1e-8, atol=1e-10)
    assert (form[:, 5] == 0).all(), "biases do not count"
    new.look()
    assert new.spaces["0"].slope == pytest.approx(at_zero, abs=1e-6)
    assert new.spaces["0"].constant == isinstance(activation, nn.Sigmoid)


@pytest.mark.parametrize("layers", ["bias", "norm", "neither"])
def test_behind_relu_the_form_is_measured_with_a_bias_or_with_both_signs(layers):
    """A positive bias, of the layer or of a norm, puts new units where the ReLU is linear; without any, pairs do."""
    norm = [nn.BatchNorm1d(7)] if layers == "norm" else []
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 7, bias=layers == "bias"), *norm, nn.ReLU(), nn.Linear(7, 6)))
    model.eval()
    new = NewUnits(model, [trace(model, X)["0"]], Objective(mean_square, [(X, Y)]))
    slope = 0.5 if layers == "neither" else 1.0
    expected = slope * matrix(model)
    rows, columns = draws(3, 6), torch.cat([draws(2, 5, seed=2), torch.zeros(2, 1)], dim=1)[:, : 5 + (layers == "bias")]
    by_in, by_out = new.products({"0": rows}, {"0": columns})["0"]
    torch.testing.assert_close(by_in[:, :5], rows @ expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(by_out, columns[:, :5] @ expected.T, rtol=1e-5, atol=1e-8)


def test_both_sides_of_the_form_agree_and_groups_share_a_pass():
    """Fan-in gradients are rows times the form, fan-out gradients the form times columns, for all groups at once."""
    entry = ZOO["mlp"]
    model, (args, _) = entry.build(), entry.inputs()
    structure = trace(model, *args)
    y = draws(6, 3)
    objective = Objective(mean_square, [(args[0], y)])
    alone = {name: NewUnits(model, [structure[name]], objective).form(name) for name in structure}
    new = NewUnits(model, [structure[name] for name in structure], objective)
    rows = {name: draws(3, form.shape[0]) for name, form in alone.items()}
    columns = {name: draws(2, form.shape[1], seed=2) for name, form in alone.items()}
    for name, (by_in, by_out) in new.products(rows, columns).items():
        torch.testing.assert_close(by_in, rows[name] @ alone[name], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(by_out, columns[name] @ alone[name].T, rtol=1e-5, atol=1e-8)
    assert new.passes == 1


GEOMETRIES = [
    {"first": (3, 1, 1), "second": (3, 1, 1)},
    {"first": (3, 2, 1), "second": (3, 1, 1)},
    {"first": (3, 1, 1), "second": (3, 2, 1)},
    {"first": (5, 2, 2), "second": (3, 2, 0)},
    {"first": (1, 1, 0), "second": (3, 2, 1)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_form_of_convolutions_is_exact_at_the_borders(geometry):
    """Against the explicit matrix: patches times gradients gathered back by the transposed convolution of each tap."""
    (k1, s1, p1), (k2, s2, p2) = geometry["first"], geometry["second"]
    conv1, conv2 = nn.Conv2d(2, 3, k1, s1, p1), nn.Conv2d(3, 4, k2, s2, p2)
    model = seeded(lambda: nn.Sequential(conv1, nn.Tanh(), conv2))
    x = draws(3, 2, 8, 7)
    target = draws(*model(x).shape, seed=1)
    form = NewUnits(model, [trace(model, x)["0"]], Objective(mean_square, [(x, target)])).form("0")

    delta = (2 * (model(x) - target) / target.numel()).detach()
    hidden = model[0](x).shape[2:]
    patches = F.unfold(x, k1, 1, p1, s1)
    taps = torch.eye(k2 * k2, dtype=torch.float64).reshape(1, k2 * k2, k2, k2)
    short = [hidden[i] - ((delta.shape[2 + i] - 1) * s2 - 2 * p2 + k2) for i in (0, 1)]
    back = F.conv_transpose2d(delta.reshape(-1, 1, *delta.shape[2:]), taps, None, s2, p2, short)
    expected = torch.einsum("bip,bjp->ji", patches, back.reshape(3, 4 * k2 * k2, -1))
    torch.testing.assert_close(form[:, :-1], expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["cnn_batch_norm", "gated_ffn", "attention_of_heads", "lstm", "unet", "concat_raw"])
def test_any_unit_gets_the_gradient_that_the_form_says(name):
    """Ordinary new units of an ordinary edited model: their fan-in gradient is their fan-out times the form."""
    entry = ZOO[name]
    model, (args, kwargs) = entry.build().eval(), entry.inputs()
    structure = trace(model, *args, **kwargs)
    groups = [group for group in structure.groups.values() if refusal(model, group) is None]
    assert groups
    weights = draws(*model(*args, **kwargs).shape, seed=3)
    objective = Objective(lambda m, _: (m(*args, **kwargs) * weights).sum(), [None])
    new = NewUnits(model, groups, objective)
    new.look()
    for group in groups:
        space = new.spaces[group.name]
        if abs(space.slope - 1) > 1e-6:
            continue  # relu gives no gradient at zero: see above
        fan_out = draws(2, space.fan_out_length, seed=4)
        expected = new.products({group.name: fan_out}, {})[group.name][0]
        grown = entry.build().eval()
        apply_(grown, [new.edit(group.name, torch.zeros(2, len(space.free), dtype=torch.float64), fan_out)])
        torch.testing.assert_close(grown(*args, **kwargs), model(*args, **kwargs), rtol=1e-12, atol=1e-12)
        wider = trace(grown, *args, **kwargs)[group.name]
        vectors = UnitVectors(grown, wider, "produced")
        _, gradients = objective.gradients(grown, vectors.parameters)
        found = vectors.of(gradients)[-2:]
        keep = _known(grown, wider, group.size)
        torch.testing.assert_close(found[:, keep] * space.free, expected, rtol=1e-6, atol=1e-9)
        assert expected.norm() > 1e-4


def _known(model, group, size):
    """Entries of a fan-in that do not read new units of the same group (recurrent layers do)."""
    vectors = UnitVectors(model, group, "produced")
    marks = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for axis in group.with_role("consumed"):
        if axis.tensor in vectors.parameters:
            marks[axis.tensor].narrow(axis.dim, size, group.size - size).zero_()
    return vectors.of(marks)[0] > 0


@pytest.mark.parametrize(
    ("name", "group", "free"), [("attention_of_heads", "1.attention.q", "v"), ("lstm", "cell", "g")]
)
def test_gates_queries_and_keys_stay_random(name, group, free):
    """Only what the output of a unit is linear in begins at zero; else heads would be stuck at a saddle."""
    entry = ZOO[name]
    model, (args, kwargs) = entry.build(), entry.inputs()
    structure = trace(model, *args, **kwargs)
    weights = draws(*model(*args, **kwargs).shape, seed=3)
    objective = Objective(lambda m, _: (m(*args, **kwargs) * weights).sum(), [None])
    space = NewUnits(model, [structure[group]], objective).spaces[group]
    vectors = UnitVectors(model, structure[group], "produced")
    marks = {parameter: torch.zeros_like(dict(model.named_parameters())[parameter]) for parameter in vectors.parameters}
    for parameter, mark in marks.items():
        if free == "v" and parameter.endswith("v.weight"):
            mark.fill_(1)
        if free == "g" and "weight" in parameter:
            mark[12:18] = 1  # input, forget, cell, output: six rows each
    assert torch.equal(space.free, vectors.of(marks)[0] > 0)
    assert (space.base[space.free] == 0).all()
    assert space.base.abs().max() > 0


def random_matrix_model(p=30, q=40):
    """A perceptron whose matrix has a spectrum that falls by ten percent from value to value."""
    model = seeded(lambda: nn.Sequential(nn.Linear(p, 9), nn.Tanh(), nn.Linear(9, q)))
    x = draws(60, p) * 0.9 ** torch.arange(p)
    return model, x, draws(60, q, seed=1)


def test_leading_pairs_are_exact_where_the_sketch_spans_the_shorter_side():
    model, x, y = random_matrix_model(p=6)
    new = NewUnits(model, [trace(model, x)["0"]], Objective(mean_square, [(x, y)]))
    pairs = new.leading({"0": 4}, oversampling=2)["0"]
    assert new.passes == 1
    left, values, right = torch.linalg.svd(matrix(model, x, y), full_matrices=False)
    torch.testing.assert_close(pairs.values, values[:4], rtol=1e-6, atol=0)
    torch.testing.assert_close((pairs.fan_out * left.T[:4]).sum(dim=1).abs(), torch.ones_like(values[:4]))
    torch.testing.assert_close((pairs.fan_in[:, :6] * right[:4]).sum(dim=1).abs(), torch.ones_like(values[:4]))
    largest = pairs.fan_out.gather(1, pairs.fan_out.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all(), "signs do not depend on the solver"


@pytest.mark.parametrize(("passes", "least"), [(2, 0.9), (3, 0.97), (5, 0.999)])
def test_more_passes_come_closer_to_the_leading_pairs(passes, least):
    """What the sketch finds, measured by what units with these fan-outs would get."""
    model, x, y = random_matrix_model()
    new = NewUnits(model, [trace(model, x)["0"]], Objective(mean_square, [(x, y)]))
    pairs = new.leading({"0": 5}, oversampling=4, passes=passes)["0"]
    assert new.passes == passes
    m = matrix(model, x, y)
    best = torch.linalg.svdvals(m)[:5].square().sum()
    got = (pairs.fan_out @ m).square().sum()
    assert least < got / best <= 1 + 1e-9
    torch.testing.assert_close(pairs.fan_out @ pairs.fan_out.T, torch.eye(5, dtype=torch.float64))


def test_fewer_pairs_than_wanted_where_the_rank_is_lower():
    model = perceptron(nn.Tanh())
    one = X[:1]
    new = NewUnits(model, [trace(model, one)["0"]], Objective(mean_square, [(one, Y[:1])]))
    assert len(new.leading({"0": 4})["0"].values) == 1


def test_what_units_pass_on_their_way_lets_them_through_in_train_mode_too():
    """A batch norm would multiply the gradient by 316: its gain for new units makes up for that."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6))).train()
    group = trace(model, X)["0"]
    values = transparent_values(model, group, 2)
    assert values["1.weight[0]"].tolist() == [1e-5**0.5] * 2
    fan_out = draws(6, 2, seed=5)
    values |= {"0.weight[0]": torch.zeros(2, 5, dtype=torch.float64), "3.weight[1]": fan_out}
    apply_(model, [widen(group, 2, values=values)])
    norms = {}
    for train in (False, True):
        loss = mean_square(model.train(train), (X, Y))
        (gradient,) = torch.autograd.grad(loss, [model[0].weight])
        norms[train] = float(gradient[-2:].norm())
    assert 0.5 < norms[True] / norms[False] < 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m[0].requires_grad_(False), "fan-in is frozen"),
        (lambda m: m[2].requires_grad_(False), "fan-out is frozen"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[0]), "parametrized"),
    ],
)
def test_refusals_say_why(change, why):
    model = perceptron(nn.Tanh())
    change(model)
    group = trace(model, X)["0"]
    assert why in refusal(model, group)
    with pytest.raises(StructureError, match=f"'0' cannot begin at zero: .*{why}"):
        NewUnits(model, [group], Objective(mean_square, [(X, Y)]))
    told = {}
    new = NewUnits(model, [group], Objective(mean_square, [(X, Y)]), on_refusal=told.__setitem__)
    assert new.spaces == {}
    assert why in told["0"]


def test_groups_with_an_obstacle_and_squared_units_are_refused():
    entry = ZOO["layer_norm"]
    args, kwargs = entry.inputs()
    model = entry.build()
    group = next(g for g in trace(model, *args, **kwargs).groups.values() if g.obstacle)
    assert refusal(model, group) == group.obstacle
    entry = ZOO["every_unit_with_its_own_kind"]
    args, kwargs = entry.inputs()
    model = entry.build()
    assert refusal(model, trace(model, *args, **kwargs)["hidden"]) == "they are multiplied with each other"
