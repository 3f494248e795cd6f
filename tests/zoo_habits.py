"""Habits of models from large libraries: each made as small as it gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo_entry import Model, Width, entry, normal, weight


@entry(normal(2, 1, 9), Width("0.weight[0] 0.bias[0] 1.weight[0] 1.bias[0] 3.weight[1]", 6))
def group_for_each_channel() -> nn.Module:
    """A group norm with as many groups as channels normalises each of them by itself."""
    first = nn.Conv1d(1, 6, 3)
    return nn.Sequential(first, nn.GroupNorm(6, 6), nn.GELU(), nn.Conv1d(6, 2, 3), nn.AdaptiveAvgPool1d(1))


class WindowBias(nn.Module):
    """A learned bias for each distance inside a window and each head."""

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.window = (window, window)
        self.num_distances = (2 * window - 1) ** 2
        self.table = weight(self.num_distances, heads)

    def forward(self) -> Tensor:
        (rows, columns), size = self.window, 2 * self.window[0] - 1
        grid = self.table.view(2 * rows - 1, self.num_distances // (2 * columns - 1), -1)
        cells = torch.arange(rows * columns)
        down = cells[:, None] // columns - cells // columns + rows - 1
        right = cells[:, None] % columns - cells % columns + columns - 1
        return grid.view(size * size, -1)[down * size + right].permute(2, 0, 1)


class WindowAttention(nn.Module):
    """Keeps the number of heads, the size of one and that of all of them, each as a number of its own."""

    def __init__(self, features: int, window: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.num_heads, self.head_size, self.all_head_size = heads, head_size, heads * head_size
        self.query, self.key, self.value = (nn.Linear(features, self.all_head_size) for _ in range(3))
        self.bias = WindowBias(window, heads)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        parts = (self.query(x), self.key(x), self.value(x))
        q, k, v = (p.view(batch, -1, self.num_heads, self.head_size).transpose(1, 2) for p in parts)
        attention = torch.softmax(q @ k.transpose(-1, -2) / 2 + self.bias(), -1)
        out = (attention @ v).permute(0, 2, 1, 3).contiguous()
        return out.view(*out.shape[:-2], self.all_head_size)


@entry(
    normal(2, 9, 5),
    Width("attention.query.weight[0] attention.value.bias[0] attention.bias.table[1] out.weight[1]", 4),
    pinned="attention.bias.table[0]",
)
def window_bias() -> nn.Module:
    """The number of heads equals no size of the module that counts them; the table's rows are looked up."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.out(self.attention(x))

    return Model(forward, attention=WindowAttention(5, 3, 4, 2), out=nn.Linear(8, 3))
