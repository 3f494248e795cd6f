"""Views of fake tensors have the shape and strides of torch's own, and note one equation for what goes together."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lightning_grow as lg
from lightning_grow.structure.reshape import viewed


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    """Draw a tensor, perhaps transposed, and the shape of a view of it."""
    parts = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
    kept = draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    shape = [n for part, whole in zip(parts, kept, strict=True) for n in (part if whole else [math.prod(part)])]
    new = [n for part, whole in zip(parts, kept, strict=True) for n in ([math.prod(part)] if whole else part)]
    tensor = torch.arange(math.prod(shape)).view(shape)
    if draw(st.booleans()):
        dims = draw(st.permutations(range(len(shape))))
        tensor = tensor.permute(sorted(range(len(dims)), key=dims.__getitem__)).contiguous().permute(dims)
    if new and draw(st.booleans()):
        new[draw(st.integers(0, len(new) - 1))] = -1
    return tensor, new


@given(views())
def test_shape_and_strides_are_those_of_torch(case: tuple[torch.Tensor, list[int]]) -> None:
    tensor, new = case
    found = viewed(tensor.shape, tensor.stride(), new, int)
    assert found is not None
    assert math.prod(found.shape) == tensor.numel()
    try:
        expected = tensor.view(new)
    except RuntimeError:
        return  # no view: the engine copies first
    assert list(expected.shape) == found.shape
    assert torch.equal(torch.as_strided(tensor, found.shape, found.stride), expected)


@pytest.mark.parametrize(("shape", "new"), [((2, 3), (4,)), ((2, 3), (-1, 4)), ((0, 3), (3, 0)), ((6,), (-1, -1))])
def test_other_cases_are_left_to_the_engine(shape: tuple[int, ...], new: tuple[int, ...]) -> None:
    assert viewed(shape, torch.empty(shape).stride(), new, int) is None


def test_a_scalar_and_sizes_of_one() -> None:
    assert viewed([], [], [1, -1], int) == ([1, 1], [1, 1])
    assert viewed([1, 1], [1, 1], [], int) == ([], [])
    assert viewed([1, 6, 1], [6, 1, 1], [6], int) == ([6], [1])


def test_what_goes_together_is_noted() -> None:
    """Heads times their dimension, split and merged without a word about either."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(5, 12), nn.Linear(7, 4), nn.Linear(12, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            gate = self.gate(y)[:, :, None]
            return self.down((self.up(x).view(x.shape[0], -1, 3) * gate).reshape(x.shape[0], -1))

    structure = lg.trace(Mixed(), torch.randn(2, 5), torch.randn(2, 7))
    axes = {str(axis) for axis in structure["up"].axes}
    assert axes >= {"up.weight[0] = up*3", "down.weight[1] = up*3", "gate.weight[0] = up"}
