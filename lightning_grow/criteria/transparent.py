"""Whether new units can begin with a fan-in of zero, and what lets them through on their way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_grow.criteria.units import sizes_of
from lightning_grow.structure.axes import AxisGroup, Block, Role, Units, tensor_of
from lightning_grow.structure.layout import unit_entries

_ROLES: tuple[Role, Role] = ("produced", "consumed")


def refusal(model: nn.Module, group: AxisGroup) -> str | None:
    """Return why new units of a group cannot begin with a fan-in of zero; None if nothing is seen."""
    if group.obstacle is not None:
        return group.obstacle
    named = dict(model.named_parameters())
    for role, what in zip(_ROLES, ("makes", "uses"), strict=True):
        axes = [axis for axis in group.with_role(role) if axis.tensor in named]
        if not axes:
            return f"nothing {what} the units that is a parameter"
        if role == "produced" and any(not named[axis.tensor].requires_grad for axis in axes):
            return "their fan-in is frozen"
        if not any(named[axis.tensor].requires_grad for axis in axes):
            return "their fan-out is frozen"
    if any(_times(block, group.name) > 1 for axis in group.axes for block in axis.layout):
        return "they are multiplied with each other"
    if any("parametrizations." in a.tensor or a.tensor.endswith("weight_g") for a in group.with_role("produced")):
        return "their fan-in is parametrized (a weight norm divides by its length)"
    if all(named[a.tensor].ndim < 2 for a in group.with_role("produced") if a.tensor in named):
        return "they have no weights, only biases"
    return None


def transparent_values(
    model: nn.Module, group: AxisGroup, num_units: int, *, silent: bool = False
) -> dict[str, Tensor]:
    """Return values of what new units pass on their way, by axis label, with which it lets them through unchanged.

    Depthwise kernels are 1 at their centre; biases are 0. A batch norm has mean 0, variance 0 and gain ``sqrt(eps)``:
    it is the identity in eval mode, and its slope is 1 in train mode too, for units that are still zero. With a
    gain of 1, what reaches a silent unit would be multiplied by ``1 / sqrt(eps)`` = 316 in its first step.

    Args:
        model: The model; only read.
        group: The group.
        num_units: New units.
        silent: Whether the new units have a usual fan-in and no fan-out. A batch norm has its default entries then.
    """
    values = {}
    sizes = sizes_of(model, group)
    for axis in group.with_role("carried"):
        tensor = tensor_of(model, axis.tensor)
        path, _, leaf = axis.tensor.rpartition(".")
        module = model.get_submodule(path)
        value = None if silent and hasattr(module, "running_mean") else _transparent(module, leaf, tensor)
        if value is not None:
            number = unit_entries(axis.layout, {**sizes, group.name: num_units}, group.name).numel()
            shape = [number if dim == axis.dim else n for dim, n in enumerate(tensor.shape)]
            values[axis.label] = value.expand(shape)
    return values


def _transparent(module: nn.Module, leaf: str, tensor: Tensor) -> Tensor | None:
    """Return the value of a new entry, in a shape that broadcasts over the tensor; None for the default value."""
    eps: Any = getattr(module, "eps", None)
    if hasattr(module, "running_mean") and isinstance(eps, float):
        by_name = {"weight": eps**0.5, "bias": 0.0, "running_mean": 0.0}
        by_name["running_var"] = 1.0 if getattr(module, "weight", None) is None else 0.0
        return torch.tensor(by_name[leaf], dtype=torch.float64) if leaf in by_name else None
    if leaf == "bias" and tensor.ndim == 1:  # see `_is_bias`
        return torch.zeros((), dtype=torch.float64)
    if hasattr(module, "kernel_size") and leaf == "weight" and tensor.ndim > 2:
        kernel = torch.zeros(tensor.shape[2:], dtype=torch.float64)
        kernel[tuple(length // 2 for length in kernel.shape)] = 1.0
        return kernel
    return None


def _times(block: Block, group: str) -> int:
    return sum(isinstance(factor, Units) and factor.group == group for factor in block.factors)
