"""The table of all methods: one row each, from which `test_contract.py` runs what every method must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from lightning_grow.growth import (
    Firefly,
    FireflyContinual,
    GaussNewton,
    GradMax,
    KernelGrowth,
    Net2Net,
    NoisyHeuristics,
    RandomGrowth,
    SignedSplitting,
    SplittingSteepestDescent,
    Tiny,
)
from lightning_grow.pruning import MagnitudePruning
from lightning_grow.trainer import StructuralCallback
from tests.trainer.models import Convolutional, Residual, Smooth


@dataclass(frozen=True)
class Contract:
    """What a method promises.

    Attributes:
        cls: The callback.
        arguments: Its arguments, plain enough for YAML; with them, it changes something within 12 steps.
        preserves: Whether an event keeps the function of the network exactly.
        module: An ordinary LightningModule that it works on.
    """

    cls: type[StructuralCallback]
    arguments: Mapping[str, Any]
    preserves: bool
    module: type[pl.LightningModule] = Residual
    module_arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self, **changed: Any) -> StructuralCallback:
        """Return the callback."""
        return self.cls(**{**self.arguments, **changed})


CONTRACT = {
    "net2net_wider": Contract(Net2Net, {"every_n_steps": 4, "num_units": 2}, preserves=True),
    "net2net_deeper": Contract(Net2Net, {"every_n_steps": 5, "width": False, "depth": True}, preserves=True),
    "net2net_both": Contract(
        Net2Net, {"every_n_steps": 5, "fraction": 0.5, "depth": True, "max_parameters": 400}, preserves=True
    ),
    "splitting": Contract(SplittingSteepestDescent, {"every_n_steps": 2, "num_units": 2, "steps": 3}, preserves=False),
    "splitting_rayleigh": Contract(
        SplittingSteepestDescent,
        {"every_n_steps": 4, "fraction": 0.2, "form": "rayleigh", "steps": 3, "cost": "flops"},
        preserves=False,
    ),
    "splitting_exact": Contract(
        SplittingSteepestDescent, {"every_n_steps": 3, "num_units": 2, "form": "exact"}, preserves=False
    ),
    "signed_splitting": Contract(
        SignedSplitting, {"every_n_steps": 4, "num_units": 4, "cost": "parameters"}, preserves=False
    ),
    "gradmax": Contract(GradMax, {"every_n_steps": 4, "num_units": 2}, preserves=True, module=Smooth),
    "gradmax_relu": Contract(GradMax, {"every_n_steps": 4, "num_units": 2, "together": True}, preserves=False),
    "gradmax_fan_out": Contract(GradMax, {"every_n_steps": 4, "num_units": 1, "zero": "fan_out"}, preserves=True),
    "kernel_growth": Contract(
        KernelGrowth,
        {"every_n_steps": 4, "max_kernel_size": 5, "pointwise": True},
        preserves=True,
        module=Convolutional,
    ),
    "random_new": Contract(RandomGrowth, {"every_n_steps": 4, "num_units": 3}, preserves=True),
    "random_split": Contract(
        RandomGrowth, {"every_n_steps": 4, "fraction": 0.5, "kind": "split"}, preserves=False, module=Smooth
    ),
    "firefly": Contract(
        Firefly, {"every_n_steps": 4, "num_units": 4, "search_steps": 6, "window_batches": 3}, preserves=False
    ),
    "firefly_one_list": Contract(
        Firefly,
        {
            "every_n_steps": 4,
            "fraction": 0.2,
            "one_list": True,
            "search_steps": 4,
            "window_batches": 2,
            "cost": "parameters",
            "max_parameters": 300,
        },
        preserves=False,
    ),
    "tiny": Contract(Tiny, {"every_n_steps": 4, "num_units": 2, "update_existing": True}, preserves=False),
    "firefly_continual": Contract(
        FireflyContinual,
        {
            "every_n_steps": 4,
            "num_units": 3,
            "search_steps": 4,
            "window_batches": 2,
            "task": "b",
            "tasks": {"a": {"stem": 3, "blocks.0.up": 2, "blocks.1.up": 2}},
            "own": {"b": ["head.bias"]},
        },
        preserves=False,
    ),
    "magnitude_pruning": Contract(
        MagnitudePruning, {"every_n_steps": 4, "num_units": 2, "min_size": 2}, preserves=False
    ),
    "gauss_newton": Contract(
        GaussNewton, {"every_n_steps": 4, "num_units": 2, "steps": 5, "window_batches": 3}, preserves=False
    ),
    "noisy_heuristics": Contract(  # the fan-out of what goes is set back to zero in the step of the event, too
        NoisyHeuristics,
        {"every_n_steps": 3, "num_units": 3, "num_decay_steps": 2, "window_batches": 1, "threshold_max": 9.0},
        preserves=False,
    ),
    "noisy_heuristics_adding": Contract(
        NoisyHeuristics,
        {
            "every_n_steps": 4,
            "num_units": 3,
            "removes": False,
            "window_batches": 1,
            "deepen": True,
        },
        preserves=True,
    ),
}
