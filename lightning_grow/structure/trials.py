"""Run a model on real data with resized tensors, in float64 where it can, and compare outputs."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grow.structure.axes import Attribute, AxisGroup, layout_length
from lightning_grow.structure.layout import entry_index, entry_share
from lightning_grow.structure.sandbox import cast_states, plain_layers, set_size, swap_in, tensors_in, unchanged
from lightning_grow.structure.states import is_state

_EXACT = 1e-9
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class UnrunnableError(RuntimeError):
    """The model cannot be run on real data here, so proposals cannot be tried."""


class Trials:
    """Runs a model with resized tensors and compares outputs.

    Weights are perturbed, so that layers that start at zero hide nothing. Where the model runs in float64, and casts
    to lower precision inside it can be skipped, outputs count as equal up to rounding in float64; otherwise in the
    precision that they have.

    Args:
        model: The model. It is left unchanged.
        call: Runs it on ``args`` and ``kwargs``.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        names: Tensors that take part in some group.
        train: Whether to run in train mode as well; a model that is in train mode is run there in any case.

    Attributes:
        sizes: Units of each group.
        written: Tensors that the model itself writes to when it runs.

    Raises:
        UnrunnableError: If the model does not run as it is, or has no floating-point output.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: set[str],
        *,
        train: bool = False,
    ) -> None:
        self._model, self._call, self._args, self._kwargs = model, call, args, kwargs
        self._named = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
        if any(t.device.type == "meta" for t in self._named.values()):
            raise UnrunnableError("its tensors are on the meta device")
        self._in_groups = names
        self.sizes: dict[str, int] = {}
        self.written: set[str] = set()
        flags = {id(module): train or module.training for module in model.modules()}
        self._train = flags if any(flags.values()) else {}
        error: Exception | None = None
        for dtype, keep, strength in _WAYS:
            try:
                self._prepare(dtype, keep, strength)
            except Exception as e:  # the model's own code: anything can happen
                error = e
            else:
                return
        raise UnrunnableError(f"its forward fails on the example input ({type(error).__name__}: {error})")

    def _prepare(self, dtype: torch.dtype | None, keep: bool, strength: float) -> None:
        self._dtype, self._keep = dtype, keep
        tensors = {n: self._cast(t).clone() for n, t in self._named.items()}
        tensors.update({n: perturbed(n, tensors[n], strength) for n in sorted(self._in_groups)})
        versions = {n: t._version for n, t in tensors.items()}
        originals = {n: t.clone() for n, t in tensors.items() if not isinstance(self._named[n], nn.Parameter)}
        train, self._train = self._train, {}
        reference = self.run(tensors, {})
        self._train = train
        if train and not self._runs_in_train_mode(tensors):
            self._train = {}
        self.written = {n for n, t in tensors.items() if t._version != versions[n]}
        self.written |= {n for n, t in originals.items() if not torch.equal(t, tensors[n])}  # kernels count no versions
        self._tensors = tensors | originals
        if self.written - originals.keys():
            again = {n: self._cast(t).clone() for n, t in self._named.items() if n in self.written}
            self._tensors |= {n: perturbed(n, t, strength) if n in self._in_groups else t for n, t in again.items()}
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

    def run(
        self, tensors: Mapping[str, Tensor], attributes: Mapping[Attribute, int | Tensor], grad: bool = False
    ) -> list[Tensor]:
        """Return the floating-point outputs with these tensors and module sizes."""
        own = {n: tensors[n].clone() if n in self.written else tensors[n] for n in tensors}
        with unchanged(self._model), plain_layers(), torch.set_grad_enabled(grad):
            for module in self._model.modules():
                module.__dict__["training"] = False
            swap_in(self._model, own)
            if self._dtype is not None:
                cast_states(self._model, self._dtype)
            for attribute, size in attributes.items():
                set_size(self._model, attribute, size)
            torch.manual_seed(0)
            args, kwargs = self._cast(self._args), self._cast(self._kwargs)
            with _InDouble() if self._keep else contextlib.nullcontext():  # type: ignore[no-untyped-call]
                output = self._call(*args, **kwargs)
                if self._train:  # what only that mode runs must run too
                    for module in self._model.modules():
                        module.__dict__["training"] = self._train.get(id(module), True)
                    self._call(*args, **kwargs)
            return [t if grad else t.detach().clone() for t in tensors_in(output) if _is_number(t)]

    def resized(
        self, groups: Iterable[AxisGroup], index: Mapping[str, Tensor], share: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Return the outputs after groups are resized by an index map, with fan-out shares."""
        groups = list(groups)
        return self.run(self._resized_tensors(groups, index, share), self._new_sizes(groups, index))

    def _new_sizes(self, groups: Iterable[AxisGroup], index: Mapping[str, Tensor]) -> dict[Attribute, int | Tensor]:
        sizes = self.sizes | {name: len(i) for name, i in index.items()}
        return {
            a: entry_index(a.layout, self.sizes, index) if is_state(a.name) else layout_length(a.layout, sizes)
            for g in groups
            for a in g.attributes
        }

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
