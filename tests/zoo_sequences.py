"""Recurrent and attention models of the zoo."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_entry import Model, Width, entry, normal, tokens, weight

# Recurrent


@entry(
    normal(3, 4, 5),
    Width("cell.weight_ih_l0[0] cell.weight_hh_l0[0] cell.weight_hh_l0[1] cell.bias_ih_l0[0] head.weight[1]", 6),
    pinned="cell.weight_ih_l0[1] head.weight[0]",
)
def lstm() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])

    return Model(forward, cell=nn.LSTM(5, 6, batch_first=True), head=nn.Linear(6, 3))


@entry(
    normal(4, 3, 5),
    Width(
        "cell.weight_ih_l0[0] cell.weight_hh_l0_reverse[1] cell.weight_ih_l1[1] cell.weight_ih_l1_reverse[0] "
        "cell.bias_hh_l1[0] head.weight[1] tail.weight[1]",
        4,
    ),
)
def gru_of_two_layers_and_directions() -> nn.Module:
    """All layers and directions share one hidden size, and the second layer reads both directions."""

    def forward(self: Any, x: Tensor) -> Tensor:
        states, last = self.cell(x)
        return self.head(states[-1]) + self.tail(last[-1])

    cell = nn.GRU(5, 4, num_layers=2, bidirectional=True)
    return Model(forward, cell=cell, head=nn.Linear(8, 3), tail=nn.Linear(4, 3))


@entry(
    normal(4, 2, 5),
    Width("cell.weight_hh_l0[0] cell.weight_hr_l0[1] cell.weight_ih_l1[0] cell.weight_hr_l1[1]", 9),
    Width("cell.weight_hh_l0[1] cell.weight_hr_l0[0] cell.weight_ih_l1[1] cell.weight_hr_l1[0] head.weight[1]", 3),
)
def lstm_with_projection() -> nn.Module:
    """What flows back and on is a projection of the hidden units, of a size of its own."""
    cell = nn.LSTM(5, 9, num_layers=2, proj_size=3)
    return Model(lambda self, x: self.head(self.cell(x)[0]), cell=cell, head=nn.Linear(3, 2))


@entry(normal(2, 4, 5), Width("cell.weight_ih_l0[0] cell.weight_hh_l0[1] head.weight[1]", 6))
def packed_lstm() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3]), batch_first=True)
        _, (state, _) = self.cell(packed)
        return self.head(state[-1])

    return Model(forward, cell=nn.LSTM(5, 6, batch_first=True), head=nn.Linear(6, 3))


@entry(
    normal(3, 4, 5),
    Width("encode.weight[0] cell.weight_ih[1]", 7),
    Width("cell.weight_hh[0] cell.weight_hh[1] cell.bias_ih[0] head.weight[1]", 6),
)
def unrolled_rnn_cell() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.encode(x))
        state = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state)

    return Model(forward, encode=nn.Linear(5, 7), cell=nn.GRUCell(7, 6), head=nn.Linear(6, 3))


# Attention


class FusedAttention(nn.Module):
    """Query, key and value from one projection; the head dimension follows the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, hidden: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


STREAM = "1.norm1.weight[0] 1.norm2.bias[0] 1.mlp.0.weight[1] 1.mlp.2.weight[0] 1.mlp.2.bias[0]"


@entry(
    normal(2, 3, 5),
    Width(f"0.weight[0] 0.bias[0] {STREAM} 2.norm1.weight[0] 3.weight[1]", obstacle=True, symmetric=False),
    Width("1.mlp.0.weight[0] 1.mlp.0.bias[0] 1.mlp.2.weight[1]", 10),
    Width("2.mlp.0.weight[0] 2.mlp.0.bias[0] 2.mlp.2.weight[1]", 12),
)
def transformer_fused_qkv() -> nn.Module:
    blocks = (Block(8, 10, FusedAttention(8, 2)), Block(8, 12, FusedAttention(8, 2)))
    return nn.Sequential(nn.Linear(5, 8), *blocks, nn.Linear(8, 3))


class HeadAttention(nn.Module):
    """Separate projections; the number of heads follows from the weights, the head dimension is fixed."""

    def __init__(self, width: int, heads: int, head_dim: int, groups: int = 1) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.groups = groups
        self.q = nn.Linear(width, heads * groups * head_dim)
        self.k = nn.Linear(width, heads * head_dim, bias=False)
        self.v = nn.Linear(width, heads * head_dim)
        self.out = nn.Linear(heads * groups * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part(x).view(b, t, -1, self.head_dim).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = (part.repeat_interleave(self.groups, dim=1) for part in (k, v))
        scores = (q @ k.transpose(-1, -2) / self.head_dim**0.5).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).reshape(b, t, -1))


LEAVES = ("q.weight[0]", "q.bias[0]", "k.weight[0]", "v.bias[0]", "out.weight[1]")
HEADS = " ".join(f"1.attention.{leaf}" for leaf in LEAVES)


