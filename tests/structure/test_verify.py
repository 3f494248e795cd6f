"""Proposals that are wrong must not survive their trials."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.axes import Axis, AxisGroup, Block, Units
from lightning_grow.structure.trials import Trials, UnrunnableError
from lightning_grow.structure.verify import choose_layouts, judge
from tests.test_zoo import structure_of
from tests.zoo import ZOO
from tests.zoo_entry import Model


def trials_of(name: str) -> tuple[Trials, list[AxisGroup], nn.Module]:
    """A model of the zoo with what is right for it."""
    entry, structure = ZOO[name], structure_of(ZOO[name])
    model = entry.build()
    args, kwargs = entry.inputs()
    groups = list(structure.groups.values())
    trials = Trials(model, model, args, kwargs, groups)
    return trials, [trials.cut(group) for group in groups], model


def with_layout(group: AxisGroup, label: str, factors: tuple[int | str, ...]) -> AxisGroup:
    """The group with another order of entries on one axis."""
    block = Block(tuple(f if isinstance(f, int) else group.units for f in factors))
    axes = tuple(dataclasses.replace(a, layout=(block,)) if a.label == label else a for a in group.axes)
    return dataclasses.replace(group, axes=axes)


def without(group: AxisGroup, label: str) -> AxisGroup:
    """The group with an axis forgotten."""
    return dataclasses.replace(group, axes=tuple(axis for axis in group.axes if axis.label != label))


def test_the_right_groups_pass() -> None:
    for name in ("flatten_head", "mlp_of_one_width"):
        trials, groups, _ = trials_of(name)
        chosen, reasons = choose_layouts(trials, groups, {})
        assert (chosen, reasons) == (groups, {})
        assert judge(trials, chosen, {}) == (groups, {})


def test_a_wrong_order_is_not_accepted() -> None:
    trials, groups, _ = trials_of("flatten_head")
    right = groups[1]
    wrong = with_layout(right, "minor.weight[1]", ("units", 4))
    chosen, reasons = choose_layouts(trials, [groups[0], wrong], {})
    assert [group.name for group in chosen] == [groups[0].name]
    assert reasons[right.name] == "its units are not interchangeable"


def test_of_several_orders_the_right_one_is_chosen() -> None:
    trials, groups, _ = trials_of("flatten_head")
    right = groups[1]
    wrong = with_layout(right, "minor.weight[1]", ("units", 4))
    chosen, reasons = choose_layouts(trials, [groups[0], wrong], {right.name: [wrong, right]})
    assert (chosen[1], reasons) == (right, {})


def test_a_forgotten_axis_is_noticed() -> None:
    trials, groups, _ = trials_of("mlp_of_one_width")
    chosen, reasons = choose_layouts(trials, [without(groups[0], "2.weight[1]"), groups[1]], {})
    assert [group.name for group in chosen] == ["2"]
    assert "0" in reasons


def test_two_halves_of_one_width_cannot_pass_for_two_groups() -> None:
    """Resized together, by the same number, they once looked right; alone each breaks the model."""
    trials, groups, _ = trials_of("mlp_of_one_width")
    whole = groups[0]
    halves = []
    for name, labels in (("rows", {"0.weight[0]", "0.bias[0]"}), ("columns", {"2.weight[1]"})):
        axes = [axis for axis in whole.axes if axis.label in labels]
        units = Units(name, axes[0].tensor, axes[0].dim, 1)
        axes = [dataclasses.replace(axis, layout=(Block((units,)),)) for axis in axes]
        halves.append(AxisGroup(name, whole.size, 1, tuple(axes)))
    trials.sizes |= {"rows": whole.size, "columns": whole.size}
    chosen, _ = choose_layouts(trials, halves, {})
    judged, reasons = judge(trials, chosen, {})
    assert judged == []
    assert all("resizing fails" in reason for reason in reasons.values())


def test_a_wrong_role_is_an_obstacle() -> None:
    """Shares on the rows in front of a tanh instead of the columns behind it: the sum over two copies differs."""
    trials, groups, _ = trials_of("mlp_of_one_width")
    swapped = {"produced": "consumed", "consumed": "produced", "carried": "carried"}
    axes = tuple(dataclasses.replace(axis, role=swapped[axis.role]) for axis in groups[1].axes)
    (group,), _ = judge(trials, [dataclasses.replace(groups[1], axes=axes)], {})
    assert group.obstacle == "the sum over two copies differs from the unit"


def test_what_was_seen_to_mix_names_the_obstacle() -> None:
    trials, groups, _ = trials_of("softmax_over_units")
    judged, _ = judge(trials, groups, {groups[0].name: "softmax normalises over this axis"})
    assert judged[0].obstacle == "softmax normalises over this axis"


def test_trials_leave_the_model_and_its_buffers_alone() -> None:
    trials, groups, model = trials_of("buffers_written_in_eval_mode")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    judge(trials, groups, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_does_not_run_cannot_be_tried() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(UnrunnableError, match="forward fails"):
        Trials(model, model, (torch.ones(1, 4),), {}, [])
    nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(UnrunnableError, match="not finite"):
        Trials(model, model, (torch.ones(1, 3),), {}, [])


def test_small_effects_are_seen() -> None:
    """A head whose columns are tiny next to the rest still tells a wrong order from a right one."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    structure = lg.trace(model, torch.randn(4, 5))
    layout = (Block((2, Units("0", "0.weight", 0, 2))),)
    axes = tuple(dataclasses.replace(axis, layout=layout) for axis in structure["0"].axes if axis.role == "produced")
    wrong = AxisGroup("0", 2, 1, (*axes, Axis("2.weight", 1, "consumed", (Block((Units("0", "0.weight", 0, 2), 2)),))))
    trials = Trials(model, model, (torch.randn(4, 5),), {}, [wrong])
    assert choose_layouts(trials, [wrong], {})[1] == {"0": "its units are not interchangeable"}


def test_a_model_is_tried_in_miniature() -> None:
    """No run sees more than a few units of a wide group, and the model itself keeps its size."""
    seen: list[int] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 512), nn.Linear(512, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(int(self.first.weight.shape[0]) if type(self.first.weight.shape[0]) is int else 0)
            return self.second(torch.relu(self.first(x)))

    model = Net()
    structure = lg.trace(model, torch.randn(4, 5))
    assert structure["first"].size == model.first.out_features == 512
    assert structure["first"].obstacle is None
    assert 0 < max(seen) < 32


def test_a_group_that_cannot_be_cut_down_keeps_its_size() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(self.wide(x))
        if hidden.shape[1] < 40:
            raise ValueError("too narrow")
        return self.head(torch.tanh(self.other(hidden)))

    model = Model(forward, wide=nn.Linear(5, 64), other=nn.Linear(64, 48), head=nn.Linear(48, 3))
    structure = lg.trace(model, torch.randn(4, 5))
    assert {g.name: (g.size, g.obstacle) for g in structure.groups.values()} == {
        "wide": (64, None),
        "other": (48, None),
    }


def test_a_model_without_values_is_tried_with_others() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 512), nn.LayerNorm(512), nn.Tanh(), nn.Linear(512, 6), nn.Linear(6, 3))
    structure = lg.trace(model, torch.zeros(2, 5))
    assert "LayerNorm" in (structure["0"].obstacle or "")
    assert structure["3"].obstacle is None
    assert all(p.is_meta for p in model.parameters())
