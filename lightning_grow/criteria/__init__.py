"""What a unit is worth: pure functions, one score per unit, and what they are computed from. Knows torch only."""

from lightning_grow.criteria.magnitude import magnitude
from lightning_grow.criteria.objective import MeasurementError, Objective
from lightning_grow.criteria.overgrown import Overgrown, apart
from lightning_grow.criteria.selection import best_units
from lightning_grow.criteria.splits import Offspring, Splits, offspring_edit
from lightning_grow.criteria.statistics import GradientSums, Statistic
from lightning_grow.criteria.units import UnitVectors, sizes_of, sum_over_units

__all__ = [
    "GradientSums",
    "MeasurementError",
    "Objective",
    "Offspring",
    "Overgrown",
    "Splits",
    "Statistic",
    "UnitVectors",
    "apart",
    "best_units",
    "magnitude",
    "offspring_edit",
    "sizes_of",
    "sum_over_units",
]
