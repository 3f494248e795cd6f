"""What a model costs to run: floating-point operations, counted, and milliseconds, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(call: Callable[[], object]) -> int:
    """Return the floating-point operations of one call, as torch's own counter sees them.

    A multiplication and an addition count as two. Element-wise operations count as none.

    Args:
        call: Runs the model once, for example ``lambda: model(x)``. Gradients are switched off.

    Example:
        >>> layer = nn.Linear(4, 8)
        >>> count_flops(lambda: layer(torch.zeros(2, 4)))
        128
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call()
    return int(counter.get_total_flops())


def measure_latency_ms(call: Callable[[], object], device: torch.device, repeats: int = 9, warmup: int = 2) -> float:
    """Return the median wall-clock time of a call in milliseconds.

    Args:
        call: Runs the model once. Gradients are switched off.
        device: Where it runs; on an accelerator each measurement waits for it to finish.
        repeats: Measurements, of which the median is returned, ``>= 1``.
        warmup: Calls before the first measurement.

    Raises:
        ValueError: If ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"Expected `repeats` of at least 1, found {repeats}.")
    times = []
    with torch.no_grad():
        for _ in range(warmup):
            call()
        for _ in range(repeats):
            _wait(device)
            begin = time.perf_counter()
            call()
            _wait(device)
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def in_eval_mode(model: nn.Module, call: Callable[[], object]) -> Callable[[], object]:
    """Return a call that runs ``call`` with ``model`` in eval mode, and restores the mode of each of its modules."""

    def run() -> object:
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            return call()
        finally:
            for module, training in modes.items():
                module.training = training

    return run


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
