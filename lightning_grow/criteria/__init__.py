"""What a unit is worth: pure functions, one score per unit, and the sums they are computed from. Knows torch only."""

from lightning_grow.criteria.magnitude import magnitude
from lightning_grow.criteria.statistics import GradientSums, Statistic
from lightning_grow.criteria.units import sizes_of, sum_over_units

__all__ = ["GradientSums", "Statistic", "magnitude", "sizes_of", "sum_over_units"]
