"""Tiny models with what is known about their hidden widths: perceptrons here, the others in `zoo_*.py`.

`ZOO` holds those that were written for the tests, `THIRD_PARTY` those that others wrote, `EVERYTHING` both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import (
    zoo_arithmetic,
    zoo_blocks,
    zoo_convolutions,
    zoo_habits,
    zoo_hostile,
    zoo_sequences,
    zoo_settings,
)
from tests.zoo_entry import ZOO, Entry, Model, Width, entry, normal, weight
from tests.zoo_third_party import THIRD_PARTY

__all__ = [
    "EVERYTHING",
    "THIRD_PARTY",
    "ZOO",
    "Entry",
    "Width",
    "zoo_arithmetic",
    "zoo_blocks",
    "zoo_convolutions",
    "zoo_habits",
    "zoo_hostile",
    "zoo_sequences",
    "zoo_settings",
]


@entry(
    normal(6, 5),
    Width("0.weight[0] 0.bias[0] 2.weight[1]", 8),
    Width("2.weight[0] 2.bias[0] 4.weight[1]", 7),
    pinned="0.weight[1] 4.weight[0] 4.bias[0]",
)
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, 3))


@entry(
    normal(6, 6),
    Width("0.weight[0] 0.bias[0] 2.weight[1]", 6),
    Width("2.weight[0] 2.bias[0] 4.weight[1]", 6),
    pinned="0.weight[1] 4.weight[0] 4.bias[0]",
)
def mlp_of_one_width() -> nn.Module:
    """All widths, the batch and the input have the same length: nothing may be told apart by numbers alone."""
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


@entry(
    normal(6, 5),
    Width("w1[0] b1[0] w2[0]", 8),
    Width("w2[1] scale[0] w3[0]", 6),
    pinned="w1[1] w3[1]",
)
def functional() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = F.relu(F.linear(x, self.w1, self.b1))
        hidden = torch.tanh(hidden @ self.w2) * self.scale
        return torch.einsum("bi,io->bo", hidden, self.w3)

    return Model(forward, w1=weight(8, 5), b1=weight(8), w2=weight(8, 6), scale=weight(6), w3=weight(6, 3))


@entry(
    normal(6, 5),
    Width("hidden.weight[0] hidden.bias[0] head.weight[1]", 7),
    Width("side.weight[0] side.bias[0] head.weight[1]", 4),
)
def concat_raw() -> nn.Module:
    """The raw input has no gradient and so is not in the autograd graph, but its columns must stay."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.relu(self.hidden(x)), x, torch.tanh(self.side(x))], dim=1))

    return Model(forward, hidden=nn.Linear(5, 7), side=nn.Linear(5, 4), head=nn.Linear(16, 3))


@entry(
    normal(6, 5),
    Width("inner.weight[0] inner.weight[1] inner.bias[0] first.weight[0] last.weight[1]", 8),
)
def shared_twice() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return self.last(torch.tanh(self.inner(torch.relu(self.inner(hidden)))))

    return Model(forward, first=nn.Linear(5, 8), inner=nn.Linear(8, 8), last=nn.Linear(8, 3))


@entry(normal(6, 5), Width("encoder.weight[0] encoder.bias[0]", 8, obstacle=None), pinned="encoder.weight[1]")
def tied_autoencoder() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.relu(self.encoder(x)) @ self.encoder.weight

    return Model(forward, encoder=nn.Linear(5, 8))


@entry(
    normal(6, 5),
    Width("left.weight[0] left.bias[0] form.weight[1]", 6),
    Width("right.weight[0] right.bias[0] form.weight[2]", 4),
)
def bilinear() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.form(torch.relu(self.left(x)), torch.tanh(self.right(x)))

    return Model(forward, left=nn.Linear(5, 6), right=nn.Linear(5, 4), form=nn.Bilinear(6, 4, 3))


@entry(
    lambda: ((torch.randn(4, 5).double(),), {"context": torch.randn(4, 3).double(), "gain": 2.0}),
    Width("left.weight[0] left.bias[0] right.weight[0] right.bias[0] head.weight[1] side.weight[1]", 8),
    pinned="left.weight[1] right.weight[1] head.weight[0] side.weight[0]",
)
def keywords_and_mapping() -> nn.Module:
    def forward(self: Any, x: Tensor, *, context: Tensor | None = None, gain: float = 1.0) -> dict[str, Any]:
        hidden = self.left(x)
        if context is not None:
            hidden = hidden + gain * self.right(context)
        hidden = torch.relu(hidden)
        return {"logits": self.head(hidden), "others": (self.side(hidden), "text", None)}

    parts = {"left": nn.Linear(5, 8), "right": nn.Linear(3, 8), "head": nn.Linear(8, 3), "side": nn.Linear(8, 2)}
    return Model(forward, **parts)


@entry(
    normal(6, 5),
    Width("first.weight[0] first.bias[0] second.weight[1]", 8),
    Width("second.weight[0] second.bias[0] head.weight[1]", 6),
)
def python_sizes() -> nn.Module:
    """Sizes that the module keeps as Python integers must be written when the width changes."""

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x)).reshape(-1, self.hidden)
        return self.head(torch.tanh(self.second(hidden)).view(x.shape[0], *self.shape).flatten(1))

    layers = {"first": nn.Linear(5, 8), "second": nn.Linear(8, 6), "head": nn.Linear(6, 3)}
    return Model(forward, **layers, hidden=8, shape=(1, 6))


@entry(normal(6, 5), Width("0.weight[0] 2.weight[1]", 8), pinned="0.weight[1]")
def numbers_that_equal_a_width() -> nn.Module:
    """Of three integers with the value of the width only one is the width; the others must stay."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight(8, 5)
            self.units = self.steps = self.temperature = 8

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.linear(x, self.weight).view(-1, self.units) / self.temperature
            return torch.stack([hidden * step for step in range(self.steps)]).sum(0)

    return nn.Sequential(Layer(), nn.ReLU(), nn.Linear(8, 3))


@entry(normal(2, 8, 5), Width("first.weight[0] first.bias[0] second.weight[1]", 8), pinned="first.weight[1]")
def sequence_as_long_as_wide() -> nn.Module:
    """The length of the data and the width are kept side by side, and have the same value."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).reshape(-1, self.length, self.width).mean(1))

    return Model(forward, first=nn.Linear(5, 8), second=nn.Linear(8, 3), length=8, width=8)


@entry(normal(6, 5), Width("0.weight[0] 0.bias[0] 3.weight[1]", 8), stochastic=True)
def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3))


@entry(
    normal(6, 5),
    Width("backbone.0.weight[0] backbone.0.bias[0] backbone.2.weight[1]", 8),
    Width("backbone.2.weight[0] backbone.2.bias[0] head.weight[1]", 6),
)
def frozen_backbone() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)

    backbone = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh()).requires_grad_(False)
    return Model(forward, backbone=backbone, head=nn.Linear(6, 3))


EVERYTHING = ZOO | THIRD_PARTY
