"""Methods that make networks larger: one file each."""

from lightning_grow.growth.firefly import Firefly, firefly
from lightning_grow.growth.firefly_continual import FireflyContinual, locked_entries, task_network
from lightning_grow.growth.gauss_newton import GaussNewton, gauss_newton, gauss_newton_splits
from lightning_grow.growth.gradmax import GradMax, gradmax
from lightning_grow.growth.kernel_growth import KernelGrowth, larger_kernels
from lightning_grow.growth.net2net import Net2Net, net2deeper, net2wider, with_noise
from lightning_grow.growth.noisy_heuristics import NoisyHeuristics, random_units, unfit_units
from lightning_grow.growth.random_growth import RandomGrowth, random_new_units, random_splits
from lightning_grow.growth.signed_splitting import SignedSplitting, signed_scheme, signed_splits
from lightning_grow.growth.splitting import SplittingSteepestDescent, split_gains, steepest_splits
from lightning_grow.growth.tiny import Tiny, tiny

__all__ = [
    "Firefly",
    "FireflyContinual",
    "GaussNewton",
    "GradMax",
    "KernelGrowth",
    "Net2Net",
    "NoisyHeuristics",
    "RandomGrowth",
    "SignedSplitting",
    "SplittingSteepestDescent",
    "Tiny",
    "firefly",
    "gauss_newton",
    "gauss_newton_splits",
    "gradmax",
    "larger_kernels",
    "locked_entries",
    "net2deeper",
    "net2wider",
    "random_new_units",
    "random_splits",
    "random_units",
    "signed_scheme",
    "signed_splits",
    "split_gains",
    "steepest_splits",
    "task_network",
    "tiny",
    "unfit_units",
    "with_noise",
]
