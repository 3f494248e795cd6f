r"""Steps whose length depends on the loss: where the loss comes from, and what happens when it cannot be used.

``step`` knows the gradient of the loss, but not the loss. There are two doors:

- the closure of ``step(closure)`` returns it;
- ``set_loss(loss)`` before ``step()``, where no closure is passed (mixed precision with a gradient scaler, manual
  optimisation), or where its value is not the loss of the gradients (gradient accumulation).

What was set by hand counts more than what the closure returns. Under a Lightning Trainer, the callback `LossFeed` sets
it. Where ``torch.distributed`` runs, the mean over all processes is taken, as gradients are means over them.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor
from typing_extensions import override

from lightning_grow.optim.base import AdaptiveOptimizer, Closure
from lightning_grow.optim.fused import dots
from lightning_grow.optim.tensors import squared_norm, wide_dtype

log = logging.getLogger(__name__)

Loss = Tensor | float


class _Door:
    """Where a loss waits for its step: an object, so that wrappers of the optimizer, as a Trainer has, share it."""

    loss: Loss | None = None
    gradients: tuple[tuple[int, int], ...] = ()
    passes: int = 0
    window: int | None = None


class LossOptimizer(AdaptiveOptimizer):
    """The abstract parent of optimizers that need the loss: two doors for it, and a count of steps that were skipped.

    A step is skipped, with everything left as it was, if there is no loss or it is not finite, or the gradient is not
    finite.

    Args:
        params: Parameters, named parameters, or param groups.
        defaults: Options of a param group, with ``max_skips``, ``lr``, ``maximize`` and ``foreach`` among them.
    """

    has_feed = False
    """Whether somebody promised to set the loss before each step: a `LossFeed`."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._door = _Door()
        super().__init__(params, defaults)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_door", _Door())

    @property
    def skipped(self) -> int:
        """How many steps were skipped so far."""
        return int(self._notes["steps"]["skipped"]) if "steps" in self._notes else 0

    def rates(self) -> dict[str, float | Tensor]:
        """Return the size of the last step of each param group, where the method has one, or the largest allowed."""
        found: dict[str, float | Tensor] = {}
        for place, group in enumerate(self.param_groups):
            name = "step_size" if "step_size" in group else "lr"
            found[name if len(self.param_groups) == 1 else f"{name}/{place}"] = group[name]
        return found

    def set_loss(self, loss: Loss | None) -> None:
        """Set the loss that the gradients of the next step belong to; None forgets it.

        The next ``zero_grad`` after its backward pass forgets it, too: it goes with its gradients.

        Args:
            loss: A number, or a tensor with one. Without the scale of a gradient scaler. With gradient accumulation,
                the sum of all losses that were differentiated.

        Raises:
            ValueError: If it is a tensor with several numbers.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"Expected a loss of one number, found a tensor of shape {tuple(loss.shape)}.")
            loss = loss.detach()
        self._door.loss = loss
        self._door.gradients = self._gradients_now()

    def add_loss(self, loss: Loss, window: int | None = None) -> None:
        """Add to the loss of the next step: once for each backward pass before it.

        Args:
            loss: A number, or a tensor with one.
            window: By how many passes losses were divided before they were differentiated, if so; there may be fewer.
        """
        before = self._door.loss
        self.set_loss(loss)
        if before is not None and self._door.loss is not None:
            self._door.loss = before + self._door.loss
        self._door.passes = 1 if before is None else self._door.passes + 1
        self._door.window = window

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the loss that was set for them."""
        if self._door.loss is not None and self._gradients_now() != self._door.gradients:
            self._door.loss = None
        super().zero_grad(set_to_none)

    def _gradients_now(self) -> tuple[tuple[int, int], ...]:
        """Return what differs after a backward pass."""
        grads = (p.grad for group in self.param_groups for p in group["params"])
        return tuple((0, 0) if g is None else (id(g), g._version) for g in grads)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. What belongs to no single parameter is copied."""
        super().load_state_dict(state_dict)
        self._notes.update({key: copy.deepcopy(value) for key, value in self._notes.items() if isinstance(key, str)})

    @override
    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group.get("maximize"):
            raise ValueError(
                f"{type(self).__name__} does not support `maximize=True`: its steps go down to a lower bound of the "
                "loss. Minimise the negative objective, with `lower_bound` below it where there is that option."
            )
        if not is_finite(group.get("lower_bound", 0.0)):
            raise ValueError(f"Expected a finite `lower_bound`, found {group['lower_bound']!r}.")
        skips = group["max_skips"]
        if not isinstance(skips, int) or isinstance(skips, bool) or skips < 0:
            raise ValueError(f"Expected `max_skips` to be a whole number of at least 0, found {skips!r}.")

    def _evaluate(self, closure: Closure | None) -> tuple[Any, Tensor | None]:
        """Run the closure; return its value, and the loss of the step: 0-d, on the device of the parameters.

        The loss is NaN if the closure found none, and None if there is nothing to step along either.

        Raises:
            RuntimeError: If there are gradients, but no closure, and no loss was set.
        """
        returned = self._run(closure)
        fed, self._door.loss = self._door.loss, None
        loss = returned if fed is None else fed
        if loss is None and closure is None:
            if any(p.grad is not None for group in self.param_groups for p in group["params"]):
                raise RuntimeError(
                    f"{type(self).__name__} needs the loss for its step size, but `step()` was called without a "
                    f"closure that returns it, and it was not set. {_HOW}"
                )
            return returned, None
        if fed is None and not self.has_feed:
            refuse_trainer(type(self).__name__, closure, "automatic_optimization", "accumulation", "clipping")
        return returned, self._mean_over_ranks(math.nan if loss is None else loss)

    def _mean_over_ranks(self, value: Loss) -> Tensor:
        """Return the mean over all processes of a number, on the device of the parameters."""
        device = self._device
        mean = torch.as_tensor(value).detach().to(device, wide_dtype(device), copy=True).reshape(())
        if ranks_of_processes() > 1:
            torch.distributed.all_reduce(mean)
            mean /= ranks_of_processes()
        return mean

    @property
    def _notes(self) -> dict[Any, Any]:
        """The state; under strings it has what belongs to no single parameter."""
        return cast("dict[Any, Any]", self.state)

    @property
    def _device(self) -> torch.device:
        params = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in params), torch.device("cpu"))

    def _is_slow(self, group: dict[str, Any]) -> bool:
        return group["foreach"] is False

    def _numbers(self, loss: Tensor, grads: list[Tensor]) -> tuple[float, float]:
        """Return the loss and the squared norm of all gradients: the one time in a step that waits for the device."""
        if any(self._is_slow(group) for group in self.param_groups):
            square = _plain_square(grads, loss)
        elif any(group["fused"] for group in self.param_groups):
            (square,) = dots(grads, [grads], fused=True)
        else:
            square = squared_norm(grads)
        value, square_value = torch.stack([loss, square.to(loss)]).tolist()
        return value, square_value

    def _skip(self, loss: float, square: float) -> None:
        """Count a step that is not taken.

        Raises:
            RuntimeError: If it is one too many in a row.
        """
        before = self._notes.get("steps", {"skipped": 0, "in_a_row": 0})
        counts = {name: number + 1 for name, number in before.items()}
        self._notes["steps"] = counts
        limit = self.param_groups[0]["max_skips"]
        found = f"the loss is {loss:g}, the squared norm of its gradient {square:g}"
        if counts["in_a_row"] > limit:
            raise RuntimeError(
                f"{type(self).__name__} skipped {counts['in_a_row']} steps in a row ({found}; a missing loss counts as "
                "nan). Let the closure or `training_step` return the loss, look for what makes it infinite or nan, or "
                "raise `max_skips`."
            )
        if counts["in_a_row"] == 1:
            log.warning("%s skips a step: %s.", type(self).__name__, found)

    def _step_taken(self) -> None:
        if "steps" in self._notes:
            self._notes["steps"] = {**self._notes["steps"], "in_a_row": 0}


_HOW = (
    "Call `optimizer.step(closure)`, or `optimizer.set_loss(loss)` before `optimizer.step()`; under a Lightning "
    "Trainer add the callback `lightning_grow.trainer.LossFeed()`."
)


def ranks_of_processes() -> int:
    """Return the number of processes that ``torch.distributed`` runs; 1 without it."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_finite(*values: float) -> bool:
    """Return whether no number is infinite or NaN."""
    return all(math.isfinite(value) for value in values)


