"""What a model reads from the values of its tensors: recorded once on data, replayed while it is traced.

Fake tensors have no values. Where a model looks at some (a mask that is checked, rows that are picked out), it runs
once on the real example input, and what it read is given to it again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grow.structure.sandbox import plain_layers, unchanged


@dataclass(frozen=True)
class Made:
    """Shape, type and device of a result."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


READS_VALUES = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "masked_select",
    "repeat_interleave",
    "bincount",
}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what operators that read values return while a model runs on data."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for mask in args[1] if func is torch.ops.aten.index.Tensor else ():
            if mask is not None and mask.dtype in (torch.bool, torch.uint8):
                self.values.append(Made((int(mask.sum()), mask.ndim), torch.int64, mask.device))
        if func.__name__.split(".")[0] in READS_VALUES:
            made = pytree.tree_map_only(Tensor, lambda t: Made(tuple(t.shape), t.dtype, t.device), out)
            self.values.append(made)
        return out


class _ListsByItems(TorchFunctionMode):
    """Lets ``tensor.tolist()`` read one number after the other, as on fake tensors: on data it is no operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return _items(args[0])
        return func(*args, **(kwargs or {}))


def _items(tensor: Tensor) -> Any:
    return [_items(row) for row in tensor.unbind()] if tensor.ndim else tensor.item()


def record_outputs(model: nn.Module, call: Callable[[], Any], paths: Iterable[str]) -> dict[str, list[Any]]:
    """Run the model on data, and return what some of its modules returned, call by call: sizes in place of tensors.

    Raises:
        Exception: Whatever the model raises. The model is unchanged then, too.
    """
    outputs: dict[str, list[Any]] = {path: [] for path in paths}

    def recorder(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            made = pytree.tree_map_only(Tensor, lambda t: Made(tuple(t.shape), t.dtype, t.device), output)
            outputs[path].append(made)

        return hook

    with unchanged(model), plain_kernels(), torch.no_grad():
        handles = [model.get_submodule(path).register_forward_hook(recorder(path)) for path in outputs]
        try:
            call()
        finally:
            for handle in handles:
                handle.remove()
    return outputs


def record(model: nn.Module, call: Callable[[], Any]) -> list[Any]:
    """Run the model on data, in the mode that it is in, and return what it reads from tensors, in order.

    Raises:
        Exception: Whatever the model raises. The model is unchanged then, too.
    """
    recorder = _Recorder()
    with unchanged(model), plain_kernels(), torch.no_grad(), recorder:
        call()
    return recorder.values


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Let layers and attention run as the operators that they are made of, and the engine keep silent."""
    # These log what the caller gets as an exception.
    names = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
    loggers = {log: log.disabled for log in map(logging.getLogger, names)}
    for log in loggers:
        log.disabled = True
    try:
        math = torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH])
        with plain_layers(), math, _ListsByItems():
            yield
    finally:
        for log, disabled in loggers.items():
            log.disabled = disabled
