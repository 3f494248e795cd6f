"""The training loss over some batches, of a model and of its resized copies: what criteria that look ahead measure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grow.criteria.statistics import Reduce
from lightning_grow.structure.sandbox import reseed


class MeasurementError(RuntimeError):
    """The loss or its gradient cannot be measured. The event is called off; training goes on unharmed."""


def alone(tensor: Tensor) -> Tensor:
    """Return a sum as it is: there is one process."""
    return tensor


class Objective:
    """The mean loss over some batches, and its gradient.

    Models run in eval mode, so that no norm moves its statistics and no unit is dropped; every mode is put back. Sums
    are added up over processes, so that all of them get the same numbers, and the same errors.

    Args:
        loss: Runs a model on one batch and returns its loss, a mean over the batch: ``loss(model, batch)``.
        batches: What to run it on, at least one.
        reduce: Adds a tensor up over processes, and returns the total to each; by default there is one process.
        seed: Seeds random draws within the model. The global random state is left as it was.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> batches = [(torch.ones(3, 2), torch.zeros(3, 1))] * 2
        >>> objective = Objective(lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), batches)
        >>> objective.value(model) == float(model(torch.ones(1, 2)).detach() ** 2)
        True
    """

    def __init__(
        self,
        loss: Callable[[nn.Module, Any], Tensor],
        batches: Sequence[Any],
        reduce: Reduce = alone,
        seed: int = 0,
    ) -> None:
        self.loss = loss
        self.batches = batches
        self.reduce = reduce
        self.seed = seed

    def on(self, batches: Sequence[Any]) -> Objective:
        """Return the same loss on other batches: on one of them, say."""
        return Objective(self.loss, batches, self.reduce, self.seed)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let what one process measures by itself fail in all of them, so that none waits for another's sums.

        Raises:
            MeasurementError: If the body raises one, in this process or in another.
        """
        failure = None
        try:
            yield
        except MeasurementError as error:
            failure = error
        failed = bool(self.reduce(torch.tensor(float(failure is not None))) > 0)
        if failure is not None:
            raise failure
        if failed:
            raise MeasurementError("Another process could not measure the loss; its log says why.")

    def value(self, model: nn.Module) -> float:
        """Return the mean loss.

        Raises:
            MeasurementError: If it is not finite, or there is no batch.
        """
        with self.together(), torch.no_grad(), measuring(model, self.seed):
            losses = [self.loss(model, batch).detach() for batch in self.batches]
        return float(self._mean([_total(losses)])[0])

    def gradients(self, model: nn.Module, parameters: Iterable[str]) -> tuple[float, dict[str, Tensor]]:
        """Return the mean loss, and its gradient with respect to some parameters, by name (zero where none flows).

        Raises:
            MeasurementError: If the loss or a gradient is not finite, or there is no batch.
            ValueError: If the model has no parameter of a name.
        """
        named = dict(model.named_parameters())
        names = list(dict.fromkeys(parameters))
        unknown = [name for name in names if name not in named]
        if unknown:
            raise ValueError(f"Cannot take the gradient of {', '.join(unknown)}: the model has no such parameter.")
        chosen = [named[name] for name in names]
        losses: list[Tensor] = []
        sums: list[Tensor] = [_wide_zeros(parameter) for parameter in chosen]
        with self.together(), torch.enable_grad(), measuring(model, self.seed):
            for batch in self.batches:
                loss = self.loss(model, batch)
                losses.append(loss.detach())
                if not loss.requires_grad:
                    continue
                found = torch.autograd.grad(loss, chosen, allow_unused=True)
                for place, gradient in enumerate(found):
                    if gradient is not None:
                        sums[place] += gradient.detach()
        loss, *means = self._mean([_total(losses), *sums])
        return float(loss), dict(zip(names, means, strict=True))

    def _mean(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Return sums over batches as means over the batches of all processes."""
        if not self.batches:
            raise MeasurementError("There is no batch to measure the loss on.")
        count = self.reduce(torch.tensor(float(len(self.batches)), dtype=torch.float64, device=sums[0].device))
        means = [self.reduce(tensor) / float(count) for tensor in sums]
        if not bool(torch.stack([torch.isfinite(mean).all() for mean in means]).all()):  # the device is asked once
            raise MeasurementError("The loss, or its gradient, is not finite on the batches that were observed.")
        return means


@contextlib.contextmanager
def measuring(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run a model in eval mode with random draws of its own; modes and random state are put back."""
    modes = {module: module.training for module in model.modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    recurrent = any(isinstance(module, nn.RNNBase) for module in modes)
    model.eval()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            if recurrent and device.type == "cuda":  # cuDNN has no gradient of recurrent layers in eval mode
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            reseed(seed)
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _total(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([loss.double() for loss in losses]).sum() if losses else torch.zeros((), dtype=torch.float64)


def _wide_zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), requires_grad=False)
