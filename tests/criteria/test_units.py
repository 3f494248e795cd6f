"""One vector for each unit, whatever tensors and axes it is spread over."""

import copy

import pytest
import torch

from lightning_grow.criteria import UnitVectors, sizes_of
from lightning_grow.structure import trace
from lightning_grow.structure.axes import tensor_of
from lightning_grow.structure.layout import entry_share
from lightning_grow.surgery import Edit, apply_, widen
from tests.zoo import ZOO

NAMES = [
    "mlp",
    "cnn_batch_norm",
    "residual_cnn",
    "flatten_head",
    "concat_raw",
    "grouped_conv",
    "conv1d_and_transposed",
    "channel_shuffle",
    "lstm",
    "gru_of_two_layers_and_directions",
    "attention_of_heads",
    "grouped_query_attention",
    "transformer_fused_qkv",
    "gated_ffn",
    "tied_language_model",
    "shared_twice",
]
ROLES = pytest.mark.parametrize("role", ["produced", "consumed"])


@pytest.fixture(scope="module", params=NAMES)
def traced(request):
    entry = ZOO[request.param]
    args, kwargs = entry.inputs()
    return entry, trace(entry.build(), *args, **kwargs)


def vectors_of(model, structure, role):
    found = [UnitVectors(model, group, role) for group in structure.groups.values()]
    return [vectors for vectors in found if vectors.axes]


@ROLES
def test_every_entry_of_a_unit_is_in_its_vector_once(traced, role):
    """Told by numbers: each parameter reads as the number of the unit that owns the entry."""
    entry, structure = traced
    model = entry.build()
    for vectors in vectors_of(model, structure, role):
        group, named = vectors.group, dict(model.named_parameters())
        marks, count = {}, 0
        for axis in vectors.axes:
            tensor = named[axis.tensor]
            units = {group.name: torch.arange(group.size, dtype=torch.float64) + 2}
            owner = entry_share(axis.layout, sizes_of(model, group), units)  # 1: of other groups
            shape = [-1 if dim == axis.dim else 1 for dim in range(tensor.ndim)]
            if axis.tensor not in marks:
                marks[axis.tensor] = owner.reshape(shape).expand(tensor.shape)
            count += int((owner > 1).sum()) * (tensor.numel() // tensor.shape[axis.dim])
        assert count == group.size * vectors.length
        if len(marks) == len(vectors.axes):
            found = vectors.of(marks)
            expected = torch.arange(group.size, dtype=torch.float64)[:, None] + 2
            torch.testing.assert_close(found, expected.expand(found.shape))


@ROLES
def test_what_is_written_is_read(traced, role):
    """And nothing else is changed."""
    entry, structure = traced
    model = entry.build()
    for vectors in vectors_of(model, structure, role):
        drawn = torch.randn(vectors.group.size, vectors.length, dtype=torch.float64)
        before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        vectors.write_(model, drawn)
        named = dict(model.named_parameters())
        if len(vectors.parameters) == len(vectors.axes):  # else entries lie on two axes of one tensor
            torch.testing.assert_close(vectors.of(named), drawn)
        changed = sum(int((named[name] != before[name]).sum()) for name in before)
        assert changed <= drawn.numel()
        assert all(torch.equal(named[n], before[n]) for n in before if n not in vectors.parameters)
        vectors.write_(model, vectors.of(before))
        assert all(torch.equal(named[name], before[name]) for name in before)


@ROLES
def test_shifts_add_up_to_what_is_written(traced, role):
    """An edit that shifts all units is the same as writing their vectors."""
    entry, structure = traced
    for vectors in vectors_of(entry.build(), structure, role):
        group, model = vectors.group, entry.build()
        if len(vectors.parameters) < len(vectors.axes):
            continue
        drawn = torch.randn(group.size, vectors.length, dtype=torch.float64)
        written = copy.deepcopy(model)
        vectors.write_(written, vectors.of(dict(model.named_parameters())) + drawn)
        apply_(model, [Edit(group, tuple(range(group.size)), shifts=vectors.spread(drawn))])
        for (name, one), (_, other) in zip(model.named_parameters(), written.named_parameters(), strict=True):
            torch.testing.assert_close(one, other, msg=lambda m, where=f"{group.name}, {name}": f"{where}: {m}")


@ROLES
def test_values_of_new_units_are_read_from_the_wider_model(traced, role):
    entry, structure = traced
    for vectors in vectors_of(entry.build(), structure, role):
        group, model = vectors.group, entry.build()
        if any(axis.tensor == other.tensor and axis != other for axis in vectors.axes for other in group.axes):
            continue  # new units also lengthen the vectors of such a group
        new = torch.randn(group.step, vectors.length, dtype=torch.float64)
        apply_(model, [widen(group, group.step, values=vectors.spread(new, new=group.step))])
        wider = UnitVectors(model, trace_again(group, group.size + group.step), role)
        torch.testing.assert_close(wider.of(dict(model.named_parameters()))[group.size :], new)


def trace_again(group, size):
    return type(group)(**{**vars(group), "size": size})


def test_frozen_parameters_are_left_out_unless_asked_for():
    entry = ZOO["mlp"]
    model, (args, kwargs) = entry.build(), entry.inputs()
    group = trace(model, *args, **kwargs)["0"]
    model[0].weight.requires_grad_(False)
    assert UnitVectors(model, group, "produced").length == 1
    assert UnitVectors(model, group, "produced", trained=False).length == 6
    model[0].bias.requires_grad_(False)
    nothing = UnitVectors(model, group, "produced")
    assert (nothing.axes, nothing.length) == ((), 0)


def test_a_head_is_the_rows_of_its_queries_keys_and_values():
    entry = ZOO["attention_of_heads"]
    model, (args, kwargs) = entry.build(), entry.inputs()
    group = trace(model, *args, **kwargs)["1.attention.q"]
    vectors = UnitVectors(model, group, "produced")
    assert {name.split(".")[-2] for name in vectors.parameters} >= {"q", "k", "v"}
    weight = tensor_of(model, "1.attention.q.weight").detach()
    rows = len(weight) // group.size
    where = [axis.label for axis in vectors.axes].index("1.attention.q.weight[0]")
    part = torch.split(vectors.of(dict(model.named_parameters())), vectors.lengths, dim=1)[where]
    torch.testing.assert_close(part[1], weight[rows : 2 * rows].reshape(-1))
