"""How large the weights of a unit are: the plainest criterion, which looks at no data."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lightning_grow.criteria.units import sizes_of, sum_over_units
from lightning_grow.structure.axes import AxisGroup, Role, tensor_of


def magnitude(
    group: AxisGroup, model: nn.Module, *, roles: Collection[Role] = ("produced", "consumed"), p: float = 2.0
) -> Tensor:
    r"""Return the size of the weights of each unit, relative to the mean unit of the group.

    For each slice ``m`` of unit ``k`` (a row of a layer that makes it, a column of one that uses it)
    :math:`I_m(k) = \sum |m[k]|^p`; the score is :math:`(\operatorname{mean}_m I_m(k))^{1/p}`, divided by its mean over
    the units, so that the scores of different groups can be compared.

    Args:
        group: The group.
        model: The model; frozen parameters count, buffers do not.
        roles: Which axes count: ``"produced"`` (fan-in), ``"consumed"`` (fan-out), ``"carried"`` (norms, depthwise).
        p: Exponent of the norm, > 0.

    Returns:
        float64 ``(group.size,)``, higher = worth more, with mean 1 (all 0 if all weights are).

    Raises:
        ValueError: If ``p`` is not above 0, or the group has no parameter on any axis of these roles.

    Example:
        >>> from lightning_grow.structure import trace
        >>> model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> magnitude(trace(model, torch.zeros(1, 1))["0"], model, roles=["produced"])
        tensor([0.5000, 1.0000, 1.5000], dtype=torch.float64)

    Reference:
        Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv:1608.08710; coupled axes as in Fang et
        al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv:2301.12900.
    """
    if not p > 0:
        raise ValueError(f"Expected `p` above 0, found {p!r}.")
    sizes = sizes_of(model, group)
    names = {name for name, _ in model.named_parameters()}
    axes = [axis for axis in group.axes if axis.role in roles and axis.tensor in names]
    if not axes:
        raise ValueError(f"No parameter of '{group.name}' has a role among {', '.join(sorted(roles)) or 'none'}.")
    members = [sum_over_units(tensor_of(model, a.tensor).detach().abs().pow(p), group, a, sizes) for a in axes]
    scores = torch.stack(members).mean(dim=0).pow(1 / p)
    mean = scores.mean()
    return scores / mean if mean > 0 else scores
