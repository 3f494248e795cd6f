"""What `trace` and `apply_` promise, for every model of the zoo and every group found in it.

The same properties hold for models that others wrote: `test_zoo_third_party` takes them over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.axes import AxisGroup, Structure, layout_length, tensor_of
from lightning_grow.structure.holders import read
from lightning_grow.structure.layout import entry_index
from tests.fuzz import PER_EPISODE, fuzz
from tests.zoo import EVERYTHING, ZOO, Entry

torch.set_num_threads(1)
EXACT = {"rtol": 0.0, "atol": 1e-10}
MODELS = ZOO
Snapshot = dict[str, Any]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every property that takes an entry for each model of the module's table."""
    if "entry" in metafunc.fixturenames:
        models = metafunc.module.MODELS
        metafunc.parametrize("entry", models.values(), ids=list(models))


class Traced(NamedTuple):
    """A structure, and what the model and the process were before and after it was found."""

    structure: Structure
    before: Snapshot
    after: Snapshot


@functools.cache
def trace_once(name: str) -> Traced:
    """Trace a model of the zoo in train mode, with gradients present, once for all tests."""
    entry = EVERYTHING[name]
    model = entry.build()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for module in list(model.modules())[::3]:
        module.training = not module.training
    args, kwargs = entry.inputs()
    before = snapshot(model)
    structure = lg.trace(model, *args, **kwargs)
    return Traced(structure, before, snapshot(model))


def structure_of(entry: Entry) -> Structure:
    """The structure of a freshly built model."""
    return trace_once(entry.name).structure


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, tied ones under each of their names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def plain_attributes(model: nn.Module) -> dict[str, Any]:
    """All attributes of all modules that are plain Python values."""
    plain = (int, float, str, tuple, list, type(None))
    return {
        f"{name}.{key}": list(value) if isinstance(value, list) else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain) and not key.startswith("_flat")
    }


