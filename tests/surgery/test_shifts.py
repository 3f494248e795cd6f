"""Shifts of an edit: added to what is there after it, in step with all other edits of the same tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_grow.criteria import UnitVectors
from lightning_grow.structure import trace
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.surgery import Edit, apply_, prune, split, widen
from lightning_grow.trainer.proposal import fingerprint, trimmed

X = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


STRUCTURE = trace(mlp(), X)
FIRST, SECOND = STRUCTURE["0"], STRUCTURE["2"]


def drawn(group: AxisGroup, units: int, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a shift of the fan-in of each unit, as vectors and by axis."""
    vectors = UnitVectors(mlp(), group, "produced")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(units, vectors.length, dtype=torch.float64, generator=generator)
    return rows, vectors.spread(rows)


@torch.no_grad()
def test_copies_are_moved_and_everything_else_stays() -> None:
    model, before = mlp(), mlp()
    rows, shifts = drawn(SECOND, 6)
    apply_(model, [Edit(SECOND, (0, 1, 2, 3, 4, 2), (1, 1, 0.25, 1, 1, 0.75), shifts=shifts)])
    index = [0, 1, 2, 3, 4, 2]
    torch.testing.assert_close(model[2].weight, before[2].weight[index] + rows[:, :3])
    torch.testing.assert_close(model[2].bias, before[2].bias[index] + rows[:, 3])
    torch.testing.assert_close(model[4].weight[:, 5], 0.75 * before[4].weight[:, 2])
    assert torch.equal(model[0].weight, before[0].weight)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@torch.no_grad()
def test_a_moved_input_that_is_split_is_shared_like_its_weight(order: tuple[int, int]) -> None:
    """Offspring w_k of an input unit take w_k of its column, and w_k of what the column is moved by."""
    model, before = mlp(), mlp()
    rows, shifts = drawn(SECOND, 5)
    splitting = Edit(FIRST, (0, 1, 2, 0), (0.3, 1, 1, 0.7))
    edits = [splitting, Edit(SECOND, tuple(range(5)), shifts=shifts)]
    apply_(model, [edits[place] for place in order])
    moved = before[2].weight + rows[:, :3]
    torch.testing.assert_close(model[2].weight[:, 0], 0.3 * moved[:, 0])
    torch.testing.assert_close(model[2].weight[:, 3], 0.7 * moved[:, 0])
    torch.testing.assert_close(model[2].weight[:, 1:3], moved[:, 1:])
    alone = mlp()
    apply_(alone, [edits[1]])
    torch.testing.assert_close(model(X), alone(X), rtol=0, atol=1e-12)  # splitting inputs keeps the function


@torch.no_grad()
def test_shifts_follow_when_inputs_go_or_come() -> None:
    rows, shifts = drawn(SECOND, 5)
    fewer = mlp()
    apply_(fewer, [prune(FIRST, [1]), Edit(SECOND, tuple(range(5)), shifts=shifts)])
    torch.testing.assert_close(fewer[2].weight, (mlp()[2].weight + rows[:, :3])[:, [0, 2]])
    more = mlp()
    apply_(more, [widen(FIRST, 2), Edit(SECOND, tuple(range(5)), shifts=shifts)])
    torch.testing.assert_close(more[2].weight[:, :3], mlp()[2].weight + rows[:, :3])
    assert not more[2].weight[:, 3:].any()  # silent new inputs get no part of a shift


@torch.no_grad()
def test_shifts_go_with_new_units_and_their_values() -> None:
    model = mlp()
    rows, shifts = drawn(SECOND, 7)
    values = {"2.weight[0]": torch.ones(2, 3, dtype=torch.float64)}
    apply_(model, [Edit(SECOND, (0, 1, 2, 3, 4, -1, -1), values=values, shifts=shifts)])
    torch.testing.assert_close(model[2].weight[5:], 1 + rows[5:, :3])
    torch.testing.assert_close(model[2].weight[:5], mlp()[2].weight + rows[:5, :3])


