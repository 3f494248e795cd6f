"""What one more unit of each group costs, for methods that weigh gains against costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.costs import count_flops, in_eval_mode, measure_latency_ms, unit_parameters
from lightning_grow.criteria.objective import MeasurementError
from lightning_grow.criteria.overgrown import Overgrown
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.surgery.edit import widen
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import in_all

CostName = Literal["units", "parameters", "flops", "latency"]
Cost = CostName | Callable[[nn.Module, AxisGroup], float]
"""A name, or a function of the model and a group that returns what one more unit costs: energy, from a table, say."""


def check_cost(cost: Cost) -> None:
    """Refuse what is no cost.

    Raises:
        MisconfigurationException: If ``cost`` is neither a known name nor callable.
    """
    if not callable(cost) and cost not in ("units", "parameters", "flops", "latency"):
        raise MisconfigurationException(
            f"`cost` should be 'units', 'parameters', 'flops', 'latency' or a function, found {cost!r}."
        )


def unit_costs(occasion: Occasion, cost: Cost, groups: Sequence[AxisGroup] | None = None) -> dict[str, float]:
    """Return what one more unit of each group costs; equal on all ranks.

    FLOPs are those of the training loss on one observed batch, forward; latency is its time in milliseconds, measured
    in copies with a quarter more units, and so noisy: what cannot be told from 0 counts as the least that can.

    Args:
        occasion: The event.
        cost: What to count; ``"units"`` makes all units cost 1.
        groups: Which; all that the user chose, by default.

    Raises:
        MeasurementError: If a cost is not above 0, or there is no batch to run.
    """
    groups = occasion.groups if groups is None else groups
    if cost == "units":
        return {group.name: 1.0 for group in groups}
    if cost == "parameters":
        found = {g.name: float(unit_parameters(occasion.model, occasion.structure, g.name)) for g in groups}
    elif callable(cost):
        found = {group.name: float(cost(occasion.model, group)) for group in groups}
    else:
        found = _run_costs(occasion, cost, groups)
    wrong = [name for name, value in found.items() if not value > 0]
    if wrong:
        raise MeasurementError(f"A unit of {', '.join(wrong)} should cost more than 0, by `cost={cost!r}`.")
    return found


def allowance(
    groups: Sequence[AxisGroup],
    costs: Mapping[str, float],
    num_units: int | None,
    fraction: float | None,
    default: float,
) -> tuple[int, float | None]:
    """Return what `best_units` may spend on groups that share one list: units, and cost.

    Args:
        groups: The groups.
        costs: Cost of one unit of each.
        num_units: So many units for all groups together, or
        fraction: a share of what all their units cost now; enough for one unit at least.
        default: The share if neither is given.

    Returns:
        Most units to add, and most that they may cost together; None where units alone count.
    """
    if num_units is not None:
        return num_units, None
    share = default if fraction is None else fraction
    if len({costs[group.name] for group in groups}) <= 1:
        return in_all(groups, None, share, default), None
    present = sum(group.size * costs[group.name] for group in groups)
    dearest = max(group.step * costs[group.name] for group in groups)
    return max(1, math.ceil(share * present / min(costs.values()))), max(share * present, dearest)


def _run_costs(occasion: Occasion, cost: str, groups: Sequence[AxisGroup]) -> dict[str, float]:
    objective = occasion.measured
    if not objective.batches:
        raise MeasurementError("There is no batch to measure costs on.")

    def price(model: nn.Module) -> float:
        call = in_eval_mode(model, lambda: objective.loss(model, objective.batches[0]))
        if cost == "flops":
            return float(count_flops(call))
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return measure_latency_ms(call, device)

    found = {}
    with objective.together():
        base = price(Overgrown(occasion.model, []).model)
        for group in groups:
            more = group.step if cost == "flops" else -(-group.size // (4 * group.step)) * group.step
            found[group.name] = (price(Overgrown(occasion.model, [widen(group, more)]).model) - base) / more
    if cost == "latency":
        known = [value for value in found.values() if value > 0]
        least = statistics.median(known) / 10 if known else 1.0
        found = {name: max(value, least) for name, value in found.items()}
    return {name: _agreed(occasion, value) for name, value in found.items()}


def _agreed(occasion: Occasion, value: float) -> float:
    """Return the mean over ranks."""
    pair = occasion.measured.reduce(torch.tensor([value, 1.0], dtype=torch.float64))
    return float(pair[0] / pair[1])
