"""Models whose forward reads sizes from objects that modules hold: configurations, dictionaries, lists, nested ones."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.zoo_entry import Model, Width, entry, normal

WIDTHS = [8, 6]
"""A constant of the program, as default arguments are: a model that is resized must not change it."""


class Heads(NamedTuple):
    """Nested settings that cannot be changed in place."""

    count: int = 2
    size: int = 3


@dataclass(frozen=True)
class Attention:
    """Settings of a part."""

    width: int = 8
    heads: Heads = field(default_factory=Heads)
    other: int = 12


@dataclass
class Config:
    """Settings that all blocks share; ``vocabulary`` and ``steps`` equal a width by accident."""

    attention: Attention = field(default_factory=Attention)
    hidden: int = 12
    vocabulary: int = 12
    steps: int = 8
    table: dict[str, int] = field(default_factory=lambda: {"hidden": 12, "vocabulary": 12})


class ConfiguredBlock(nn.Module):
    """Attention with heads of its own size and a perceptron; every reshape takes its numbers from the settings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, inner = config.attention.width, config.attention.heads.count * config.attention.heads.size
        self.config = config
        self.query, self.value, self.out = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.up, self.down = nn.Linear(width, config.hidden), nn.Linear(config.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        heads = self.config.attention.heads
        query, value = (part(x).view(batch, length, heads.count, heads.size) for part in (self.query, self.value))
        mixed = torch.einsum("bthd,bshd->bhts", query, query).softmax(-1) @ value.transpose(1, 2)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        hidden = torch.relu(self.up(x)).reshape(batch * length, self.config.hidden)
        return x + self.down(hidden.view(batch, length, self.config.table["hidden"]))


@entry(
    normal(2, 4, 5),
    Width("blocks.0.up.weight[0] blocks.1.up.bias[0] blocks.0.down.weight[1] blocks.1.down.weight[1]", 12),
    Width("stem.weight[0] blocks.0.query.weight[1] blocks.1.down.weight[0] head.weight[1]", 8),
    pinned="stem.weight[1] head.weight[0]",
)
def settings_shared_by_blocks() -> nn.Module:
    """One configuration for all blocks: their widths are one group, because one number makes them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    config = Config()
    blocks = nn.ModuleList(ConfiguredBlock(config) for _ in range(2))
    return Model(forward, config=config, stem=nn.Linear(5, 8), blocks=blocks, head=nn.Linear(8, 3))


@entry(normal(6, 5), Width("0.weight[0] 0.bias[0] 1.layer.weight[1]", 4), Width("1.layer.weight[0] 3.weight[1]", 6))
def settings_of_each_layer() -> nn.Module:
    """Namespaces, one for each layer, and a list that is a constant of the program."""

    class Layer(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.options, self.widths = argparse.Namespace(more=SimpleNamespace(**options)), WIDTHS
            self.layer = nn.Linear(options["inputs"], options["outputs"])

        def forward(self, x: Tensor) -> Tensor:
            more = self.options.more
            x = self.layer(x.reshape(x.shape[0], more.inputs // 2, 2).reshape(-1, self.widths[0]))
            return torch.relu(x.view(-1, more.outputs))

    return nn.Sequential(nn.Linear(5, 8), Layer(inputs=8, outputs=6), nn.Tanh(), nn.Linear(6, 3))


@entry(normal(6, 5), Width("hidden.weight[0] hidden.bias[0] head.weight[1]", 8))
def hyperparameters_in_a_dictionary() -> nn.Module:
    """As a LightningModule keeps them; the rate and the epochs are no sizes, although one equals the width."""

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = self.hidden(x).view(-1, self._hparams["model"]["width"])
        return self.head(hidden.relu()) * self._hparams["epochs"] / 8

    hparams = {"model": {"width": 8}, "epochs": 8, "lr": 0.1}
    return Model(forward, _hparams=hparams, hidden=nn.Linear(5, 8), head=nn.Linear(8, 3))
