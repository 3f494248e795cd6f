"""Exchange tensors, attributes and optimizer state under a model's feet, and take all of it back on any failure.

The only file of the package that touches what torch keeps private about tensors and modules.
"""

# ruff: noqa: SLF001

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.holders import Step, get, put


def check_swappable(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose content cannot be exchanged safely. Nothing is changed.

    Args:
        name: Its qualified name.
        tensor: A parameter or buffer.

    Raises:
        StructureError: If the tensor is sharded, sparse or quantized, has hooks, or is part of a
            live autograd graph.
    """
    if hasattr(tensor, "device_mesh") or hasattr(tensor, "__tensor_flatten__"):
        raise StructureError(
            f"'{name}' is a {type(tensor).__name__}: sharded and wrapped tensors cannot be resized. Edit the model "
            "before it is sharded or quantized."
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise StructureError(
            f"'{name}' is {tensor.dtype} of layout {tensor.layout}: only dense tensors can be resized."
        )
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise StructureError(
            f"'{name}' of shape {tuple(tensor.shape)} has hooks (register_hook or "
            "register_post_accumulate_grad_hook), which would not survive a resize. Remove them with their handles, "
            "edit, and register them again."
        )
    if _is_in_live_graph(tensor):
        gc.collect()  # A graph may be kept alive by nothing but a reference cycle.
        if _is_in_live_graph(tensor):
            raise StructureError(
                f"'{name}' of shape {tuple(tensor.shape)} is part of a live autograd graph, or another tensor shares "
                "its memory. Edit between optimizer steps: after backward(), with outputs, losses and views of it "
                "deleted."
            )
    if weakref.getweakrefs(tensor) and _use_count(tensor) > 1:
        raise StructureError(
            f"'{name}' of shape {tuple(tensor.shape)} is held by weak references and by an autograd graph; delete the "
            "last loss and outputs before the edit."
        )


def _use_count(tensor: Tensor) -> int:
    return int(tensor._use_count())  # type: ignore[attr-defined]


def _is_in_live_graph(tensor: Tensor) -> bool:
    """Return whether a backward pass could still need the tensor, or another tensor shares its storage object.

    After ``backward()`` a loss that is still in scope holds nothing but the parameter's gradient accumulator, which
    `torch.utils.swap_tensors` retires safely; everything beyond that is a saved tensor or a view.
    """
    if tensor.grad_fn is not None:
        return True
    count = _use_count(tensor)
    if count == 2 and tensor.requires_grad:
        with torch.enable_grad():
            accumulator = torch.autograd.graph.get_gradient_edge(tensor).node
            count = _use_count(tensor) - 1
        del accumulator
    return count > 1


class Commit:
    """A context in which exchanges are written down, and undone in reverse order if it is left by an exception.

    What can be computed back from what replaced it (``restore``) is let go at once, so that an event needs little more
    memory than the larger model. The largest tensor let go is kept until the end as a reserve: if memory runs out, it
    makes room for taking everything back.

    Args:
        model: The model; what its modules keep of the tensors is renewed at the end.
        tensors: The parameters and buffers that will be exchanged.
    """

    def __init__(self, model: nn.Module, tensors: Iterable[Tensor]) -> None:
        changed = {id(tensor) for tensor in tensors}
        self._modules = [
            module
            for module in model.modules()
            if any(id(t) in changed for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        ]
        self._undo: list[Callable[[], object]] = []
        self._reserve: dict[torch.device, Tensor] = {}

    def __enter__(self) -> Commit:
        for module in self._modules:
            _suspend_caches(module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._renew_caches()
            except BaseException:
                self._roll_back()
                raise
        else:
            self._roll_back()

    def tensor(
        self,
        old: Tensor,
        value: Tensor,
        attributes: Mapping[str, Any] | None = None,
        restore: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Give ``old`` the content of ``value``: same object, dtype, flags and Python attributes; its gradient goes.

        Args:
            old: A parameter or buffer.
            value: Of any shape; it is used up.
            attributes: New values of some of its Python attributes.
            restore: Computes the old content from the new one, bit for bit, if that is possible.
        """
        attributes = attributes or {}
        gradient = old.grad if old.is_leaf else None
        old.grad = None
        self._undo.append(lambda: setattr(old, "grad", gradient))
        kept = dict(vars(old))
        if weakref.getweakrefs(old):
            before = old.data
            old.data = value
            vars(old).update(attributes)
            self._undo.append(lambda: setattr(old, "data", before))
            self._undo.append(lambda: vars(old).update(kept))
            return
        partner = _like(old, value, {**kept, **attributes})
        _exchange(old, partner)
        if restore is None:
            self._undo.append(lambda: _exchange(old, partner))
        else:
            self._undo.append(lambda: _exchange(old, _like(old, restore(old.detach()), kept)))
            self._let_go(partner)

    def values(self, tensor: Tensor, value: Tensor) -> None:
        """Overwrite the values of a tensor of the same shape, in place."""
        before = tensor.detach().clone()
        self._undo.append(lambda: _overwrite(tensor, before))
        _overwrite(tensor, value)

    def attribute(self, owner: Any, step: Step, value: object) -> None:
        """Set an attribute of a module or of an object that it holds, or an item of a container."""
        before = get(owner, step)
        put(owner, step, value)
        self._undo.append(lambda: put(owner, step, before))

    def item(self, container: Any, key: Any, value: Any, restore: Callable[[Any], Any] | None = None) -> None:
        """Set an item of a mapping or list. An item that is a mapping itself stays the same object.

        Args:
            container: The mapping or list.
            key: The place in it.
            value: Its new content.
            restore: Computes the old content from the new one, bit for bit, if that is possible.
        """
        item = container[key]
        if not isinstance(item, MutableMapping):
            container[key] = value
            self._undo.append(lambda: container.__setitem__(key, item))
            return
        before = dict(item)
        if restore is None:
            self._undo.append(lambda: _refill(item, before))
        else:
            self._undo.append(lambda: _refill(item, restore(dict(item))))
            for entry in before.values():
                if isinstance(entry, Tensor):
                    self._let_go(entry)
        _refill(item, value)

    def contents(self, container: Any, contents: Any) -> None:
        """Replace all that a mapping or list holds; it stays the same object."""
        before = list(container) if isinstance(container, list) else dict(container)
        self._undo.append(lambda: _refill(container, before))
        _refill(container, contents)

    def _let_go(self, tensor: Tensor) -> None:
        held = self._reserve.get(tensor.device)
        if held is None or held.nbytes < tensor.nbytes:
            self._reserve[tensor.device] = tensor

    def _roll_back(self) -> None:
        self._reserve.clear()
        for undo in reversed(self._undo):
            undo()
        self._renew_caches()

    def _renew_caches(self) -> None:
        for module in self._modules:
            _renew_caches(module)


def _like(old: Tensor, value: Tensor, attributes: Mapping[str, Any]) -> Tensor:
    partner = torch.Tensor._make_subclass(type(old), value, old.requires_grad)
    vars(partner).update(attributes)
    return partner


def _overwrite(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _refill(container: Any, contents: Any) -> None:
    contents = contents.copy()
    container.clear()
    container.extend(contents) if isinstance(container, list) else container.update(contents)


def _exchange(first: Tensor, second: Tensor) -> None:
    torch.utils.swap_tensors(first, second)  # type: ignore[no-untyped-call]
    for tensor in (first, second):
        # What is left of removed hooks belongs to the content that went: later hooks would never be called.
        if not tensor._backward_hooks:
            tensor._backward_hooks = None
        if not getattr(tensor, "_post_accumulate_grad_hooks", None):
            setattr(tensor, "_post_accumulate_grad_hooks", None)  # noqa: B010 (typed as never None)


def _suspend_caches(module: nn.Module) -> None:
    """Let go of what a module keeps of its parameters."""
    if isinstance(module, nn.RNNBase):
        module._flat_weight_refs = []
    for name in _computed(module):
        kept = module.__dict__.get(name)
        if isinstance(kept, Tensor) and kept.grad_fn is not None:
            setattr(module, name, kept.detach())


def _renew_caches(module: nn.Module) -> None:
    """Rebuild what a module keeps of its parameters."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    for name, compute in _computed(module).items():
        with torch.enable_grad():
            setattr(module, name, compute())


def _computed(module: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return weights that a module keeps although hooks compute them: weight norm, spectral norm and pruning masks."""
    found: dict[str, Callable[[], Tensor]] = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found[hook.name] = partial(hook.compute_weight, module)
        elif isinstance(hook, SpectralNorm):
            found[hook.name] = partial(hook.compute_weight, module, do_power_iteration=False)
        elif isinstance(hook, BasePruningMethod):
            found[hook._tensor_name] = partial(hook.apply_mask, module)
    return found
