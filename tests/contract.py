"""The table of all methods: one row each, from which `test_contract.py` runs what every method must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from lightning_grow.growth import Net2Net
from lightning_grow.pruning import MagnitudePruning
from lightning_grow.trainer import StructuralCallback
from tests.trainer.models import Residual


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
    "net2net_deeper": Contract(Net2Net, {"every_n_steps": 4, "width": False, "depth": True}, preserves=True),
    "net2net_both": Contract(
        Net2Net, {"every_n_steps": 5, "fraction": 0.5, "depth": True, "max_parameters": 400}, preserves=True
    ),
    "magnitude_pruning": Contract(
        MagnitudePruning, {"every_n_steps": 4, "num_units": 2, "min_size": 2}, preserves=False
    ),
}