def _plain_square(grads: list[Tensor], like: Tensor) -> Tensor:
    """Return the squared norm of tensors, by a plain loop, in the type and on the device of a number."""
    return sum(((g.to(like.dtype) ** 2).sum().to(like.device) for g in grads), start=torch.zeros_like(like))


def refuse_trainer(name: str, closure: Closure | None, *reasons: str) -> None:
    """Refuse to step in a Trainer without a `LossFeed` where the closure does not tell what is needed.

    A Trainer passes a `functools.partial` with its LightningModule among the arguments.

    Args:
        name: Of the optimizer.
        closure: What `step` was given.
        reasons: What is refused: ``"automatic_optimization"`` off, ``"accumulation"``, ``"clipping"``, or any
            ``"trainer"``.

    Raises:
        RuntimeError: If there is such a Trainer.
    """
    for argument in getattr(closure, "args", ()):
        trainer = getattr(argument, "_trainer", None)
        if trainer is None:
            continue
        found = {
            "automatic_optimization": ("with automatic_optimization=False", not argument.automatic_optimization),
            "accumulation": ("with accumulate_grad_batches", getattr(trainer, "accumulate_grad_batches", 1) != 1),
            "clipping": ("with gradient_clip_val", bool(getattr(trainer, "gradient_clip_val", None))),
            "trainer": ("", True),
        }
        for text, is_there in (found[reason] for reason in reasons):
            if is_there:
                raise RuntimeError(
                    f"{name} does not learn what it needs to know in a Trainer {text}{' ' * bool(text)}unless the "
                    "callback `lightning_grow.trainer.LossFeed` is there. It is added by itself where lightning-grow "
                    "is installed (not only on the path); else pass Trainer(callbacks=[LossFeed()])."
                )
