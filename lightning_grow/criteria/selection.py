"""Which units are worth what they cost: one list for all layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_grow.structure.axes import AxisGroup


def best_units(
    gains: Mapping[str, tuple[AxisGroup, Tensor]],
    num_units: int,
    *,
    costs: Mapping[str, float] | None = None,
    max_cost: float | None = None,
) -> dict[str, list[int]]:
    """Return the candidates with the largest gain for their cost, wherever they are.

    With equal costs these are the ``num_units`` largest gains. With costs, what the linear relaxation of the knapsack
    would take whole (Wang et al., "Energy-Aware Neural Architecture Optimization with Fast Splitting Steepest
    Descent", arXiv:1910.03103): the best gains for their cost, up to the first that ``max_cost`` does not allow, so
    that a group whose units become dearer never gets more of them. Candidates that gain nothing, or cost more than
    ``max_cost`` alone, are never taken. In a group, they go in multiples of ``group.step``, best first.

    Args:
        gains: By group name, the group and one gain for each candidate, ``(candidates,)``; higher = worth more.
        num_units: Candidates to take in all, ``>= 1``; fewer if fewer gain something.
        costs: Cost of one unit, by group name, above 0; by default all cost the same.
        max_cost: What all together may cost at most.

    Returns:
        By group name, the chosen candidates in rising order; groups without any are left out.

    Raises:
        ValueError: If a number is out of range, or gains are not one-dimensional.

    Example:
        >>> import torch
        >>> from lightning_grow.structure.axes import Axis, Block, Units
        >>> layout = (Block((Units("fc1", "fc1.weight", 0, 1),)),)
        >>> group = AxisGroup("fc1", 3, 1, (Axis("fc1.weight", 0, "produced", layout),))
        >>> best_units({"fc1": (group, torch.tensor([0.1, -1.0, 0.3]))}, 2)
        {'fc1': [0, 2]}
    """
    if num_units < 1:
        raise ValueError(f"Expected `num_units` of at least 1, found {num_units}.")
    costs = costs or dict.fromkeys(gains, 1.0)
    if min((costs[name] for name in gains), default=1.0) <= 0:
        raise ValueError(f"Expected costs above 0, found {dict(costs)}.")
    bundles: list[tuple[float, float, str, list[int]]] = []
    for name, (group, gain) in gains.items():
        if gain.ndim != 1:
            raise ValueError(f"Expected one gain for each candidate of '{name}', found shape {tuple(gain.shape)}.")
        order = gain.argsort(descending=True, stable=True).tolist()
        for begin in range(0, len(order) // group.step * group.step, group.step):
            units = order[begin : begin + group.step]
            total, cost = float(gain[units].sum()), costs[name] * len(units)
            if total > 0 and (max_cost is None or cost <= max_cost):
                bundles.append((total / cost, cost, name, units))
    chosen: dict[str, list[int]] = {}
    left, money = num_units, max_cost
    for _, cost, name, units in sorted(bundles, key=lambda bundle: -bundle[0]):  # stable: ties go by order of groups
        if money is not None and cost > money:
            break
        if len(units) <= left:
            chosen.setdefault(name, []).extend(units)
            left -= len(units)
            money = None if money is None else money - cost
    return {name: sorted(units) for name, units in chosen.items()}
