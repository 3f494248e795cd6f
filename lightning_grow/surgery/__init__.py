"""How a model changes: edits as plain data, applied to weights, buffers, attributes and optimizer state at once."""

from lightning_grow.surgery.apply import apply_
from lightning_grow.surgery.edit import Edit, prune, split, widen

__all__ = ["Edit", "apply_", "prune", "split", "widen"]
