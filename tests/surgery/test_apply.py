"""Laws of `apply_`: what it keeps, that it happens entirely or not at all, and what it refuses."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_grow.structure.axes import Attribute, Block, Units
from lightning_grow.structure.errors import StructureError
from lightning_grow.surgery import Edit, apply_, prune, split, swap, widen
from tests.surgery.models import Case, assert_same, gated, group_of, perceptron, snapshot

fast = settings(deadline=None, derandomize=True, database=None, max_examples=25)


def trained(make_case: Callable[[], Case] = perceptron) -> Case:
    case = make_case()
    case.optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01, amsgrad=True)
    case.train()
    return case


def draw_edit(data: st.DataObject, case: Case, name: str) -> Edit:
    group = case.group(name)
    kind = data.draw(st.sampled_from(["widen", "split", "prune", "permute"]))
    if kind == "widen":
        return widen(group, data.draw(st.integers(1, 3)))
    if kind == "permute":
        return Edit(group, tuple(data.draw(st.permutations(range(group.size)))))
    units = sorted(data.draw(st.sets(st.integers(0, group.size - 1), max_size=group.size - 1)))
    return (split if kind == "split" else prune)(group, units)


@pytest.mark.parametrize("make_case", [perceptron, gated])
def test_identity_edits_change_nothing_and_keep_gradients(make_case: Callable[[], Case]) -> None:
    case = trained(make_case)
    before = snapshot(case.model, case.optimizer)
    state = {p: dict(s) for p, s in case.optimizer.state.items()}
    for edits in ([], [Edit(g, tuple(range(g.size))) for g in case.groups.values()]):
        apply_(case.model, edits, [case.optimizer])
        assert_same(snapshot(case.model, case.optimizer), before)
        assert all(case.optimizer.state[p][k] is v for p, s in state.items() for k, v in s.items())


@pytest.mark.parametrize("make_case", [perceptron, gated])
@pytest.mark.parametrize("verb", ["widen", "split", "permute"])
def test_the_function_is_preserved(make_case: Callable[[], Case], verb: str) -> None:
    case = trained(make_case)
    before = case.output()
    groups = list(case.groups.values())
    makers: dict[str, Callable[[Any], Edit]] = {
        "widen": lambda g: widen(g, 3),
        "split": lambda g: split(g, [0, g.size - 1]),
        "permute": lambda g: Edit(g, tuple(reversed(range(g.size)))),
    }
    apply_(case.model, [makers[verb](g) for g in groups], [case.optimizer])
    torch.testing.assert_close(case.output(), before, rtol=0, atol=1e-12)
    case.train()


@fast
@given(st.data())
def test_the_order_of_edits_in_one_call_does_not_matter(data: st.DataObject) -> None:
    one, other = trained(), trained()
    edits = [draw_edit(data, one, "0"), draw_edit(data, one, "2")]
    apply_(one.model, edits, [one.optimizer])
    apply_(other.model, edits[::-1], [other.optimizer])
    pick = ("values", "state 0", "plain")
    left, right = (snapshot(c.model, c.optimizer) for c in (one, other))
    assert_same({k: left[k] for k in pick}, {k: right[k] for k in pick})


@fast
@given(st.data())
def test_edits_of_copies_and_subsets_commute_over_calls(data: st.DataObject) -> None:
    """Both groups meet in one tensor; without new entries there is nothing that could depend on the order."""
    one, other = trained(), trained()
    edits = [draw_edit(data, one, name) for name in ("0", "2")]
    edits = [e if not e.num_new else split(e.group, [0]) for e in edits]
    for edit in edits:
        apply_(one.model, [edit], [one.optimizer])
    for edit in edits[::-1]:
        apply_(other.model, [edit], [other.optimizer])
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), rtol=1e-12, atol=0)
    states = [case.optimizer.state_dict()["state"] for case in (one, other)]
    torch.testing.assert_close(*states, rtol=1e-12, atol=0)


class InjectedError(RuntimeError):
    """A failure that no code expects."""


@fast
@given(st.data())
def test_an_edit_that_fails_in_the_middle_leaves_everything_bit_identical(data: st.DataObject) -> None:
    case = trained()
    case.model[2].weight.grad = torch.ones_like(case.model[2].weight)
    edits = [draw_edit(data, case, name) for name in ("0", "2")]
    before = snapshot(case.model, case.optimizer)
    states = dict(case.optimizer.state)
    steps = {p: s["step"] for p, s in states.items()}
    fuse = data.draw(st.integers(0, 30))
    burnt = 0

    def failing(original: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal burnt
            burnt += 1
            if burnt == fuse and not after:
                raise InjectedError
            result = original(*args, **kwargs)
            if burnt == fuse:
                raise InjectedError
            return result

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tensor", "item", "attribute"):
            patch.setattr(swap.Commit, name, failing(getattr(swap.Commit, name), data.draw(st.booleans())))
        try:
            apply_(case.model, edits, [case.optimizer])
        except InjectedError:
            assert_same(snapshot(case.model, case.optimizer), before)
            assert all(case.optimizer.state[p] is s for p, s in states.items())
            assert all(case.optimizer.state[p]["step"] is step for p, step in steps.items())
            case.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("make_case", [perceptron, gated])
def test_any_floating_dtype_keeps_its_dtype(make_case: Callable[[torch.dtype], Case], dtype: torch.dtype) -> None:
    case = make_case(dtype)
    case.optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01, momentum=0.9)
    case.train()
    before = case.output()
    apply_(case.model, [widen(g, 2) for g in case.groups.values()], [case.optimizer])
    torch.testing.assert_close(case.output(), before)
    apply_(case.model, [split(case.group(n), [1]) for n in case.groups], [case.optimizer])
    torch.testing.assert_close(case.output(), before, rtol=0.05, atol=0.05)
    assert {
        t.dtype
        for t in [*case.model.parameters(), case.optimizer.state[next(case.model.parameters())]["momentum_buffer"]]
    } == {dtype}
    case.train()


def test_a_model_without_storage_takes_on_the_shapes() -> None:
    case = perceptron()
    case.model.to("meta")
    apply_(case.model, [widen(g, 2) for g in case.groups.values()])
    assert case.model[2].weight.shape == (7, 8)
    assert case.model(torch.ones(4, 3, dtype=torch.float64, device="meta")).shape == (4, 2)


def test_frozen_stays_frozen_and_modes_and_python_attributes_stay() -> None:
    case = trained()
    weight = case.model[2].weight
    weight.requires_grad_(False)
    weight.note = ["no weight decay"]
    weight.mask = weight > 0
    case.model[3].eval()
    modes = [m.training for m in case.model.modules()]
    note, mask = weight.note, weight.mask
    apply_(case.model, [widen(case.groups["2"], 2)], [case.optimizer])
    assert case.model[2].weight is weight
    assert not weight.requires_grad
    assert weight.note is note
    assert torch.equal(weight.mask[:5], mask), "what has the shape of the parameter follows it"
    assert weight.mask.shape == weight.shape
    assert all(p.requires_grad for p in case.model[3].parameters())
    assert [m.training for m in case.model.modules()] == modes
    assert all(p.grad is None for p in (weight, case.model[3].weight))


def test_tied_parameters_stay_tied_and_are_resized_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    units = Units("embed", "embed.weight", 1, 1)
    both = group_of(
        "embed", units, 4, "embed.weight[1] body.weight[0] body.bias[0]", "", "body.weight[1] head.weight[1]"
    )
    apply_(model, [widen(both, 2)])
    assert model["head"].weight is model["embed"].weight
    assert model["embed"].weight.shape == (7, 6)
    assert model["body"].weight.shape == (6, 6)


def test_modules_own_integers_tuples_and_lists_follow() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model.widths, model.split_sizes = (4, 2), [1, 4]
    units = Units("0", "0.weight", 0, 1)
    layout = (Block((units,)),)
    group = group_of("0", units, 4, "0.weight[0] 0.bias[0]", "1.weight[0] 1.bias[0]", "2.weight[1]", "0.out_features")
    kept = [("1", "normalized_shape", 0), ("", "widths", 0), ("", "split_sizes", 1)]
    group = replace(group, attributes=(*group.attributes, *(Attribute(m, n, i, layout) for m, n, i in kept)))
    sizes = model.split_sizes
    apply_(model, [widen(group, 2)])
    assert (model.widths, model.split_sizes, model[1].normalized_shape) == ((6, 2), [1, 6], (6,))
    assert type(model[1].normalized_shape) is tuple
    assert sizes == [1, 4]
    assert model(torch.ones(1, 3)).shape == (1, 2)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_renew_their_flat_weights(kind: type[nn.RNNBase]) -> None:
    model = nn.ModuleDict({"cell": kind(3, 5, num_layers=2), "head": nn.Linear(5, 2)}).double()
    gates = model["cell"].weight_ih_l0.shape[0] // 5
    units = Units("cell", "head.weight", 1, 1)
    rows = [f"cell.{n}_l{i}[0]" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for i in (0, 1)]
    columns = "cell.weight_hh_l0[1] cell.weight_hh_l1[1] cell.weight_ih_l1[1] head.weight[1]"
    layouts = dict.fromkeys(rows, (Block((gates, units)),))
    group = group_of("cell", units, 5, " ".join(rows), "", columns, "cell.hidden_size head.in_features", layouts)
    inputs = torch.randn(4, 2, 3, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters())
    loss = model["head"](model["cell"](inputs)[0]).sum()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        before = model["head"](model["cell"](inputs)[0])
    apply_(model, [widen(group, 2)], [optimizer])
    cell = model["cell"]
    assert all(
        flat is getattr(cell, name) for flat, name in zip(cell._flat_weights, cell._flat_weights_names, strict=True)
    )
    after = model["head"](cell(inputs)[0])
    torch.testing.assert_close(after, before)
    after.sum().backward()
    optimizer.step()
    assert all(weakref.getweakrefs(p) for p in cell.parameters())


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized_weights_follow_through_their_originals(norm: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    old = norm.startswith("old ")
    wrap = getattr(nn.utils if old else nn.utils.parametrizations, norm.removeprefix("old "))
    wrap(model[0])
    model(torch.randn(2, 3, dtype=torch.float64)).sum().backward()
    names = [n for n, p in [*model.named_parameters(), *model.named_buffers()] if n[0] == "0" and p.shape[0] == 4]
    weight = next(
        n for n in names if "bias" not in n and dict(model.named_parameters()).get(n, torch.ones(1)).ndim == 2
    )
    carried = [n for n in names if n != weight and "bias" not in n]
    units = Units("0", weight, 0, 1)
    consumed = "2.weight[1]"
    group = group_of(
        "0", units, 4, f"{weight}[0] 0.bias[0]", " ".join(f"{n}[0]" for n in carried), consumed, "0.out_features"
    )
    inputs = torch.randn(5, 3, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        before = model(inputs)
    order = Edit(group, (2, 0, 3, 1))
    apply_(model, [order])
    torch.testing.assert_close(model(inputs).detach(), before)
    apply_(model, [widen(group, 2)])
    assert model[0].weight.shape == (6, 3)
    model.train()(inputs).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_masked_weights_follow_and_new_entries_take_part() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for i in (0, 2):
        nn.utils.prune.l1_unstructured(model[i], "weight", amount=0.5)
    inputs = torch.randn(5, 3, dtype=torch.float64)
    before = model(inputs).detach()
    produced, consumed = "0.weight_orig[0] 0.weight_mask[0] 0.bias[0]", "2.weight_orig[1] 2.weight_mask[1]"
    group = group_of("0", Units("0", "0.weight_orig", 0, 1), 4, produced, "", consumed, "0.out_features 2.in_features")
    apply_(model, [Edit(group, (3, 1, 0, 2))])
    torch.testing.assert_close(model(inputs).detach(), before)
    apply_(model, [widen(group, 2)])
    torch.testing.assert_close(model(inputs).detach(), before)
    assert model[0].weight_mask[4:].all()
    assert model[2].weight_mask[:, 4:].all()
    assert int(model[2].weight_mask.sum()) == 4 + 4


def test_values_of_an_edit_are_used() -> None:
    case = perceptron()
    rows, columns = torch.randn(2, 3), torch.randn(5, 2)
    edit = widen(case.groups["0"], 2, values={"0.weight[0]": rows, "2.weight[1]": columns, "0.bias[0]": torch.ones(2)})
    apply_(case.model, [edit, prune(case.groups["2"], [1])])
    assert torch.equal(case.model[0].weight[6:], rows.double())
    assert torch.equal(case.model[0].bias[6:], torch.ones(2).double())
    assert torch.equal(case.model[2].weight[:, 6:], columns.double()[[0, 2, 3, 4]])


def test_inference_mode_and_disabled_gradients_do_not_leak_into_the_parameters() -> None:
    case = perceptron()
    with torch.inference_mode():
        apply_(case.model, [widen(case.groups["0"], 2)])
    case.model(case.inputs).sum().backward()
    assert case.model[0].weight.grad is not None


def test_a_loss_that_is_still_in_scope_after_backward_is_no_obstacle() -> None:
    case = perceptron()
    loss = case.model(case.inputs).sum()
    loss.backward()
    apply_(case.model, [widen(case.groups["0"], 2)])
    case.model(case.inputs).sum().backward()
    assert loss.grad_fn is not None


def test_weakly_referenced_parameters_keep_their_references() -> None:
    case = perceptron()
    reference = weakref.ref(case.model[0].weight)
    apply_(case.model, [widen(case.groups["0"], 2)])
    assert reference() is case.model[0].weight
    assert reference().shape == (8, 3)
    case.model(case.inputs).sum().backward()


def hook(case: Case) -> Any:
    return case.model[0].weight.register_hook(lambda grad: grad)


def late_hook(case: Case) -> Any:
    return case.model[2].weight.register_post_accumulate_grad_hook(lambda parameter: None)


def live_graph(case: Case) -> Tensor:
    return case.model(case.inputs).sum()


@pytest.mark.parametrize(
    ("message", "hold"),
    [
        (r"'0.weight' of shape \(6, 3\) has hooks", hook),
        (r"'2.weight' of shape \(5, 6\) has hooks", late_hook),
        ("live autograd graph", live_graph),
    ],
)
def test_what_could_not_be_exchanged_safely_is_refused(message: str, hold: Callable[[Case], Any]) -> None:
    case = trained()
    held = hold(case)
    before = snapshot(case.model, case.optimizer)
    with pytest.raises(StructureError, match=message):
        apply_(case.model, [widen(case.groups["0"], 2)], [case.optimizer])
    assert_same(snapshot(case.model, case.optimizer), before)
    if isinstance(held, Tensor) and held.requires_grad:
        held.backward()
    else:
        held.remove()
    del held
    apply_(case.model, [widen(case.groups["0"], 2)], [case.optimizer])


def test_what_does_not_fit_the_model_is_refused() -> None:
    case = trained()
    group, other = case.groups["0"], case.groups["2"]
    before = snapshot(case.model, case.optimizer)
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    alien = group_of("0", Units("0", "0.weight", 0, 1), 6, "0.weight[0] nowhere.weight[0]")
    wrong = group_of("0", Units("0", "0.weight", 0, 1), 6, "0.weight[0]", "", "5.weight[1]")
    attribute = replace(group, attributes=(Attribute("0", "in_features", None, other.axes[0].layout),))
    values = {"2.weight[1]": torch.ones(4, 2)}
    refused: list[tuple[type[Exception], str, Callable[[], None]]] = [
        (StructureError, "planned for 9 units, but the model has 6", lambda: go([widen(replace(group, size=9), 1)])),
        (StructureError, "no parameter or buffer 'nowhere.weight'", lambda: go([widen(alien, 1)])),
        (StructureError, r"5.weight\[1\] = 0 should have 6 entries.*\(2, 5\)", lambda: go([widen(wrong, 1)])),
        (StructureError, "'0.in_features' should be 5, but is 3", lambda: go([widen(attribute, 1), widen(other, 1)])),
        (ValueError, "edited twice", lambda: go([widen(group, 1), prune(group, [0])])),
        (ValueError, r"must have shape \(5, 2\)", lambda: go([widen(group, 2, values=values)])),
        (TypeError, "pass \\[edit\\]", lambda: go(widen(group, 1))),
        (TypeError, "one is a str", lambda: go(["0"])),
        (TypeError, "pass \\[optimizer\\]", lambda: apply_(case.model, [widen(group, 1)], case.optimizer)),
        (TypeError, "one is a Linear", lambda: apply_(case.model, [widen(group, 1)], [case.model[0]])),
        (ValueError, "none of the model's parameters", lambda: apply_(case.model, [widen(group, 1)], [stranger])),
        (ValueError, "new_state must be", lambda: apply_(case.model, [], new_state="ones")),
    ]

    def go(edits: Any) -> None:
        apply_(case.model, edits, [case.optimizer])

    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
        assert_same(snapshot(case.model, case.optimizer), before)


def test_parameters_that_are_not_plain_tensors_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    group = group_of("0", Units("0", "1.weight", 1, 1), 4, "0.weight[0]", "", "1.weight[1]")
    with pytest.raises(StructureError, match="run one batch"):
        apply_(model, [widen(group, 1)])
    sharded = perceptron()
    sharded.model[0].weight.device_mesh = "2 devices"
    with pytest.raises(StructureError, match="sharded and wrapped tensors cannot be resized"):
        apply_(sharded.model, [widen(sharded.groups["0"], 1)])
    sparse = nn.ParameterDict({"weight": nn.Parameter(torch.eye(4).to_sparse())})
    with pytest.raises(StructureError, match="only dense"):
        apply_(sparse, [widen(group_of("w", Units("w", "weight", 0, 1), 4, "weight[0]"), 1)])