def snapshot(model: nn.Module) -> Snapshot:
    """Everything about a model and the process that tracing could disturb."""
    return {
        "tensors": {name: (id(t), t.detach().clone(), t.requires_grad, t.grad) for name, t in named(model)},
        "modules": [
            (name, {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
            for name, module in model.named_modules()
        ],
        "plain": plain_attributes(model),
        "generators": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
        "switches": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()),
    }


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers."""
    return [*model.named_parameters(), *model.named_buffers()]


@contextlib.contextmanager
def about(groups: Sequence[AxisGroup], what: str = "") -> Iterator[None]:
    """Name the groups in whatever goes wrong inside."""
    try:
        yield
    except Exception as error:
        for group in groups:
            error.add_note(f"{what} group '{group.name}' (size {group.size}, step {group.step})\n{group}")
        raise


def live(structure: Structure, model: nn.Module, name: str) -> AxisGroup:
    """A group with the size that it has in ``model`` now."""
    return structure.resized(structure.sizes_in(model))[name]


EDITS: dict[str, Callable[[AxisGroup], lg.Edit]] = {
    "widen": lambda group: lg.widen(group, group.step),
    "widen thrice": lambda group: lg.widen(group, 3 * group.step),
    "split": lambda group: lg.split(group, list(range(group.step))),
    "split all": lambda group: lg.split(group, list(range(group.size))),
}
"""One edit of each kind that may preserve the function."""


def batches(entry: Entry) -> list[list[AxisGroup]]:
    """Groups to edit together: each by itself; of larger models all without obstacle, all others, and two by itself."""
    groups = list(structure_of(entry).groups.values())
    if not entry.third_party:
        return [[group] for group in groups]
    free = [group for group in groups if group.obstacle is None]
    hindered = [group for group in groups if group.obstacle is not None]
    return [batch for batch in (free, hindered, free[:1], free[-1:]) if batch]


def loss_of(entry: Entry, model: nn.Module) -> Tensor:
    """A loss in which every output counts."""
    outputs = [output for output in entry.outputs(model) if output.requires_grad]
    return torch.stack([(output - 0.3).square().sum() for output in outputs]).sum()


def widened(entry: Entry) -> nn.Module:
    """A model in which every group has one step more, all at once."""
    model = entry.build()
    lg.apply_(model, [lg.widen(group, group.step) for group in structure_of(entry).groups.values()])
    return model


def test_each_hidden_width_is_a_group(entry: Entry) -> None:
    groups = structure_of(entry).groups.values()
    names = []
    for width in entry.widths:
        found = [g for g in groups if set(width.labels) <= {axis.label for axis in g.axes}]
        assert len(found) == 1, f"expected one group of {width.axes}, found:\n{structure_of(entry)}"
        if width.size is not None:
            assert (found[0].size, found[0].step) == (width.size, 1), found[0]
        if width.obstacle is not None:
            assert (found[0].obstacle is not None) == width.obstacle, found[0]
        names.append(found[0].name)
    assert len(set(names)) == len(names), f"widths that differ are in one group: {names}"
    if entry.obstacles_only:
        assert all(group.obstacle for group in groups), structure_of(entry)


def test_every_axis_is_in_a_group_or_pinned_with_a_reason(entry: Entry) -> None:
    structure, model = structure_of(entry), entry.build()
    sizes = structure.sizes_in(model)
    assert sizes == {name: group.size for name, group in structure.groups.items()}
    grouped = {axis.label: axis for group in structure.groups.values() for axis in group.axes}
    labels = {f"{name}[{dim}]" for name, parameter in model.named_parameters() for dim in range(parameter.ndim)}
    assert labels <= set(grouped) | set(structure.pinned)
    assert not set(grouped) & set(structure.pinned)
    assert set(entry.pinned) <= set(structure.pinned), structure
    assert all(isinstance(reason, str) and reason for reason in structure.pinned.values())
    for axis in grouped.values():
        assert tensor_of(model, axis.tensor).shape[axis.dim] == layout_length(axis.layout, sizes), axis


def test_sizes_kept_as_python_integers_are_known(entry: Entry) -> None:
    structure, model = structure_of(entry), entry.build()
    sizes = structure.sizes_in(model)
    for group in structure.groups.values():
        for attribute in group.attributes:
            value = read(model.get_submodule(attribute.module), attribute.name, attribute.index)
            assert value == layout_length(attribute.layout, sizes), attribute


def test_tracing_changes_nothing(entry: Entry) -> None:
    _, before, after = trace_once(entry.name)
    for name, (identity, value, requires_grad, grad) in before["tensors"].items():
        assert after["tensors"][name][0] == identity, name
        assert torch.equal(after["tensors"][name][1], value), name
        assert after["tensors"][name][2] == requires_grad, name
        assert after["tensors"][name][3] is grad, name
    for (name, old), (_, new) in zip(before["modules"], after["modules"], strict=True):
        assert list(old) == list(new), name
        for key, value in old.items():
            if isinstance(value, dict):
                assert list(value) == list(new[key]), f"{name}.{key}"
                assert all(new[key][k] is v for k, v in value.items()), f"{name}.{key}"
            else:
                assert new[key] is value, f"{name}.{key}"
    assert before["plain"] == after["plain"]
    assert torch.equal(before["generators"][0], after["generators"][0])
    assert before["generators"][1] == after["generators"][1]
    assert np.array_equal(before["generators"][2][1], after["generators"][2][1])
    assert before["switches"] == after["switches"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_widening_and_splitting_preserve_the_function(entry: Entry, training: bool) -> None:
    """Where there is an obstacle the function may change, but the model must still run."""
    random_numbers = training and entry.stochastic
    expected = entry.outputs(entry.build().train(training))
    for batch in batches(entry):
        for kind, edit_of in EDITS.items():
            with about(batch, kind):
                model = entry.build().train(training)
                edits = [edit_of(group) for group in batch]
                lg.apply_(model, edits)
                sizes = structure_of(entry).sizes_in(model)
                assert all(sizes[edit.group.name] == len(edit.index) for edit in edits)
                outputs = entry.outputs(model)
                assert [o.shape for o in outputs] == [o.shape for o in expected]
                if all(group.obstacle is None for group in batch) and not random_numbers:
                    torch.testing.assert_close(outputs, expected, **EXACT)


def test_pruning_fresh_units_is_the_exact_inverse_of_widening(entry: Entry) -> None:
    model = entry.build()
    before, plain = tensors(model), plain_attributes(model)
    structure = structure_of(entry)
    for batch in batches(entry):
        with about(batch):
            lg.apply_(model, [lg.widen(group, 2 * group.step) for group in batch])
            wider = [(live(structure, model, group.name), group.size) for group in batch]
            lg.apply_(model, [lg.prune(group, list(range(size, group.size))) for group, size in wider])
            after = tensors(model)
            assert list(after) == list(before)
            assert all(torch.equal(after[n], value) for n, value in before.items())
            assert plain_attributes(model) == plain


def test_pruning_a_unit_equals_silencing_its_fan_out(entry: Entry) -> None:
    """The reference is the model as it is, with zeros in the columns of the pruned unit."""
    structure = structure_of(entry)
    sizes = structure.sizes_in(entry.build())
    for batch in batches(entry):
        smaller = [group for group in batch if group.obstacle is None and group.size > group.step]
        with about(smaller), torch.no_grad():
            reference, model = entry.build().eval(), entry.build().eval()
            for group in smaller:
                silent = torch.arange(group.size).masked_fill(torch.arange(group.size) < group.step, -1)
                for axis in group.with_role("consumed"):
                    entries = (entry_index(axis.layout, sizes, {group.name: silent}) < 0).nonzero().flatten()
                    tensor_of(reference, axis.tensor).index_fill_(axis.dim, entries, 0.0)
            lg.apply_(model, [lg.prune(group, list(range(group.step))) for group in smaller])
            torch.testing.assert_close(entry.outputs(model), entry.outputs(reference), **EXACT)


def test_the_order_of_units_is_free(entry: Entry) -> None:
    ordered = {label for width in entry.widths if not width.symmetric for label in width.labels}
    expected = entry.outputs(entry.build().eval())

    def is_free(group: AxisGroup) -> bool:
        return group.obstacle is None or (group.step == 1 and not ordered & {axis.label for axis in group.axes})

    def reversed_(group: AxisGroup) -> lg.Edit:
        order = torch.arange(group.size).reshape(-1, group.step).flip(0).flatten().tolist()
        return lg.Edit(group, index=tuple(order), share=(1.0,) * group.size)

    for batch in batches(entry):
        with about(batch):
            model = entry.build().eval()
            lg.apply_(model, [reversed_(group) for group in batch if is_free(group)])
            torch.testing.assert_close(entry.outputs(model), expected, **EXACT)


def test_a_training_step_runs_after_every_edit(entry: Entry) -> None:
    structure, model = structure_of(entry), entry.build()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    parameters = list(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss_of(entry, model).backward()
        optimizer.step()
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert {name: p.requires_grad for name, p in model.named_parameters()} == learns
        for parameter, state in optimizer.state.items():
            assert all(v.shape in (parameter.shape, torch.Size()) for v in state.values() if isinstance(v, Tensor))

    step()
    for batch in batches(entry):
        with about(batch):
            for edit_of in (
                lambda group: lg.widen(group, group.step),
                lambda group: lg.prune(group, list(range(group.step))),
                lambda group: lg.split(group, list(range(group.step))),
            ):
                edits = [edit_of(live(structure, model, group.name)) for group in batch]
                lg.apply_(model, edits, optimizers=[optimizer])
                step()


def test_new_units_learn_and_part(entry: Entry) -> None:
    """After one step of plain gradient descent, fan-in and fan-out of some new unit have a gradient, and no two units
    are the same: neither new ones nor copies and what they were copied from.
    """
    structure = structure_of(entry)
    learns = {n for n, p in entry.build().named_parameters() if p.requires_grad}
    for batch in batches(entry):
        learning = [g for g in batch if g.obstacle is None and any(axis.tensor in learns for axis in g.axes)]
        for edit_of in (lambda group: lg.widen(group, 4 * group.step), EDITS["split all"]) if learning else ():
            edits = {group.name: edit_of(group) for group in learning}
            with about(batch):
                model = entry.build()
                before = structure.sizes_in(model)
                lg.apply_(model, edits.values())
                loss_of(entry, model).backward()
                torch.optim.SGD(model.parameters(), lr=1e-2).step()
                model.zero_grad()
                loss_of(entry, model).backward()
                for edit in edits.values():
                    with about([edit.group]):
                        if -1 in edit.index:
                            assert_new_units_learn(edit.group, edits, before, model, learns)
                        assert_no_twins(edit.group, structure.sizes_in(model), model, learns)


def assert_new_units_learn(
    group: AxisGroup, edits: dict[str, lg.Edit], sizes: dict[str, int], model: nn.Module, learns: set[str]
) -> None:
    """Some entry of a new unit has a gradient, in the fan-in and in the fan-out."""
    index = {name: torch.tensor(edit.index) for name, edit in edits.items()}
    index = {name: units if name == group.name else units.clamp(min=0) for name, units in index.items()}
    for role in ("produced", "consumed"):
        seen = []
        for axis in group.with_role(role):
            new = entry_index(axis.layout, sizes, index) < 0
            grad = tensor_of(model, axis.tensor).grad
            if axis.tensor in learns and grad is not None:
                seen.append(grad.movedim(axis.dim, 0)[new].abs().max().item())
        assert not seen or max(seen) > 0, f"no gradient for {role} entries"


def assert_no_twins(group: AxisGroup, sizes: dict[str, int], model: nn.Module, learns: set[str]) -> None:
    """No two units of a group have the same weights everywhere; but what nothing reads does not learn."""
    units = []
    for axis in group.axes if sizes[group.name] > 1 and group.with_role("consumed") else ():
        if axis.tensor in learns:
            weight = tensor_of(model, axis.tensor).detach().movedim(axis.dim, 0)
            own = entry_index(axis.layout, sizes, {group.name: torch.tensor([-1])}) < 0
            chosen = [torch.tensor([unit]) for unit in range(sizes[group.name])]
            entries = [entry_index(axis.layout, sizes, {group.name: unit})[own] for unit in chosen]
            units.append(torch.stack([weight[i].flatten() for i in entries]))
    if units:
        rows = torch.cat(units, dim=1)
        assert len(torch.unique(rows, dim=0)) == len(rows), "units are twins"


@pytest.mark.parametrize("units", [1, 3])
def test_exact_growth_behind_norms_is_exact(entry: Entry, units: int) -> None:
    """By any number of units, twice; and by copies of all."""
    structure = structure_of(entry)
    for group in structure.groups.values():
        several = group.obstacle is not None and group.padding is not None
        numbers = [units, units] if several else [group.size] if group.copies and units == 1 else []
        if not numbers:
            continue
        with about([group]), torch.no_grad():
            model = entry.build().eval()
            for number in numbers:
                before = entry.outputs(model)
                lg.apply_(model, [lg.widen(live(structure, model, group.name), number, preserve=True)])
                for old, new in zip(before, entry.outputs(model), strict=True):
                    torch.testing.assert_close(new, old, rtol=1e-10, atol=1e-10)


def test_a_state_dict_round_trips_into_a_fresh_model(entry: Entry) -> None:
    structure, grown = structure_of(entry), widened(entry)
    small, large = entry.build().state_dict(), grown.state_dict()
    saved = set(large)
    complete = all(axis.tensor in saved for group in structure.groups.values() for axis in group.axes)
    fresh = entry.build()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    lg.resize_like_(fresh, large, structure=structure)
    fresh.load_state_dict(large)
    assert plain_attributes(fresh) == plain_attributes(grown)
    if complete:
        torch.testing.assert_close(entry.outputs(fresh.eval()), entry.outputs(grown.eval()), rtol=0, atol=0)
    lg.resize_like_(fresh, small, structure=structure)
    fresh.load_state_dict(small)
    other = entry.build()
    outputs, expected = entry.outputs(fresh.eval()), entry.outputs(other.eval())  # attributes may appear then
    if complete:
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert plain_attributes(fresh) == plain_attributes(other)


def test_a_state_dict_needs_no_structure_or_asks_for_it(entry: Entry) -> None:
    """It asks where numbers may be sizes; where only torch's modules keep some, none is wrong if it does not ask."""
    structure, grown = structure_of(entry), widened(entry)
    kept = {a.module for group in structure.groups.values() for a in group.attributes}
    of_torch = all(type(grown.get_submodule(name)).__module__.startswith("torch.nn") for name in kept)
    fresh = entry.build()
    before = plain_attributes(fresh)
    refused = ""
    try:
        lg.resize_like_(fresh, grown.state_dict())
    except lg.StructureError as error:
        refused = str(error)
    assert not refused or ("trace the model" in refused and plain_attributes(fresh) == before)
    if of_torch and not refused:
        fresh.load_state_dict(grown.state_dict())
        assert plain_attributes(fresh) == plain_attributes(grown)


def test_tracing_again_gives_the_resized_structure(entry: Entry) -> None:
    """Names stay, and the second trace is made in eval mode: the mode does not matter.

    Reasons are told by the first of like blocks that was looked at, so they may name another one afterwards.
    """
    structure, model = structure_of(entry), widened(entry).eval()
    args, kwargs = entry.inputs()
    expected = structure.resized({name: group.size + group.step for name, group in structure.groups.items()})
    again = lg.trace(model, *args, **kwargs)
    assert list(again.groups) == list(expected.groups)
    assert list(again.pinned) == list(expected.pinned)
    # A configuration that cannot express a width says so when it is resized, and stands for none of it any more.
    told = {place for group in expected.groups.values() for place in group.settings}
    assert not told or entry.third_party
    for name, group in expected.groups.items():
        assert dataclasses.replace(again[name], settings=()) == dataclasses.replace(group, settings=())
        assert set(again[name].settings) <= told
    assert again.stacks == expected.stacks


def test_a_structure_survives_as_plain_data(entry: Entry) -> None:
    structure = structure_of(entry)
    assert lg.Structure.from_dict(structure.to_dict()) == structure
    assert all(name in str(structure) for name in structure.groups)


def test_random_edits_break_nothing(entry: Entry) -> None:
    """A tenth of what ``python -m tests.fuzz`` does, over all models."""
    tally = fuzz(entry, structure_of(entry), seed=0)
    assert sum(tally.edits.values()) >= PER_EPISODE
