"""Try every proposal on resized tensors: nothing that was discovered counts before it has run.

Four trials, each one forward pass of the real model in eval mode, with perturbed weights so that zero-initialised
layers hide nothing: permuting the units of a group must leave the output unchanged (so the layout is right); one more
unit with silent fan-out, and one unit split in two, must leave it unchanged (or the group has an obstacle); one unit
less must run. All groups are tried at once; only when a joint trial fails are they tried one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_grow.structure.axes import Attribute, AxisGroup, Layout, layout_length
from lightning_grow.structure.layout import entry_index, entry_share
from lightning_grow.structure.sandbox import set_size, swap_in, tensors_in, unchanged

# In float64, models that compute in float32 inside still differ by rounding; a real mistake shows as 1e-2 or more.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class UnrunnableError(RuntimeError):
    """The model cannot be run on real data here, so proposals cannot be tried."""


class Trials:
    """Runs a model with resized tensors and compares outputs.

    Args:
        model: The model. It is left unchanged.
        call: Runs it on ``args`` and ``kwargs``.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        names: Tensors that take part in some group.

    Raises:
        UnrunnableError: If the model does not run as it is, or has no floating-point output.
    """

    def __init__(
        self, model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], names: set[str]
    ) -> None:
        self._model, self._call, self._args, self._kwargs = model, call, args, kwargs
        named = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
        if any(t.device.type == "meta" for t in named.values()):
            raise UnrunnableError("its tensors are on the meta device")
        self._named = named
        self._in_groups = names
        self.sizes: dict[str, int] = {}
        error: Exception | None = None
        for dtype in (torch.float64, None):
            try:
                self._prepare(dtype)
            except Exception as e:  # the model's own code: anything can happen
                error = error or e
            else:
                return
        raise UnrunnableError(f"its forward fails on the example input: {type(error).__name__}: {error}")

    def _prepare(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._tensors = {n: self._cast(t) for n, t in self._named.items()}
        self._tensors.update({n: perturbed(n, self._tensors[n]) for n in sorted(self._in_groups)})
        self.reference = self.run(self._tensors, {})
        if not self.reference:
            raise UnrunnableError("it returns no floating-point tensor")
        if not all(bool(torch.isfinite(t).all()) for t in self.reference):
            raise UnrunnableError("its output is not finite on the example input")
        least = min((t.dtype for t in self.reference), key=lambda d: -torch.finfo(d).eps)
        self._tolerance = _TOLERANCE.get(least, 1e-3)

    def _cast(self, tree: Any) -> Any:
        if self._dtype is None:
            return tree
        return pytree.tree_map_only(
            Tensor, lambda t: t.to(self._dtype) if t.is_floating_point() and t.dtype != self._dtype else t, tree
        )

    def run(
        self, tensors: Mapping[str, Tensor], attributes: Mapping[Attribute, int], grad: bool = False
    ) -> list[Tensor]:
        """Return the floating-point outputs with these tensors and module sizes."""
        with unchanged(self._model), torch.set_grad_enabled(grad):
            for module in self._model.modules():
                module.__dict__["training"] = False
            swap_in(self._model, tensors)
            for attribute, size in attributes.items():
                set_size(self._model, attribute, size)
            torch.manual_seed(0)
            output = self._call(*self._cast(self._args), **self._cast(self._kwargs))
            return [t if grad else t.detach().clone() for t in tensors_in(output) if t.is_floating_point()]

    def resized(
        self, groups: Iterable[AxisGroup], index: Mapping[str, Tensor], share: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Return the outputs after groups are resized by an index map, with fan-out shares."""
        groups = list(groups)
        return self.run(self._resized_tensors(groups, index, share), self._new_sizes(groups, index))

    def _new_sizes(self, groups: Iterable[AxisGroup], index: Mapping[str, Tensor]) -> dict[Attribute, int]:
        sizes = self.sizes | {name: len(i) for name, i in index.items()}
        return {a: layout_length(a.layout, sizes) for g in groups for a in g.attributes}

    def _resized_tensors(
        self, groups: Iterable[AxisGroup], index: Mapping[str, Tensor], share: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors = dict(self._tensors)
        for axis in {axis.label: axis for group in groups for axis in group.axes}.values():
            entries = entry_index(axis.layout, self.sizes, index)
            tensor = tensors[axis.tensor].index_select(axis.dim, entries.clamp(min=0))
            if axis.role == "consumed":
                factor = entry_share(axis.layout, self.sizes, share).masked_fill(entries < 0, 0)
                tensor = tensor * factor.to(tensor).reshape([-1 if d == axis.dim else 1 for d in range(tensor.ndim)])
            tensors[axis.tensor] = tensor
        return tensors

    def learns(self, group: AxisGroup, index: Tensor, share: Tensor) -> bool:
        """Return whether the silenced entries of new units receive a gradient."""
        axes = group.with_role("consumed")
        with torch.enable_grad():
            tensors = self._resized_tensors([group], {group.name: index}, {group.name: share})
            for axis in axes:
                tensors[axis.tensor] = tensors[axis.tensor].detach().requires_grad_()
            outputs = self.run(tensors, self._new_sizes([group], {group.name: index}), grad=True)
            weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(0)).to(t) for t in outputs]
            total = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
            leaves = [tensors[axis.tensor] for axis in axes]
            if not isinstance(total, Tensor) or not total.requires_grad:
                return False
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        new = [entry_index(a.layout, self.sizes, {group.name: index}) < 0 for a in axes]
        return any(
            g is not None and bool(g.index_select(a.dim, n.nonzero().flatten()).any())
            for g, a, n in zip(grads, axes, new, strict=True)
        )

    def same(self, outputs: Sequence[Tensor]) -> bool:
        """Return whether outputs equal the reference, up to rounding."""
        if [t.shape for t in outputs] != [t.shape for t in self.reference]:
            return False
        for a, b in zip(outputs, self.reference, strict=True):
            scale = b.abs().max().item() if b.numel() else 0.0
            if b.numel() and not (a - b).abs().max().item() <= self._tolerance * max(scale, 1e-6):
                return False
        return True


