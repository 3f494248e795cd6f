"""Random numbers in a model that is tried: the same everywhere, so that units can change places.

Latent variables, noisy layers and stochastic depth draw numbers for each unit. Two orders of the units then give two
outputs, although nothing is wrong with either. While proposals are tried, such operators return their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_MEAN = 0.5


def _constant(_args: tuple[Any, ...], out: Tensor) -> Tensor:
    return out.fill_(_MEAN)


def _first(args: tuple[Any, ...], out: Tensor) -> Tensor:
    return out.copy_(args[0]) if args and isinstance(args[0], Tensor) and args[0] is not out else out.fill_(1.0)


def _normal(args: tuple[Any, ...], out: Tensor) -> Tensor:
    mean, std = (*args, 1.0)[:2]
    return out.copy_(mean + _MEAN * std) if isinstance(mean, Tensor) or isinstance(std, Tensor) else out.fill_(_MEAN)


_EVEN: dict[str, Callable[[tuple[Any, ...], Tensor], Tensor]] = {
    **dict.fromkeys(("rand", "rand_like", "randn", "randn_like", "normal_", "uniform", "uniform_"), _constant),
    **dict.fromkeys(("exponential_", "exponential", "cauchy_", "log_normal_", "geometric_"), _constant),
    **dict.fromkeys(("bernoulli", "bernoulli_", "poisson", "_standard_gamma"), _first),
    "normal": _normal,
}


class EvenNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives the same number to every entry that is drawn at random.

    Attributes:
        drawn: Whether any was drawn.

    Example:
        >>> with EvenNoise():
        ...     torch.randn(2)
        tensor([0.5000, 0.5000])
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name == "native_dropout" and args[2]:
            self.drawn = True
            return args[0].clone(), torch.ones_like(out[1])
        if name in _EVEN and isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex()):
            self.drawn = True
            return _EVEN[name](args, out)
        return out