@torch.no_grad()
def test_at_once_equals_one_after_the_other() -> None:
    rows, _ = drawn(SECOND, 6)
    at_once, in_turn = mlp(), mlp()
    splitting = split(SECOND, [2])
    vectors = UnitVectors(mlp(), SECOND, "produced")
    apply_(at_once, [Edit(SECOND, splitting.index, splitting.share, shifts=vectors.spread(rows))])
    apply_(in_turn, [splitting])
    structure = trace(in_turn, X)
    wider = UnitVectors(in_turn, structure["2"], "produced")
    apply_(in_turn, [Edit(structure["2"], tuple(range(6)), shifts=wider.spread(rows))])
    for one, other in zip(at_once.parameters(), in_turn.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_optimizer_state_is_that_of_the_copies(make: object) -> None:
    """Offspring inherit w_k of the momentum of their fan-in, w_k^2 of its square, and the fan-out's as it is."""
    model = mlp()
    optimizer = make(model.parameters())  # type: ignore[operator]
    model(X).square().mean().backward()
    optimizer.step()
    before = copy.deepcopy({n: optimizer.state[p] for n, p in model.named_parameters()})
    _, shifts = drawn(SECOND, 6)
    share = torch.tensor([1, 1, -1, 1, 1, 2], dtype=torch.float64)
    index = [0, 1, 2, 3, 4, 2]
    apply_(model, [Edit(SECOND, tuple(index), tuple(share.tolist()), shifts=shifts)], [optimizer])
    rows, columns = optimizer.state[model[2].weight], optimizer.state[model[4].weight]
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2), ("momentum_buffer", 1)):
        if key in rows:
            torch.testing.assert_close(rows[key], before["2.weight"][key][index] * share[:, None] ** power)
            torch.testing.assert_close(columns[key], before["4.weight"][key][:, index])
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


@torch.no_grad()
def test_a_shortened_edit_moves_only_units_that_have_all_their_copies() -> None:
    rows, shifts = drawn(SECOND, 7)
    edit = Edit(SECOND, (0, 1, 2, 3, 4, 2, 0), (0.5, 1, 0.5, 1, 1, 0.5, 0.5), shifts=shifts)
    shorter = trimmed(edit, 6, {"0": 3, "2": 5})
    assert shorter.index == (0, 1, 2, 3, 4, 2)
    assert shorter.share == (1, 1, 0.5, 1, 1, 0.5)
    assert not shorter.shifts["2.weight[0]"][0].any()  # it lost its copy
    torch.testing.assert_close(shorter.shifts["2.weight[0]"][1:], rows[1:6, :3])
    model = mlp()
    apply_(model, [shorter])
    torch.testing.assert_close(model[2].weight[2], mlp()[2].weight[2] + rows[2, :3])


@pytest.mark.parametrize("failing", [FIRST, SECOND], ids=["first", "second"])
def test_a_failure_leaves_everything_as_it_was(failing: AxisGroup) -> None:
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, good = drawn(SECOND, 5)
    bad = {failing.with_role("produced")[0].label: torch.zeros(2, 2)}
    edits = [Edit(failing, tuple(range(failing.size)), shifts=bad)]
    if failing is FIRST:
        edits.insert(0, Edit(SECOND, tuple(range(5)), shifts=good))
    with pytest.raises(ValueError, match=r"Shifts of .*weight\[0\] in the edit of group '.' must have shape"):
        apply_(model, edits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_edit_with_shifts_is_no_identity_and_has_a_fingerprint_of_its_own() -> None:
    _, shifts = drawn(SECOND, 5)
    _, others = drawn(SECOND, 5, seed=2)
    same = tuple(range(5))
    assert not Edit(SECOND, same, shifts=shifts).is_identity
    prints = {fingerprint([Edit(SECOND, same, shifts=given)]) for given in ({}, shifts, others)}
    assert len(prints) == 3
    with pytest.raises(ValueError, match=r"Values or shifts are given for 9.weight\[0\]"):
        Edit(SECOND, same, shifts={"9.weight[0]": torch.zeros(1)})
