"""Larger kernels of convolutions, with zeros around what they were and as much more padding: the same function.

Network morphism of the kernel size: Wei, Wang, Rui, Chen, "Network Morphism", ICML 2016, arXiv:1603.01670.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.holders import Step
from lightning_grow.surgery.attributes import Change
from lightning_grow.surgery.optimizer_state import OptimizerMemory
from lightning_grow.surgery.plan import AxisMap, TensorPlan, gather
from lightning_grow.surgery.swap import Commit, check_swappable

_OWN_FORWARD = {
    cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}
_BORDERS = ("zeros", "replicate")
"""Borders of any width. Those that mirror or wrap the image may not be wider than it, which no weight tells."""


@dataclass(frozen=True)
class KernelEdit:
    """A planned change of the kernel size of one convolution. Nothing is changed until `enlarge_`.

    Attributes:
        module: Name of the convolution.
        before: Its kernel size now.
        after: Its kernel size afterwards: along each dimension an even number more, at least as many, in all larger.

    Raises:
        ValueError: If the sizes do not go together.

    Example:
        >>> str(KernelEdit("stem", (3, 3), (5, 5)))
        'stem: 3x3 -> 5x5'
    """

    module: str
    before: tuple[int, ...]
    after: tuple[int, ...]

    def __post_init__(self) -> None:
        pairs = list(zip(self.before, self.after, strict=False))
        if len(self.before) != len(self.after) or any(a < b or (a - b) % 2 for b, a in pairs):
            raise ValueError(
                f"A kernel of '{self.module}' grows by an even number along each of its dimensions, so that as much is "
                f"added on either side, but goes from {self.before} to {self.after}."
            )

    @property
    def size_before(self) -> int:
        """Its length along its longest dimension now."""
        return max(self.before)

    @property
    def size_after(self) -> int:
        """Its length along its longest dimension afterwards."""
        return max(self.after)

    def __str__(self) -> str:
        before, after = ("x".join(str(length) for length in size) for size in (self.before, self.after))
        return f"{self.module}: {before} -> {after}"


def obstacle_to_kernels(model: nn.Module, name: str) -> str | None:
    """Return why the kernel of a module cannot grow and keep the function; None if it can.

    Args:
        model: The model.
        name: Qualified name of the module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
        >>> obstacle_to_kernels(model, "0")
        "its border is 'reflect': a wider one may not fit into the image"
    """
    module = model.get_submodule(name)
    if not isinstance(module, _ConvNd):
        return f"a {type(module).__name__} is no convolution"
    if type(module).forward not in _OWN_FORWARD or "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own, which may count on the size of its kernel"
    if is_parametrized(module, "weight") or "weight" not in module._parameters:  # noqa: SLF001
        return "its weight is computed from other tensors (a parametrization, a norm of weights, a mask)"
    if nn.parameter.is_lazy(module.weight):
        return "its weight has no shape yet"
    if module.padding_mode not in _BORDERS:
        return f"its border is '{module.padding_mode}': a wider one may not fit into the image"
    for path, other in model.named_modules():
        shares = [leaf for leaf, p in other.named_parameters(recurse=False) if p is module.weight]
        if other is not module and shares:
            if shares != ["weight"] or not isinstance(other, _ConvNd) or type(other).forward not in _OWN_FORWARD:
                return f"'{path}', which is no ordinary convolution, shares its weight"
            if other.padding_mode not in _BORDERS:
                return f"'{path}' shares its weight, and its border is '{other.padding_mode}'"
    return None


def enlarge(model: nn.Module, name: str, kernel_size: int | Iterable[int] | None = None) -> KernelEdit:
    """Plan a larger kernel for a convolution of any dimension, stride, dilation, and number of groups.

    The kernel gets zeros on either side and the padding grows by as much, times the dilation; the function stays
    exactly the same. Convolutions that share the weight are changed, too.

    Args:
        model: The model; only read.
        name: Qualified name of an ``nn.Conv1d`` to ``nn.Conv3d`` or of its transpose.
        kernel_size: The size afterwards, one for all dimensions or one for each: an even number more than now, or as
            many; by default the present one.

    Returns:
        The edit. Nothing is changed yet.

    Raises:
        StructureError: If the module is no ordinary convolution, or its border mirrors or wraps the image.
        ValueError: If a size does not go with the present one.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1))
        >>> enlarge_(model, [enlarge(model, "0", 5)])
        >>> model[0].kernel_size, model[0].padding
        ((5, 5), (2, 2))

    Reference:
        Wei et al., "Network Morphism", ICML 2016, arXiv:1603.01670.
    """
    obstacle = obstacle_to_kernels(model, name)
    if obstacle is not None:
        raise StructureError(f"The kernel of '{name}' cannot grow and keep the function: {obstacle}.")
    before = tuple(model.get_parameter(f"{name}.weight").shape[2:])
    after = (kernel_size,) * len(before) if isinstance(kernel_size, int) else tuple(kernel_size or before)
    return KernelEdit(name, before, after)


def enlarge_(
    model: nn.Module,
    edits: Iterable[KernelEdit],
    optimizers: Iterable[Any] = (),
    *,
    new_state: Literal["mean", "zeros"] = "mean",
) -> None:
    """Enlarge kernels in place: weights, sizes, padding and optimizer state; all or nothing.

    Parameters keep their identity, as in `apply_`. What optimizers remember is padded, too: gradients with zeros,
    squared gradients as ``new_state`` says.

    Args:
        model: The model.
        edits: From `enlarge`; at most one for each weight.
        optimizers: Optimizers of the model's parameters.
        new_state: What squared gradients are for new entries: ``"mean"`` of the others, or ``"zeros"``.

    Raises:
        StructureError: If a kernel cannot grow, or has another size than the edit was planned for. Nothing has changed
            then, as after any other error.
        ValueError: If a weight is enlarged twice, or an optimizer holds none of the model's parameters.
    """
    edits = list(edits)
    with torch.inference_mode(False), torch.no_grad():
        weights: dict[int, tuple[str, Tensor, tuple[AxisMap, ...]]] = {}
        for edit in edits:
            obstacle = obstacle_to_kernels(model, edit.module)
            if obstacle is not None:
                raise StructureError(f"The kernel of '{edit.module}' cannot grow and keep the function: {obstacle}.")
            weight: Tensor = model.get_parameter(f"{edit.module}.weight")
            if tuple(weight.shape[2:]) != edit.before:
                raise StructureError(
                    f"The edit of '{edit.module}' was planned for a kernel of {edit.before}, but it has "
                    f"{tuple(weight.shape[2:])}. Plan it again."
                )
            if id(weight) in weights:
                raise ValueError(f"The weight of '{edit.module}' is enlarged twice in one call.")
            pairs = enumerate(zip(edit.before, edit.after, strict=True), start=2)
            maps = tuple(centred(dim, old, new) for dim, (old, new) in pairs if old != new)
            weights[id(weight)] = f"{edit.module}.weight", weight, maps
        sizes = {key: edit.after for key, edit in zip(weights, edits, strict=True)}
        memories = [OptimizerMemory(optimizer, model.parameters()) for optimizer in optimizers]
        with Commit(model, [weight for _, weight, _ in weights.values()]) as commit:
            for name, weight, _ in weights.values():
                check_swappable(name, weight)
            for change in kernel_changes(model, sizes):
                commit.attribute(*change)
            for name, weight, maps in weights.values():
                if not maps:
                    continue
                value = gather(weight.detach(), maps)
                plan = TensorPlan(name, maps, weight.shape, value)
                for memory in memories:
                    for place in memory.planned(weight, plan, new_state):
                        commit.item(*place)
                commit.tensor(weight, value)
            for memory in memories:
                for place in memory.shared_by([weight for _, weight, _ in weights.values()]):
                    commit.item(*place)
        for memory in memories:
            memory.report_resets()


def centred(dim: int, old: int, new: int) -> AxisMap:
    """Return the map of an axis that gets, or loses, as many entries at one end as at the other; new ones are zero."""
    index = torch.arange(new) - (new - old) // 2
    return AxisMap(dim, "consumed", torch.where((index >= 0) & (index < old), index, -1))


def kernels_of(model: nn.Module) -> set[int]:
    """Return the ``id`` of the weight of each of torch's convolutions."""
    weights = (m._parameters.get("weight") for m in model.modules() if isinstance(m, _ConvNd))  # noqa: SLF001
    return {id(weight) for weight in weights if weight is not None}


