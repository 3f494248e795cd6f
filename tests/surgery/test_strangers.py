"""Optimizers that nobody named: state is understood by what it looks like."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_grow.surgery import Edit, apply_, insert_, prune, remove_, split, widen
from lightning_grow.surgery.optimizer_state import plan_state
from lightning_grow.surgery.plan import AxisMap, TensorPlan
from tests.surgery.models import Case, perceptron
from tests.surgery.test_depth import deep, stack, train


class Averaged(torch.optim.Optimizer):
    """Trains a hidden iterate ``z`` and an average that began at zero; steps back to the start, kept flat."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(z=p.clone(), ema=torch.zeros_like(p), origin=p.flatten().clone(), steps=0)
                state["steps"] += 1
                state["z"].sub_(p.grad, alpha=group["lr"])
                state["ema"].lerp_(p, 0.01)
                p.lerp_(state["z"], 0.5).lerp_(state["origin"].view_as(p), 1e-3)


class Pair(NamedTuple):
    first: Tensor
    count: int


class Nested(torch.optim.Optimizer):
    """State in dicts, lists, tuples and queues; factored squares without the averaged dimension; a mask."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["moments"] = {"slow": torch.zeros_like(p), "fast": [torch.zeros_like(p)]}
                    state["queue"] = deque(maxlen=2)
                    state["pair"] = Pair(torch.zeros_like(p), 0)
                    state["mask"] = torch.ones_like(p, dtype=torch.bool)
                    state["history"] = torch.zeros(2, *p.shape, dtype=p.dtype)
                    if p.ndim == 2:
                        state["row"], state["col"] = p.new_zeros(p.shape[0]), p.new_zeros(p.shape[1])
                state["queue"].append(p.grad.clone())
                state["moments"]["slow"].lerp_(p.grad, 0.1)
                state["moments"]["fast"][0].lerp_(p.grad, 0.5)
                state["pair"] = Pair(state["pair"].first + p.grad, state["pair"].count + 1)
                state["history"] = torch.stack([p.grad, state["history"][0]])
                update = state["moments"]["slow"] + state["moments"]["fast"][0] + state["queue"][0]
                update = (update + state["pair"].first * 0.1 + state["history"].sum(0)) * state["mask"]
                if p.ndim == 2:
                    state["row"].lerp_(p.grad.square().mean(1), 0.1)
                    state["col"].lerp_(p.grad.square().mean(0), 0.1)
                    update = update / (torch.outer(state["row"], state["col"]) / state["row"].mean() + 1e-4).sqrt()
                p.sub_(update, alpha=group["lr"] * 0.1)


class Lookahead:
    """No torch optimizer by class: wraps one; slow weights beside the parameters, and a mapping of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.defaults = optimizer.defaults
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        self.first = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.fast_updates = {p: torch.zeros_like(p) for group in self.param_groups for p in group["params"]}
        self.calls = 0

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        before = {p: p.clone() for p in self.fast_updates}
        self.optimizer.step()
        self.calls += 1
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for p, s in zip(group["params"], slow, strict=True):
                self.fast_updates[p].lerp_(p - before[p], 0.5)
                if self.calls % 2 == 0:
                    s.lerp_(p, 0.5)
                    p.copy_(s + 0.1 * self.fast_updates[p])
        for p, first in zip((p for g in self.param_groups for p in g["params"]), self.first, strict=True):
            p.lerp_(first, 1e-3)


class Statistics:
    """An object that hides tensors."""

    def __init__(self, size: int) -> None:
        self.matrix = torch.eye(size)


