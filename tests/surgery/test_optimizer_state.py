"""Optimizer state follows the units, for every optimizer of torch and for strangers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import AxisGroup, Block, Units
from lightning_grow.surgery import Edit, apply_, prune, split, widen
from lightning_grow.surgery.optimizer_state import plan_state
from lightning_grow.surgery.plan import AxisMap, TensorPlan
from tests.surgery.models import Case, assert_same, gated, group_of, perceptron, snapshot

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD nesterov foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9, foreach=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05, t0=2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


def permutation(group: AxisGroup, seed: int = 0) -> Edit:
    order = torch.randperm(group.size, generator=torch.Generator().manual_seed(seed))
    return Edit(group, tuple(order.tolist()))


@pytest.mark.parametrize("make_case", [perceptron, gated])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_a_permutation_and_steps_equal_the_permuted_uninterrupted_run(
    name: str, make_case: Callable[[], Case]
) -> None:
    edited, plain = make_case(), make_case()
    for case in (edited, plain):
        case.optimizer = OPTIMIZERS[name](list(case.model.parameters()))
        case.train(4)
    edits = [permutation(group) for group in edited.groups.values()]
    apply_(edited.model, edits, [edited.optimizer])
    for case in (edited, plain):
        case.train(4)
    apply_(plain.model, edits, [plain.optimizer])
    torch.testing.assert_close(edited.model.state_dict(), plain.model.state_dict(), rtol=1e-6, atol=1e-9)
    states = [case.optimizer.state_dict()["state"] for case in (edited, plain)]
    torch.testing.assert_close(*states, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("new_state", ["mean", "zeros"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "LBFGS"])
@pytest.mark.parametrize("make_case", [perceptron, gated])
def test_pruning_fresh_units_is_the_exact_inverse_of_widening(
    make_case: Callable[[], Case], name: str, new_state: Any
) -> None:
    case = make_case()
    make = OPTIMIZERS.get(name, lambda p: torch.optim.LBFGS(p, max_iter=3))
    case.optimizer = make(list(case.model.parameters()))
    case.train()
    case.optimizer.zero_grad()
    if name == "LBFGS":
        case.optimizer.state.clear()
    before = snapshot(case.model, case.optimizer)
    sizes = {name: case.group(name).size for name in case.groups}
    apply_(case.model, [widen(case.group(n), 3) for n in sizes], [case.optimizer], new_state=new_state)
    apply_(case.model, [prune(case.group(n), range(s, s + 3)) for n, s in sizes.items()], [case.optimizer])
    assert_same(snapshot(case.model, case.optimizer), before)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "LBFGS"])
def test_training_goes_on_after_growth_and_no_value_is_undefined(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = perceptron()
    make = OPTIMIZERS.get(name, lambda p: torch.optim.LBFGS(p, max_iter=3, history_size=5))
    case.optimizer = make(list(case.model.parameters()))
    case.train()
    with caplog.at_level(logging.WARNING, "lightning_grow"):
        apply_(case.model, [widen(case.group("0"), 2), split(case.group("2"), [0, 3])], [case.optimizer])
    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    case.train()
    for n, parameter in case.model.named_parameters():
        assert parameter.isfinite().all(), n
        assert not torch.equal(parameter, before[n]), n
    told = [record.message for record in caplog.records]
    assert len(told) == (1 if name == "LBFGS" else 0), told


def test_factored_squares_of_what_stays_stay_what_they_were() -> None:
    case = perceptron()
    case.optimizer = torch.optim.Adafactor(case.model.parameters())
    case.train(6)
    weight = case.model[2].weight

    def squares() -> Tensor:
        state = case.optimizer.state[weight]
        return state["row_var"] @ state["col_var"] / state["row_var"].mean()

    before = squares()
    apply_(case.model, [prune(case.group("0"), [0, 4]), prune(case.group("2"), [1])], [case.optimizer])
    torch.testing.assert_close(squares(), before[[0, 2, 3, 4]][:, [1, 2, 3, 5]])
    before = squares()
    edit = split(case.group("2"), [0])
    apply_(case.model, [edit], [case.optimizer])
    share = torch.tensor(edit.share, dtype=torch.float64)
    torch.testing.assert_close(squares(), before[list(edit.index)] * share.square()[:, None])


def test_flat_histories_go_also_when_the_first_parameter_stays(caplog: pytest.LogCaptureFixture) -> None:
    """L-BFGS keeps what it knows of all parameters under the first one, which this edit does not touch."""
    case = perceptron()
    case.optimizer = torch.optim.LBFGS(case.model.parameters(), max_iter=3)
    case.train()
    with caplog.at_level(logging.WARNING, "lightning_grow"):
        apply_(case.model, [widen(case.group("2"), 2)], [case.optimizer])
    assert "covers all parameters at once" in caplog.text
    case.train()


def test_a_model_under_muon_keeps_its_momentum() -> None:
    case = perceptron()
    matrices = [p for p in case.model.parameters() if p.ndim == 2]
    case.optimizer = torch.optim.Muon(matrices, lr=0.01)
    case.train()
    before = {p: case.optimizer.state[p]["momentum_buffer"].clone() for p in matrices}
    edit = permutation(case.group("0"))
    apply_(case.model, [edit], [case.optimizer])
    order = torch.tensor(edit.index)
    after = [case.optimizer.state[p]["momentum_buffer"] for p in matrices]
    assert torch.equal(after[0], before[matrices[0]][order])
    assert torch.equal(after[1], before[matrices[1]][:, order])
    case.train()


def test_sparse_adam_follows_an_embedding() -> None:
    def run(edit_at: int) -> tuple[Tensor, dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
        units = Units("0", "0.weight", 1, 1)
        layouts = {"2.weight[1]": (Block((2, units)),)}
        group = group_of("0", units, 4, "0.weight[1]", "", "2.weight[1]", "0.embedding_dim", layouts)
        dense = [model[2].weight, model[2].bias]
        optimizers = [torch.optim.SparseAdam([model[0].weight], lr=0.05), torch.optim.SGD(dense, lr=0.05)]
        tokens = torch.tensor([[0, 1], [2, 3], [5, 1]])
        for step in range(6):
            if step == edit_at:
                apply_(model, [Edit(group, (2, 0, 3, 1))], optimizers)
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(tokens).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
        if edit_at == 6:
            apply_(model, [Edit(group, (2, 0, 3, 1))], optimizers)
        return model[0].weight.detach(), optimizers[0].state[model[0].weight]

    weight, state = run(3)
    expected_weight, expected_state = run(6)
    torch.testing.assert_close(weight, expected_weight)
    torch.testing.assert_close(state, expected_state)


def test_copies_share_the_gradient_and_its_square() -> None:
    case = perceptron()
    case.optimizer = torch.optim.AdamW(case.model.parameters())
    case.train()
    state = copy.deepcopy(case.optimizer.state_dict()["state"])
    edit = split(case.group("0"), [1])
    apply_(case.model, [edit], [case.optimizer])
    after = case.optimizer.state_dict()["state"]
    for row, unit, share in ((1, 1, edit.share[1]), (6, 1, edit.share[6]), (2, 2, 1.0)):
        torch.testing.assert_close(after[0]["exp_avg"][row], state[0]["exp_avg"][unit] * share)
        torch.testing.assert_close(after[1]["exp_avg_sq"][row], state[1]["exp_avg_sq"][unit] * share**2)
        torch.testing.assert_close(after[2]["exp_avg"][:, row], state[2]["exp_avg"][:, unit])
    assert after[0]["step"] == state[0]["step"]


def test_the_shared_gradient_is_the_gradient_of_the_split_model() -> None:
    """What the factor w stands for: one step of SGD after a split sees w times the gradient of the unit."""
    case = perceptron()
    case.model(case.inputs).square().sum().backward()
    gradient = case.model[0].weight.grad.clone()
    edit = split(case.group("0"), [1])
    apply_(case.model, [edit])
    case.model(case.inputs).square().sum().backward()
    torch.testing.assert_close(case.model[0].weight.grad[6], gradient[1] * edit.share[6])
    torch.testing.assert_close(case.model[0].weight.grad[1], gradient[1] * edit.share[1])


def test_new_squares_are_the_mean_of_the_existing_units_and_new_step_sizes_never_zero() -> None:
    case = perceptron()
    case.optimizer = torch.optim.AdamW(case.model.parameters())
    case.train()
    squares = case.optimizer.state[case.model[0].weight]["exp_avg_sq"].clone()
    apply_(case.model, [widen(case.group("0"), 2)], [case.optimizer])
    after = case.optimizer.state[case.model[0].weight]
    torch.testing.assert_close(after["exp_avg_sq"][6:], squares.mean(0).expand(2, -1))
    assert not after["exp_avg"][6:].any()

    case = perceptron()
    case.optimizer = torch.optim.Rprop(case.model.parameters())
    case.train()
    apply_(case.model, [widen(case.group("0"), 2)], [case.optimizer], new_state="zeros")
    assert (case.optimizer.state[case.model[2].weight]["step_size"] > 0).all()


def test_an_average_of_the_weights_gets_the_same_new_values_as_the_weights() -> None:
    case = perceptron()
    case.optimizer = torch.optim.ASGD(case.model.parameters(), lr=0.05, t0=1)
    case.train()
    apply_(case.model, [widen(case.group("0"), 2)], [case.optimizer])
    weight = case.model[0].weight
    assert torch.equal(case.optimizer.state[weight]["ax"][6:], weight[6:].detach())


def test_factored_squares_of_a_single_row_grow_as_rows_and_columns() -> None:
    """Of a parameter of shape (1, 9), the mean over rows has the shape of the parameter itself."""
    weight = nn.Parameter(torch.randn(1, 9))
    optimizer = torch.optim.Adafactor([weight])
    weight.square().sum().backward()
    optimizer.step()
    maps = (AxisMap(0, "produced", torch.tensor([0, -1])),)
    state = plan_state(optimizer, weight, TensorPlan("weight", maps, weight.shape, torch.randn(2, 9)))
    assert (state["row_var"].shape, state["col_var"].shape) == ((2, 1), (1, 9))
