"""PyTorch Lightning callbacks and optimizers with which a LightningModule finds its own size while it trains."""

from lightning_grow.structure import Axis, AxisGroup, Stack, Structure, StructureError, trace
from lightning_grow.surgery import Edit, apply_, prune, split, widen

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "AxisGroup",
    "Edit",
    "Stack",
    "Structure",
    "StructureError",
    "apply_",
    "prune",
    "split",
    "trace",
    "widen",
]
