"""How much units matter to what is trained, sample by sample, and how often they are on.

Sapkota, Bhattarai, "Noisy Heuristics NAS: A Network Morphism based Neural Architecture Search using Heuristics", 2022,
arXiv:2207.04467; rules and constants are those of the authors' published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_grow.criteria.likelihood import Likelihood
from lightning_grow.criteria.objective import MeasurementError, Objective, measuring
from lightning_grow.criteria.overgrown import Overgrown
from lightning_grow.criteria.reads import UNSEEN, Readers, Reads, gradients_of, sample_sums
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.structure.errors import StructureError

Form = Literal["loss", "outputs"]
"""Whose gradient says what a unit is worth: that of the loss, or that of the outputs."""


def significance(
    model: nn.Module, groups: Sequence[AxisGroup], objective: Objective, form: Form = "loss"
) -> dict[str, Tensor]:
    r"""Return how much each unit matters, on one scale for all groups.

    With activations :math:`a` as the layers that use a unit read them, and gradients :math:`g` with respect to these,

    - ``"loss"``: :math:`s = \sum_n |\sum_p g_{np} a_{np}|`, with ``g`` of the loss, times :math:`(1 - q^{33}) / 0.872`;
      divided by the mean over all units;
    - ``"outputs"``: :math:`s = \operatorname{mean}_n (\sum_p g_{np} a_{np})^2`, with ``g`` of the sum of the outputs,
      times :math:`4 (1 - q)`; divided by the largest.

    Positions ``p`` are summed inside. ``q`` is the fraction of activations above 0: a unit that is always on is linear.
    It counts for groups whose activations are never negative (rectifiers), otherwise the factor is 1. A unit that is
    read as several numbers (heads, flattened channels) is on where most of them are.

    Args:
        model: The model; a copy of it runs.
        groups: The groups, each read by linear layers or convolutions, with the batch first.
        objective: The loss; the outputs are what its loss functions get (see `Likelihood`).
        form: Which.

    Returns:
        float64 ``(size,)`` by group name.

    Raises:
        StructureError: If something else reads a group.
        MeasurementError: If something is not finite, or there are no outputs.
    """
    copy = Overgrown(model, []).model.requires_grad_()
    readers = Readers(copy, groups)
    unseen = readers.unseen(copy, objective)
    if unseen:
        raise StructureError(f"Cannot tell what {', '.join(unseen)} contribute: {UNSEEN}. Exclude them.")
    totals = {group.name: torch.zeros(5, group.size, dtype=torch.float64) for group in groups}
    with objective.together():
        for batch in objective.batches:
            with torch.enable_grad(), measuring(copy, objective.seed):
                with Likelihood() as likelihood, Reads(copy, readers.weights) as reading:
                    loss = objective.loss(copy, batch)
                if form == "outputs" and not likelihood.terms:
                    raise MeasurementError("The loss shows no outputs: it goes through none of torch's loss functions.")
                source = loss if form == "loss" else torch.stack([t.outputs.sum() for t in likelihood.terms]).sum()
                gradients = gradients_of(source, [read.source for read in reading.reads])
            values = readers.by_unit(reading.reads, [read.source.detach() for read in reading.reads])
            slopes = readers.by_unit(reading.reads, gradients)
            samples = min((read.arranged(read.source).shape[0] for read in reading.reads), default=1)
            for group in groups:
                totals[group.name] += _observed(values[group.name], slopes[group.name], samples, group.size)
    scores = {}
    for name, sums in totals.items():
        absolute, square, on, number, below = objective.reduce(sums)
        if not bool(torch.isfinite(absolute).all()):
            raise MeasurementError("The gradient of the loss is not finite on the batches that were observed.")
        q = on / number.clamp(min=1)
        if bool((below > 0).any()):
            factor = torch.ones_like(q)
        else:
            factor = (1 - q**33) / 0.872 if form == "loss" else 4 * (1 - q)
        scores[name] = factor * (absolute if form == "loss" else square / number.clamp(min=1))
    every = torch.cat(list(scores.values()))
    scale = every.mean() if form == "loss" else every.max()
    return {name: score / scale if scale > 0 else score for name, score in scores.items()}


def _observed(values: Sequence[Tensor], slopes: Sequence[Tensor], samples: int, size: int) -> Tensor:
    """Return, for each unit: the sum of effects, of their squares, how often it is on, of how many, how often below."""
    if not values:
        return torch.zeros(5, size, dtype=torch.float64)
    effects = torch.stack([sample_sums(a * g, samples) for a, g in zip(values, slopes, strict=True)]).sum(dim=0)
    on = torch.stack([(a > 0).double().mean(dim=(0, 2, 3)) for a in values]).mean(dim=0) * samples
    below = torch.stack([(a < 0).double().sum(dim=(0, 2, 3)) for a in values]).sum(dim=0)
    effects = effects.double()
    number = torch.full_like(on, float(samples))
    return torch.stack([effects.abs().sum(dim=0), effects.square().sum(dim=0), on, number, below]).cpu()
