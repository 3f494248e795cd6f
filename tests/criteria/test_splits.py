"""Splitting matrices: the closed forms, what predicted gains are worth, any kind of unit, three ways to the ends."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_grow.criteria import (
    MeasurementError,
    Objective,
    Offspring,
    Overgrown,
    Splits,
    apart,
    can_split,
    exact,
    extremes,
    lanczos,
    offspring_edit,
    rayleigh,
    splitting_matrices,
)
from lightning_grow.criteria.lift import difference
from lightning_grow.structure import StructureError, trace
from lightning_grow.surgery import apply_
from tests.zoo import THIRD_PARTY, ZOO

X = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(*layers):
    """Return a sequence of layers in double precision, with weights of its own seed, large enough to bend."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(*(layer() for layer in layers)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.7)
        return model


def mlp(activation=nn.Tanh):
    return build(lambda: nn.Linear(4, 5), activation, lambda: nn.Linear(5, 2))


def deep():
    return build(lambda: nn.Linear(4, 5), nn.Tanh, lambda: nn.Linear(5, 6), nn.SiLU, lambda: nn.Linear(6, 2))


def squared(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


OBJECTIVE = Objective(squared, [(X, Y)])


def matrices(model, objective=OBJECTIVE, x=X, radius=1e-4):
    groups = [g for g in trace(model, x).groups.values() if can_split(model, g)]
    return splitting_matrices(Splits(model, groups, objective, radius))


def pre_activation_gradients(model, place, x=X, y=Y):
    """Return the input of a layer, its output, and the gradient of the loss with respect to what follows it."""
    kept = {}
    inner = model[place].register_forward_hook(lambda _m, args, out: kept.update(x=args[0], z=out))

    def keep(_module, _args, out):
        out.retain_grad()
        kept["h"] = out

    outer = model[place + 1].register_forward_hook(keep)
    F.mse_loss(model(x), y).backward()
    inner.remove()
    outer.remove()
    return kept["x"].detach(), kept["z"].detach(), kept["h"].grad


def second_tanh(z):
    t = torch.tanh(z)
    return -2 * t * (1 - t**2)


def with_ones(x):
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def test_closed_form_of_a_linear_layer_with_bias():
    """[D]: S_i is the sum over the batch of g f''(z) times the outer product of the input with itself."""
    model = mlp()
    found = matrices(model)["0"]
    x, z, g = pre_activation_gradients(model, 0)
    expected = torch.einsum("bi,bk,bl->ikl", g * second_tanh(z), with_ones(x), with_ones(x))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_closed_form_of_a_convolution_before_batch_norm():
    """[D]: with running statistics a norm only scales the curvature, by the square of its slope."""
    model = build(
        lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        lambda: nn.BatchNorm2d(3),
        nn.SiLU,
        lambda: nn.Conv2d(3, 2, 3),
    )
    model[1].running_var.fill_(2.0)
    model[1].running_mean.fill_(0.1)
    x = torch.randn(6, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = torch.zeros(6, 2, 2, 2, dtype=torch.float64) + 0.5
    found = matrices(model, Objective(squared, [(x, y)]), x)["0"]
    assert bool(model[1].running_var.eq(2.0).all())  # the norm has not moved
    model.eval()
    _, u, g = pre_activation_gradients(model, 1, x, y)
    s = torch.sigmoid(u)
    slope = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    c = g * s * (1 - s) * (2 + u * (1 - 2 * s)) * slope[None, :, None, None] ** 2
    patches = F.unfold(x, 3, padding=1, stride=2)
    expected = torch.einsum("bip,bkp,blp->ikl", c.flatten(2), patches, patches)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


class Gated(nn.Module):
    """A gated unit: the gate's row and the value's make one fan-in vector."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False), nn.Linear(5, 2)

    def forward(self, x):
        self.h = F.silu(self.gate(x)) * self.up(x)
        return self.down(self.h)


def test_closed_form_of_a_gated_unit():
    """[D]: indefinite as soon as the block beside the diagonal is not zero: a gated unit is never splitting-stable."""
    model = build(Gated)[0]
    found = matrices(model)["gate"]
    loss = squared(model, (X, Y))
    g = torch.autograd.grad(loss, model.h)[0]
    a, q = model.gate(X).detach(), model.up(X).detach()
    s = torch.sigmoid(a)
    first, second = s * (1 + a * (1 - s)), s * (1 - s) * (2 + a * (1 - 2 * s))
    blocks = [
        [torch.einsum("bi,bk,bl->ikl", g * f, X, X) for f in row] for row in ((second * q, first), (first, 0 * a))
    ]
    expected = torch.cat([torch.cat(row, dim=2) for row in blocks], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    values = torch.linalg.eigvalsh(found)
    assert bool((values[:, 0] < 0).all())
    assert bool((values[:, -1] > 0).all())


def test_scalar_unit():
    """[D]: for one input and one tanh unit the matrix is a number."""
    model = build(lambda: nn.Linear(1, 1, bias=False), nn.Tanh, lambda: nn.Linear(1, 2))
    x = X[:, :1]
    objective = Objective(squared, [(x, Y)])
    found = matrices(model, objective, x)["0"]
    _, z, g = pre_activation_gradients(model, 0, x)
    torch.testing.assert_close(found[0, 0, 0], (g * second_tanh(z) * x**2).sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("between", [nn.Identity, nn.ReLU], ids=["linear", "far_from_kinks"])
def test_without_curvature_the_matrix_is_zero(between):
    """[D]: splitting a linear unit changes nothing; neither does a kink that the radius does not reach."""
    model = mlp(between)
    if between is nn.ReLU:
        model[0].bias.data += 30
    assert not matrices(model, radius=0.05)["0"].any()
    for ends in (lanczos, exact):
        arguments = [torch.Generator().manual_seed(0)] if ends is lanczos else []
        found = ends(Splits(model, [trace(model, X)["0"]], OBJECTIVE), *arguments)["0"]
        assert not found.lowest.any()
        assert not found.highest.any()
        for vectors in (found.lowest_vectors, found.highest_vectors):  # directions all the same
            torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_round_off_is_no_curvature():
    """Twins of a linear unit whose gradients are summed in another order differ in the last digit, no more."""
    gradient = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    other = gradient * (1 + torch.tensor([[2e-7], [1e-3], [0.0]]))
    left = difference(gradient, other)
    assert [bool(row.any()) for row in left] == [False, True, False]


def test_a_kink_within_reach_has_curvature():
    """The surrogate for ReLU: what a split of this radius would see."""
    assert matrices(mlp(nn.ReLU), radius=0.1)["0"].any()


def test_batches_may_be_cut_in_any_way():
    """[D]: with batches of equal size."""
    parts = Objective(squared, [(X[i : i + 10], Y[i : i + 10]) for i in range(0, 40, 10)])
    torch.testing.assert_close(matrices(mlp(), parts)["0"], matrices(mlp())["0"], rtol=1e-7, atol=1e-9)


def test_products_are_linear_and_symmetric():
    model = mlp()
    splits = Splits(model, [trace(model, X)["0"]], OBJECTIVE, 1e-4)
    u, v = (splits.directions(torch.Generator().manual_seed(seed))["0"] for seed in (1, 2))
    su, sv, sum_ = (splits.products({"0": w})["0"] for w in (u, v, (u + v)))
    torch.testing.assert_close(sum_, su + sv, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close((u * sv).sum(1), (v * su).sum(1), rtol=1e-5, atol=1e-7)
    one = splits.products({"0": u}, batch=0)["0"]
    torch.testing.assert_close(one, su)


def test_the_error_falls_with_the_square_of_the_radius():
    model = mlp()
    group = trace(model, X)["0"]
    u = Splits(model, [group], OBJECTIVE).directions(torch.Generator().manual_seed(1))
    truth = Splits(model, [group], OBJECTIVE, 1e-4).products(u)["0"]
    errors = [(Splits(model, [group], OBJECTIVE, r).products(u)["0"] - truth).norm() for r in (0.1, 0.05)]
    assert 3.5 < float(errors[0] / errors[1]) < 4.5


SMOOTH = [
    ("lstm", ("cell",)),
    ("gru_of_two_layers_and_directions", ("cell",)),
    ("packed_lstm", ("cell",)),
    ("unrolled_rnn_cell", ("cell",)),
    ("shared_twice", ("first",)),
    ("gated_ffn", ("gate", "down", "both")),
    ("attention_of_heads", ("1.attention.q", "1.mlp.0")),
    ("grouped_query_attention", ("1.attention.q",)),
    ("tied_language_model", ("block.attention.q", "block.mlp.0")),
    ("depthwise_separable", ("6",)),
    ("conv1d_and_transposed", ("0",)),
    ("gpt2", ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc")),
]


def loss_of_outputs(model, batch):
    """Return some loss of all that a model of the zoo returns."""
    args, kwargs = batch
    leaves = torch.utils._pytree.tree_leaves(model(*args, **kwargs))
    outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return sum(((out - 0.3) ** 3).mean() + (out**2).mean() for out in outputs)


@pytest.mark.parametrize(("name", "groups"), SMOOTH, ids=[name for name, _ in SMOOTH])
def test_one_law_for_all_kinds_of_units(name, groups, caplog):
    """Uneven offspring change the loss by half the sum of w d^T S d: rows, gates, heads, cells that read themselves."""
    entry = (ZOO | THIRD_PARTY)[name]
    model, batch = entry.build(), entry.inputs()
    structure, objective = trace(model, *batch[0], **batch[1]), Objective(loss_of_outputs, [batch])
    base = objective.value(Overgrown(model, []).model)
    for group in (structure[group] for group in groups):
        splits = Splits(model, [group], objective, 1e-3)
        u = splits.directions(torch.Generator().manual_seed(0))
        quadratic = (u[group.name] * splits.products(u)[group.name]).sum(1)
        unit = int(quadratic.abs().argmax())
        offset = 20 * splits.radii[group.name][unit] * u[group.name][unit]
        pair = [Offspring(0.7, 0.3 * offset), Offspring(0.3, -0.7 * offset)]
        change = objective.value(Overgrown(model, [offspring_edit(model, group, {unit: pair})]).model) - base
        expected = 0.5 * 0.21 * float(offset.square().sum() * quadratic[unit])
        assert change == pytest.approx(expected, rel=0.03)
    assert "cannot express the model" not in caplog.text  # of copies that nobody keeps


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name", ["cnn_batch_norm", "residual_cnn", "lstm", "flatten_head", "gated_ffn", "grouped_conv"]
)
@torch.no_grad()
def test_offspring_without_offsets_keep_the_function(name, train):
    """[D]: also in train mode with batch norm; shares may be negative, as long as they add up to 1."""
    entry = ZOO[name]
    model, (args, kwargs) = entry.build().train(train), entry.inputs()
    structure = trace(model, *args, **kwargs)
    expected = copy.deepcopy(model)(*args, **kwargs)
    edits = []
    for group in structure.groups.values():
        if can_split(model, group):
            still = torch.zeros(Splits(model, [group], OBJECTIVE).length(group.name))
            parts = [Offspring(w, still) for w in (1.0, 1.0, -0.5, -0.5)]
            edits.append(offspring_edit(model, group, dict.fromkeys(range(group.step), parts)))
    assert edits
    apply_(model, edits)
    torch.testing.assert_close(model(*args, **kwargs), expected, rtol=0, atol=1e-10)


def test_offspring_take_the_place_of_their_unit_and_are_appended_in_order():
    group = trace(mlp(), X)["0"]
    zero, one = torch.zeros(5), torch.ones(5)
    edit = offspring_edit(
        mlp(), group, {3: [Offspring(0.5, one), Offspring(0.5, -one)], 1: [Offspring(2.0, zero), Offspring(-1.0, one)]}
    )
    assert edit.index == (0, 1, 2, 3, 4, 1, 3)
    assert edit.share == (1, 2, 1, 0.5, 1, -1, 0.5)
    assert edit.shifts["0.bias[0]"].tolist() == [0, 0, 0, 1, 0, 1, -1]
    with pytest.raises(ValueError, match="Unit 5 of '0' \\(5 units\\) needs offspring"):
        offspring_edit(mlp(), group, {5: [Offspring(1.0, zero)]})
    with pytest.raises(ValueError, match="Unit 2 of '0'"):
        offspring_edit(mlp(), group, {2: []})


# -- the ends of the spectra --------------------------------------------------------------------------------------


def all_splits(model=None, radius=1e-3, objective=OBJECTIVE):
    model = model or deep()
    return Splits(model, list(trace(model, X).groups.values()), objective, radius)


def test_lanczos_with_all_steps_is_exact():
    """[D]: fan-in vectors of different lengths take part as long as they have directions left."""
    whole = exact(all_splits())
    found = lanczos(all_splits(), torch.Generator().manual_seed(3), steps=20)
    assert {name: ends.lowest.shape for name, ends in found.items()} == {"0": (5,), "2": (6,)}
    for name, ends in found.items():
        for end in ("lowest", "highest"):
            torch.testing.assert_close(getattr(ends, end), getattr(whole[name], end), rtol=1e-4, atol=1e-6)
            alike = (getattr(ends, f"{end}_vectors") * getattr(whole[name], f"{end}_vectors")).sum(1)
            torch.testing.assert_close(alike, torch.ones_like(alike), rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_stay_within_the_spectrum_and_come_closer(steps):
    """[D]: the Rayleigh bound."""
    whole = exact(all_splits())
    fewer, more = (lanczos(all_splits(), torch.Generator().manual_seed(3), steps=n) for n in (steps, steps + 1))
    for name, ends in whole.items():
        slack = 1e-4 * ends.highest.abs().max()
        assert bool((fewer[name].lowest >= more[name].lowest - slack).all())
        assert bool((more[name].lowest >= ends.lowest - slack).all())
        assert bool((fewer[name].highest <= more[name].highest + slack).all())
        assert bool((more[name].highest <= ends.highest + slack).all())


def test_an_exhausted_space_goes_on_from_a_fresh_direction():
    """Were it not for that, a second unit with the rank of one would end in divisions of zero by zero."""
    x = torch.zeros(40, 4, dtype=torch.float64)
    x[:, 0] = X[:, 0]  # matrices of rank one or two, with the bias
    objective = Objective(squared, [(x, Y)])
    whole = exact(all_splits(mlp(), objective=objective))["0"]
    found = lanczos(all_splits(mlp(), objective=objective), torch.Generator().manual_seed(0), steps=5)["0"]
    torch.testing.assert_close(found.lowest, whole.lowest, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.highest, whole.highest, rtol=1e-4, atol=1e-7)
    assert bool(torch.isfinite(found.lowest_vectors).all())


@pytest.mark.parametrize("whole", [False, True], ids=["batch_by_batch", "all_batches"])
def test_descent_of_the_quotient_reaches_the_end(whole):
    """[D]: it never falls below the smallest eigenvalue by more than what batches differ, and gets there."""
    batches = [(X[i : i + 20], Y[i : i + 20]) for i in (0, 20)]
    objective = Objective(squared, [(X, Y)] * 2) if not whole else Objective(squared, batches)
    truth = exact(all_splits(mlp(), objective=objective))["0"]
    for highest, expected in ((False, truth.lowest), (True, truth.highest)):
        generator = torch.Generator().manual_seed(1)
        splits = all_splits(mlp(), objective=objective)
        values, vectors = rayleigh(splits, generator, 80, lr=6e-3, highest=highest, whole=whole)["0"]
        slack = 1e-3 * truth.highest.abs().max()
        assert bool(((values - expected) * (-1 if highest else 1) >= -slack).all())
        torch.testing.assert_close(values, expected, rtol=0.05, atol=float(20 * slack))
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_averages_are_over_the_last_pass():
    """As published: the quotient of the last iterate alone is another one."""
    batches = [(X[i : i + 10], Y[i : i + 10]) for i in range(0, 40, 10)]
    splits = all_splits(mlp(), objective=Objective(squared, batches))
    values, _ = rayleigh(splits, torch.Generator().manual_seed(1), 1, lr=0.0)["0"]
    start = splits.directions(torch.Generator().manual_seed(1))
    quotients = [(start["0"] * splits.products(start, batch)["0"]).sum(1) for batch in range(4)]
    torch.testing.assert_close(values, torch.stack(quotients).mean(0))


@pytest.mark.parametrize("form", ["exact", "lanczos", "rayleigh"])
def test_vectors_have_a_definite_sign(form):
    """Else ranks could differ."""
    for ends in extremes(all_splits(), form, torch.Generator().manual_seed(0), 3).values():
        for vectors in (ends.lowest_vectors, ends.highest_vectors):
            assert bool((vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all())


def test_matrices_that_would_not_fit_are_refused_with_a_way_out():
    splits = all_splits()
    with pytest.raises(StructureError, match=r"matrices of '0' would take .* \(5 units with 5 fan-in weights each\)"):
        splitting_matrices(splits, max_bytes=999)
    with pytest.raises(StructureError, match="Use form='lanczos', which needs no matrix"):
        exact(splits, max_bytes=1500)  # enough for the first group (1000 bytes), not for the second (1728)


def test_groups_that_fit_one_by_one_are_done_one_by_one():
    apart_, together = exact(all_splits(), max_bytes=1800), exact(all_splits())
    for name in together:
        torch.testing.assert_close(apart_[name].lowest, together[name].lowest, rtol=1e-4, atol=1e-7)


# -- what cannot be split ----------------------------------------------------------------------------------------


def test_refusals():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()
    group = trace(model, X)["0"]
    assert not can_split(model, group)
    with pytest.raises(StructureError, match="Cannot split units of '0' and keep the function"):
        Splits(model, [group], OBJECTIVE)
    model = mlp()
    group = trace(model, X)["0"]
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    assert not can_split(model, group)
    with pytest.raises(MeasurementError, match="fan-in of '0' is frozen"):
        Splits(model, [group], OBJECTIVE)
    with pytest.raises(ValueError, match="`radius` above 0, found 0"):
        Splits(model, [group], OBJECTIVE, 0)
    with pytest.raises(ValueError, match="`steps` of at least 1"):
        lanczos(all_splits(), torch.Generator(), 0)
    with pytest.raises(ValueError, match="`passes` of at least 1"):
        rayleigh(all_splits(), torch.Generator(), 0)
    for ends in (lanczos, rayleigh):
        with pytest.raises(MeasurementError, match="no batch"):
            ends(all_splits(objective=Objective(squared, [])), torch.Generator())


def test_lots_share_no_tensor():
    groups = list(trace(deep(), X).groups.values())
    assert [[group.name for group in lot] for lot in apart(groups)] == [["0"], ["2"]]


def test_the_model_stays_as_it_is():
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lanczos(all_splits(model), torch.Generator().manual_seed(0), 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