class Opaque(torch.optim.Optimizer):
    """A preconditioner matrix for each parameter: nothing that a gather could follow. One entry is made at once."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["begun"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["begun"] += 1
                if "whiten" not in state:
                    state["whiten"] = torch.eye(p.shape[0], dtype=p.dtype)
                    state["statistics"] = Statistics(p.shape[0])
                p.sub_((state["whiten"] @ p.grad.reshape(p.shape[0], -1)).reshape(p.shape), alpha=group["lr"])


STRANGERS: dict[str, Callable[[Any], Any]] = {
    "averaged": Averaged,
    "nested": Nested,
    "lookahead": lambda p: Lookahead(torch.optim.AdamW(p, lr=0.01)),
    "lookahead of averaged": lambda p: Lookahead(Averaged(p)),
}


def case_of(make: Callable[[Any], Any], steps: int = 4) -> Case:
    case = perceptron()
    case.optimizer = make(list(case.model.parameters()))
    case.train(steps)
    return case


@pytest.mark.parametrize("name", STRANGERS)
def test_steps_a_permutation_and_steps_equal_the_permuted_uninterrupted_run(name: str) -> None:
    edited, plain = case_of(STRANGERS[name]), case_of(STRANGERS[name])
    edits = [
        Edit(g, tuple(torch.randperm(g.size, generator=torch.Generator().manual_seed(1)).tolist()))
        for g in plain.groups.values()
    ]
    apply_(edited.model, edits, [edited.optimizer])
    edited.train(4)
    plain.train(4)
    apply_(plain.model, edits, [plain.optimizer])
    torch.testing.assert_close(edited.model.state_dict(), plain.model.state_dict(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", STRANGERS)
def test_training_goes_on_after_growth_and_shrinking(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = case_of(STRANGERS[name])
    with caplog.at_level(logging.WARNING, "lightning_grow"):
        apply_(case.model, [widen(case.group("0"), 2), split(case.group("2"), [1])], [case.optimizer])
        case.train()
        apply_(case.model, [prune(case.group("0"), [0, 7]), prune(case.group("2"), [5])], [case.optimizer])
        case.train()
    assert not caplog.records
    assert all(p.isfinite().all() for p in case.model.parameters())


def test_copies_of_the_weights_get_the_new_values_of_the_weights() -> None:
    case = case_of(Averaged)
    fraction = next(float((s["ema"] / p.detach()).median()) for p, s in case.optimizer.state.items())
    apply_(case.model, [widen(case.group("0"), 2)], [case.optimizer])
    weight = case.model[0].weight
    state = case.optimizer.state[weight]
    assert torch.equal(state["z"][6:], weight[6:].detach())
    assert torch.equal(state["origin"].view_as(weight)[6:], weight[6:].detach())
    torch.testing.assert_close(state["ema"][6:], weight[6:].detach() * fraction, rtol=0.1, atol=0)

    edit = split(case.group("2"), [1])
    columns = case.optimizer.state[case.model[5].weight]["z"].clone()
    apply_(case.model, [edit], [case.optimizer])
    state = case.optimizer.state[case.model[5].weight]
    torch.testing.assert_close(state["z"][:, 5], columns[:, 1] * edit.share[5])


def test_slow_weights_beside_the_parameters_follow() -> None:
    case = case_of(STRANGERS["lookahead"])
    apply_(case.model, [widen(case.group("0"), 2)], [case.optimizer])
    slow = dict(zip((n for n, _ in case.model.named_parameters()), case.optimizer.slow[0], strict=True))
    assert torch.equal(slow["0.weight"][6:], case.model[0].weight[6:].detach())
    assert not slow["2.weight"][:, 6:].any()
    assert torch.equal(case.optimizer.first[0][6:], case.model[0].weight[6:].detach())


def test_what_stands_beside_the_parameters_follows_changes_of_depth() -> None:
    model = deep()
    optimizer = Lookahead(torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=0.01))
    train(model, optimizer)
    slow = {
        id(p): s for [s], group in zip(optimizer.slow, optimizer.param_groups, strict=True) for p in group["params"]
    }
    first = dict(zip(map(id, model.parameters()), optimizer.first, strict=True))
    insert_(model, stack(model), 1, [optimizer])
    for entries, group in zip(optimizer.slow, optimizer.param_groups, strict=True):
        for entry, p in zip(entries, group["params"], strict=True):
            assert entry is slow[id(p)] if id(p) in slow else torch.equal(entry, p.detach())
    assert all(any(kept is entry for entry in optimizer.first) for kept in first.values())
    assert set(optimizer.fast_updates) == set(model.parameters())
    train(model, optimizer)
    remove_(model, stack(model), 0, [optimizer])
    train(model, optimizer)
    assert len(optimizer.first) == len(list(model.parameters())) == len(optimizer.fast_updates)


def test_masks_follow_the_majority_and_queues_keep_their_length() -> None:
    case = case_of(Nested)
    apply_(case.model, [widen(case.group("0"), 2)], [case.optimizer])
    state = case.optimizer.state[case.model[0].weight]
    assert state["mask"].all()
    assert (type(state["queue"]), state["queue"].maxlen) == (deque, 2)
    assert type(state["pair"]) is Pair
    assert state["pair"].count == 4
    assert state["history"].shape == (2, 8, 3)
    assert (state["row"].shape, state["col"].shape) == ((8,), (3,))
    torch.testing.assert_close(state["row"][6:], state["row"][:6].mean().expand(2))


def test_what_is_not_understood_starts_afresh_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    case = case_of(Opaque)
    with caplog.at_level(logging.WARNING, "lightning_grow"):
        apply_(case.model, [widen(case.group("0"), 2)], [case.optimizer])
    assert len(caplog.records) == 1
    assert "Opaque: state of 0.weight, 0.bias, 2.weight starts afresh" in caplog.text
    assert "'whiten' of shape (6, 6)" in caplog.text
    state = case.optimizer.state
    assert list(state[case.model[0].weight]) == ["begun"], "what the constructor fills in is there again"
    assert "whiten" in state[case.model[5].weight], "other parameters keep theirs"
    case.train()


def test_a_square_parameter_needs_names_to_tell_rows_from_columns() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    index = torch.tensor([2, 0, 1])
    plan = TensorPlan("weight", (AxisMap(0, "produced", index),), weight.shape, weight.detach()[index])
    vector = torch.tensor([1.0, 2.0, 3.0])
    optimizer.state[weight] = OrderedDict(exp_avg_sq_row=vector, exp_avg_sq_col=vector, step=torch.ones(1))
    state = plan_state(optimizer, weight, plan)
    assert state["exp_avg_sq_row"].tolist() == [3.0, 1.0, 2.0]
    assert state["exp_avg_sq_col"].tolist() == [1.0, 2.0, 3.0]
    assert state["step"] is optimizer.state[weight]["step"]
    optimizer.state[weight] = {"mystery": vector}
    assert plan_state(optimizer, weight, plan) == {}


def test_quantized_codes_start_afresh() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    plan = TensorPlan("w", (AxisMap(0, "produced", torch.tensor([1, 0])),), weight.shape, weight.detach()[:2])
    optimizer.state[weight] = {"codes": torch.zeros(4, 3, dtype=torch.uint8)}
    assert plan_state(optimizer, weight, plan) == {}
    optimizer.state[weight] = {"visits": torch.arange(12).reshape(4, 3)}
    assert plan_state(optimizer, weight, plan)["visits"].tolist() == [[3, 4, 5], [0, 1, 2]]
