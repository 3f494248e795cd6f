"""What a unit is worth: pure functions, one score per unit, and what they are computed from. Knows torch only."""

from lightning_grow.criteria.bottleneck import Bottleneck, bottlenecks
from lightning_grow.criteria.curvature import Extremes, Form, exact, extremes, lanczos, rayleigh, splitting_matrices
from lightning_grow.criteria.magnitude import magnitude
from lightning_grow.criteria.new_units import NewUnits, SingularPairs
from lightning_grow.criteria.objective import MeasurementError, Objective
from lightning_grow.criteria.overgrown import Overgrown, apart
from lightning_grow.criteria.second_order import GaussNewtonModel
from lightning_grow.criteria.selection import best_units
from lightning_grow.criteria.significance import significance
from lightning_grow.criteria.splits import Offspring, Splits, can_split, offspring_edit
from lightning_grow.criteria.statistics import GradientSums, Statistic
from lightning_grow.criteria.units import UnitVectors, sizes_of, sum_over_units

__all__ = [
    "Bottleneck",
    "Extremes",
    "Form",
    "GaussNewtonModel",
    "GradientSums",
    "MeasurementError",
    "NewUnits",
    "Objective",
    "Offspring",
    "Overgrown",
    "SingularPairs",
    "Splits",
    "Statistic",
    "UnitVectors",
    "apart",
    "best_units",
    "bottlenecks",
    "can_split",
    "exact",
    "extremes",
    "lanczos",
    "magnitude",
    "offspring_edit",
    "rayleigh",
    "significance",
    "sizes_of",
    "splitting_matrices",
    "sum_over_units",
]
