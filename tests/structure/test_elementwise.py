"""Operators that work entry by entry make of fake tensors what torch makes of real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.elementwise import elementwise, is_elementwise
from tests.zoo_entry import Model

ATEN = torch.ops.aten
DTYPES = [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]


@st.composite
def operands(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw two tensors that broadcast, each perhaps permuted."""
    shape = draw(st.lists(st.integers(1, 4), max_size=4))
    made = []
    for _ in range(2):
        own = [size if draw(st.booleans()) else 1 for size in shape]
        dims = draw(st.permutations(range(len(shape))))
        tensor = torch.ones([own[dim] for dim in dims], dtype=draw(st.sampled_from(DTYPES)))
        made.append(tensor.permute(sorted(range(len(dims)), key=dims.__getitem__)))
    return made[0], made[1]


@given(
    operands(),
    st.sampled_from([ATEN.add.Tensor, ATEN.mul.Tensor, ATEN.lt.Tensor, ATEN.div.Tensor]),
)
def test_shape_strides_and_type_are_those_of_torch(pair: tuple[Tensor, Tensor], func: Any) -> None:
    expected = func(*pair)
    made = elementwise(func, pair, {}, int)
    assert made is not None
    assert (made.shape, made.dtype) == (list(expected.shape), expected.dtype)
    assert [s for n, s in zip(made.shape, made.stride, strict=True) if n > 1] == [
        s for n, s in zip(expected.shape, expected.stride(), strict=True) if n > 1
    ]


def test_keyword_arguments_and_numbers_are_passed_on() -> None:
    x = torch.ones(2, 3)
    assert elementwise(ATEN.gelu.default, (x,), {"approximate": "tanh"}, int) == ([2, 3], [3, 1], torch.float32)
    assert elementwise(ATEN.add.Scalar, (x.int(), 0.5), {}, int) == ([2, 3], [3, 1], torch.float32)


def test_sizes_that_differ_are_left_to_the_engine() -> None:
    assert elementwise(ATEN.lt.Tensor, (torch.ones(2), torch.ones(3)), {}, int) is None


@pytest.mark.parametrize(
    "func", [ATEN.add_.Tensor, ATEN.add.out, ATEN.sum.default, ATEN.view.default, ATEN.frexp.Tensor]
)
def test_others_do_not_work_entry_by_entry(func: Any) -> None:
    assert not is_elementwise(func)


def test_what_is_added_is_of_one_width() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head((self.a(x) + self.b(x)).tanh().transpose(0, 1).sigmoid().transpose(0, 1).view(len(x), -1))

    model = Model(forward, a=nn.Linear(5, 6), b=nn.Linear(5, 6), head=nn.Linear(6, 3))
    (group,) = lg.trace(model, torch.randn(4, 5)).groups.values()
    assert {"a.weight[0]", "b.weight[0]", "head.weight[1]"} <= {axis.label for axis in group.axes}
