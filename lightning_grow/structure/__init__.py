"""What may vary: models as axes. Knows torch only."""

from lightning_grow.structure.axes import Attribute, Axis, AxisGroup, Block, Stack, Structure, Units
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.trace import trace, trace_call

__all__ = [
    "Attribute",
    "Axis",
    "AxisGroup",
    "Block",
    "Stack",
    "Structure",
    "StructureError",
    "Units",
    "trace",
    "trace_call",
]
