"""Models of blocks that look alike: what is known about one of them need not hold for the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo_entry import Model, Width, entry, normal

Mix = Callable[[Tensor, Tensor], Tensor]


class Mixing(nn.Module):
    """A layer, and a function of its output and its input."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.relu(self.layer(x)), x)


class ByPosition(nn.Module):
    """Every other block is residual."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.layer_idx = layer_idx

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.layer(x))
        return x + hidden if self.layer_idx % 2 else hidden


class Perceptron(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 7)
        self.down = nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.down(torch.relu(self.up(x))))


def tower(*blocks: nn.Module, left: int = 6, **parts: Any) -> nn.Module:
    """A stem, blocks one behind the other, and a head."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))

    return Model(forward, stem=nn.Linear(5, 6), blocks=nn.Sequential(*blocks), head=nn.Linear(left, 3), **parts)


@entry(
    normal(4, 5),
    Width("stem.weight[0] blocks.0.layer.weight[0] blocks.0.layer.weight[1] blocks.1.layer.weight[1]", 6),
    Width("blocks.1.layer.weight[0] blocks.2.layer.weight[1]", 6),
    Width("blocks.2.layer.weight[0] head.weight[1]", 6),
)
def blocks_that_keep_a_function() -> nn.Module:
    return tower(Mixing(lambda h, x: h + x), Mixing(lambda h, x: h), Mixing(lambda h, x: torch.tanh(h)))


@entry(
    normal(4, 5),
    Width("stem.weight[0] blocks.0.layer.weight[1]", 6),
    Width("blocks.0.layer.weight[0] blocks.1.layer.weight[0] blocks.1.layer.weight[1] blocks.2.layer.weight[1]", 6),
    Width("blocks.2.layer.weight[0] blocks.3.layer.weight[0] head.weight[1]", 6),
)
def blocks_that_know_their_position() -> nn.Module:
    return tower(*(ByPosition(i) for i in range(4)))


@entry(
    normal(4, 5),
    Width("stem.weight[0] blocks.0.up.weight[1]", 6),
    Width("blocks.0.up.weight[0] blocks.0.down.weight[1] head.weight[1]", 7),
    Width("blocks.0.down.weight[0] blocks.1.up.weight[1]", 6),
    Width("blocks.1.up.weight[0] blocks.1.down.weight[1] head.weight[1]", 7),
)
def features_taken_by_hooks() -> nn.Module:
    """The head reads what hooks on inner layers have put aside."""
    kept: list[Tensor] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        self.blocks(self.stem(x))
        features = torch.cat(kept, dim=-1)
        kept.clear()
        return self.head(torch.relu(features))

    model = tower(Perceptron(), Perceptron(), left=14)
    model.function = forward
    for block in model.blocks:
        block.up.register_forward_hook(lambda module, args, output: kept.append(output))
    return model


@entry(
    normal(4, 5),
    Width("stem.weight[0] blocks.0.layer.weight[1]", 6),
    Width("blocks.0.layer.weight[0] scales.0[0] blocks.1.layer.weight[1]", 6),
    Width("blocks.1.layer.weight[0] scales.1[0] blocks.2.layer.weight[1]", 6),
    Width("blocks.2.layer.weight[0] scales.2[0] head.weight[1]", 6),
)
def blocks_that_use_parameters_of_their_parent() -> nn.Module:
    scales = nn.ParameterList(torch.rand(6) + 0.5 for _ in range(3))

    return tower(*(Mixing(lambda h, x, i=i: h * scales[i]) for i in range(3)), scales=scales)


@entry(
    normal(4, 5),
    Width("blocks.0.up.weight[0] blocks.0.down.weight[1] blocks.2.up.bias[0] blocks.2.down.weight[1]", 7),
    Width("stem.weight[0] blocks.0.up.weight[1] blocks.1.down.weight[0]", 6),
    Width("blocks.1.up.weight[0] blocks.1.down.weight[1]", 7),
)
def blocks_tied_here_and_there() -> nn.Module:
    """The third block shares its first weight with the first block, and so its input width as well."""
    model = tower(Perceptron(), Perceptron(), Perceptron())
    model.blocks[2].up.weight = model.blocks[0].up.weight
    return model
