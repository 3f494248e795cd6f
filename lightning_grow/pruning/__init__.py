"""Methods that make networks smaller: one file each."""

from lightning_grow.pruning.magnitude import MagnitudePruning, prune_lowest

__all__ = ["MagnitudePruning", "prune_lowest"]
