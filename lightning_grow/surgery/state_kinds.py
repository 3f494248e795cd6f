"""Which kind of optimizer state is which: by name where it is known, else by what its numbers look like.

The kinds, and what becomes of them when the units of a parameter are gathered:

| kind | examples | new entries | copies of a unit with share w |
|---|---|---|---|
| gradient | ``momentum_buffer``, ``exp_avg`` | zero | times w |
| square | ``exp_avg_sq``, Adagrad's ``sum`` | mean of the existing units | times w squared |
| magnitude | Adamax's ``exp_inf`` | mean of the existing units | times w |
| update | RMSprop's momentum (of normalised gradients) | zero | as it is |
| rate | Rprop's ``step_size``, Adadelta's ``acc_delta`` | mean of the existing units | as it is |
| mask | which entries take part | what most existing units have | as it is |
| weight | ASGD's ``ax``, Schedule-Free's ``z``, Prodigy's ``p0`` | the new weights | like the weight |

The share acts where a unit's gradient depends on it: on produced and carried axes. (Kind weight: on consumed axes.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """How one entry of optimizer state follows its parameter.

    Attributes:
        name: Its name in messages.
        power: Power of the share by which copies are multiplied.
        new: What new entries become: zero, the mean of the existing units (``"mean"`` gives way to zeros when the
            caller wishes, ``"always mean"`` does not), or the new weights.
        scale: What new weights are multiplied by: an average that began at zero is a fraction of the weights.
    """

    name: str
    power: int
    new: Literal["zero", "mean", "always mean", "weight"]
    scale: float = 1.0

    def initial(self, parameter: Tensor) -> Tensor:
        """Return the entry of a parameter of which nothing is remembered yet."""
        return parameter * self.scale if self.new == "weight" else torch.zeros_like(parameter)


GRADIENT = Kind("gradient", 1, "zero")
SQUARE = Kind("square", 2, "mean")
MAGNITUDE = Kind("magnitude", 1, "mean")
UPDATE = Kind("update", 0, "zero")
RATE = Kind("rate", 0, "always mean")
MASK = Kind("mask", 0, "always mean")
WEIGHT = Kind("weight", 0, "weight")

_NAMED = {
    "momentum_buffer": GRADIENT,
    "momentum": GRADIENT,
    "exp_avg": GRADIENT,
    "grad_avg": GRADIENT,
    "prev": GRADIENT,
    "previous_grad": GRADIENT,
    "exp_avg_sq": SQUARE,
    "max_exp_avg_sq": SQUARE,
    "square_avg": SQUARE,
    "sum": SQUARE,
    "row_var": SQUARE,
    "col_var": SQUARE,
    "variance": SQUARE,
    "exp_inf": MAGNITUDE,
    "acc_delta": RATE,
    "step_size": RATE,
    "lr_unit": RATE,
    "lr_parameter": RATE,
    "ax": WEIGHT,
    "p0": WEIGHT,
    "x0": WEIGHT,
    "slow_buffer": WEIGHT,
    "slow_param": WEIGHT,
    "slow_params": WEIGHT,
    "slow_weights": WEIGHT,
    "prev_param": WEIGHT,
    "master_param": WEIGHT,
    "master_params": WEIGHT,
    "param_copy": WEIGHT,
    "bundle_start": WEIGHT,
    "bundle_gradients": GRADIENT,
}
_OF_OPTIMIZER = {("RMSprop", "momentum_buffer"): UPDATE}
_HINTS = ((("step_size", "lr", "gain"), RATE), (("inf", "abs", "norm"), MAGNITUDE))
_SAMPLE = 4096
_COPY_COSINE, _COPY_RATIO = 0.8, 2.0
_SCALED_COSINE, _POSITIVE_COSINE = 0.95, 0.999


def named_kind(optimizer: str, key: str) -> Kind | None:
    """Return the kind of a state entry by the names of the optimizer class and of the entry, or None if unknown."""
    if key == "z" and "schedulefree" in optimizer.lower():
        return WEIGHT
    return _OF_OPTIMIZER.get((optimizer, key), _NAMED.get(key))


def observed_kind(key: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> Kind:
    """Return the kind that the numbers of a state entry tell.

    A copy of the weights is close to the parameters and far from zero, all parameters taken together, and a multiple
    of them is a copy too (an average that began at zero); squares and magnitudes are nowhere negative; anything else
    behaves like a gradient.

    Args:
        key: Name of the entry.
        pairs: For each parameter that has the entry, the state tensor and the parameter, of equally many entries.

    Example:
        >>> observed_kind("slow", [(torch.tensor([1.0, -2.0]), torch.tensor([1.1, -1.9]))]).name
        'weight'
    """
    dot = state_square = weight_square = 0.0
    lowest = highest = 0.0
    for state, parameter in ((_sample(s), _sample(p)) for s, p in pairs):
        dot += float(state @ parameter)
        state_square += float(state @ state)
        weight_square += float(parameter @ parameter)
        lowest, highest = min(lowest, float(state.min())), max(highest, float(state.max()))
    if state_square and weight_square:
        ratio = (state_square / weight_square) ** 0.5
        cosine = dot / (state_square * weight_square) ** 0.5
        is_signed = lowest < 0
        if cosine > (_COPY_COSINE if is_signed else _POSITIVE_COSINE) and 1 / _COPY_RATIO < ratio < _COPY_RATIO:
            return WEIGHT
        if is_signed and cosine > _SCALED_COSINE:
            return replace(WEIGHT, scale=ratio)
    if lowest < 0 or highest == 0:
        return GRADIENT
    return next((kind for words, kind in _HINTS if any(word in key.lower() for word in words)), SQUARE)


def _sample(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return real.reshape(-1)[:_SAMPLE].to("cpu", torch.float64)
