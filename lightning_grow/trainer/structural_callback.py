"""The one class that knows the Trainer: when -> observe -> propose -> apply -> record."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from typing_extensions import override

from lightning_grow.criteria.objective import MeasurementError
from lightning_grow.criteria.statistics import Statistic
from lightning_grow.planning import Plan
from lightning_grow.structure.axes import AxisGroup, Structure
from lightning_grow.trainer.budget import Budget, Meter, apply_changes_
from lightning_grow.trainer.editing import agree, editing, refuse_module, refuse_strategy
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.plateau import Plateau
from lightning_grow.trainer.probe import (
    count_of,
    example_inputs,
    largest_difference,
    objective_of,
    outputs_if_possible,
    run_eagerly,
    trace_module,
)
from lightning_grow.trainer.proposal import BlockEdit, Proposal, is_nothing
from lightning_grow.trainer.record import Record
from lightning_grow.trainer.reporting import log_final_sizes, log_sizes, loss_of, summary, to_events
from lightning_grow.trainer.resume import Restorer
from lightning_grow.trainer.run import CHECKPOINT_KEY, Run, run_of
from lightning_grow.trainer.scope import Scope
from lightning_grow.trainer.triggers import Trigger, finished_epochs
from lightning_grow.trainer.twins import twins_of
from lightning_grow.trainer.window import Window

log = logging.getLogger(__name__)


class StructuralCallback(pl.Callback, ABC):
    """Changes the architecture of a LightningModule while it trains. A method implements `propose`.

    The model, its optimizers, schedulers and the Trainer stay the same objects. An event happens between two optimizer
    steps, never within gradient accumulation, sanity checking or a tuner's trial. Several structural callbacks can
    work in one run: they share one structure and one record, and take turns, one event each step, in list order.

    Args:
        every_n_steps: An event each time so many optimizer steps are done.
        every_n_epochs: An event at the end of every n-th epoch, except the last. The default, with 1, if no other
            condition is given.
        at_steps: An event at each of these optimizer steps.
        on_plateau: Name of a logged metric: an event when it has not improved for ``patience`` epochs.
        patience: Epochs without improvement that make a plateau.
        min_delta: Smallest change of the metric that counts as an improvement.
        mode: Whether the metric should fall (``"min"``) or rise (``"max"``).
        start: No event before so many optimizer steps (with epochs or a plateau: epochs) are done.
        stop: No event after so many optimizer steps (epochs) are done.
        groups: Which groups and stacks to change: glob patterns of their names, as in `Structure`, of which
            ``"!pattern"`` excludes; or a `Plan`, or the path of a plan's YAML file, with limits for each of them.
        max_parameters: Largest number of parameters of the whole model.
        max_flops: Most floating-point operations of ``forward(example_input_array)``.
        max_latency_ms: Longest time of ``forward(example_input_array)`` in eval mode, in milliseconds.
        num_units: Units by which each group changes at an event, or
        fraction: the share of its units by which it changes; rounded up to whole steps of the group.
        new_state: Squared gradients in the optimizer for new units: the ``"mean"`` of the others, or ``"zeros"``.
        seed: Seed of the method's own random draws; the global random state is never touched.
        verify: Compare what a training step returns in eval mode before and after each event, on the same batch.
        verbose: Show the structure once, on rank zero.

    Raises:
        MisconfigurationException: If an argument is out of range, or (in ``setup``, ``on_fit_start`` and at the first
            batch) the model, the strategy or the budget cannot work.
    """

    shrinks: ClassVar[bool] = False
    """Whether the method makes models smaller: it then starts above a budget, and stops when it is reached."""

    measures: ClassVar[bool] = False
    """Whether the method measures the loss of copies of the model: the window then keeps its batches for it."""

    window_batches: int = 8
    """Ordinary batches that the statistics observe before an event, for methods that look at data."""

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        at_steps: list[int] | None = None,
        on_plateau: str | None = None,
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Literal["min", "max"] = "min",
        start: int = 0,
        stop: int | None = None,
        groups: list[str] | str | Plan | None = None,
        max_parameters: int | None = None,
        max_flops: float | None = None,
        max_latency_ms: float | None = None,
        num_units: int | None = None,
        fraction: float | None = None,
        new_state: Literal["mean", "zeros"] = "mean",
        seed: int = 0,
        verify: bool = False,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        if every_n_steps is None and every_n_epochs is None and at_steps is None and on_plateau is None:
            every_n_epochs = 1
        self.trigger = Trigger(
            every_n_steps, every_n_epochs, at_steps, on_plateau, start, stop, patience, min_delta, mode
        )
        self.budget = Budget(max_parameters, max_flops, max_latency_ms)
        self.scope = Scope.of(groups)
        if num_units is not None and fraction is not None:
            raise MisconfigurationException(
                f"Expected `num_units` or `fraction`, found both: {num_units!r} and {fraction!r}."
            )
        if num_units is not None and num_units < 1:
            raise MisconfigurationException(f"`num_units` should be at least 1, found {num_units!r}.")
        if fraction is not None and not fraction > 0:
            raise MisconfigurationException(f"`fraction` should be above 0, found {fraction!r}.")
        if new_state not in {"mean", "zeros"}:
            raise MisconfigurationException(f"`new_state` should be 'mean' or 'zeros', found {new_state!r}.")
        self.groups = groups
        self.num_units = num_units
        self.fraction = fraction
        self.new_state = new_state
        self.seed = seed
        self.verify = verify
        self.verbose = verbose

        # the Trainer asks for the key at every hook of every step
        self._state_key = self._generate_state_key(
            every_n_steps=every_n_steps,
            every_n_epochs=every_n_epochs,
            at_steps=at_steps,
            on_plateau=on_plateau,
            groups=[*groups.groups, *groups.stacks] if isinstance(groups, Plan) else groups,
        )
        self._run = Run()
        self._restorer: Restorer | None = None
        self._plateau = Plateau(self.trigger)
        self._is_ready = False
        self._seen_step = 0
        self._due = False
        self._window: Window | None = None
        self._saved_window: dict[str, Any] | None = None
        self._log_countdown = 0
        self._said_why = False
        self._left_alone: set[str] = set()

    # -- what a method implements ----------------------------------------------------------------------------------

    @abstractmethod
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        """Return the changes that the method wants now, most wanted first; at most one for each group or stack.

        Pure: equal on all ranks because everything in ``occasion`` is.
        """

    def statistics(self, structure: Structure, groups: Sequence[AxisGroup]) -> Mapping[str, Statistic]:
        """Return what to observe between the trigger and the event; nothing, by default."""
        del structure, groups
        return {}

    def check_scope(self, model: nn.Module, structure: Structure) -> None:
        """Raise, before the first batch, if there is nothing that the callback may change.

        Raises:
            MisconfigurationException: With what there is.
        """
        del model
        self.scope.check(structure, shrink=self.shrinks)

    def leave_alone(self, names: Iterable[str], why: str, level: int = logging.INFO) -> None:
        """Say, once of each and on rank zero, which of the chosen groups the method cannot work on, and why.

        Args:
            names: The groups.
            why: Why, and perhaps what to do.
            level: Level of the log.
        """
        new = [name for name in names if name not in self._left_alone]
        self._left_alone |= set(new)
        if new:
            listed = ", ".join(f"'{name}'" for name in new)
            rank_zero_only(log.log)(level, "%s leaves %s alone: %s", type(self).__name__, listed, why)

    # -- what a user may read --------------------------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """Everything that happened to the model in this run, by this callback and by others."""
        return self._run.record

    @property
    def structure(self) -> Structure | None:
        """The structure of the model, as it was after the last event; None before the first training batch."""
        return self._run.structure

    @property
    @override
    def state_key(self) -> str:
        return self._state_key

    # -- before training -------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_strategy(trainer.strategy)
            refuse_module(pl_module)
        self._run = run_of(pl_module)
        self._restorer = Restorer(pl_module, trainer)
        self._restorer.install()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_module(pl_module, trainer.optimizers)
        self._run.reorder_(pl_module, trainer.optimizers)
        if self.budget.is_limited:
            excess = self._meter(trainer, pl_module, Structure(groups={})).excess()
            if excess and not self.shrinks:
                listed = "; ".join(f"{n}={limit:,} but the model has {cost:,}" for n, (cost, limit) in excess.items())
                raise MisconfigurationException(
                    f"The budget of {type(self).__name__} is already exceeded before training: {listed}. Raise the "
                    "limit, or begin with a smaller model."
                )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        self._run.last_event_step = -1

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._is_ready:
            return
        if not self._run.is_current(pl_module):
            self._run.structure = trace_module(trainer, pl_module, batch, batch_idx)
            if self.verbose:
                rank_zero_only(log.info)("%s\n%s", type(pl_module).__name__, self._run.structure)
        self._is_ready = True
        self.check_scope(pl_module, self._run.live_structure(pl_module))
        self._run.begin(pl_module)
        self._begin_to_log(trainer)
        if self._saved_window is not None:
            self._open_window(pl_module, self._saved_window)
            self._saved_window = None

    # -- while training --------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._run.awaits_loss and self._run.last_event_step != trainer.global_step:
            self._run.answer(loss_of(outputs))
        if self._window is not None:
            self._window.saw(batch, batch_idx)
        finished = finished_epochs(trainer) if self.trigger.every_n_epochs is not None else None
        step = trainer.global_step
        if step == self._seen_step and finished is None:
            return
        if self.trigger.after_step(self._seen_step, step, finished):
            self._due = True
        stepped = step != self._seen_step
        self._seen_step = step
        if self._due and stepped:
            self._advance(trainer, pl_module, outputs, batch, batch_idx)
        if self._log_countdown > 0:
            self._log_countdown -= 1
            self._log_sizes(trainer, pl_module, at_epoch_end=False)

    def _advance(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Open the window, wait for it to fill, or let the event happen: an optimizer step has just been done."""
        if self._window is None and self._open_window(pl_module):
            return
        if self._window is not None and self._window.batches < self.window_batches:
            return
        if self._run.last_event_step == trainer.global_step:
            return  # another callback's turn; the next step is ours
        window = self.close_window()
        self._due = False
        self._event(trainer, pl_module, window or Window({}), outputs, batch, batch_idx)

    def _event(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        window: Window,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        structure = self._run.live_structure(pl_module)
        try:
            proposals = self.propose(self._occasion(trainer, pl_module, structure, window))
        except MeasurementError as error:
            rank_zero_only(log.warning)("%s changes nothing this time: %s", type(self).__name__, error)
            return
        proposals = [p for p in proposals if not is_nothing(p.change)]
        proposals = self.scope.within_limits(proposals, structure)
        fitting = self._within_budget(trainer, pl_module, structure, proposals)
        changes = [p.change for p in fitting]
        agree(trainer, changes, trainer.global_step)
        if not changes:
            self._say_nothing_to_do(proposals)
            return
        for other in structural_callbacks(trainer):
            other.close_window()  # hooks on parameters go before these change
        before = outputs_if_possible(trainer, pl_module, batch, batch_idx) if self.verify else None
        with editing(trainer) as module:
            twins = [twin.within(module) for twin in twins_of(module, trainer)]
            apply_changes_(module, changes, trainer.optimizers, self.new_state)
            for twin in twins:
                apply_changes_(twin, changes)
        if any(isinstance(change, BlockEdit) for change in changes):
            self._run.structure = trace_module(trainer, pl_module, batch, batch_idx)
        structure = self._run.live_structure(pl_module)
        difference = None
        if before is not None:
            difference = largest_difference(before, outputs_if_possible(trainer, pl_module, batch, batch_idx))
        events = to_events(
            fitting,
            structure,
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            method=type(self).__name__,
            parameters=count_of(pl_module),
            loss=loss_of(outputs),
            difference=difference,
        )
        self._run.add(events, trainer.global_step)
        self._begin_to_log(trainer)
        rank_zero_only(log.info)("%s", summary(events))

    def _within_budget(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, structure: Structure, proposals: list[Proposal]
    ) -> list[Proposal]:
        if not self.budget.is_limited or not proposals:
            return proposals
        meter = self._meter(trainer, pl_module, structure)
        if self.shrinks:
            return [] if meter.fits() else proposals
        return meter.fit(proposals)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._due |= self._plateau.reached(trainer, epoch_is_over=False)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._due |= self._plateau.reached(trainer, epoch_is_over=True)
        self._log_sizes(trainer, pl_module, at_epoch_end=True)

    # -- at the end ------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.close_window()
        if self._run.structure is not None:
            log_final_sizes(trainer.loggers, *self._sizes(pl_module))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        self.close_window()
        if self._restorer is not None:
            self._restorer.release()
            self._restorer = None
        self._is_ready = False

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "due": self._due,
            "plateau": self._plateau.state_dict(),
            "window": None if self._window is None else self._window.state_dict(),  # None: due, and observed anew
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._due = state_dict["due"]
        self._plateau.load_state_dict(state_dict["plateau"])
        self._saved_window = state_dict["window"]

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if CHECKPOINT_KEY not in checkpoint:
            checkpoint[CHECKPOINT_KEY] = run_of(pl_module).to_checkpoint(pl_module, trainer.optimizers)

    # -- private ---------------------------------------------------------------------------------------------------

    def _occasion(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        structure: Structure,
        window: Window,
    ) -> Occasion:
        groups = tuple(self.scope.groups(structure, shrink=self.shrinks, with_room=True))
        stacks = tuple(self.scope.stacks(structure, shrink=self.shrinks, with_room=True))
        least = self.scope.least_units(groups)
        objective = objective_of(trainer, window.kept) if self.measures else None
        return Occasion(
            pl_module,
            structure,
            groups,
            stacks,
            window.reduced(trainer),
            trainer.global_step,
            self.seed,
            least,
            objective,
        )

    def _meter(self, trainer: pl.Trainer, pl_module: pl.LightningModule, structure: Structure) -> Meter:
        inputs = example_inputs(trainer, pl_module) if self.budget.needs_running else None
        forward = None
        if inputs is not None:
            args, kwargs = inputs
            forward = lambda model: run_eagerly(model, *args, **kwargs)  # noqa: E731
        return Meter(self.budget, pl_module, structure, forward, trainer.strategy.broadcast)

    def _open_window(self, pl_module: pl.LightningModule, saved: dict[str, Any] | None = None) -> bool:
        """Begin to observe; return whether there is anything to observe."""
        structure = self._run.live_structure(pl_module)
        groups = self.scope.groups(structure, shrink=self.shrinks, with_room=True)
        statistics = self.statistics(structure, groups)
        if not statistics and not self.measures:
            return False
        self._window = Window(dict(statistics), keeps=self.measures)
        if saved is not None:
            self._window.load_state_dict(saved, pl_module.device)
        self._window.attach(pl_module)
        return True

    def close_window(self) -> Window | None:
        """Stop observing, at an event or because another callback's is about to change the model."""
        window, self._window = self._window, None
        if window is not None:
            window.detach()
        return window

    def _sizes(self, pl_module: pl.LightningModule) -> tuple[dict[str, int], int]:
        """Return the sizes of what the user chose, and the number of parameters."""
        structure = self._run.structure or Structure(groups={})
        sizes, parameters = self._run.sizes(pl_module)
        names = [group.name for group in self.scope.groups(structure, shrink=self.shrinks)]
        names += [stack.name for stack in self.scope.stacks(structure, shrink=self.shrinks)]
        return {name: sizes[name] for name in names}, parameters

    def _log_sizes(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, at_epoch_end: bool) -> None:
        if self._run.structure is not None:
            log_sizes(trainer, pl_module, *self._sizes(pl_module), at_epoch_end=at_epoch_end)

    def _begin_to_log(self, trainer: pl.Trainer) -> None:
        """Log for so many steps that one of them is a step at which the loggers listen."""
        self._log_countdown = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def _say_nothing_to_do(self, proposals: Sequence[Proposal]) -> None:
        """Tell once why an event changes nothing."""
        if self._said_why:
            return
        self._said_why = True
        where = "the structure" if self.scope.plan is None else f"the structure, their limits in {self.scope.source}"
        why = f"the chosen groups and stacks allow no change (their obstacles stand in {where})"
        if proposals:
            limits = ", ".join(f"{n}={limit:,}" for n, limit in vars(self.budget).items() if limit is not None)
            why = f"the budget is reached ({limits})"
        rank_zero_only(log.info)("%s: nothing to do, %s", type(self).__name__, why)


def structural_callbacks(trainer: pl.Trainer) -> list[StructuralCallback]:
    """Return the structural callbacks of a trainer, in the order in which they take turns."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, StructuralCallback)]
