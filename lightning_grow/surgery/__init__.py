"""How a model changes: edits as plain data, applied to weights, buffers, attributes and optimizer state at once."""

from lightning_grow.surgery.apply import apply_
from lightning_grow.surgery.depth import insert_, remove_
from lightning_grow.surgery.edit import Edit, prune, split, widen
from lightning_grow.surgery.kernels import KernelEdit, enlarge, enlarge_
from lightning_grow.surgery.restore import replay_, resize_like_

__all__ = [
    "Edit",
    "KernelEdit",
    "apply_",
    "enlarge",
    "enlarge_",
    "insert_",
    "prune",
    "remove_",
    "replay_",
    "resize_like_",
    "split",
    "widen",
]
