"""Random numbers that a model draws, also in eval mode."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.noise import EvenNoise


class Latent(nn.Module):
    """A variational autoencoder that answers its reconstruction only."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 8), nn.Linear(7, 5)
        self.mean, self.spread, self.decode = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.enter(x))
        mean = self.mean(h)
        latent = mean + torch.randn_like(mean) * torch.exp(0.5 * self.spread(h))
        return self.leave(torch.relu(self.decode(latent)))


class NoisyWeights(nn.Module):
    """Draws a weight from its mean and spread."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(outputs, inputs))
        self.spread = nn.Parameter(torch.rand(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.normal(self.mean, self.spread.abs()).T


def test_units_for_which_numbers_are_drawn_are_a_group_with_an_obstacle_that_says_so() -> None:
    structure = lg.trace(Latent(), torch.randn(3, 5))
    assert structure["mean"].size == 4
    assert structure["mean"].obstacle == "random numbers are drawn for each of its units"
    assert {axis.tensor for axis in structure["mean"].axes} >= {"mean.weight", "spread.bias", "decode.weight"}
    assert structure["enter"].obstacle is None
    assert structure["decode"].obstacle is None


def test_widths_of_noisy_weights_are_found() -> None:
    model = nn.Sequential(NoisyWeights(5, 6), nn.ReLU(), NoisyWeights(6, 2))
    structure = lg.trace(model, torch.randn(3, 5))
    (group,) = structure.groups.values()
    assert (group.size, group.obstacle is None) == (6, False)
    lg.apply_(model, [lg.widen(group, 2)])
    assert model(torch.randn(3, 5)).shape == (3, 2)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(4),
        lambda: torch.empty(4).normal_(),
        lambda: torch.bernoulli(torch.full((4,), 0.5)),
        lambda: torch.normal(torch.zeros(4), torch.ones(4)),
        lambda: torch.empty(4).exponential_(),
        lambda: torch.nn.functional.dropout(torch.ones(4), 0.5),
    ],
)
def test_every_entry_is_drawn_alike(draw: object) -> None:
    with EvenNoise() as noise:
        drawn = draw()  # type: ignore[operator]
    assert noise.drawn
    assert drawn.unique().numel() == 1
    assert math.isfinite(drawn[0])


def test_a_model_without_random_numbers_draws_none() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5).eval())
    with EvenNoise() as noise, torch.no_grad():
        model(torch.ones(2, 5))
    assert not noise.drawn
