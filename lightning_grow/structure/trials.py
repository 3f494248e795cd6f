"""Run a model on real data with resized tensors, in float64 where it can, and compare outputs."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grow.structure.axes import AxisGroup, Padding, layout_length, layout_units
from lightning_grow.structure.layout import entry_index, entry_share
from lightning_grow.structure.modules import conflict
from lightning_grow.structure.noise import EvenNoise
from lightning_grow.structure.sandbox import cast_states, plain_layers, reseed, set_size, swap_in, tensors_in, unchanged
from lightning_grow.structure.states import is_state, states

MOST_BYTES = 4 << 30
"""Most memory for a copy in float64; what is larger is tried in the precision that it has."""

_EXAMPLES = 2
_EXACT = 1e-9
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class UnrunnableError(RuntimeError):
    """The model cannot be run on real data here, so proposals cannot be tried."""


class Trials:
    """Runs a miniature of a model with resized tensors and compares outputs.

    Verification needs the model's code, not its size: the groups are cut down to a few units each, so that a run takes
    little time and memory however large the model is. A group that cannot be cut down keeps its size.

    Weights are perturbed, so that layers that start at zero hide nothing. Where the model runs in float64, and casts
    to lower precision inside it can be skipped, outputs count as equal up to rounding in float64; otherwise in the
    precision that they have.

    Args:
        model: The model. It is left unchanged. Tensors on the meta device are given random values.
        call: Runs it on ``args`` and ``kwargs``.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        groups: The groups, each with its likeliest layout.
        train: Whether to run in train mode as well; a model that is in train mode is run there in any case.

    Attributes:
        model: The model.
        sizes: Units of each group in the miniature.
        written: Tensors that the model itself writes to when it runs.
        random: Whether the model draws random numbers in eval mode: the same for all units, except `with_noise`.

    Raises:
        UnrunnableError: If the model does not run as it is, or has no floating-point output.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        groups: Sequence[AxisGroup],
        *,
        train: bool = False,
    ) -> None:
        self.model, self._call = model, call
        self._named = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
        unknown = [n for n, t in self._named.items() if t.device.type == "meta" and not _is_number(t)]
        if unknown:
            raise UnrunnableError(f"the values of '{unknown[0]}' are not known: it is on the meta device")
        self._axes = {axis.label: axis for group in groups for axis in group.axes}
        self._attributes = list(dict.fromkeys(a for group in groups for a in group.attributes))
        self._full = {group.name: group.size for group in groups}
        self.sizes: dict[str, int] = {}
        self.written: set[str] = set()
        self.random = False
        self._noise: EvenNoise | None = None
        self._has_states = bool(states(dict(model.named_modules())))
        flags = {id(module): train or module.training for module in model.modules()}
        self._train = flags if any(flags.values()) else {}
        few = few_units(groups)
        whole = (args, kwargs)
        self._args, self._kwargs = _few_examples(whole)
        error = self._begin(few)
        if error is not None and self._args is not args:
            self._args, self._kwargs = whole
            error = self._begin(few)
        if error is not None:
            cut = self._can_be_cut(list(few), few)
            error = self._begin({name: few[name] for name in cut}) and self._begin({})
        if error is not None:
            raise UnrunnableError(f"its forward fails on the example input ({type(error).__name__}: {error})")

    def _begin(self, few: Mapping[str, int]) -> Exception | None:
        """Make the miniature with so many units of some groups; return the error if it does not run in any way."""
        self.sizes = {**self._full, **few}
        error: Exception | None = None
        for dtype, keep, strength in _WAYS:
            if dtype is not None and self._bytes(dtype) > MOST_BYTES:
                continue
            try:
                self._prepare(dtype, keep, strength)
            except Exception as e:  # the model's own code: anything can happen
                error = e
            else:
                return None
        return error or UnrunnableError("it is too large")

    def _can_be_cut(self, names: Sequence[str], few: Mapping[str, int]) -> list[str]:
        """Return the groups that can be cut down to a few units, each together with others or alone."""
        if len(names) < 2:
            return []
        found: list[str] = []
        half = len(names) // 2
        for part in (names[:half], names[half:]):
            whole = self._begin({name: few[name] for name in part}) is None
            found += part if whole else self._can_be_cut(part, few)
        return found

    def _bytes(self, dtype: torch.dtype) -> int:
        """Return what a copy of all tensors of the miniature takes."""
        total = 0
        for name, tensor in self._named.items():
            shape = list(tensor.shape)
            for dim in range(tensor.ndim):
                axis = self._axes.get(f"{name}[{dim}]")
                shape[dim] = shape[dim] if axis is None else layout_length(axis.layout, self.sizes)
            total += math.prod(shape) * dtype.itemsize
        return total

    def _small(self, name: str) -> Tensor:
        """Return a tensor with the units that the miniature keeps; the same object if it keeps all."""
        tensor = self._named[name]
        for dim in range(tensor.ndim):
            axis = self._axes.get(f"{name}[{dim}]")
            if axis is not None:
                kept = {n: torch.arange(self.sizes[n]) for n in layout_units(axis.layout)}
                if any(self.sizes[n] != self._full[n] for n in kept):
                    tensor = tensor.index_select(dim, entry_index(axis.layout, self._full, kept).to(tensor.device))
        return with_values(tensor)

    def _prepare(self, dtype: torch.dtype | None, keep: bool, strength: float) -> None:
        self._dtype, self._keep = dtype, keep
        in_groups = {axis.tensor for axis in self._axes.values()}
        tensors = {n: self._cast(self._small(n)) for n in self._named}
        tensors.update({n: perturbed(n, tensors[n], strength) for n in sorted(in_groups)})
        tensors = {n: t.clone() if t is self._named[n] else t for n, t in tensors.items()}
        versions = {n: t._version for n, t in tensors.items()}
        parameters = dict(self.model.named_parameters())
        buffers = {n: t.clone() for n, t in tensors.items() if n not in parameters}
        train, self._train = self._train, {}
        self._noise = noise = EvenNoise()
        reference = self.run(tensors, {})
        self.random = noise.drawn
        self._noise = noise if noise.drawn else None
        self._train = train
        if train and not self._runs_in_train_mode(tensors):
            self._train = {}
        self.written = {n for n, t in tensors.items() if t._version != versions[n]}
        self.written |= {n for n, t in buffers.items() if not torch.equal(t, tensors[n])}  # kernels count no versions
        again = {n: self._cast(self._small(n)).clone() for n in self.written - buffers.keys()}
        again |= {n: perturbed(n, t, strength) for n, t in again.items() if n in in_groups}
        self._tensors = tensors | buffers | again
        self.reference = reference
        if not reference:
            raise UnrunnableError("it returns no floating-point tensor")
        if not all(bool(torch.isfinite(t).all()) for t in reference):
            raise UnrunnableError("its output is not finite")
        least = min((t.dtype for t in reference), key=lambda d: -torch.finfo(d).eps)
        self._tolerance = _EXACT if keep and least == torch.float64 else _TOLERANCE.get(least, 1e-3)

    def _runs_in_train_mode(self, tensors: Mapping[str, Tensor]) -> bool:
        try:
            self.run(tensors, {})
        except Exception:  # the model's own code: batch norm on a single example, for one
            return False
        return True

    def _cast(self, tree: Any) -> Any:
        if self._dtype is None:
            return tree
        return pytree.tree_map_only(
            Tensor, lambda t: t.to(self._dtype) if t.is_floating_point() and t.dtype != self._dtype else t, tree
        )

    def run(self, tensors: Mapping[str, Tensor], index: Mapping[str, Tensor], grad: bool = False) -> list[Tensor]:
        """Return the floating-point outputs with these tensors; sizes kept in Python follow the index map."""
        own = {n: tensors[n].clone() if n in self.written else tensors[n] for n in tensors}
        with torch.set_grad_enabled(grad), self._model_with(own, index) as (args, kwargs):
            precision = _InDouble() if self._keep else contextlib.nullcontext()  # type: ignore[no-untyped-call]
            with precision, self._noise or contextlib.nullcontext():
                output = self._call(*args, **kwargs)
                if self._train:  # what only that mode runs must run too
                    for module in self.model.modules():
                        module.__dict__["training"] = self._train.get(id(module), True)
                    self._call(*args, **kwargs)
            return [t if grad else t.detach().clone() for t in tensors_in(output) if _is_number(t)]

    @contextlib.contextmanager
    def with_noise(self) -> Iterator[None]:
        """Let random numbers differ from unit to unit, as they do where the model is used."""
        if not self.random:
            yield
            return
        noise, reference = self._noise, self.reference
        self._noise = None
        self.reference = self.run(self._tensors, {})
        try:
            yield
        finally:
            self._noise, self.reference = noise, reference

    @contextlib.contextmanager
    def _model_with(self, tensors: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> Iterator[Any]:
        """Let the model have other tensors, and be in eval mode; yields the arguments of the call."""
        units = {n: torch.arange(size) for n, size in self.sizes.items()} | dict(index)  # the first ones of the model's
        sizes = {n: len(i) for n, i in units.items()}
        with unchanged(self.model), plain_layers():
            for module in self.model.modules():
                module.__dict__["training"] = False
            swap_in(self.model, tensors)
            if self._dtype is not None and self._has_states:
                cast_states(self.model, self._dtype)
            for attribute in self._attributes:
                if is_state(attribute.name):
                    set_size(self.model, attribute, entry_index(attribute.layout, self._full, units))
                elif any(sizes[n] != self._full[n] for n in layout_units(attribute.layout)):
                    set_size(self.model, attribute, layout_length(attribute.layout, sizes))
            reseed(0)
            yield self._cast((self._args, self._kwargs))

    @contextlib.contextmanager
    def miniature(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Let the model be its miniature for a while; yields the arguments of its call."""
        precision = _InDouble() if self._keep else contextlib.nullcontext()  # type: ignore[no-untyped-call]
        with self._model_with(self._tensors, {}) as arguments, precision, self._noise or contextlib.nullcontext():
            yield arguments

    def resized(
        self, groups: Iterable[AxisGroup], index: Mapping[str, Tensor], share: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Return the outputs after groups are resized by an index map, with fan-out shares."""
        return self.run(self._resized_tensors(list(groups), index, share), index)

    def allowed(self, index: Mapping[str, Tensor]) -> bool:
        """Return whether modules can have the sizes that these units give them."""
        units = self.sizes | {name: len(i) for name, i in index.items()}
        sizes: dict[str, dict[str, int]] = {}
        for attribute in (a for a in self._attributes if not is_state(a.name)):
            sizes.setdefault(attribute.module, {})[attribute.name] = layout_length(attribute.layout, units)
        return all(conflict(self.model.get_submodule(path), new) is None for path, new in sizes.items())

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

    def padded(self, group: AxisGroup, padding: Padding, num_units: int) -> list[Tensor]:
        """Return the outputs after units are added in a way that norms do not show."""
        index = torch.cat([torch.arange(group.size), torch.full((num_units,), -1)])
        ratio = group.size / len(index)
        tensors = self._resized_tensors([group], {group.name: index}, {group.name: torch.ones(len(index))})
        generator = torch.Generator().manual_seed(0)
        for axis in sorted(group.axes, key=lambda axis: axis.role == "consumed"):
            tensor = tensors[axis.tensor].movedim(axis.dim, 0).clone()
            new = entry_index(axis.layout, self.sizes, {group.name: index}) < 0
            if axis.label in padding.written:
                fill = tensor[~new].mean(0) if padding.fill == "mean" else torch.zeros(())
            elif axis.label in padding.shifts or (axis.role == "consumed" and padding.silent):
                fill = torch.zeros(())
            else:
                fill = torch.randn(tensor[new].shape, generator=generator, dtype=torch.float64)
            tensor[new] = fill.to(tensor).expand_as(tensor[new])
            if axis.label in padding.gains:
                tensor[~new] *= ratio**0.5
            tensors[axis.tensor] = tensor.movedim(0, axis.dim)
        with unchanged(self.model):
            for path, name in padding.eps:
                module = self.model.get_submodule(path)
                module.__dict__[name] = eps_of(module, name, self._dtype) * ratio
            return self.run(tensors, {group.name: index})

    def learns(self, group: AxisGroup, index: Tensor, share: Tensor) -> bool:
        """Return whether the silenced entries of new units receive a gradient."""
        axes = group.with_role("consumed")
        with torch.enable_grad():
            tensors = self._resized_tensors([group], {group.name: index}, {group.name: share})
            for axis in axes:
                tensors[axis.tensor] = tensors[axis.tensor].detach().requires_grad_()
            outputs = self.run(tensors, {group.name: index}, grad=True)
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

    def cut(self, group: AxisGroup) -> AxisGroup:
        """Return a group with the number of units that it has in the miniature."""
        return replace(group, size=self.sizes[group.name])

    def same(self, outputs: Sequence[Tensor]) -> bool:
        """Return whether outputs equal the reference, up to rounding."""
        if [t.shape for t in outputs] != [t.shape for t in self.reference]:
            return False
        for a, b in zip(outputs, self.reference, strict=True):
            scale = b.abs().max().item() if b.numel() else 0.0
            if b.numel() and not (a - b).abs().max().item() <= self._tolerance * max(scale, 1e-6):
                return False
        return True


_WAYS = [
    (dtype, keep, s)
    for dtype, keep in ((torch.float64, True), (torch.float64, False), (None, False))
    for s in (1.0, 0.1)
]
"""Precision, whether to skip casts to a lower one, and how much to perturb weights: the first that runs is taken."""


class _InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Skips casts from float64 to a lower precision, which would hide small mistakes behind rounding."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        dtype = kwargs.get("dtype")
        if func is torch.ops.aten._to_copy.default and dtype is not None and dtype.is_floating_point:
            kwargs["dtype"] = torch.float64 if args[0].dtype == torch.float64 else dtype
        return func(*args, **kwargs)


def few_units(groups: Iterable[AxisGroup]) -> dict[str, int]:
    """Return how many units of each group a miniature keeps: few, and as many in two groups as they are equally wide.

    Example:
        >>> few_units(AxisGroup(f"width {n}", n, 1, ()) for n in (64, 2, 256, 64))
        {'width 64': 4, 'width 2': 2, 'width 256': 5}
    """
    groups = list(groups)
    few: dict[int, int] = {}
    largest = 3
    for size in sorted({group.size for group in groups}):
        few[size] = min(size, largest + 1)
        largest = max(largest, few[size])
    return {group.name: few[group.size] for group in groups}


def _few_examples(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the first examples of a batch, if all tensors agree how many there are; else the same object."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    lengths = {len(t) if t.ndim else 0 for t in tensors}
    if len(lengths) != 1 or min(lengths) <= _EXAMPLES:
        return arguments
    cut: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, lambda t: t[:_EXAMPLES], arguments)
    return cut


def eps_of(module: nn.Module, name: str, dtype: torch.dtype | None = None) -> float:
    """Return the number that keeps a norm from dividing by zero; where it is None, that of its type.

    Example:
        >>> eps_of(nn.LayerNorm(3), "eps"), eps_of(nn.RMSNorm(3), "eps") == torch.finfo(torch.float32).eps
        (1e-05, True)
    """
    value = getattr(module, name)
    own = next((p.dtype for p in module.parameters(recurse=False)), torch.float32)
    return float(torch.finfo(dtype or own).eps if value is None else value)


def with_values(tensor: Tensor) -> Tensor:
    """Return a tensor; if it is on the meta device, one on the CPU with random values (zeros for integers)."""
    if tensor.device.type != "meta":
        return tensor
    if not _is_number(tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def perturbed(name: str, tensor: Tensor, strength: float = 1.0) -> Tensor:
    """Return values near the present ones of which no two are equal and none is zero; positive ones stay positive."""
    if not _is_number(tensor) or not tensor.numel():
        return tensor
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    if not tensor.is_complex() and bool((tensor > 0).all()):
        lift = 0.3 * strength if tensor.mean().item() < 0.05 else 0.0
        return tensor * torch.exp(0.1 * noise) + lift * (1 + 0.3 * noise.abs())
    spread = tensor.std().item() if tensor.numel() > 1 else 0.0
    return tensor + noise * max(0.2 * spread, 0.1 * strength)
