"""The page of models that others wrote: it names them all, and its reference tells right from wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from tests.test_zoo import structure_of
from tests.zoo import THIRD_PARTY, ZOO

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_peer", DOCS / "models_peer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_rows(model: nn.Module, columns: list[int]) -> Callable[[], Any]:
    """Remove the first hidden unit of `concat_raw`, and some columns of the layer that reads it."""

    def remove() -> None:
        model.hidden.weight = nn.Parameter(model.hidden.weight[1:])
        model.hidden.bias = nn.Parameter(model.hidden.bias[1:])
        left = [i for i in range(model.head.weight.shape[1]) if i not in columns]
        model.head.weight = nn.Parameter(model.head.weight[:, left])

    return remove


@pytest.mark.parametrize(("columns", "end"), [([0], "equal"), ([1], "differs"), ([8], "differs"), ([], "raises")])
def test_only_the_right_columns_are_equal(peer: ModuleType, columns: list[int], end: str) -> None:
    entry = ZOO["concat_raw"]
    whole = entry.outputs(entry.build().eval())
    found, axes, error = peer.outcome(entry, lambda model: without_rows(model, columns), whole)
    assert found == end
    assert bool(error) == (end == "raises")
    assert axes == (set() if end == "raises" else {"hidden.weight[0]", "hidden.bias[0]", "head.weight[1]"})


@pytest.mark.parametrize("name", ["mlp", "concat_raw", "flatten_head"])
def test_our_groups_are_equal(peer: ModuleType, name: str) -> None:
    entry = ZOO[name]
    whole = [t.detach() for t in entry.outputs(entry.build().eval())]
    for group in structure_of(entry).groups:
        assert peer.outcome(entry, peer.ours_cut(structure_of(entry), group), whole)[0] == "equal"


def test_an_output_of_another_size_is_told(peer: ModuleType) -> None:
    entry = ZOO["mlp"]
    whole = entry.outputs(entry.build().eval())

    def cut(model: nn.Module) -> Callable[[], None]:
        def remove() -> None:
            model[4].weight, model[4].bias = nn.Parameter(model[4].weight[1:]), nn.Parameter(model[4].bias[1:])

        return remove

    assert peer.outcome(entry, cut, whole)[0] == "output"


def test_a_norm_is_told_apart(peer: ModuleType) -> None:
    """Under a LayerNorm nothing can be compared: the mean is over fewer units."""
    entry = ZOO["layer_norm"]
    whole = entry.outputs(entry.build().eval())
    assert peer.outcome(entry, peer.ours_cut(structure_of(entry), "0"), whole)[0] == "norm"


def test_the_page_names_every_model_of_the_tests() -> None:
    page = (DOCS / "models.md").read_text()
    assert all(f"`{name}`" in page for name in THIRD_PARTY)
