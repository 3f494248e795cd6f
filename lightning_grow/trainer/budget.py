"""What a model may cost in the end, and how proposals are shortened to stay within it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.costs import count_flops, count_parameters, in_eval_mode, measure_latency_ms
from lightning_grow.structure.axes import Structure
from lightning_grow.surgery.apply import apply_
from lightning_grow.surgery.depth import insert_, remove_
from lightning_grow.surgery.edit import Edit
from lightning_grow.surgery.kernels import KernelEdit, enlarge_
from lightning_grow.trainer.proposal import BlockEdit, Change, Proposal, is_nothing, size_after, size_before, trimmed

_HALVINGS = 10  # a common fraction of all growth is found to one part in a thousand


@dataclass(frozen=True)
class Budget:
    """Upper limits; None means no limit.

    Attributes:
        max_parameters: Parameters of the whole model.
        max_flops: Floating-point operations of ``forward(example_input_array)``.
        max_latency_ms: Milliseconds of ``forward(example_input_array)`` in eval mode, measured where the model is.
    """

    max_parameters: int | None = None
    max_flops: float | None = None
    max_latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name, limit in vars(self).items():
            if limit is not None and not limit > 0:
                raise MisconfigurationException(f"`{name}` should be above 0, found {limit!r}.")

    @property
    def needs_running(self) -> bool:
        """Whether a model must run to know what it costs."""
        return self.max_flops is not None or self.max_latency_ms is not None

    @property
    def is_limited(self) -> bool:
        """Whether there is any limit."""
        return self.max_parameters is not None or self.needs_running


@dataclass(frozen=True)
class Meter:
    """Measures what a model costs, now and after changes.

    Attributes:
        budget: Says what to measure.
        model: The model. It is never changed: changes are tried on a copy.
        structure: Its structure.
        forward: Runs a model of this kind once on the example input; None when there is no example input.
        agree: Turns a number measured on this rank into one that all ranks share.
    """

    budget: Budget
    model: nn.Module
    structure: Structure
    forward: Callable[[nn.Module], object] | None = None
    agree: Callable[[float], float] = float

    def costs(self, changes: Sequence[Change] = ()) -> dict[str, float]:
        """Return the cost after some changes under the name of each limit."""
        edits = {c.group.name: size_after(c) for c in changes if isinstance(c, Edit)}
        only_widths = len(edits) == len(changes)
        costs: dict[str, float] = {}
        if only_widths and not self.budget.needs_running:
            return {"max_parameters": count_parameters(self.model, self.structure, edits)}
        model = self._changed(changes) if changes else self.model
        costs["max_parameters"] = sum(p.numel() for p in model.parameters())
        if self.budget.needs_running:
            if self.forward is None:
                raise MisconfigurationException(
                    "`max_flops` and `max_latency_ms` measure `forward(example_input_array)`, but the model has no "
                    "`example_input_array`. Set it in the LightningModule, or use `max_parameters`."
                )
            forward = self.forward
            call = in_eval_mode(model, lambda: forward(model))
            if self.budget.max_flops is not None:
                costs["max_flops"] = count_flops(call)
            if self.budget.max_latency_ms is not None:
                device = next((p.device for p in model.parameters()), torch.device("cpu"))
                costs["max_latency_ms"] = self.agree(measure_latency_ms(call, device))
        return costs

    def excess(self, changes: Sequence[Change] = ()) -> dict[str, tuple[float, float]]:
        """Return the limits that the model exceeds after some changes: name to cost and limit."""
        costs = self.costs(changes)
        limits = {name: getattr(self.budget, name) for name in costs}
        return {n: (costs[n], limit) for n, limit in limits.items() if limit is not None and costs[n] > limit}

    def fits(self, changes: Sequence[Change] = ()) -> bool:
        """Return whether the model stays within the budget after some changes."""
        return not self.excess(changes)

    def fit(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """Return the proposals, shortened so that the model stays within the budget; perhaps none of them.

        Growth of width is cut by the same fraction everywhere. What shrinks the model stays as it is. A new block, or
        a larger kernel, is left out, the last one first, when the model would be too large with it even without any
        growth of width.
        """
        proposals = list(proposals)
        if not self.budget.is_limited or self.fits([p.change for p in proposals]):
            return proposals
        whole = [p for p in proposals if _is_all_or_nothing(p.change)]
        for count in range(len(whole), -1, -1):
            chosen = [p for p in proposals if p not in whole[count:]]
            if self.fits([p.change for p in self._grown_by(chosen, 0.0)]):
                return self._widest(chosen)
        return [p for p in proposals if size_after(p.change) <= size_before(p.change)]

    def _widest(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if self.fits([p.change for p in self._grown_by(proposals, middle)]) else (low, middle)
            )
        best = self._grown_by(proposals, low, keep_all=True)
        if not self.budget.needs_running:
            for place, proposal in enumerate(proposals):
                best[place] = self._topped_up(best, place, proposal)
        return [p for p in best if not is_nothing(p.change)]

    def _topped_up(self, best: Sequence[Proposal], place: int, full: Proposal) -> Proposal:
        """Let one group take what the common fraction left over."""
        current, whole = best[place].change, full.change
        if not isinstance(current, Edit) or not isinstance(whole, Edit):
            return best[place]
        others = [p.change for i, p in enumerate(best) if i != place]
        chosen = current
        for size in range(len(current.index) + whole.group.step, len(whole.index) + 1, whole.group.step):
            candidate = trimmed(whole, size, self._sizes())
            if not self.fits([*others, candidate]):
                break
            chosen = candidate
        return replace(full, change=chosen)

    def _grown_by(self, proposals: Sequence[Proposal], fraction: float, *, keep_all: bool = False) -> list[Proposal]:
        """Cut the growth of width of all proposals to a fraction of what they ask for."""
        cut = []
        for proposal in proposals:
            change = proposal.change
            if isinstance(change, Edit) and len(change.index) > change.group.size:
                steps = int(fraction * (len(change.index) - change.group.size) / change.group.step)
                change = trimmed(change, change.group.size + steps * change.group.step, self._sizes())
            if keep_all or not is_nothing(change):
                cut.append(replace(proposal, change=change))
        return cut

    def _sizes(self) -> dict[str, int]:
        return self.structure.sizes_in(self.model)

    def _changed(self, changes: Sequence[Change]) -> nn.Module:
        model = copy.deepcopy(self.model)
        apply_changes_(model, changes)
        return model


def apply_changes_(
    model: nn.Module,
    changes: Sequence[Change],
    optimizers: Sequence[torch.optim.Optimizer] = (),
    new_state: Literal["mean", "zeros"] = "mean",
) -> None:
    """Apply widths at once, kernels at once, then depth, block by block.

    Blocks of one stack are named anew after each change, so there can be one change for each stack.
    """
    edits = [change for change in changes if isinstance(change, Edit)]
    if edits:
        apply_(model, edits, optimizers, new_state=new_state)
    kernels = [change for change in changes if isinstance(change, KernelEdit)]
    if kernels:
        enlarge_(model, kernels, optimizers, new_state=new_state)
    for change in changes:
        if isinstance(change, BlockEdit):
            (remove_ if change.remove else insert_)(model, change.stack, change.at, optimizers)


def _is_all_or_nothing(change: Change) -> bool:
    return isinstance(change, KernelEdit) or (isinstance(change, BlockEdit) and not change.remove)
