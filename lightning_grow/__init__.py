"""PyTorch Lightning networks that change their own architecture while they train."""

from lightning_grow.structure import Axis, AxisGroup, Stack, Structure, StructureError, trace

__version__ = "0.1.0"

__all__ = ["Axis", "AxisGroup", "Stack", "Structure", "StructureError", "trace"]