def perturbed(name: str, tensor: Tensor) -> Tensor:
    """Return values near the present ones of which no two are equal and none is zero; positive ones stay positive."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    generator = torch.Generator().manual_seed(len(name) * 7919 + tensor.numel())
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    if bool((tensor > 0).all()):
        return tensor * torch.exp(0.1 * noise)
    spread = tensor.std().item() if tensor.numel() > 1 else 0.0
    return tensor + noise * max(0.2 * spread, 0.02)


# -- trials ------------------------------------------------------------------------------------------------------------


def permutation(size: int) -> Tensor:
    """Return a fixed permutation without fixed points (for size > 1)."""
    generator = torch.Generator().manual_seed(size)
    order = torch.randperm(size, generator=generator)
    return order[(torch.argsort(order) + 1) % size]


def _identity(size: int) -> Tensor:
    return torch.arange(size)


def _permuted(group: AxisGroup) -> tuple[Tensor, Tensor]:
    """Permute the units; a single one is put behind a new, silent one."""
    index = permutation(group.size) if group.size > 1 else torch.tensor([-1, 0])
    return index, torch.ones(len(index), dtype=torch.float64)


def _widened(group: AxisGroup) -> tuple[Tensor, Tensor]:
    index = torch.cat([_identity(group.size), torch.full((group.step,), -1)])
    return index, torch.ones(len(index), dtype=torch.float64)


def _split(group: AxisGroup) -> tuple[Tensor, Tensor]:
    index = torch.cat([_identity(group.size), _identity(group.step)])
    share = torch.ones(len(index), dtype=torch.float64)
    share[: group.step], share[group.size :] = 0.3, 0.7
    return index, share


def _pruned(group: AxisGroup) -> tuple[Tensor, Tensor]:
    rest = max(group.size - group.step, group.step)
    return _identity(rest), torch.ones(rest, dtype=torch.float64)


Plan = Callable[[AxisGroup], tuple[Tensor, Tensor]]


def try_each(trials: Trials, groups: Sequence[AxisGroup], plan: Plan, exact: bool) -> dict[str, str]:
    """Return the groups for which a trial fails, with the error, or '' where only the output differs.

    Args:
        trials: The model.
        groups: Groups to resize, all at once and, if that fails, by halves.
        plan: Index and shares for a group.
        exact: Whether the output must stay the same.
    """
    if not groups:
        return {}
    plans = {g.name: plan(g) for g in groups}
    try:
        out = trials.resized(groups, {n: i for n, (i, _) in plans.items()}, {n: s for n, (_, s) in plans.items()})
        error = None if not exact or trials.same(out) else ""
    except Exception as e:  # the model's own code: anything can happen
        error = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    if error is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: error}
    half = len(groups) // 2
    return try_each(trials, groups[:half], plan, exact) | try_each(trials, groups[half:], plan, exact)


def choose_layouts(
    trials: Trials, groups: Sequence[AxisGroup], options: Mapping[str, Sequence[AxisGroup]]
) -> tuple[list[AxisGroup], dict[str, str]]:
    """Return the groups whose units can be permuted, with the layout that allows it, and why others cannot.

    Args:
        trials: The model.
        groups: Proposals, each with its likeliest layout.
        options: For groups whose order was not seen, the same group with other layouts.
    """
    failed = try_each(trials, groups, _permuted, exact=True)
    chosen: list[AxisGroup] = []
    reasons: dict[str, str] = {}
    layouts: dict[str, Layout] = {}
    for group in groups:
        if group.name not in failed:
            chosen.append(group)
            continue
        for other in options.get(group.name, ()):
            if not try_each(trials, [other], _permuted, exact=True):
                chosen.append(other)
                layouts |= {axis.label: axis.layout for axis in other.axes}
                break
        else:
            error = failed[group.name]
            reasons[group.name] = f"resizing fails ({error})" if error else "its units are not interchangeable"
    # A composite axis has one layout in all the groups that it depends on.
    for i, group in enumerate(chosen):
        axes = tuple(replace(axis, layout=layouts.get(axis.label, axis.layout)) for axis in group.axes)
        chosen[i] = replace(group, axes=axes)
    return chosen, reasons


def judge(
    trials: Trials, groups: Sequence[AxisGroup], mixing: Mapping[str, str]
) -> tuple[list[AxisGroup], dict[str, str]]:
    """Return the groups with their obstacles, and reasons for those that cannot be resized at all.

    Args:
        trials: The model.
        groups: Groups with known layouts.
        mixing: What mixes along the axes of a group, where the trace saw an operator do so.
    """
    groups = [_with_closing_axes(trials, g) for g in groups]
    clear = [g for g in groups if g.name not in mixing]
    mixed = [g for g in groups if g.name in mixing]
    failed: dict[str, str] = {}
    for part in (clear, mixed):
        failed |= try_each(trials, part, _widened, exact=True)
    rest = [g for g in groups if g.name not in failed]
    failed |= {n: e or "copies" for n, e in try_each(trials, rest, _split, exact=True).items()}
    broken = {n: e for n, e in failed.items() if e and e != "copies"}
    runnable = [g for g in groups if g.name not in broken]
    broken |= try_each(trials, [g for g in runnable if g.size > g.step], _pruned, exact=False)
    judged = []
    for g in groups:
        if g.name in broken:
            continue
        obstacle = None
        if g.name in failed:
            why = "the sum over two copies differs from the unit" if failed[g.name] else "new units change the output"
            obstacle = mixing.get(g.name, why)
        judged.append(replace(g, obstacle=obstacle))
    return judged, {n: f"resizing fails ({e})" for n, e in broken.items()}


def _with_closing_axes(trials: Trials, group: AxisGroup) -> AxisGroup:
    """Give a group without fan-out weights a side that can be silenced.

    Where units of two activations are multiplied and summed (queries with keys), zeros on one side silence new units:
    the axes of the last such module then take the part of fan-out weights.
    """
    if group.with_role("consumed"):
        return group
    modules = dict.fromkeys(axis.tensor.rpartition(".")[0] for axis in group.axes)
    for module in reversed(modules):
        axes = tuple(
            replace(axis, role="consumed") if axis.tensor.rpartition(".")[0] == module else axis for axis in group.axes
        )
        candidate = replace(group, axes=axes)
        if not try_each(trials, [candidate], _widened, exact=True) and trials.learns(candidate, *_widened(candidate)):
            return candidate
    return group
