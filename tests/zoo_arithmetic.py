"""Models that calculate with sizes: scales made of them, products, quotients and windows."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo_entry import Model, Width, entry, normal, pooled, weight


@entry(normal(6, 5), Width("hidden.weight[0] hidden.bias[0] head.weight[1]", 8, obstacle=True))
def scaled_by_its_width() -> nn.Module:
    """A float made of a size is a value: it fixes nothing, but new units change it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = torch.relu(self.hidden(x))
        return self.head(h) / math.sqrt(h.shape[-1])

    return Model(forward, hidden=nn.Linear(5, 8), head=nn.Linear(8, 3))


@entry(
    normal(2, 4, 5),
    Width("query.weight[0] key.weight[0]", 8, obstacle=True),
    Width("value.weight[0] head.weight[1]", 6),
)
def attention_scaled_by_shape() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.head((q @ k.transpose(1, 2) / math.sqrt(k.size(-1))).softmax(-1) @ v)

    widths = {"query": 8, "key": 8, "value": 6}
    return Model(forward, **{n: nn.Linear(5, w) for n, w in widths.items()}, head=nn.Linear(6, 3))


class GraphAttention(nn.Module):
    """Nodes attend to their neighbours: the rows of one projection are heads times features."""

    def __init__(self, inputs: int, heads: int, features: int) -> None:
        super().__init__()
        self.heads, self.features = heads, features
        self.project = nn.Linear(inputs, heads * features, bias=False)
        self.source, self.target = weight(1, heads, features), weight(1, heads, features)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.project(x).view(-1, self.heads, self.features)
        score = (h * self.source).sum(-1)[edges[0]] + (h * self.target).sum(-1)[edges[1]]
        score = torch.exp(F.leaky_relu(score, 0.2)).unsqueeze(-1)
        total = x.new_zeros(len(x), self.heads, 1).index_add(0, edges[1], score)
        return torch.zeros_like(h).index_add(0, edges[1], h[edges[0]] * score / total[edges[1]]).flatten(1)


EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 0]])


@entry(
    normal(6, 5),
    Width("attention.project.weight[0] attention.source[1] attention.target[1] head.weight[1]", 2, obstacle=None),
    Width("attention.project.weight[0] attention.source[2] attention.target[2] head.weight[1]", 4, obstacle=None),
)
def graph_attention() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(F.elu(self.attention(x, EDGES)))

    return Model(forward, attention=GraphAttention(5, 2, 4), head=nn.Linear(8, 3))


@entry(
    normal(6, 5),
    Width("left.weight[0] left.bias[0] head.weight[1]", 3),
    Width("right.weight[0] right.bias[0] head.weight[1]", 4),
)
def every_unit_with_every_other() -> nn.Module:
    """The head reads products: as many columns as there are pairs."""

    def forward(self: Any, x: Tensor) -> Tensor:
        pairs = torch.relu(self.left(x)).unsqueeze(2) * torch.tanh(self.right(x)).unsqueeze(1)
        return self.head(pairs.flatten(1))

    return Model(forward, left=nn.Linear(5, 3), right=nn.Linear(5, 4), head=nn.Linear(12, 2))


@entry(normal(6, 5), Width("hidden.weight[0] hidden.bias[0] head.weight[1]", 4))
def every_unit_with_its_own_kind() -> nn.Module:
    """Bilinear pooling: a square of columns."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = torch.relu(self.hidden(x))
        return self.head((h.unsqueeze(2) * h.unsqueeze(1)).flatten(1))

    return Model(forward, hidden=nn.Linear(5, 4), head=nn.Linear(16, 2))


class Windows(nn.Module):
    """Mixes the pixels of each window; its side is an integer that equals a width by chance."""

    def __init__(self, channels: int, hidden: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.enter, self.leave = weight(hidden, channels), weight(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        across = (batch, height // self.side, self.side, width // self.side, self.side, channels)
        h = x.view(across).transpose(2, 3).reshape(-1, self.side**2, channels)
        h = F.linear(torch.relu(F.linear(h, self.enter)), self.leave) + h.mean(1, keepdim=True)
        h = h.view(-1, height // self.side, width // self.side, self.side, self.side, channels)
        return x + h.transpose(2, 3).reshape(batch, height, width, channels)


@entry(
    normal(2, 4, 4, 5),
    Width("stem.weight[0] windows.enter[1] windows.leave[0] head.weight[1]", 6),
    Width("windows.enter[0] windows.leave[1]", 2),
)
def windows_of_a_side_that_equals_a_width() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.windows(self.stem(x)).mean((1, 2)))

    return Model(forward, stem=nn.Linear(5, 6), windows=Windows(6, 2, 2), head=nn.Linear(6, 3))


@entry(
    normal(2, 3, 9),
    Width("0.bias[0] 0.parametrizations.weight.original1[0] 2.parametrizations.weight.original1[1]", 4, obstacle=None),
    Width("2.bias[0] 2.parametrizations.weight.original1[0] 5.weight[1]", 6),
)
def weight_norm_over_kernels() -> nn.Module:
    """The extent of a kernel behind a parametrization is no width."""
    convs = [parametrizations.weight_norm(nn.Conv1d(n, m, 3)) for n, m in ((3, 4), (4, 6))]
    layers = (convs[0], nn.ReLU(), convs[1], nn.AdaptiveAvgPool1d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(6, 2))


class Standardized(nn.Conv2d):
    """Subtracts the mean over its input channels from its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


@entry(normal(2, 3, 6, 6), Width("0.weight[0] 0.bias[0] 2.weight[1]", 4, obstacle=True))
def standardized_weights() -> nn.Module:
    return nn.Sequential(*pooled(Standardized(3, 4, 3), nn.ReLU(), Standardized(4, 6, 3)), nn.Linear(6, 2))
