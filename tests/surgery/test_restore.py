"""A model takes on the shape of a state dict, larger or smaller, with or without a structure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from lightning_grow.structure.axes import Structure
from lightning_grow.structure.errors import StructureError
from lightning_grow.surgery import apply_, insert_, prune, remove_, replay_, resize_like_, swap, widen
from tests.surgery.models import Case, assert_same, gated, perceptron, snapshot
from tests.surgery.test_depth import deep, stack


def grown(make_case: Callable[[], Case]) -> Case:
    case = make_case()
    case.optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01)
    case.train()
    apply_(case.model, [widen(g, 3) for g in case.groups.values()], [case.optimizer])
    case.train()
    return case


@pytest.mark.parametrize("with_structure", [False, True])
@pytest.mark.parametrize("make_case", [perceptron, gated])
def test_fresh_and_larger_models_take_on_the_state_dict(make_case: Callable[[], Case], with_structure: bool) -> None:
    large, fresh = grown(make_case), make_case()
    structure = Structure(fresh.groups) if with_structure else None
    small_state = copy.deepcopy(fresh.model.state_dict())
    small_output = fresh.output()
    ids = {n: id(p) for n, p in fresh.model.named_parameters()}
    resize_like_(fresh.model, large.model.state_dict(), structure)
    assert_same(dict(fresh.model.state_dict()), dict(large.model.state_dict()))
    assert snapshot(fresh.model)["plain"] == snapshot(large.model)["plain"]
    assert torch.equal(fresh.output(), large.output())
    assert {n: id(p) for n, p in fresh.model.named_parameters()} == ids
    fresh.model.load_state_dict(large.model.state_dict())
    resize_like_(fresh.model, small_state, structure)
    assert torch.equal(fresh.output(), small_output)
    assert snapshot(fresh.model)["plain"] == snapshot(make_case().model)["plain"]


def test_optimizer_state_follows_and_training_goes_on() -> None:
    large, small = grown(perceptron), perceptron()
    small.optimizer = torch.optim.AdamW(small.model.parameters(), lr=0.01)
    small.train()
    kept = small.optimizer.state[small.model[0].weight]["exp_avg"].clone()
    resize_like_(small.model, large.model.state_dict(), optimizers=[small.optimizer])
    state = small.optimizer.state[small.model[0].weight]
    assert torch.equal(state["exp_avg"][:6], kept)
    assert state["exp_avg_sq"].shape == (9, 3)
    small.optimizer.load_state_dict(copy.deepcopy(large.optimizer.state_dict()))
    for case in (small, large):
        case.train()
    torch.testing.assert_close(small.model.state_dict(), large.model.state_dict())


def test_tied_weights_hidden_buffers_and_other_dtypes() -> None:
    class Tied(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width
            self.embed = nn.Embedding(5, width)
            self.head = nn.Linear(width, 5)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.ones(width), persistent=False)

        def forward(self, x: Any) -> Any:
            return self.head((self.embed(x) * self.scale).view(-1, self.width))

    small, large = Tied(3), Tied(4).bfloat16()
    import lightning_grow as lg

    structure = lg.trace(small, torch.tensor([1, 2]))
    resize_like_(small, large.state_dict(), structure)
    assert small.head.weight is small.embed.weight
    assert small.embed.weight.dtype == torch.float32
    assert (small.width, small.scale.shape, small.embed.embedding_dim) == (4, (4,), 4)
    torch.testing.assert_close(small(torch.tensor([1, 2])), large.float()(torch.tensor([1, 2])))


def test_numbers_that_may_be_a_size_are_refused_without_a_structure() -> None:
    class Stranger(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, inputs))
            self.inputs, self.kernels, self.heads = inputs, (inputs, 5), 2

    class Above(nn.Module):
        def __init__(self, width: int, side: int) -> None:
            super().__init__()
            self.side = side
            self.linear = nn.Linear(3, width)

    model = Stranger(3, 4)
    resize_like_(model, Stranger(3, 6).state_dict())
    assert (model.inputs, model.kernels, model.heads) == (3, (3, 5), 2)
    for inputs, outputs, name in ((3, 5, "kernels"), (3, 2, "heads")):
        model = Stranger(inputs, outputs)
        with pytest.raises(StructureError, match=rf"'{name}' of Stranger has the value {outputs}.*trace the model"):
            resize_like_(model, Stranger(inputs, 7).state_dict())
        assert model.weight.shape == (outputs, inputs), "all or nothing"
    with pytest.raises(StructureError, match=r"'0.side' of Above has the value 4, as long as axis 0 of '0.linear."):
        resize_like_(nn.Sequential(Above(4, 4)), nn.Sequential(Above(6, 4)).state_dict())
    normed = [nn.Sequential(nn.Linear(3, n), nn.LayerNorm(n, elementwise_affine=False)) for n in (4, 6)]
    with pytest.raises(StructureError, match=r"'1\.normalized_shape' of LayerNorm has the value 4"):
        resize_like_(normed[0], normed[1].state_dict())
    linear = nn.Linear(3, 4)
    linear.out_features = 99
    resize_like_(linear, nn.Linear(3, 5).state_dict())
    assert linear.out_features == 99, "it was not the length of the axis before, either"


def test_a_state_dict_of_another_model_is_refused_and_nothing_changes() -> None:
    case = perceptron()
    before = snapshot(case.model)
    own = case.model.state_dict()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("it lacks '0.bias'", {k: v for k, v in own.items() if k != "0.bias"}),
        ("has besides 'extra'", {**own, "extra": torch.ones(1)}),
        (r"'0.bias' has shape \(6, 1\) in it, but \(6,\) here", {**own, "0.bias": torch.ones(6, 1)}),
    ]
    for message, state_dict in wrong:
        with pytest.raises(StructureError, match=message):
            resize_like_(case.model, state_dict)
        assert_same(snapshot(case.model), before)
    tied = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    tied[1].weight = tied[0].weight
    with pytest.raises(StructureError, match="are one tensor"):
        resize_like_(tied, {"0.weight": torch.ones(3, 2), "1.weight": torch.ones(2, 2)})
    handle = case.model[0].weight.register_hook(lambda g: g)
    with pytest.raises(StructureError, match="has hooks"):
        resize_like_(case.model, grown(perceptron).model.state_dict())
    handle.remove()
    assert_same(snapshot(case.model), before)


@pytest.mark.parametrize("method", ["tensor", "attribute", "values"])
def test_a_failure_in_the_middle_leaves_everything_as_it_was(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, target = perceptron(), grown(perceptron).model.state_dict()
    case.optimizer = torch.optim.AdamW(case.model.parameters())
    case.train()
    before = snapshot(case.model, case.optimizer)
    original, calls = getattr(swap.Commit, method), []

    def failing(self: Any, *args: Any) -> None:
        original(self, *args)
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("injected")

    monkeypatch.setattr(swap.Commit, method, failing)
    with pytest.raises(RuntimeError, match="injected"):
        resize_like_(case.model, target, optimizers=[case.optimizer])
    assert_same(snapshot(case.model, case.optimizer), before)


@dataclass
class Change:
    what: str
    at: int | None
    stack: dict[str, Any] | None


@dataclass
class History:
    events: list[Change] = field(default_factory=list)

    def depth_events(self) -> list[Change]:
        return self.events


def plain(found: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(found).items()}


def test_a_record_of_depth_is_replayed() -> None:
    model, history = deep(), History()
    for what, at in (("insert", 1), ("insert", 3), ("remove", 0)):
        history.events.append(Change(what, at, plain(stack(model))))
        (insert_ if what == "insert" else remove_)(model, stack(model), at)
    fresh = deep()
    replay_(fresh, history)
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert [b.layer_idx for b in fresh.blocks] == [0, 1, 2]
    resize_like_(fresh, model.state_dict())
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))
    with pytest.raises(StructureError, match="does not say how to repeat"):
        replay_(fresh, History([Change("insert", 1, None)]))


def test_an_own_edit_and_its_state_dict_agree() -> None:
    case, fresh = grown(perceptron), perceptron()
    apply_(case.model, [prune(case.group("2"), [0, 7])], [case.optimizer])
    resize_like_(fresh.model, case.model.state_dict())
    assert torch.equal(fresh.output(), case.output())
