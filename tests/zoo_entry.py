"""Tiny models with what is known about their hidden widths: the table that the tests of the core run over.

Each entry builds its model from a fixed seed, in float64, with norm weights and running statistics that differ from
their neutral values, so that a slice that went to the wrong place shows in the output.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
ZOO: dict[str, Entry] = {}


@dataclass(frozen=True)
class Width:
    """A hidden width that the structure must show.

    Attributes:
        axes: Labels ``"tensor[dim]"``, separated by blanks, that must depend on one and the same group.
        size: Number of units of that group; None where several units make sense.
        obstacle: Whether the group must have an obstacle; None where either is right.
        symmetric: Whether the order of the units is free, so that a permutation keeps the output.
    """

    axes: str
    size: int | None = None
    obstacle: bool | None = False
    symmetric: bool = True

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels one by one."""
        return tuple(self.axes.split())


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: The name in the table.
        make: Builds the bare model; use `build`.
        make_inputs: Builds the arguments; use `inputs`.
        widths: Widths that must be found.
        pinned: Labels of axes that must be pinned.
        stochastic: Whether train mode draws random numbers.
        obstacles_only: Whether every group found must have an obstacle.
        third_party: Whether others wrote it: its weights are made large enough for each of them to count, and it is run
            without the casts to single precision that such models make inside.
    """

    name: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[], Arguments]
    widths: tuple[Width, ...]
    pinned: tuple[str, ...] = ()
    stochastic: bool = False
    obstacles_only: bool = False
    third_party: bool = False

    def build(self) -> nn.Module:
        """Return the model in float64 and train mode; two calls give equal models."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = self.make().double()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim < 2:
                        parameter.add_(torch.rand_like(parameter), alpha=0.3)
                    elif self.third_party:
                        parameter.add_(torch.randn_like(parameter), alpha=0.2)
                for name, buffer in model.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.normal_(0, 0.3)
                    elif name.endswith("running_var"):
                        buffer.uniform_(0.5, 1.5)
        return model

    def inputs(self) -> Arguments:
        """Return positional and keyword arguments for ``forward``; two calls give equal ones."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return self.make_inputs()

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Return all tensors that ``model`` answers, in a fixed order."""
        args, kwargs = self.inputs()
        with InDouble() if self.third_party else contextlib.nullcontext():
            return [t for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point() or not self.third_party]


class InDouble(TorchDispatchMode):
    """Skips casts from double to single precision, which would hide small mistakes behind rounding."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64 if args[0].dtype == torch.float64 else torch.float32
        return func(*args, **kwargs)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors inside nested mappings and sequences, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def normal(*shape: int) -> Callable[[], Arguments]:
    """One positional input, standard normal."""
    return lambda: ((torch.randn(*shape, dtype=torch.float64),), {})


def tokens(vocabulary: int, *shape: int) -> Callable[[], Arguments]:
    """One positional input of token numbers."""
    return lambda: ((torch.randint(vocabulary, shape),), {})


def entry(
    make_inputs: Callable[[], Arguments],
    *widths: Width,
    pinned: str = "",
    stochastic: bool = False,
    obstacles_only: bool = False,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Add a model to the zoo under the name of its function."""

    def add(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = make.__name__
        ZOO[name] = Entry(name, make, make_inputs, widths, tuple(pinned.split()), stochastic, obstacles_only)
        return make

    return add


class Model(nn.Module):
    """Submodules and parameters by keyword, and a forward function: keeps the table short."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def weight(*shape: int) -> nn.Parameter:
    """A random parameter."""
    return nn.Parameter(torch.randn(shape) * 0.5)


def pooled(*layers: nn.Module) -> nn.Sequential:
    """Convolutions, then global average pooling and a flatten."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def norm_axes(name: str) -> str:
    """All axes of a batch norm."""
    return " ".join(f"{name}.{leaf}[0]" for leaf in ("weight", "bias", "running_mean", "running_var"))
