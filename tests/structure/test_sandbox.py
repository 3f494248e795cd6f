"""Running a model with other tensors must leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_grow.criteria.objective import measuring
from lightning_grow.structure import trace
from lightning_grow.structure.axes import Attribute, Block
from lightning_grow.structure.sandbox import set_size, swap_in, tensors_in, unchanged


def test_attributes_come_back_however_the_body_ends() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model.log = [1]
    parameters = list(model.parameters())
    state = torch.get_rng_state()

    def meddle() -> None:
        model[0].weight = nn.Parameter(torch.zeros(5, 2))
        model[0].out_features = 5
        model.log.append(2)
        model.extra = object()
        model.eval()
        torch.rand(3)
        del model._modules["1"]
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), unchanged(model):
        meddle()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model[0].out_features == 3
    assert model.log == [1]
    assert not hasattr(model, "extra")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_parameters_are_swapped_under_all_their_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with unchanged(model):
        swap_in(model, {"0.weight": torch.ones(3, 3)})
        assert model[1].weight is model[0].weight
        assert bool((model[1].weight == 1).all())
    assert model[1].weight is model[0].weight
    assert isinstance(model[0].weight, nn.Parameter)


def test_recurrent_modules_run_on_what_is_swapped_in() -> None:
    model = nn.GRU(2, 3)
    x = torch.randn(4, 1, 2)
    before = model(x)[0]
    with unchanged(model), torch.no_grad():
        swap_in(model, {n: torch.zeros_like(p) for n, p in model.named_parameters()})
        assert not model(x)[0].any()
    assert torch.equal(model(x)[0], before)


def test_a_size_inside_a_tuple_keeps_its_kind() -> None:
    model = nn.LayerNorm((4, 6))
    set_size(model, Attribute("", "normalized_shape", 1, (Block((6,)),)), 7)
    assert model.normalized_shape == (4, 7)
    model.sizes = [1, 2]
    set_size(model, Attribute("", "sizes", 0, (Block((6,)),)), 5)
    assert model.sizes == [5, 2]


def test_tensors_are_found_in_nested_outputs() -> None:
    first, second, third = torch.ones(1), torch.ones(2), torch.ones(3)
    found: list[Tensor] = tensors_in({"a": [first, "text", None], "b": ({"c": second}, 3.0), "d": third})
    assert [t.numel() for t in found] == [1, 2, 3]


def test_no_seed_is_left_for_devices_that_come_into_use_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds them all, and forking the generator of the CPU does not take that back."""
    seeds: list[int] = []
    for backend in (torch.cuda, torch.xpu, torch.mtia):
        monkeypatch.setattr(backend, "manual_seed_all", seeds.append)
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 3), nn.Linear(3, 1))
    trace(model, torch.zeros(2, 2))
    with measuring(model):
        model(torch.zeros(2, 2))
    assert seeds == []
    torch.manual_seed(0)
    assert len(seeds) == 3
