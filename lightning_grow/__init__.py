"""PyTorch Lightning callbacks and optimizers with which a LightningModule finds its own size while it trains."""

from lightning_grow.growth import Net2Net, net2deeper, net2wider
from lightning_grow.planning import Plan, PlanError, plan
from lightning_grow.pruning import MagnitudePruning
from lightning_grow.structure import Axis, AxisGroup, Stack, Structure, StructureError, trace
from lightning_grow.surgery import Edit, apply_, insert_, prune, remove_, replay_, resize_like_, split, widen
from lightning_grow.trainer import History, StructuralCallback, load_from_checkpoint

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "AxisGroup",
    "Edit",
    "History",
    "MagnitudePruning",
    "Net2Net",
    "Plan",
    "PlanError",
    "Stack",
    "StructuralCallback",
    "Structure",
    "StructureError",
    "apply_",
    "insert_",
    "load_from_checkpoint",
    "net2deeper",
    "net2wider",
    "plan",
    "prune",
    "remove_",
    "replay_",
    "resize_like_",
    "split",
    "trace",
    "widen",
]
