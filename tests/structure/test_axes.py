"""Structures as plain data."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn

import lightning_grow as lg
from lightning_grow.structure.axes import (
    Axis,
    AxisGroup,
    Block,
    Structure,
    Units,
    layout_length,
    layout_units,
    tensor_of,
)
from tests.test_zoo import structure_of
from tests.zoo import ZOO

LEFT, RIGHT = Units("left", "a.weight", 0, 1), Units("right", "b.weight", 0, 2)
SIZES = {"left": 3, "right": 4}


def test_the_length_of_a_layout_is_a_sum_of_products() -> None:
    layout = (Block((LEFT, 16)), Block((5,)), Block((2, RIGHT, 3)))
    assert layout_length(layout, SIZES) == 3 * 16 + 5 + 2 * 4 * 3
    assert layout_units(layout) == {"left": LEFT, "right": RIGHT}
    assert [str(block) for block in layout] == ["left*16", "5", "2*right*3"]


def test_a_layout_without_units_has_a_fixed_length() -> None:
    assert layout_length((Block((2, 3)), Block(())), {}) == 7
    assert layout_units((Block((2, 3)),)) == {}


def test_units_read_their_number_off_the_model() -> None:
    model = nn.ModuleDict({"b": nn.Linear(2, 8)})
    assert RIGHT.size_in(model) == 4


def test_a_tensor_is_found_by_its_qualified_name() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3)))
    assert tensor_of(model, "0.0.running_mean") is model[0][0].running_mean
    assert tensor_of(model, "0.0.weight") is model[0][0].weight


def test_roles_select_axes() -> None:
    layout = (Block((LEFT,)),)
    axes = (Axis("a.weight", 0, "produced", layout), Axis("c.weight", 1, "consumed", layout))
    group = AxisGroup("left", 3, 1, axes)
    assert group.with_role("consumed") == (axes[1],)
    assert group.with_role("carried") == ()
    assert group.units == LEFT
    assert [axis.label for axis in group.axes] == ["a.weight[0]", "c.weight[1]"]


def test_an_unknown_group_is_named_together_with_the_known_ones() -> None:
    with pytest.raises(lg.StructureError, match=r"No group is named 'fc9'\. Groups of this model: 0, 2"):
        structure_of(ZOO["mlp"])["fc9"]


def test_resizing_a_structure_by_an_unknown_name_is_refused() -> None:
    with pytest.raises(lg.StructureError, match="fc9"):
        structure_of(ZOO["mlp"]).resized({"fc9": 3})


def test_a_structure_is_a_collection_of_groups() -> None:
    structure = structure_of(ZOO["mlp"])
    assert list(structure) == ["0", "2"]
    assert len(structure) == 2
    assert structure["0"] is structure.groups["0"]


def test_a_resized_structure_differs_in_the_sizes_only() -> None:
    structure = structure_of(ZOO["mlp"])
    resized = structure.resized({"0": 11})
    assert resized["0"].size == 11
    assert resized["0"].axes == structure["0"].axes
    assert resized["2"] == structure["2"]
    assert structure["0"].size == 8
    assert resized.resized({"0": 8}) == structure


@pytest.mark.parametrize("name", ["tied_language_model", "unet", "lstm"])
def test_the_plain_form_is_json_and_safe_to_load(name: str, tmp_path) -> None:
    structure = structure_of(ZOO[name])
    plain = structure.to_dict()
    assert Structure.from_dict(json.loads(json.dumps(plain))) == structure
    torch.save(plain, tmp_path / "structure.pt")
    assert Structure.from_dict(torch.load(tmp_path / "structure.pt", weights_only=True)) == structure
    assert pickle.loads(pickle.dumps(structure)) == structure


def test_a_printed_structure_shows_groups_obstacles_and_pinned_reasons() -> None:
    text = str(structure_of(ZOO["tied_language_model"]))
    assert "block.mlp.0" in text
    assert "LayerNorm" in text
    assert "embed.weight[0]" in text
    assert max(len(line) for line in text.splitlines()) < 250
