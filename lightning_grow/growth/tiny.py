r"""TINY: new units that do best what the present weights cannot do, and the best step of those that can.

Verbockhaven, Rudkiewicz, Chevallier, Charpiat, "Growing Tiny Networks: Spotting Expressivity Bottlenecks and Fixing
Them Optimally", TMLR 2024, arXiv:2405.19816.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn
from typing_extensions import override

from lightning_grow.criteria.bottleneck import Bottleneck, bottlenecks, with_best_signs
from lightning_grow.criteria.objective import MeasurementError, Objective
from lightning_grow.criteria.overgrown import Overgrown
from lightning_grow.criteria.selection import best_units
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.surgery.edit import Edit
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import Proposal, in_all
from lightning_grow.trainer.structural_callback import StructuralCallback
from lightning_grow.trainer.unit_costs import Cost, check_cost, unit_costs

log = logging.getLogger(__name__)

AMPLITUDES = (0.1, 0.5, 2.0)
"""What the line search tries, besides 0."""


def tiny(
    model: nn.Module,
    group: AxisGroup,
    objective: Objective,
    num_units: int,
    *,
    amplitudes: Sequence[float] = AMPLITUDES,
    update_existing: bool = False,
    eigenvalue_threshold: float = 1e-6,
    singular_threshold: float = 1e-3,
) -> Edit:
    r"""Append the units that reduce a layer's expressivity bottleneck most, as far as that lowers the loss.

    The bottleneck is what is left of the move of a layer's outputs that the loss wants, once its present weights have
    done what they can; the new units are the best approximation of it of their number, their activation taken as the
    identity (`bottlenecks`). A line search chooses the factor :math:`\gamma` of what they contribute. The
    function changes.

    Args:
        model: The model; it is not changed.
        group: The group to widen: its units are made by one Linear or Conv2d, and used by one of the same kind.
        objective: The loss, and the batches that it is measured on.
        num_units: Units to append at most, a multiple of ``group.step``; there are fewer where fewer have an effect.
        amplitudes: Values of :math:`\gamma` to try, above 0. If none lowers the loss, nothing is appended.
        update_existing: Whether the present weights of the layer that uses the units take their best step, too, with
            the same factor. What its bias could do counts as bottleneck then, for an edit of this group does not
            move that.
        eigenvalue_threshold: See `bottlenecks`.
        singular_threshold: Likewise.

    Returns:
        An edit which appends up to ``num_units`` units, or leaves everything as it is. Nothing is changed yet.

    Raises:
        StructureError: If the group does not lie between two such layers, with the reason.
        MeasurementError: If the loss cannot be measured.
        ValueError: If a number is out of range.

    Example:
        >>> import torch
        >>> from lightning_grow.structure import trace
        >>> from lightning_grow.surgery import apply_
        >>> model, x = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)), torch.randn(64, 4)
        >>> objective = Objective(lambda m, x: (m(x) - x[:, :3]).square().sum(dim=1).mean(), [x])
        >>> before = objective.value(model)
        >>> apply_(model, [tiny(model, trace(model, x)["0"], objective, num_units=2)])
        >>> model[0].out_features, objective.value(model) < before
        (4, True)

    Reference:
        Verbockhaven et al., "Growing Tiny Networks: Spotting Expressivity Bottlenecks and Fixing Them Optimally", TMLR
        2024, arXiv:2405.19816.
    """
    if num_units < 1 or num_units % group.step:
        raise ValueError(
            f"Expected `num_units` to be a positive multiple of {group.step} for '{group.name}', found {num_units}."
        )
    if not amplitudes or min(amplitudes) <= 0:
        raise ValueError(f"Expected `amplitudes` above 0, found {list(amplitudes)!r}.")
    loss, found = bottlenecks(
        model,
        [group],
        objective,
        with_bias=not update_existing,
        eigenvalue_threshold=eigenvalue_threshold,
        singular_threshold=singular_threshold,
    )
    most = min(num_units, len(found[group.name].values) // group.step * group.step)
    bottleneck = with_best_signs(model, found, {group.name: most}, objective)[group.name] if most else found[group.name]
    wanted = min(most, len(bottleneck.values) // group.step * group.step)

    def edits(amplitude: float) -> list[Edit]:
        return [bottleneck.edit(model, wanted, amplitude, update=update_existing)]

    amplitude, _ = best_amplitude(model, edits, objective, amplitudes, loss)
    return edits(amplitude)[0] if amplitude else Edit(group, tuple(range(group.size)))


def best_amplitude(
    model: nn.Module,
    edits: Callable[[float], Sequence[Edit]],
    objective: Objective,
    amplitudes: Sequence[float],
    loss: float,
) -> tuple[float, float]:
    """Return the amplitude at which edits lower the loss most, and by how much; 0 and 0 if none lowers it.

    The search does not go on beyond the largest, though the loss on a few batches often falls further: what it found
    there was worth less on validation images of Fashion-MNIST (`docs/methods/growth.md`).

    Args:
        model: The model; edits are tried on copies.
        edits: The edits with an amplitude.
        objective: The loss: each amplitude costs one forward pass over its batches. One that it is not finite at does
            not count.
        amplitudes: What to try.
        loss: The loss as it is.
    """
    best, gain = 0.0, 0.0
    for amplitude in amplitudes:
        try:
            found = loss - objective.value(Overgrown(model, edits(amplitude)).model)
        except MeasurementError:
            continue
        if found > gain:
            best, gain = amplitude, found
    return best, gain


class Tiny(StructuralCallback):
    """Widens groups where the weights between two layers cannot do what the loss wants, by the units that do it best.

    Groups between one Linear or Conv2d and another are measured, with or without a batch norm on the way; others are
    left alone. Units go where they lower the loss most, by the first-order estimate; one line search over the loss then
    chooses how strong all of them are. If no strength lowers the loss, nothing is added.

    Args:
        amplitudes: What the line search tries; see `tiny`.
        update_existing: Whether present weights take their best step, too; see `tiny`.
        eigenvalue_threshold: See `bottlenecks`.
        singular_threshold: Likewise.
        cost: What gains are divided by: ``"units"``, ``"parameters"``, ``"flops"``, ``"latency"``, or a function of
            the model and a group.
        **common: When, where and how far; see `StructuralCallback`. ``num_units`` is for all groups together,
            ``fraction`` a share of the units of all groups together; without either, a quarter is added.

    Example::

        trainer = L.Trainer(callbacks=[lg.Tiny(every_n_epochs=2, fraction=0.25, max_parameters=200_000)])
    """

    measures: ClassVar[bool] = True

    def __init__(
        self,
        amplitudes: list[float] | None = None,
        update_existing: bool = False,
        eigenvalue_threshold: float = 1e-6,
        singular_threshold: float = 1e-3,
        cost: Cost = "units",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.amplitudes = list(AMPLITUDES) if amplitudes is None else amplitudes
        if not self.amplitudes or min(self.amplitudes) <= 0:
            raise MisconfigurationException(f"`amplitudes` should be some numbers above 0, found {amplitudes!r}.")
        if not (0 < eigenvalue_threshold < 1 and 0 < singular_threshold < 1):
            raise MisconfigurationException(
                "`eigenvalue_threshold` and `singular_threshold` should be between 0 and 1, found "
                f"{eigenvalue_threshold!r} and {singular_threshold!r}."
            )
        check_cost(cost)
        self.update_existing = update_existing
        self.eigenvalue_threshold = eigenvalue_threshold
        self.singular_threshold = singular_threshold
        self.cost: Cost = cost

    @override
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        loss, found = bottlenecks(
            occasion.model,
            occasion.groups,
            occasion.measured,
            with_bias=not self.update_existing,
            eigenvalue_threshold=self.eigenvalue_threshold,
            singular_threshold=self.singular_threshold,
            on_refusal=lambda name, why: self.leave_alone([name], why),
        )
        if not found:
            return []
        groups = [bottleneck.group for bottleneck in found.values()]
        total = in_all(groups, self.num_units, self.fraction, default=0.25)
        costs = unit_costs(occasion, self.cost, groups)
        gains = {name: (bottleneck.group, bottleneck.gains) for name, bottleneck in found.items()}
        wanted = {n: len(units) for n, units in best_units(gains, total, costs=costs).items()}
        found = with_best_signs(occasion.model, found, wanted, occasion.measured)
        wanted = {n: k for n, b in found.items() if (k := len(b.values) // b.group.step * b.group.step)}

        def edits(amplitude: float) -> list[Edit]:
            return [found[n].edit(occasion.model, k, amplitude, update=self.update_existing) for n, k in wanted.items()]

        amplitude, gain = best_amplitude(occasion.model, edits, occasion.measured, self.amplitudes, loss)
        if not amplitude:
            rank_zero_only(log.info)("Tiny adds nothing this time: no amplitude lowers the loss.")
            return []
        for name, num_units in wanted.items():
            self._report(found[name], num_units, amplitude)
        shares = {name: float(found[name].gains[:num_units].sum()) for name, num_units in wanted.items()}
        whole = sum(shares.values())
        return [
            Proposal(edit, gain * shares[edit.group.name] / whole)
            for edit in sorted(edits(amplitude), key=lambda edit: -shares[edit.group.name])
        ]

    def _report(self, bottleneck: Bottleneck, num_units: int, amplitude: float) -> None:
        rank_zero_only(log.info)(
            "Tiny, '%s': bottleneck %.3g of %.3g before, %.3g after %d new units (first order); amplitude %g",
            bottleneck.group.name,
            bottleneck.before,
            bottleneck.goal,
            bottleneck.after(num_units),
            num_units,
            amplitude,
        )
