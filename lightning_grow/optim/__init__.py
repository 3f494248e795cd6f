"""Optimizers that adapt their learning rate, in the grammar of ``torch.optim``."""

from lightning_grow.optim.hypergradient import SGDHD, SGDNHD, AdamHD

__all__ = ["SGDHD", "SGDNHD", "AdamHD"]
