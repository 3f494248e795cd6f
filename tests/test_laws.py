"""Laws of edits: what must hold for any sequence of edits of any model of the zoo."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.axes import AxisGroup, Structure, layout_length, tensor_of
from tests.test_zoo import EXACT, live, loss_of, plain_attributes, structure_of, tensors
from tests.zoo import ZOO, Entry

MODELS = [
    "mlp",
    "concat_raw",
    "shared_twice",
    "residual_cnn",
    "depthwise_separable",
    "flatten_head",
    "gru_of_two_layers_and_directions",
    "gated_ffn",
    "tied_language_model",
]
fast = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
any_model = st.sampled_from([ZOO[name] for name in MODELS])
Everything = dict[str, Any]


def trained(entry: Entry) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer with something to remember: one with gradient-like and square-like state."""
    model = entry.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    for _ in range(2):
        step(entry, model, optimizer)
    optimizer.zero_grad()
    return model, optimizer


def step(entry: Entry, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One training step."""
    optimizer.zero_grad()
    loss_of(entry, model).backward()
    optimizer.step()


def answers(entry: Entry, model: nn.Module) -> list[Tensor]:
    """Outputs in eval mode; they hold no graph, in the middle of which no edit is allowed."""
    with torch.no_grad():
        return entry.outputs(model.eval())


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Everything:
    """All that an edit may change, as copies, and the identities that it must not change."""
    return {
        "tensors": tensors(model),
        "identity": [id(t) for t in [*model.parameters(), *model.buffers()]],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "plain": plain_attributes(model),
        "training": [module.training for module in model.modules()],
        "state": [(id(p), copy.deepcopy(optimizer.state[p])) for p in optimizer.state],
        "param groups": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
    }


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Bit for bit."""
    assert type(left) is type(right), path
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype, path
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert list(left) == list(right), path
        for key, value in left.items():
            assert_same(value, right[key], f"{path}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}/{i}")
    else:
        assert left == right, path


def assert_consistent(structure: Structure, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Shapes, attributes and optimizer state agree with the sizes that the structure reads off the model."""
    sizes = structure.sizes_in(model)
    for group in structure.groups.values():
        assert sizes[group.name] % group.step == 0
        for axis in group.axes:
            assert tensor_of(model, axis.tensor).shape[axis.dim] == layout_length(axis.layout, sizes), axis
        for kept in group.attributes:
            value = getattr(model.get_submodule(kept.module), kept.name)
            assert (value if kept.index is None else value[kept.index]) == layout_length(kept.layout, sizes), kept
    known = {id(p) for p in model.parameters()}
    for parameter, state in optimizer.state.items():
        assert id(parameter) in known
        assert all(v.shape in (parameter.shape, torch.Size()) for v in state.values() if isinstance(v, Tensor))


def permuted(group: AxisGroup, numbers: st.DataObject) -> lg.Edit:
    """An edit that only changes the order of units, in runs of one step."""
    runs = numbers.draw(st.permutations(range(group.size // group.step)))
    index = [run * group.step + i for run in runs for i in range(group.step)]
    return lg.Edit(group, index=tuple(index), share=(1.0,) * group.size)


def random_edit(group: AxisGroup, data: st.DataObject, kinds: tuple[str, ...]) -> lg.Edit:
    """An edit of one of the kinds; never one that leaves no units, and none that grows without bound."""
    runs = group.size // group.step
    if runs > 12 and "prune" in kinds:
        kinds = ("prune",)
    kind = data.draw(st.sampled_from(kinds))
    if kind == "prune" and runs == 1:
        kind = "widen"
    if kind == "widen":
        return lg.widen(group, group.step * data.draw(st.integers(1, 3)))
    if kind == "order":
        return permuted(group, data)
    chosen = data.draw(st.sets(st.integers(0, runs - 1), min_size=1, max_size=max(1, min(3, runs - 1))))
    units = [run * group.step + i for run in sorted(chosen) for i in range(group.step)]
    return lg.split(group, units) if kind == "split" else lg.prune(group, units)


@pytest.mark.parametrize("name", MODELS)
def test_an_identity_edit_changes_nothing(name: str) -> None:
    entry = ZOO[name]
    model, optimizer = trained(entry)
    before = everything(model, optimizer)
    groups = structure_of(entry).groups.values()
    edits = [lg.Edit(g, index=tuple(range(g.size)), share=(1.0,) * g.size) for g in groups]
    lg.apply_(model, edits, optimizers=[optimizer])
    assert_same(everything(model, optimizer), before)


@fast
@given(entry=any_model, data=st.data())
def test_edits_of_different_groups_commute(entry: Entry, data: st.DataObject) -> None:
    """One after the other, in either order, and both at once: the same to the last bit."""
    structure = structure_of(entry)
    assume(len(structure.groups) > 1)
    names = data.draw(st.permutations(list(structure.groups)))[:2]
    edits = [random_edit(structure[name], data, ("prune", "split", "order")) for name in names]
    results = []
    for batches in ([[edits[0]], [edits[1]]], [[edits[1]], [edits[0]]], [edits]):
        model, optimizer = trained(entry)
        for batch in batches:
            lg.apply_(model, batch, optimizers=[optimizer])
        results.append(everything(model, optimizer))
    for result in results[1:]:
        for key in ("tensors", "plain"):
            assert_same(result[key], results[0][key], key)
        assert_same([s for _, s in result["state"]], [s for _, s in results[0]["state"]], "state")


@fast
@given(entry=any_model, data=st.data())
def test_widening_commutes_in_its_effect(entry: Entry, data: st.DataObject) -> None:
    """Where two groups meet in a tensor the new entries may differ with the order, never the function."""
    structure = structure_of(entry)
    names = [name for name, group in structure.groups.items() if group.obstacle is None]
    names = data.draw(st.permutations(names))[:2]
    edits = [random_edit(structure[name], data, ("widen", "split")) for name in names]
    expected = entry.outputs(entry.build().eval())
    for batches in ([edits[:1], edits[1:]], [edits[1:], edits[:1]], [edits]):
        model = entry.build().eval()
        for batch in batches:
            lg.apply_(model, batch)
        torch.testing.assert_close(entry.outputs(model), expected, **EXACT)


@settings(fast, max_examples=5, phases=(Phase.explicit, Phase.generate))  # shrinking fifty edits takes minutes
@given(entry=any_model, data=st.data())
def test_fifty_random_edits_keep_everything_consistent(entry: Entry, data: st.DataObject) -> None:
    structure = structure_of(entry)
    model, optimizer = trained(entry)
    for count in range(50):
        group = live(structure, model, data.draw(st.sampled_from(list(structure.groups))))
        edit = random_edit(group, data, ("widen", "split", "order", "prune"))
        before = answers(entry, model)
        lg.apply_(model, [edit], optimizers=[optimizer])
        assert_consistent(structure, model, optimizer)
        after = answers(entry, model)
        if group.obstacle is None and set(edit.index) >= set(range(group.size)):
            torch.testing.assert_close(after, before, **EXACT)
        if count % 10 == 9:
            step(entry, model.train(), optimizer)


@fast
@given(entry=any_model, data=st.data())
def test_split_then_prune_of_the_copies_keeps_shapes_and_fan_in(entry: Entry, data: st.DataObject) -> None:
    structure = structure_of(entry)
    group = structure[data.draw(st.sampled_from(list(structure.groups)))]
    model, optimizer = trained(entry)
    before = everything(model, optimizer)
    edit = random_edit(group, data, ("split",))
    lg.apply_(model, [edit], optimizers=[optimizer])
    copies = list(range(group.size, len(edit.index)))
    lg.apply_(model, [lg.prune(live(structure, model, group.name), copies)], optimizers=[optimizer])
    after = everything(model, optimizer)
    consumed = {axis.tensor for axis in group.with_role("consumed")}
    for name, value in before["tensors"].items():
        if name in consumed:
            assert after["tensors"][name].shape == value.shape, name
        else:
            assert torch.equal(after["tensors"][name], value), name
    assert after["plain"] == before["plain"]


@fast
@given(entry=any_model, data=st.data())
def test_an_edit_that_fails_changes_nothing(entry: Entry, data: st.DataObject) -> None:
    """The failure comes at any of the swaps, long after the planning is done."""
    structure = structure_of(entry)
    model, optimizer = trained(entry)
    loss_of(entry, model).backward()
    before = everything(model, optimizer)
    edits = [random_edit(group, data, ("widen", "split", "order")) for group in structure.groups.values()]
    countdown = data.draw(st.integers(1, 4))
    swap = torch.utils.swap_tensors
    calls = 0

    def failing(first: Tensor, second: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == countdown:
            raise RuntimeError("out of memory, let us say")
        swap(first, second)

    touched = {axis.tensor for group in structure.groups.values() for axis in group.axes}
    with mock.patch("torch.utils.swap_tensors", failing), pytest.raises(RuntimeError, match="let us say"):
        lg.apply_(model, edits, optimizers=[optimizer])
    assert calls >= countdown <= len(touched)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("name", MODELS)
def test_a_refused_edit_among_good_ones_changes_nothing(name: str) -> None:
    entry = ZOO[name]
    structure = structure_of(entry)
    model, optimizer = trained(entry)
    before = everything(model, optimizer)
    good = [lg.widen(group, group.step) for group in structure.groups.values()]
    first = good[-1].group
    wrong = lg.widen(structure.resized({first.name: first.size + first.step})[first.name], first.step)
    with pytest.raises(lg.StructureError, match=rf"{first.name}"):
        lg.apply_(model, [*good[:-1], wrong], optimizers=[optimizer])
    assert_same(everything(model, optimizer), before)