def kernel_changes(model: nn.Module, sizes: Mapping[int, tuple[int, ...]]) -> Iterator[Change]:
    """Yield what convolutions keep about kernels that change their size: the size, and the padding.

    Args:
        model: The model.
        sizes: Kernel sizes afterwards, by the ``id`` of the weight.

    Raises:
        StructureError: If a kernel changes by an odd number, or would need a padding below zero.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _ConvNd) or id(module._parameters.get("weight")) not in sizes:  # noqa: SLF001
            continue
        before, after = module.kernel_size, sizes[id(module.weight)]
        if after == tuple(before):
            continue
        more = [d * (new - old) for d, old, new in zip(module.dilation, before, after, strict=True)]
        padding: Any = module.padding
        if padding != "same":
            now = [0] * len(after) if padding == "valid" else padding
            padding = tuple(p + m // 2 for p, m in zip(now, more, strict=True))
        odd = any((new - old) % 2 for old, new in zip(before, after, strict=True))
        if odd or (padding != "same" and min(padding) < 0):
            raise StructureError(
                f"'{name}' has a kernel of {tuple(before)}, and could not be the same with one of {after}: kernels "
                "change by an even number, and their padding by half of it."
            )
        yield Change(module, Step("kernel_size", False), after)
        yield Change(module, Step("padding", False), padding)
        yield Change(module, Step("_reversed_padding_repeated_twice", False), _on_both_sides(module, after, padding))


def _on_both_sides(module: _ConvNd, kernel_size: tuple[int, ...], padding: Any) -> list[int] | tuple[int, ...]:
    """Return the padding as torch's convolutions with borders other than zeros use it: last dimension first."""
    found: list[int] = []
    for place in reversed(range(len(kernel_size))):
        if padding == "same":
            total = module.dilation[place] * (kernel_size[place] - 1)
            found += [total // 2, total - total // 2]
        else:
            found += [padding[place]] * 2
    return found if padding == "same" else tuple(found)
