r"""Noisy heuristics: too many units are added at random, and those that turn out unfit go gently.

Sapkota, Bhattarai, "Noisy Heuristics NAS: A Network Morphism based Neural Architecture Search using Heuristics", 2022,
arXiv:2207.04467. The text of the paper was not at hand: rules and constants are those of the authors' published code
and logs. What is here is their rule for width, and of their hierarchy of layers the rule that says when to deepen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_grow.criteria.overgrown import Overgrown
from lightning_grow.criteria.reads import UNSEEN, Readers
from lightning_grow.criteria.significance import Form, significance
from lightning_grow.criteria.units import UnitVectors, sizes_of
from lightning_grow.structure.axes import AxisGroup, Role, Stack, tensor_of
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.layout import unit_entries
from lightning_grow.surgery.edit import Edit
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import BlockEdit, Proposal, in_all
from lightning_grow.trainer.structural_callback import StructuralCallback

log = logging.getLogger(__name__)

_ROLES: tuple[Role, ...] = ("produced", "carried", "consumed")
_MEMORY = 4 / 5
_FIT_STEPS = 50
_FEWEST_POINTS = 10


# -- adding -----------------------------------------------------------------------------------------------------------


def random_units(
    model: nn.Module, group: AxisGroup, num_units: int, generator: torch.Generator, without: Sequence[int] = ()
) -> Edit:
    r"""Append units of random fan-in that nothing hears yet, and perhaps leave out others.

    Weights of the fan-in are uniform in :math:`\pm 1/\sqrt i`, with ``i`` entries in each tensor's fan-in; biases and
    fan-out are zero, so that the function is preserved exactly.

    Args:
        model: The model; only read.
        group: The group, without an obstacle.
        num_units: Units to append, ``>= 0``.
        generator: Draws the weights.
        without: Units that go.

    Raises:
        StructureError: If the group has an obstacle.
        ValueError: If nothing is left, or ``group.step`` is violated.
    """
    if group.obstacle is not None:
        raise StructureError(f"Cannot widen '{group.name}' and keep the function: {group.obstacle}.")
    gone = set(without)
    kept = tuple(unit for unit in range(group.size) if unit not in gone)
    sizes, values = sizes_of(model, group), {}
    for axis in group.with_role("produced") if num_units else ():
        tensor = tensor_of(model, axis.tensor)
        shape = list(tensor.shape)
        shape[axis.dim] = num_units * unit_entries(axis.layout, sizes, group.name).shape[1]
        bound = (tensor.shape[axis.dim] / tensor.numel()) ** 0.5 if tensor.ndim > 1 else 0.0
        drawn = 2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1
        values[axis.label] = (bound * drawn).to(tensor)
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    return Edit(group, kept + (-1,) * num_units, values=values, seed=seed)


def shares(
    groups: Sequence[AxisGroup],
    num_units: int,
    balance: Mapping[str, float],
    generator: torch.Generator,
    by_balance: float = 0.7,
) -> dict[str, int]:
    r"""Return how many units each group gains.

    One part is drawn with probabilities proportional to :math:`\operatorname{softplus}(d_k)`, the rest evenly.

    Args:
        groups: The groups.
        num_units: Units to add in all; each group gains a multiple of its step.
        balance: :math:`d_k` by group name, a running mean of units added less units removed; 0 where not given.
        generator: Draws.
        by_balance: The first part, in ``[0, 1]``: 0.7 in the authors' convolutional networks, 0.5 in their perceptrons.
    """
    d = torch.tensor([balance.get(group.name, 0.0) for group in groups], dtype=torch.float64)
    drawn = round(by_balance * num_units)
    chosen = torch.zeros(len(groups), dtype=torch.long)
    for probability, number in ((torch.nn.functional.softplus(d), drawn), (torch.ones_like(d), num_units - drawn)):
        if number:
            picks = torch.multinomial(probability, number, replacement=True, generator=generator)
            chosen += torch.bincount(picks, minlength=len(groups))
    counts = zip(groups, chosen.tolist(), strict=True)
    return {group.name: count // group.step * group.step for group, count in counts if count >= group.step}


def new_balance(balance: Mapping[str, float], changes: Mapping[str, int]) -> dict[str, float]:
    """Return the running means of units added less units removed, after one more cycle, by group name."""
    names = dict.fromkeys([*balance, *changes])
    return {n: _MEMORY * balance.get(n, 0.0) + (1 - _MEMORY) * changes.get(n, 0) for n in names}


# -- who is fit -------------------------------------------------------------------------------------------------------


def unfit_units(
    scores: Mapping[str, tuple[AxisGroup, Tensor]],
    num_added: int,
    *,
    add_to_remove_ratio: float = 2.0,
    threshold_max: float = 0.5,
    threshold_min: float = 0.01,
    random_share: float = 0.0,
    generator: torch.Generator | None = None,
    least_units: Mapping[str, int] | None = None,
) -> dict[str, list[int]]:
    """Return the units that go: few and unfit, or quite useless, and some by chance.

    Of the scores below ``threshold_max``, the ``ceil(num_added / add_to_remove_ratio)`` smallest go; whatever is not
    above ``threshold_min`` goes in any case.

    Args:
        scores: By group name, the group and one score for each unit, ``(size,)``, with mean (or maximum) 1.
        num_added: Units added since the last time.
        add_to_remove_ratio: Units added for each that goes; with 1 the network keeps its size, above it grows.
        threshold_max: Units that score at least so much stay.
        threshold_min: Units that score at most so much go.
        random_share: Probability with which any unit goes: 0.05 in the authors' convolutional networks.
        generator: Draws these.
        least_units: Units that have to stay, by group name; one at least.

    Returns:
        Units in rising order, by group name; a multiple of ``group.step`` each.

    Raises:
        ValueError: If a number is out of range.
    """
    if not add_to_remove_ratio > 0 or not 0 <= random_share < 1 or threshold_min > threshold_max:
        raise ValueError(
            "Expected add_to_remove_ratio > 0, 0 <= random_share < 1 and threshold_min <= threshold_max, found "
            f"{add_to_remove_ratio}, {random_share}, {threshold_min} and {threshold_max}."
        )
    every = [(float(s), name, unit) for name, (_, score) in scores.items() for unit, s in enumerate(score.tolist())]
    below = sorted(entry for entry in every if entry[0] < threshold_max)
    gone = {entry[1:] for entry in below[: math.ceil(num_added / add_to_remove_ratio)]}
    gone |= {entry[1:] for entry in every if entry[0] <= threshold_min}
    if random_share:
        drawn = torch.rand(len(every), dtype=torch.float64, generator=generator)
        gone |= {entry[1:] for entry, chance in zip(every, drawn.tolist(), strict=True) if chance < random_share}
    found = {}
    for name, (group, score) in scores.items():
        units = sorted((unit for owner, unit in gone if owner == name), key=lambda unit: (float(score[unit]), unit))
        least = -(-max(1, (least_units or {}).get(name, 1)) // group.step) * group.step
        number = min(len(units), max(0, group.size - least)) // group.step * group.step
        if number:
            found[name] = sorted(units[:number])
    return found


# -- going gently -----------------------------------------------------------------------------------------------------


def decay_factor(step: int, num_steps: int) -> float:
    """Return what is left of the fan-out of a unit that goes: ``(1 - t/T)^2``, 0 from ``T`` on.

    Example:
        >>> [decay_factor(t, 4) for t in range(5)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """
    return max(0.0, 1 - step / num_steps) ** 2 if num_steps else 0.0


class _Fading(NamedTuple):
    """Units of one group that fade: what they held when they began.

    Attributes:
        units: Which.
        size: Units of the group.
        fan_in: By role (``"produced"``, ``"carried"``), their vectors, which are held.
        fan_out: Their vectors, which fade.
    """

    units: list[int]
    size: int
    fan_in: dict[str, Tensor]
    fan_out: Tensor


def _held(model: nn.Module, group: AxisGroup, units: Sequence[int]) -> _Fading:
    named = dict(model.named_parameters())
    vectors: dict[str, Tensor] = {}
    for role in _ROLES:
        of_role = UnitVectors(model, group, role)
        if of_role.axes:
            vectors[role] = of_role.of(named)[list(units)].clone()
    return _Fading(list(units), group.size, vectors, vectors.pop("consumed"))


def fade_(model: nn.Module, group: AxisGroup, fading: _Fading, factor: float) -> None:
    """Set the fan-out of fading units to a part of what it was, and everything else of them to what it was.

    Args:
        model: The model; changed in place.
        group: The group.
        fading: The units.
        factor: The part that is left.
    """
    named = dict(model.named_parameters())
    wanted = {**fading.fan_in, "consumed": factor * fading.fan_out}
    for role in _ROLES:
        if role in wanted:
            of_role = UnitVectors(model, group, role)
            everyone = of_role.of(named).clone()
            everyone[fading.units] = wanted[role].to(everyone)
            of_role.write_(model, everyone)


# -- layers -----------------------------------------------------------------------------------------------------------


def layer_size(i: float, o: float) -> float:
    """Return the hidden size that suits a layer from ``i`` to ``o`` units: ``(max(i, o) * min(i, o)^2)^(1/3)``.

    Example:
        >>> [round(layer_size(*sizes), 2) for sizes in ((8, 8), (8, 16), (784, 10))]
        [8.0, 10.08, 42.8]
    """
    return float((max(i, o) * min(i, o) ** 2) ** (1 / 3))


def is_large(hidden: int, i: float, o: float) -> bool:
    """Return whether a hidden layer is so large that there should be more layers instead: above ``h(i, o) + 1``."""
    return hidden > layer_size(i, o) + 1


def neighbours(model: nn.Module, group: AxisGroup) -> tuple[int, int]:
    """Return how many numbers the first layer that makes a group reads, and how many the first that reads it makes.

    Where a layer is a convolution, channels are counted, not the entries of its kernels.
    """
    found = []
    for role in (_ROLES[0], _ROLES[2]):
        shapes = [(tuple(tensor_of(model, axis.tensor).shape), axis.dim) for axis in group.with_role(role)]
        lengths = [shape[1 - dim] for shape, dim in shapes if len(shape) > 1 and dim < 2]
        found.append(lengths[0] if lengths else group.size)
    return found[0], found[1]


# -- when training has done what it can -------------------------------------------------------------------------------


class Fall(NamedTuple):
    r"""A curve :math:`e^{c_0 x} (1 - x) c_1 + c_2` through a falling loss, scaled to the unit square."""

    c0: float = 0.0
    c1: float = 0.0
    c2: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the loss fell early, and has been flat since: ``c0 < -5``."""
        return self.c0 < -5


def fitted_fall(losses: Sequence[float], before: Fall | None = None) -> Fall:
    """Fit the curve of a falling loss by fifty steps of Adam, from where the last fit ended.

    Args:
        losses: Smoothed losses of a training phase, in order. What comes before the largest is left out.
        before: The last fit of this phase.

    Returns:
        The new fit, or the last one if there are fewer than ten losses, or they have not fallen.

    Example:
        >>> import math
        >>> fit = Fall()
        >>> for _ in range(3):
        ...     fit = fitted_fall([math.exp(-x / 10) * (1 - x / 100) for x in range(100)], fit)
        >>> fit.is_over
        True
    """
    fit = before or Fall()
    values = torch.tensor(list(losses), dtype=torch.float64)
    values = values[int(values.argmax()) :] if len(values) else values
    span = float(values[0] - values.min()) if len(values) else 0.0
    if len(values) < _FEWEST_POINTS or span <= 0:
        return fit
    x = torch.linspace(0, 1, len(values), dtype=torch.float64)
    y = ((values - values[-1]) / span).clamp(-1.1, 1.1)
    c = torch.tensor(fit, dtype=torch.float64, requires_grad=True)
    low, high = torch.tensor([[-20, 0.7, -0.2], [20, 2, 0.1]], dtype=torch.float64)
    optimizer = torch.optim.Adam([c], lr=0.8)
    with torch.enable_grad():
        for _ in range(_FIT_STEPS):
            error = ((c[0] * x).exp() * (1 - x) * c[1] + c[2] - y).square().mean()
            (c.grad,) = torch.autograd.grad(error, [c])
            optimizer.step()
            with torch.no_grad():
                c.clamp_(low, high)
    return Fall(*c.detach().tolist())


# -- all of it in a run -----------------------------------------------------------------------------------------------


class NoisyHeuristics(StructuralCallback):
    r"""Adds units at random, and removes those that training did not make use of, after their fan-out has faded.

    At an event all units are scored. Those that go fade while training goes on: after each of ``num_decay_steps``
    optimizer steps their fan-out is set to :math:`(1 - t/T)^2` of what it was, and the rest of them is held. Then they
    are cut out, and new units are added, in one event. Where nobody goes, new units are added at once.

    Of the authors' hierarchy of layers it keeps the rule for depth alone, and that only where a stack of blocks can be
    made deeper: see ``deepen``. Layers with and without shortcuts, which come and go, are not kept.

    Args:
        add_to_remove_ratio: Units added for each unit that goes: with 1 the network keeps its size, above it grows.
        removes: Whether any unit ever goes.
        threshold_max: Units that score at least so much stay; the mean score is 1.
        threshold_min: Units that score at most so much go in any case.
        random_share: Probability with which any unit goes at an event.
        num_decay_steps: Optimizer steps in which units fade; 0 cuts them out at once, which moves the function.
        form: ``"loss"`` or ``"outputs"``: how units are scored; see `significance`. With ``"outputs"`` the largest
            score is 1, and thresholds should be lower (0.1 and 0.0001 in the authors' perceptrons).
        by_balance: Part of the new units that goes where more units stayed than elsewhere; the rest goes anywhere.
        deepen: Add a block to a stack when a group within it has more than :math:`h(i, o) + 1` units.
        window_batches: Ordinary batches observed before an event.
        **common: When, where and how far; see `StructuralCallback`. ``num_units`` is what is added to all groups
            together, ``fraction`` a share of the units of all groups together; without either, one tenth.

    Example::

        trainer = L.Trainer(callbacks=[lg.NoisyHeuristics(every_n_epochs=4, num_units=16, num_decay_steps=500)])
    """

    measures: ClassVar[bool] = True

    def __init__(
        self,
        add_to_remove_ratio: float = 2.0,
        removes: bool = True,
        threshold_max: float = 0.5,
        threshold_min: float = 0.01,
        random_share: float = 0.05,
        num_decay_steps: int = 100,
        form: Form = "loss",
        by_balance: float = 0.7,
        deepen: bool = False,
        window_batches: int = 8,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not add_to_remove_ratio > 0:
            raise MisconfigurationException(f"`add_to_remove_ratio` should be above 0, found {add_to_remove_ratio!r}.")
        if not threshold_min <= threshold_max:
            raise MisconfigurationException(
                f"`threshold_min` should be at most `threshold_max`, found {threshold_min!r} and {threshold_max!r}."
            )
        if not 0 <= random_share < 1:
            raise MisconfigurationException(f"`random_share` should be in [0, 1), found {random_share!r}.")
        if num_decay_steps < 0:
            raise MisconfigurationException(f"`num_decay_steps` should be at least 0, found {num_decay_steps!r}.")
        if form not in ("loss", "outputs"):
            raise MisconfigurationException(f"`form` should be 'loss' or 'outputs', found {form!r}.")
        if not 0 <= by_balance <= 1:
            raise MisconfigurationException(f"`by_balance` should be in [0, 1], found {by_balance!r}.")
        if window_batches < 1:
            raise MisconfigurationException(f"`window_batches` should be at least 1, found {window_batches!r}.")
        self.add_to_remove_ratio = add_to_remove_ratio
        self.removes = removes
        self.threshold_max = threshold_max
        self.threshold_min = threshold_min
        self.random_share = random_share
        self.num_decay_steps = num_decay_steps
        self.form: Form = form
        self.by_balance = by_balance
        self.deepen = deepen
        self.window_batches = window_batches

        self._balance: dict[str, float] = {}
        self._added = 0
        self._cut: dict[str, int] = {}
        self._settled = 0
        self._fading: dict[str, _Fading] = {}
        self._faded_steps = 0
        self._faded_at = 0
        self._events_known = 0

    @override
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        if self._fading and self._faded_steps < self.num_decay_steps:
            return []  # an event of its own trigger, while units fade
        self._settle()
        groups = self._known(occasion)
        if not groups:
            return []
        gone = {name: fading.units for name, fading in self._fading.items()}
        if not gone and self.removes:
            gone = self._unfit(groups, occasion)
            if gone and self.num_decay_steps:
                by_name = {group.name: group for group in groups}
                self._fading = {name: _held(occasion.model, by_name[name], units) for name, units in gone.items()}
                self._faded_steps, self._faded_at = 0, occasion.step
                self._events_known = len(self.record)
                return []
        self._fading = {}
        return self._renewed(groups, gone, occasion)

    def _settle(self) -> None:
        """Count what came of the last event: a budget may have allowed less than was wanted."""
        name = type(self).__name__
        events = [e for e in self.record.events[self._settled :] if e.method == name and not e.is_depth]
        if events:
            self._balance = new_balance(self._balance, {e.group: e.after - e.before for e in events})
            self._added = sum(max(0, e.after - e.before + self._cut.get(e.group, 0)) for e in events)
            self._cut, self._settled = {}, len(self.record)

    def _known(self, occasion: Occasion) -> list[AxisGroup]:
        """Return the groups that can be judged, and say once which of them cannot."""
        groups = [group for group in occasion.groups if _can_fade(occasion.model, group)]
        if not self.removes or not groups:
            return groups
        copy = Overgrown(occasion.model, []).model.requires_grad_()
        unseen = Readers(copy, groups).unseen(copy, occasion.measured)
        self.leave_alone(unseen, UNSEEN)
        return [group for group in groups if group.name not in unseen]

    def _unfit(self, groups: Sequence[AxisGroup], occasion: Occasion) -> dict[str, list[int]]:
        scores = significance(occasion.model, groups, occasion.measured, self.form)
        return unfit_units(
            {group.name: (group, scores[group.name]) for group in groups},
            self._added,
            add_to_remove_ratio=self.add_to_remove_ratio,
            threshold_max=self.threshold_max,
            threshold_min=self.threshold_min,
            random_share=self.random_share,
            generator=occasion.generator("unfit"),
            least_units=occasion.least_units,
        )

    def _renewed(
        self, groups: Sequence[AxisGroup], gone: Mapping[str, list[int]], occasion: Occasion
    ) -> list[Proposal]:
        """Return the edits that cut units out and add new ones, and perhaps blocks."""
        num_units = in_all(groups, self.num_units, self.fraction, default=0.1)
        gains = shares(groups, num_units, self._balance, occasion.generator("shares"), self.by_balance)
        proposals = []
        for group in groups:
            gain, without = gains.get(group.name, 0), gone.get(group.name, [])
            if gain or without:
                edit = random_units(occasion.model, group, gain, occasion.generator(group.name), without)
                proposals.append(Proposal(edit))
        self._cut = {name: len(units) for name, units in gone.items()}
        self._settled = len(self.record)
        if self.deepen:
            deeper = {g.name for g in groups if is_large(g.size, *neighbours(occasion.model, g))}
            stacks = [s for s in occasion.stacks if s.obstacle is None and _holds(s, deeper)]
            if stacks:
                stack = min(stacks, key=lambda stack: len(stack.blocks))
                proposals.append(Proposal(BlockEdit(stack, len(stack.blocks))))
        return proposals

    # -- fading ----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._fading and trainer.global_step > self._faded_at:
            self._fade(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _fade(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        structure = self._run.live_structure(pl_module)
        if len(self.record) != self._events_known:
            self._begin_again(pl_module)
        self._faded_at = trainer.global_step
        self._faded_steps += 1
        factor = decay_factor(self._faded_steps, self.num_decay_steps)
        for name, fading in self._fading.items():
            fade_(pl_module, structure[name], fading, factor)
        if self._faded_steps == self.num_decay_steps:
            self._due = True  # the rest is an event

    def _begin_again(self, pl_module: pl.LightningModule) -> None:
        """Another callback has changed the model: hold what is there now; let go of units that may be others now."""
        factor = decay_factor(self._faded_steps, self.num_decay_steps)
        structure = self._run.live_structure(pl_module)
        moved = {e.group for e in self.record.events[self._events_known :] if e.what not in ("widen", "insert")}
        still = {}
        for name, fading in self._fading.items():
            if name not in structure.groups or name in moved:
                continue
            now = _held(pl_module, structure[name], fading.units)
            # what the last optimizer step did to the fan-out stays: it is small
            still[name] = now._replace(fan_out=now.fan_out / factor if factor else now.fan_out)
        self._fading = still
        self._events_known = len(self.record)

    @override
    def _say_nothing_to_do(self, proposals: Sequence[Proposal]) -> None:
        if not self._fading:
            super()._say_nothing_to_do(proposals)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        fading = {name: dict(value._asdict()) for name, value in self._fading.items()}
        own = {
            "balance": dict(self._balance),
            "added": self._added,
            "cut": dict(self._cut),
            "settled": self._settled,
            "fading": fading,
            "faded_steps": self._faded_steps,
            "faded_at": self._faded_at,
            "events_known": self._events_known,
        }
        return {**super().state_dict(), "noisy_heuristics": own}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        own = state_dict["noisy_heuristics"]
        self._balance, self._added = dict(own["balance"]), own["added"]
        self._cut, self._settled = dict(own["cut"]), own["settled"]
        self._fading = {name: _Fading(**value) for name, value in own["fading"].items()}
        self._faded_steps, self._faded_at = own["faded_steps"], own["faded_at"]
        self._events_known = own["events_known"]


def _can_fade(model: nn.Module, group: AxisGroup) -> bool:
    """Return whether units can be added and faded: nothing of their fan-out is frozen, nor all of their fan-in."""
    if group.obstacle is not None or not UnitVectors(model, group, "produced").axes:
        return False
    named = dict(model.named_parameters())
    readers = group.with_role("consumed")
    return bool(readers) and all(axis.tensor in named and named[axis.tensor].requires_grad for axis in readers)


def _holds(stack: Stack, names: set[str]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for name in names for block in stack.blocks)
