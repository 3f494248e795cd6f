"""Operators that insist on plain sizes, or have no fake kernel, leave widths free."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_grow as lg

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant padding": lambda h: F.pad(h, (1, 0, 0, 2)),
    "nearest interpolation": lambda h: F.interpolate(h, scale_factor=2),
    "bilinear interpolation": lambda h: F.interpolate(h, size=(5, 7), mode="bilinear"),
    "local response norm": lambda h: F.local_response_norm(h, 1),
    "unfolding": lambda h: F.fold(F.unfold(h, 3), (8, 8), 3),
}


class Around(nn.Module):
    """Two convolutions around an operator."""

    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.operator = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), operator

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operator(torch.relu(self.first(x)))).mean((2, 3))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))
def test_a_width_passes_an_operator_that_wants_plain_sizes(operator: Callable[[Tensor], Tensor]) -> None:
    structure = lg.trace(Around(operator), torch.randn(2, 3, 8, 8))
    assert {axis.label for axis in structure["first"].axes} == {"first.weight[0]", "first.bias[0]", "second.weight[1]"}
    assert structure["first"].obstacle is None


@torch.library.custom_op("lightning_grow_tests::pair_of_products", mutates_args=())
def pair_of_products(x: Tensor, weights: Tensor) -> Tensor:
    """Sum of two products; without a kernel for fake tensors."""
    first, second = weights
    return x @ first + x @ second


def test_sizes_that_an_operator_cannot_have_are_fixed_and_the_others_stay_free() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(7, 3)
            self.weights = nn.Parameter(torch.randn(2, 6, 7))

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = pair_of_products(self.first(x), self.weights)
            return self.last(hidden)

    structure = lg.trace(Pair(), torch.randn(4, 5))
    found = [{axis.label for axis in group.axes} for group in structure.groups.values()]
    assert found == [{"weights[2]", "last.weight[1]"}, {"weights[1]", "first.weight[0]", "first.bias[0]"}]
    assert "fixed size of 2" in structure.pinned["weights[0]"]
    assert structure.pinned["first.weight[1]"] == "model input"
