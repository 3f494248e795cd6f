"""The table of all optimizers: one row each, from which `test_table.py` runs what every optimizer must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_grow.optim import ALIG, BORAT, CAMHD, SGDHD, SGDNHD, AdamHD, ALIGPlus


@dataclass(frozen=True)
class Row:
    """What an optimizer promises.

    Attributes:
        cls: The optimizer.
        options: Its options.
        base: The optimizer of torch that it is with ``as_base``, and its options.
        as_base: Options with which nothing adapts.
        needs_loss: Whether `step` wants the loss.
        maximizes: Whether it can climb.
    """

    cls: type[torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    base: tuple[type[torch.optim.Optimizer], Mapping[str, Any]] | None = None
    as_base: Mapping[str, Any] = field(default_factory=dict)
    needs_loss: bool = False
    maximizes: bool = True

    def make(self, params: Any, **changed: Any) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return self.cls(params, **{**self.options, **changed})


ROWS = {
    "sgdhd": Row(
        SGDHD,
        {"lr": 0.01, "hypergrad_lr": 1e-3},
        (torch.optim.SGD, {"lr": 0.01}),
        {"hypergrad_lr": 0.0},
    ),
    "sgdhd_decay": Row(
        SGDHD,
        {"lr": 0.01, "hypergrad_lr": 1e-3, "weight_decay": 0.1},
        (torch.optim.SGD, {"lr": 0.01, "weight_decay": 0.1}),
        {"hypergrad_lr": 0.0},
    ),
    "sgdhd_momentum": Row(
        SGDHD,
        {"lr": 0.01, "hypergrad_lr": 1e-3, "momentum": 0.8, "dampening": 0.1},
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.8, "dampening": 0.1}),
        {"hypergrad_lr": 0.0},
    ),
    "sgdhd_multiplicative": Row(
        SGDHD,
        {"lr": 0.01, "hypergrad_lr": 0.1, "rule": "multiplicative", "shared": True},
        (torch.optim.SGD, {"lr": 0.01}),
        {"hypergrad_lr": 0.0},
    ),
    "sgdnhd": Row(
        SGDNHD,
        {"lr": 0.01, "hypergrad_lr": 1e-3},
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
        {"hypergrad_lr": 0.0},
    ),
    "adamhd": Row(
        AdamHD,
        {"lr": 0.01, "hypergrad_lr": 1e-5, "weight_decay": 0.1},
        (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
        {"hypergrad_lr": 0.0},
    ),
    "adamwhd": Row(
        AdamHD,
        {"lr": 0.01, "hypergrad_lr": 1e-5, "weight_decay": 0.1, "decoupled_weight_decay": True},
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
        {"hypergrad_lr": 0.0},
    ),
    "camhd": Row(
        CAMHD,
        {"lr": 0.01, "hypergrad_lr": 1e-3, "levels": ("global", "layer", "unit", "parameter")},
        (torch.optim.SGD, {"lr": 0.01}),
        {"hypergrad_lr": 0.0, "weights_lr": 0.0},
    ),
    "camhd_units": Row(
        CAMHD,
        {"lr": 0.01, "hypergrad_lr": 1e-3, "levels": ("global", "unit")},
        (torch.optim.SGD, {"lr": 0.01}),
        {"hypergrad_lr": 0.0, "weights_lr": 0.0},
    ),
    "camhd_nesterov": Row(
        CAMHD,
        {"lr": 0.01, "hypergrad_lr": 1e-3, "base": "sgdn"},
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
        {"hypergrad_lr": 0.0, "weights_lr": 0.0},
    ),
    "camhd_adam": Row(
        CAMHD,
        {"lr": 0.01, "hypergrad_lr": 1e-5, "base": "adam", "levels": ("global", "unit")},
        (torch.optim.Adam, {"lr": 0.01}),
        {"hypergrad_lr": 0.0, "weights_lr": 0.0},
    ),
    "alig": Row(ALIG, {"lr": 0.01}, (torch.optim.SGD, {"lr": 0.01}), needs_loss=True, maximizes=False),
    "alig_momentum": Row(
        ALIG,
        {"lr": 0.01, "momentum": 0.9, "adjusted_momentum": True},
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
        needs_loss=True,
        maximizes=False,
    ),
    "alig_plus": Row(
        ALIGPlus,
        {"lr": 0.01, "num_examples": 8, "max_epochs": 10},
        (torch.optim.SGD, {"lr": 0.01}),
        {"momentum": 0.0},
        needs_loss=True,
        maximizes=False,
    ),
    "borat": Row(
        BORAT,
        {"lr": 0.01, "num_pieces": 3, "momentum": 0.9},
        (torch.optim.SGD, {"lr": 0.01}),
        {"num_pieces": 2, "momentum": 0.0},
        needs_loss=True,
        maximizes=False,
    ),
}


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Return a small network: a convolution without the bias that its norm would take away, and two linear layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten()),
            *(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3)),
        )
    return model.to(dtype)


def batch(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch for the network."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (8,), generator=generator)


def tell(optimizer: torch.optim.Optimizer, losses: torch.Tensor) -> None:
    """Tell the losses of single examples where an optimizer wants to know them."""
    if isinstance(optimizer, ALIGPlus):
        optimizer.feed(torch.arange(losses.numel()), losses.detach().reshape(-1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0, **zero: Any) -> list[float]:
    """Train for so many steps, each on a batch of its own; return the losses."""
    losses = []
    for number in range(first, first + steps):
        x, y = batch(next(model.parameters()).dtype, seed=number)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad(**zero)
            losses = nn.functional.cross_entropy(model(x), y, reduction="none")
            losses.mean().backward()
            tell(optimizer, losses)
            return losses.mean()

        losses.append(optimizer.step(closure).item())
    return losses
