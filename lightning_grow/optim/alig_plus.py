"""ALI-G+: Polyak's step where the loss cannot reach zero, with an estimate of each example's optimal value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed
from torch import Tensor
from typing_extensions import override

from lightning_grow.optim.ball import shapes_of
from lightning_grow.optim.base import at_least_zero, within
from lightning_grow.optim.loss import LossOptimizer, is_finite, ranks_of_processes, refuse_trainer
from lightning_grow.optim.polyak import polyak_move_, polyak_rate


class ALIGPlus(LossOptimizer):
    r"""Descend as far as each example's loss is above an estimate of its optimal value, which is learned on the way.

    For a batch :math:`I` with losses :math:`\ell_z` and the gradient :math:`g` of their mean,

    .. math:: \gamma = \mathrm{clip}\left(\frac{\frac{1}{|I|}\sum_{z \in I} (\ell_z - a_z)}{\|g\|^2 + \epsilon},\ 0,
       \ \eta\right).

    The estimates :math:`a_z` begin at 0, so this begins as ALI-G. Every ``max_epochs // num_updates`` epochs, they are
    updated from the losses :math:`\bar\ell_z` of the best epoch so far: half-way up to the loss, or, where the loss has
    come down to the estimate, back by half of the last increase (never below 0).

    The training step tells which examples are in the batch, by ``optimizer.feed(indices, losses)``, and after each
    epoch stands ``optimizer.end_epoch()``. `lightning_grow.data.Indexed` makes a dataset return indices; under a
    Lightning Trainer, the callback `LossFeed` ends epochs and fills in ``max_epochs``.

    When the network grows or shrinks, the estimates stay, new entries of the momentum are zero, and the losses of the
    best epoch are replaced by those of the next: they belong to another network.

    Args:
        params: Parameters, named parameters, or param groups.
        lr: Maximal rate, at least 0. The authors suggest 0.1 or 1.
        num_examples: Examples in the training set; None: as many as the largest index seen needs.
        max_epochs: Epochs of the run, for when the estimates are updated; None: set ``optimizer.max_epochs`` later.
        num_updates: How many times the estimates are updated, at least 0. 0: never.
        momentum: In [0, 1).
        weight_decay: Decoupled, at least 0.
        track: The losses of which epoch estimates move towards: of the ``"best"`` so far (least on average), or of the
            ``"last"``.
        eps: Added to the squared norm, at least 0.
        max_skips: How many steps in a row may be skipped, for want of finite losses and gradients, before an error.
        maximize: Refused.
        foreach: False: a plain loop over tensors, the reference.
        fused: True: loops compiled by Numba (the extra ``fused``; in seconds, once) that read each number once, for
            float32 and float64 on the CPU. Not together with ``foreach``.
        differentiable: Refused.
        capturable: Refused.

    Raises:
        ValueError: If an option is out of range.

    Note:
        The authors' code keeps a reference to the losses of the epoch instead of a copy, so that its best epoch is
        always the latest. Here it is a copy; ``track="last"`` is what that code does.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(()))
        >>> targets = torch.tensor([0.0, 2.0])          # no w fits both: each loss can reach 1/2 together, not 0
        >>> optimizer = ALIGPlus([w], lr=1.0, num_examples=2, max_epochs=8, num_updates=8, momentum=0.0)
        >>> for epoch in range(8):
        ...     for z in range(2):
        ...         optimizer.zero_grad()
        ...         losses = (w - targets[z : z + 1]).square() / 2
        ...         losses.mean().backward()
        ...         optimizer.feed(torch.tensor([z]), losses)
        ...         optimizer.step()
        ...     optimizer.end_epoch()
        >>> bool((optimizer.optimal_values > 0).any())
        True

    Reference:
        Paren, Poudel, Kumar, "Faking Interpolation Until You Make It", TMLR 2022 (OpenReview OslAMMF4ZP). What is done
        about examples that were not seen, and over several processes, is ours.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        num_examples: int | None = None,
        max_epochs: int | None = None,
        num_updates: int = 5,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        track: Literal["best", "last"] = "best",
        eps: float = 1e-9,
        max_skips: int = 10,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        for name, number, least in (("num_examples", num_examples, 1), ("max_epochs", max_epochs, 1)):
            if number is not None and number < least:
                raise ValueError(f"Expected `{name}` of at least {least}, found {number!r}.")
        if num_updates < 0:
            raise ValueError(f"Expected `num_updates` of at least 0, found {num_updates!r}.")
        if track not in ("best", "last"):
            raise ValueError(f"Expected `track` to be 'best' or 'last', found {track!r}.")
        self._waiting: list[_Fed] = []  # changed in place, as wrappers of the optimizer share it
        self._plan: dict[str, Any] = {"max_epochs": max_epochs, "num_updates": num_updates, "track": track}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "max_skips": max_skips,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults)
        if num_examples is not None:
            self._grow_to(num_examples)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_plan": self._plan}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_waiting", [])

    @property
    def max_epochs(self) -> int | None:
        """Epochs of the run; may be set."""
        number: int | None = self._plan["max_epochs"]
        return number

    @max_epochs.setter
    def max_epochs(self, number: int | None) -> None:
        self._plan["max_epochs"] = number

    @property
    def num_updates(self) -> int:
        """How many times estimates are updated."""
        return int(self._plan["num_updates"])

    @property
    def optimal_values(self) -> Tensor:
        """Estimated optimal value of each example, ``(num_examples,)``."""
        optimal: Tensor = self._memory()["optimal"]
        return optimal

    @property
    def epoch(self) -> int:
        """How many epochs have ended."""
        return int(self._memory()["epoch"])

    def feed(self, indices: Tensor, losses: Tensor) -> None:
        """Tell which examples the gradients of the next step belong to. Several times before a step: all of them.

        Args:
            indices: Number of each example in the training set, integers ``(batch,)``.
            losses: The loss of each, ``(batch,)``. The gradient must be that of their mean.

        Raises:
            ValueError: If the shapes do not fit, or indices are not integers.
            IndexError: If an index is negative, or not below ``num_examples``.
        """
        if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.dtype == torch.bool:
            found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise ValueError(f"Expected indices of examples as a tensor of integers, found {found}. {_INDICES}")
        if indices.ndim != 1 or losses.shape != indices.shape or not len(indices):
            raise ValueError(
                f"Expected one index and one loss for each example of a batch, found shapes {tuple(indices.shape)} and "
                f"{tuple(losses.shape)}. Compute the loss with reduction='none', and differentiate its mean."
            )
        low, high = (int(bound) for bound in indices.aminmax())
        size = self._notes.get("examples", {}).get("size")
        if low < 0 or (size is not None and high >= size):
            raise IndexError(f"Index {low if low < 0 else high} is not one of {size or 'the'} examples.")
        self._waiting.append(_Fed(indices.detach(), losses.detach(), high, self._gradients_now()))

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the examples that were fed for them."""
        now = self._gradients_now()
        self._waiting[:] = [fed for fed in self._waiting[-1:] if fed.gradients == now]
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, or skip it and count it.

        Args:
            closure: Computes the losses and their gradients again, feeds the examples, and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            RuntimeError: If the examples are not known, or too many steps in a row were skipped.
        """
        if not self.has_feed:
            nobody_ends_epochs = self.num_updates > 0 and self.max_epochs is None
            refuse_trainer("ALIGPlus", closure, "trainer" if nobody_ends_epochs else "clipping")
        returned = self._run(closure)
        share = self._share_of_window()
        self._door.loss = None  # the losses of the examples are what counts
        fed = list(self._waiting)
        self._waiting.clear()
        work = [(group, *self._with_gradients(group)) for group in self.param_groups]
        grads = [g for _, _, own in work for g in own]
        if not fed and not grads and returned is None and ranks_of_processes() == 1:
            if closure is not None:
                self._skip(math.nan, 0.0)
            return returned
        if not fed:
            raise RuntimeError(
                "ALIGPlus needs to know the examples of the batch and their losses, but `feed` was not called since "
                f"the last step. {_INDICES}"
            )
        memory = self._memory()
        indices = torch.cat([f.indices for f in fed]).to(self._device)
        losses = torch.cat([f.losses for f in fed]).to(memory["optimal"])
        self._grow_to(max(f.highest for f in fed) + 1)
        excess = share * self._mean_over_ranks((losses - memory["optimal"][indices]).mean())
        value, square = self._numbers(excess, grads)
        rates = [polyak_rate(value, square, g["eps"], float(g["lr"])) for g in self.param_groups]
        if not is_finite(value, square, *rates):
            self._skip(value, square)
            return returned
        self._step_taken()
        memory["current"][indices] = losses
        memory["is_fresh"][indices] = True
        for (group, params, own), rate in zip(work, rates, strict=True):
            polyak_move_(group, self.state, params, own, rate)
            group["step_size"] = rate
        return returned

    def _share_of_window(self) -> float:
        """Return by which part gradients are shorter than those of the mean: a window of accumulation was not full."""
        door = self._door
        return 1.0 if door.loss is None or door.window is None else door.passes / door.window

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Take note that an epoch has ended: gather its losses over processes; update the estimates when it is time.

        Raises:
            ValueError: If ``max_epochs`` is not known.
        """
        if self.num_updates and self.max_epochs is None:
            raise ValueError(
                "ALIGPlus needs to know when to update its estimates. Pass `max_epochs`, or set `optimizer.max_epochs`."
            )
        self._gather()
        memory = self._memory()
        current, best, optimal, last = (memory[key] for key in ("current", "best", "optimal", "increase"))
        shapes = shapes_of([p for group in self.param_groups for p in group["params"]])
        is_other_network = memory.setdefault("shapes", shapes) != shapes
        memory["shapes"] = shapes
        known = current.isfinite()
        both = known & best.isfinite()
        is_better = not bool(both.any()) or bool(current[both].mean() < best[both].mean())
        taken = known if self._plan["track"] == "last" or is_other_network or is_better else known & ~both
        best[taken] = current[taken]
        if self.num_updates and self.max_epochs is not None:
            period = max(1, self.max_epochs // self.num_updates)
            if memory["epoch"] % period == period - 1:
                memory["optimal"], memory["increase"] = updated_estimates(optimal, last, best)
        memory["epoch"] += 1

    @override
    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        at_least_zero(group, "eps")
        within(group, 0, 1, "momentum")

    def _memory(self) -> dict[str, Any]:
        """Return what is remembered of the examples, on the device of the parameters."""
        if "examples" not in self._notes:
            self._grow_to(0)
        memory: dict[str, Any] = self._notes["examples"]
        for key, value in memory.items():
            if isinstance(value, Tensor) and value.device != self._device:
                memory[key] = value.to(self._device)
        return memory

    def _grow_to(self, num_examples: int) -> None:
        """Make room for more examples."""
        known: dict[str, Any] = self._notes.get("examples", {"epoch": 0})
        if "optimal" not in known and num_examples:
            known["size"] = num_examples
        before = len(known["optimal"]) if "optimal" in known else 0
        if before >= num_examples and "optimal" in known:
            return
        dtype = torch.float64 if self._is_double else torch.float32
        for key, fill in (("optimal", 0.0), ("increase", 0.0), ("best", math.inf), ("current", math.inf)):
            new = torch.full((num_examples - before,), fill, dtype=dtype, device=self._device)
            known[key] = torch.cat([known[key], new]) if before else new
        new = torch.zeros(num_examples - before, dtype=torch.bool, device=self._device)
        known["is_fresh"] = torch.cat([known["is_fresh"], new]) if before else new
        self._notes["examples"] = known

    @property
    def _is_double(self) -> bool:
        return any(p.dtype == torch.float64 for group in self.param_groups for p in group["params"])

    def _gather(self) -> None:
        """Let all processes know the losses of this epoch; of an example that several have seen, the mean."""
        memory = self._memory()
        if ranks_of_processes() > 1:
            size = torch.tensor(len(memory["current"]), device=self._device)
            torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX)
            self._grow_to(int(size))
            fresh = memory["is_fresh"]
            sums = torch.stack([torch.where(fresh, memory["current"], 0.0), fresh.to(memory["current"])])
            torch.distributed.all_reduce(sums)
            memory["current"] = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1), memory["current"])
        memory["is_fresh"] = torch.zeros_like(memory["is_fresh"])


class _Fed(NamedTuple):
    indices: Tensor
    losses: Tensor
    highest: int
    gradients: tuple[tuple[int, int], ...]


_INDICES = (
    "Wrap the training set: `lightning_grow.data.Indexed(dataset)` gives batches of (indices, items); in the training "
    "step, call `optimizer.feed(indices, losses)` (under Lightning: `self.optimizers().feed(...)`)."
)


def updated_estimates(optimal: Tensor, increase: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return new estimates of optimal values, and by how much they were last raised.

    Where the best loss is above the estimate, :math:`\delta \leftarrow (\bar\ell - a) / 2` and
    :math:`a \leftarrow a + \delta`; elsewhere it was too high, and :math:`a \leftarrow \max(0, a - \delta / 2)`.

    Args:
        optimal: Estimates, at least 0, ``(num_examples,)``.
        increase: Last increases, at least 0.
        best: Losses; infinite for examples that were never seen, which stay as they are.

    Example:
        >>> updated_estimates(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.5, 0.0]),
        ...     torch.tensor([1.0, 0.8, torch.inf]))
        (tensor([0.5000, 0.7500, 0.0000]), tensor([0.5000, 0.5000, 0.0000]))
    """
    is_seen = best.isfinite()
    is_reached = best <= optimal
    half = (torch.where(is_seen, best, optimal) - optimal) / 2
    raised, lowered = optimal + half.clamp(min=0), (optimal - increase / 2).clamp(min=0)
    new = torch.where(is_reached, lowered, raised)
    is_raised = is_seen & ~is_reached
    return torch.where(is_seen, new, optimal), torch.where(is_raised, half.clamp(min=0), increase)
