"""Optimizers that adapt their learning rate, in the grammar of ``torch.optim``."""

from lightning_grow.optim.alig import ALIG
from lightning_grow.optim.alig_plus import ALIGPlus
from lightning_grow.optim.borat import BORAT
from lightning_grow.optim.camhd import CAMHD
from lightning_grow.optim.hypergradient import SGDHD, SGDNHD, AdamHD

__all__ = ["ALIG", "BORAT", "CAMHD", "SGDHD", "SGDNHD", "ALIGPlus", "AdamHD"]
