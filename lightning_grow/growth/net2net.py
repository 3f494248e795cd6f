"""Net2Net: a wider, deeper network that computes the same function, and then learns on.

Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR 2016, arXiv:1511.05641.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_grow.criteria.units import sizes_of
from lightning_grow.structure.axes import AxisGroup, Stack, tensor_of
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.layout import entry_share
from lightning_grow.surgery.edit import Edit
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import BlockEdit, Proposal, rounded
from lightning_grow.trainer.structural_callback import StructuralCallback


def net2wider(
    group: AxisGroup,
    num_units: int,
    generator: torch.Generator | None = None,
    *,
    spread: float = 0.0,
    preserve: bool = True,
) -> Edit:
    r"""Append copies of units drawn at random, which share the fan-out of the unit that they copy.

    New unit ``j`` copies unit :math:`g(j)`, drawn uniformly. With :math:`c_k` copies of unit ``k`` in all, its own
    included, each keeps the fan-in of ``k`` and :math:`1/c_k` of its fan-out, so that together they do what ``k``
    did: the function is preserved exactly where ``group.obstacle`` is None. Norms and other carried entries are copied.

    Args:
        group: The group to widen, ``n = group.size`` units.
        num_units: Units to append, a multiple of ``group.step``: ``q - n`` in the paper.
        generator: Draws ``g``, and the shares if ``spread`` is above 0; by default one that depends on nothing but the
            group's name and sizes. The global random state is not touched.
        spread: Makes the shares of the copies unequal, so that they part during training: share ``j`` is proportional
            to ``1 + spread * u``, with ``u`` uniform in ``[-1, 1]``; ``0 <= spread < 1``. The paper has 0.
        preserve: Refuse groups with an obstacle.

    Returns:
        An edit which appends ``num_units`` copies. Nothing is changed yet.

    Raises:
        ValueError: If ``num_units`` or ``spread`` is out of range.
        StructureError: If the group has an obstacle, and ``preserve`` is set.

    Note:
        With ``spread=0`` and without `with_noise`, copies stay twins for ever under most optimizers.

    Example:
        >>> from lightning_grow.structure import trace
        >>> from lightning_grow.surgery import apply_
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(3, 4)
        >>> before = model(x).detach()
        >>> apply_(model, [net2wider(trace(model, x)["0"], num_units=4)])
        >>> model[0].out_features, torch.allclose(before, model(x), atol=1e-6)
        (12, True)

    Reference:
        Chen et al., "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR 2016, arXiv:1511.05641.
    """
    if num_units < 1 or num_units % group.step:
        raise ValueError(
            f"Expected `num_units` to be a positive multiple of {group.step} for '{group.name}', found {num_units}."
        )
    if not 0 <= spread < 1:
        raise ValueError(f"Expected `spread` in [0, 1), found {spread!r}.")
    if preserve and group.obstacle is not None:
        raise StructureError(
            f"Cannot widen '{group.name}' and keep the function: {group.obstacle}. Exclude the group, or pass "
            "preserve=False."
        )
    if generator is None:
        generator = torch.Generator().manual_seed(_seed(group, num_units))
    drawn = torch.randint(group.size, (num_units,), generator=generator)
    source = torch.cat([torch.arange(group.size), drawn])  # g
    weight = torch.ones(len(source), dtype=torch.float64)
    if spread:
        weight += spread * (2 * torch.rand(len(source), dtype=torch.float64, generator=generator) - 1)
    total = torch.zeros(group.size, dtype=torch.float64).index_add_(0, source, weight)  # c_k, if all weights are 1
    share = weight / total[source]
    return Edit(group, tuple(source.tolist()), tuple(share.tolist()), seed=_seed(group, num_units))


def with_noise(edit: Edit, model: nn.Module, noise: float, generator: torch.Generator) -> Edit:
    """Add noise to the fan-in weights of the appended copies of an edit, so that they part from the units they copy.

    The function changes a little, in proportion to ``noise``, also where the groups before and behind are edited, too.

    Args:
        edit: An edit that appends copies, as `net2wider` returns.
        model: The model; only read.
        noise: Standard deviation of the noise, relative to that of the fan-in tensor's entries, ``>= 0``.
        generator: Draws the noise.

    Returns:
        The edit with noise. The units that were there before get no noise.

    Raises:
        ValueError: If ``noise`` is below 0.
    """
    if noise < 0:
        raise ValueError(f"Expected `noise` of at least 0, found {noise!r}.")
    group = edit.group
    if noise == 0 or len(edit.index) == group.size:
        return edit
    sizes = {**sizes_of(model, group), group.name: edit.new_size}
    place = torch.arange(edit.new_size, dtype=torch.float64)
    shifts = dict(edit.shifts)
    for axis in group.with_role("produced"):
        tensor = tensor_of(model, axis.tensor).detach()
        if tensor.ndim == 1:
            continue
        is_copy = entry_share(axis.layout, sizes, {group.name: (place >= group.size).double() + 1}) == 2
        shape = [len(is_copy), *tensor.shape[: axis.dim], *tensor.shape[axis.dim + 1 :]]
        moved = torch.zeros(shape, dtype=torch.float64)
        moved[is_copy] = torch.randn(moved[is_copy].shape, dtype=torch.float64, generator=generator)
        shift = (noise * tensor.std(correction=0) * moved.to(tensor)).movedim(0, axis.dim)
        shifts[axis.label] = shifts.get(axis.label, 0.0) + shift
    return replace(edit, shifts=shifts)


def net2deeper(stack: Stack, at: int | None = None) -> BlockEdit:
    """Insert one more block into a stack, which is the identity at first.

    Args:
        stack: The stack to deepen.
        at: Position of the new block, ``stack.first <= at <= len(stack.blocks)``; at the end by default.

    Returns:
        A change of depth, for `insert_` or as a proposal. Nothing is changed yet.

    Raises:
        StructureError: If no block can start as the identity there (in the paper: an activation that is not
            idempotent).
        ValueError: If ``at`` is out of range.

    Reference:
        Chen et al., "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR 2016, arXiv:1511.05641.
    """
    if stack.obstacle is not None:
        raise StructureError(f"Cannot deepen '{stack.name}' and keep the function: {stack.obstacle}.")
    at = len(stack.blocks) if at is None else at
    if not stack.first <= at <= len(stack.blocks):
        raise ValueError(
            f"Expected a position from {stack.first} to {len(stack.blocks)} in '{stack.name}', found {at}."
        )
    return BlockEdit(stack, at)


def _seed(group: AxisGroup, num_units: int) -> int:
    return zlib.crc32(f"net2wider {group.name} {group.size} {num_units}".encode())


class Net2Net(StructuralCallback):
    """Widens every group, and deepens the shallowest stack, by function-preserving copies.

    Args:
        width: Widen the chosen groups at each event. Groups with an obstacle are left alone.
        depth: Insert one block at each event, at the end of the shallowest of the chosen stacks. Stacks in which no
            block can start as the identity are left alone.
        spread: How unequal the fan-out shares of copies are; see `net2wider`.
        noise: Noise on the fan-in weights of copies; see `with_noise`. The function is no longer preserved exactly.
        **common: When, where and how far; see `StructuralCallback`. Without ``num_units`` and ``fraction``, half of
            the units are added.

    Example::

        trainer = L.Trainer(callbacks=[lg.Net2Net(every_n_epochs=2, fraction=0.5, max_parameters=200_000)])
    """

    def __init__(
        self, width: bool = True, depth: bool = False, spread: float = 0.25, noise: float = 0.0, **common: Any
    ) -> None:
        super().__init__(**common)
        if not (width or depth):
            raise MisconfigurationException("With `width=False` and `depth=False`, Net2Net has nothing to do.")
        if not 0 <= spread < 1:
            raise MisconfigurationException(f"`spread` should be in [0, 1), found {spread!r}.")
        if noise < 0:
            raise MisconfigurationException(f"`noise` should be at least 0, found {noise!r}.")
        self.width = width
        self.depth = depth
        self.spread = spread
        self.noise = noise

    @override
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        groups = [group for group in occasion.groups if group.obstacle is None] if self.width else []
        proposals = [Proposal(self._wider(group, occasion)) for group in groups]
        stacks = [stack for stack in occasion.stacks if stack.obstacle is None] if self.depth else []
        if stacks:
            proposals.append(Proposal(net2deeper(min(stacks, key=lambda stack: len(stack.blocks)))))
        return proposals

    def _wider(self, group: AxisGroup, occasion: Occasion) -> Edit:
        fraction = 0.5 if self.num_units is None and self.fraction is None else self.fraction
        num_units = rounded(group, self.num_units, fraction)
        generator = occasion.generator(group.name)
        edit = net2wider(group, num_units, generator, spread=self.spread)
        return with_noise(edit, occasion.model, self.noise, generator)