@entry(
    normal(2, 3, 5),
    Width(f"0.weight[0] {STREAM} 1.attention.q.weight[1] 1.attention.out.weight[0] 2.weight[1]", 8, obstacle=True),
    Width(HEADS, 3),
)
def attention_of_heads() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), Block(8, 10, HeadAttention(8, 3, 4)), nn.Linear(8, 3))


@entry(
    normal(2, 3, 5),
    Width(f"{STREAM} 1.attention.q.weight[1] 1.attention.out.weight[0]", 8, obstacle=True),
    Width(HEADS, 2),
)
def grouped_query_attention() -> nn.Module:
    """Each head of keys and values serves two heads of queries: they appear and vanish together."""
    return nn.Sequential(nn.Linear(5, 8), Block(8, 10, HeadAttention(8, 2, 4, groups=2)), nn.Linear(8, 3))


@entry(
    normal(2, 3, 5),
    Width(
        "embed.weight[0] embed.bias[0] attention.in_proj_weight[1] attention.out_proj.weight[0] norm.weight[0] "
        "head.weight[1]",
        obstacle=True,
        symmetric=False,
    ),
)
def multihead_attention() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return Model(forward, embed=nn.Linear(5, 8), attention=attention, norm=nn.LayerNorm(8), head=nn.Linear(8, 3))


@entry(
    normal(2, 3, 8),
    Width("layers.0.linear1.weight[0] layers.0.linear1.bias[0] layers.0.linear2.weight[1]", 12),
    Width("layers.1.linear1.weight[0] layers.1.linear1.bias[0] layers.1.linear2.weight[1]", 12),
)
def transformer_encoder() -> nn.Module:
    """In eval mode, torch takes a fused path without the inner operators."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@entry(
    tokens(11, 2, 5),
    Width("embed.weight[1] positions[1] block.norm1.weight[0] block.mlp.0.weight[1] norm.weight[0]", 8, obstacle=True),
    Width("block.attention.q.weight[0] block.attention.out.weight[1]", 3),
    Width("block.mlp.0.weight[0] block.mlp.0.bias[0] block.mlp.2.weight[1]", 10),
    pinned="embed.weight[0] positions[0]",
)
def tied_language_model() -> nn.Module:
    def forward(self: Any, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(ids) + self.positions)))

    block = Block(8, 10, HeadAttention(8, 3, 4))
    parts = {"embed": nn.Embedding(11, 8), "positions": weight(5, 8), "block": block, "norm": nn.LayerNorm(8)}
    model = Model(forward, **parts, head=nn.Linear(8, 11, bias=False))
    model.head.weight = model.embed.weight
    return model


@entry(
    normal(2, 3, 5),
    Width("gate.weight[0] gate.bias[0] up.weight[0] up.bias[0] down.weight[1]", 10),
    Width("both.weight[0] both.bias[0] last.weight[1]", 6),
    Width("down.weight[0] down.bias[0] both.weight[1]", 8),
)
def gated_ffn() -> nn.Module:
    """Two projections, then one of which the halves are gate and value."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.tanh(self.down(F.silu(self.gate(x)) * self.up(x)))
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.last(torch.sigmoid(gate) * value)

    first = {"gate": nn.Linear(5, 10), "up": nn.Linear(5, 10), "down": nn.Linear(10, 8)}
    return Model(forward, **first, both=nn.Linear(8, 12), last=nn.Linear(6, 3))


@entry(
    normal(2, 3, 5),
    Width("q.weight[0] k.weight[0] v.weight[0] table[1] out.weight[1]", 3),
    pinned="table[0] out.weight[0]",
)
def attention_with_position_bias() -> nn.Module:
    """One bias for each distance and head, small as it is at the start: no part of the fan-out of a head."""

    def forward(self: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part(x).view(b, t, -1, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        bias = self.table[self.distance.flatten()].view(t, t, -1).permute(2, 0, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))
        return self.out(mixed.transpose(1, 2).reshape(b, t, -1))

    parts = {name: nn.Linear(5, 12) for name in ("q", "k", "v")}
    model = Model(forward, **parts, table=nn.Parameter(torch.randn(5, 3) * 0.02), out=nn.Linear(12, 3))
    model.register_buffer("distance", torch.arange(3) - torch.arange(3).unsqueeze(1) + 2)
    return model


@entry(
    normal(2, 3, 5),
    Width("embed.weight[0] encoder.norm1.weight[0] head.weight[1]", obstacle=True, symmetric=False),
    Width("encoder.linear1.weight[0] encoder.linear2.weight[1]", 12),
)
def transformer_with_padding() -> nn.Module:
    """A padding mask makes the fast path of eval mode use nested tensors."""

    def forward(self: Any, x: Tensor) -> Tensor:
        padding = torch.tensor([[False, False, True], [False, False, False]])
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding)[:, :2])

    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return Model(forward, embed=nn.Linear(5, 8), encoder=layer, head=nn.Linear(8, 3))
