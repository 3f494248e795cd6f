"""The plain twins of fused kernels have the shapes of what they stand in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.profiler import ProfilerActivity, profile

import lightning_grow as lg
from lightning_grow.structure.twins import PlainTwins
from tests.zoo_entry import Model

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
}


def shapes(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    return [shape for item in value if item is not None for shape in shapes(item)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("kind", CELLS)
def test_recurrent_twins_return_the_same_shapes(kind: str, settings: dict[str, Any]) -> None:
    module = CELLS[kind](5, 6, **settings)
    x = torch.randn(3, 4, 5)
    expected = shapes(module(x))
    with PlainTwins():
        assert shapes(module(x)) == expected


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projecting_lstm_has_the_same_shapes() -> None:
    module = nn.LSTM(5, 6, num_layers=2, proj_size=4, bidirectional=True)
    x = torch.randn(3, 4, 5)
    expected = shapes(module(x))
    with PlainTwins():
        assert shapes(module(x)) == expected


@pytest.mark.parametrize("kind", CELLS)
def test_packed_sequences_are_traced(kind: str) -> None:
    def forward(self: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)
        return self.head(out[:, -1])

    cell = CELLS[kind](5, 6, bidirectional=True, batch_first=True)
    structure = lg.trace(
        Model(forward, cell=cell, head=nn.Linear(12, 3)), torch.randn(3, 4, 5), torch.tensor([2, 4, 3])
    )
    assert [(group.size, group.obstacle) for group in structure.groups.values()] == [(6, None)]


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cell_twins_return_the_same_shapes(cell: Callable[..., nn.Module]) -> None:
    module, x = cell(5, 6), torch.randn(4, 5)
    expected = shapes(module(x))
    with PlainTwins():
        assert shapes(module(x)) == expected


def test_the_twin_of_a_bilinear_form_is_exact() -> None:
    module = nn.Bilinear(4, 5, 3).double()
    left, right = torch.randn(2, 7, 4).double(), torch.randn(2, 7, 5).double()
    expected = module(left, right)
    with PlainTwins():
        torch.testing.assert_close(module(left, right), expected)


def test_a_width_that_does_not_fit_is_noticed() -> None:
    """The fused kernel on fake tensors would accept it; this is why there are twins."""
    module = nn.LSTM(5, 6)
    module.weight_hh_l0 = nn.Parameter(torch.randn(24, 7))
    with PlainTwins(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.randn(3, 4, 5))


class Experts(nn.Module):
    """Rows, sorted by expert, times the weight of their group, in one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 2
        self.stem, self.router, self.head = nn.Linear(5, 12), nn.Linear(12, 2), nn.Linear(4, 3)
        self.up, self.down = nn.Parameter(torch.randn(2, 12, 8)), nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.tanh(self.stem(x))
        expert = self.router(rows).argmax(-1)
        order = expert.argsort()
        counts = torch.histc(expert.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = counts.cumsum(0).to(torch.int32)
        hidden = torch.relu(torch._grouped_mm(rows[order], self.up, offs=ends))
        out: torch.Tensor = self.head(torch._grouped_mm(hidden, self.down, offs=ends)[order.argsort()])
        return out


def test_a_grouped_product_shows_the_widths_of_experts() -> None:
    """Its fake kernel wants half precision, the real one whatever the model has."""
    structure = lg.trace(Experts(), torch.randn(6, 5))
    found = [{axis.label for axis in group.axes} for group in structure.groups.values() if group.size > 2]
    stream = {"stem.weight[0]", "stem.bias[0]", "router.weight[1]", "up[1]"}
    assert found == [{"up[2]", "down[1]"}, {"down[2]", "head.weight[1]"}, stream]
    assert all(group.obstacle is None for group in structure.groups.values() if group.size > 2)


@pytest.mark.parametrize("settings", [{}, {"scale": 0.3}, {"attn_mask": torch.randn(3, 5)}, {"enable_gqa": True}])
def test_the_twin_of_attention_is_exact(settings: dict[str, Any]) -> None:
    heads = 2 if "enable_gqa" in settings else 4
    q, k, v = torch.randn(2, 4, 3, 6), torch.randn(2, heads, 5, 6), torch.randn(2, heads, 5, 7)
    expected = attention(q, k, v, **settings)
    with PlainTwins():
        torch.testing.assert_close(attention(q, k, v, **settings), expected)


def test_the_twin_of_attention_stands_in_inside_torch_too() -> None:
    """A mode does not see what PyTorch's own functions call; ``nn.MultiheadAttention`` is one of them."""
    module, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 3, 8)
    with torch.enable_grad():
        expected, _ = module(x, x, x, need_weights=False)
        with PlainTwins(), profile(activities=[ProfilerActivity.CPU]) as seen:
            found, _ = module(x, x, x, need_weights=False)
    torch.testing.assert_close(found, expected)
    assert not any("scaled_dot_product" in event.key for event in seen.key_averages())
    assert nn.functional.scaled_dot_product_attention is attention
