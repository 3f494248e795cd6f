"""What a unit, a layer, a model costs: parameters, operations, milliseconds. Knows torch only."""

from lightning_grow.costs.compute import count_flops, in_eval_mode, measure_latency_ms
from lightning_grow.costs.parameters import count_parameters, unit_parameters

__all__ = ["count_flops", "count_parameters", "in_eval_mode", "measure_latency_ms", "unit_parameters"]
