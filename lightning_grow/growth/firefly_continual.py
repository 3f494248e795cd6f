"""Firefly for one task after another: what earlier tasks use is locked, and each task keeps a network of its own.

The continual-learning variant of Wu, Liu, Stone, Liu, "Firefly Neural Architecture Descent: a General Approach for
Growing Neural Networks", NeurIPS 2020, arXiv:2102.08574. How masks are kept is our reading: the paper's details and its
code were not available to us.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_grow.criteria.candidates import Candidates, searchable
from lightning_grow.criteria.selection import best_units
from lightning_grow.structure.axes import Structure, tensor_of
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.layout import entry_share
from lightning_grow.surgery.apply import apply_
from lightning_grow.surgery.edit import prune
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import Proposal, in_all
from lightning_grow.trainer.structural_callback import StructuralCallback

Model = TypeVar("Model", bound=nn.Module)


def task_network(model: Model, structure: Structure, sizes: Mapping[str, int]) -> Model:
    """Return the network of an earlier task: a copy of the model without the units that came later.

    The copy has the shapes that the model had when the task was learned, so that with locked weights (`locked_entries`)
    its outputs are the same bit by bit.

    Args:
        model: The model; it is not changed.
        structure: Its structure.
        sizes: Units of the task by group name, the first ones of each group; groups that are not named stay whole.

    Raises:
        StructureError: If a group has fewer units than the task.
    """
    _check(structure, sizes)
    edits = [prune(structure[name], range(size, structure[name].size)) for name, size in sizes.items()]
    found = copy.deepcopy(model)
    apply_(found, [edit for edit in edits if not edit.is_identity])
    return found


def locked_entries(
    model: nn.Module, structure: Structure, sizes: Mapping[str, int], free: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return which entries of the parameters and buffers the network of an earlier task has.

    An entry is locked if all units that it belongs to are of the task: weights between two old units, and all that
    belongs to no group (biases of the output). Rows and columns of units that came later are not.

    Args:
        model: The model; only read.
        structure: Its structure.
        sizes: Units of the task by group name, the first ones of each group; all units of other groups are locked.
        free: Glob patterns of parameters and buffers that the task does not use, heads of later tasks for example.

    Returns:
        By name, a bool tensor of the shape of the parameter or buffer; those without a locked entry are left out.

    Raises:
        StructureError: If a group has fewer units than the task.
    """
    _check(structure, sizes)
    units = {
        name: (torch.arange(group.size) < sizes.get(name, group.size)).double()
        for name, group in structure.groups.items()
    }
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {
        name: torch.ones(tensor.shape, dtype=torch.bool)
        for name, tensor in named.items()
        if not any(fnmatchcase(name, pattern) for pattern in free)
    }
    counts = {name: group.size for name, group in structure.groups.items()}
    for group in structure.groups.values():
        for axis in group.axes:
            if axis.tensor in found:
                mask = found[axis.tensor]
                of_axis = entry_share(axis.layout, counts, units) == 1
                mask &= of_axis.reshape([-1 if dim == axis.dim else 1 for dim in range(mask.ndim)])
    return {name: mask.to(named[name].device) for name, mask in found.items() if bool(mask.any())}


def _check(structure: Structure, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if structure[name].size < size:
            raise StructureError(
                f"'{name}' has {structure[name].size} units, but an earlier task uses {size}: a model whose units were "
                "removed cannot answer for it any more."
            )


class FireflyContinual(StructuralCallback):
    """Grows new units for each of several tasks, and locks what earlier tasks use.

    Candidates are new units, half of which begin as trainable copies of units that there are; the best are kept, as in
    `Firefly`. A unit of an earlier task is never split, for that would move it. When a task begins (`begin`), all that
    there is is locked: gradients of locked entries are zero before the optimizer sees them, and after each batch locked
    entries are put back as they were, so that neither momentum nor weight decay nor statistics of norms move them.
    `network` gives the network of an earlier task, whose outputs stay the same bit by bit. A new task may use all
    units of the old ones.

    Args:
        task: Name of the task that is learned first.
        own: By task name, glob patterns of parameters and buffers that only this task uses, such as its head. They are
            free until their task has been learned.
        tasks: Units by group name of the tasks that were learned before, by task name: `tasks` of an earlier callback.
        num_candidates: New units tried in each group; by default as many as it has, at least 16.
        radius: Amplitude of a candidate, relative to the weights around it.
        search_steps: Training steps of the candidates for each lot of groups that share no tensor.
        search_lr: Step of a candidate's vectors in the search, relative to their length.
        points: Midpoints of the integral along the ray.
        window_batches: Ordinary batches observed before an event, on which candidates are trained and compared.
        **common: When, where and how far; see `StructuralCallback`. ``num_units`` is for all groups together,
            ``fraction`` a share of the units of all groups together; without either, one tenth is added.

    Attributes:
        tasks: By name of each learned task, its units by group name: the first ones of each group.

    Example::

        grow = lg.FireflyContinual(task="a", own={"a": ["heads.a.*"], "b": ["heads.b.*"]}, num_units=8)
        L.Trainer(callbacks=[grow]).fit(module, task_a)
        grow.begin("b", module)
        L.Trainer(callbacks=[grow]).fit(module, task_b)
        grow.network(module, "a")  # answers as it did before task b
    """

    measures: ClassVar[bool] = True

    def __init__(
        self,
        task: str = "0",
        own: dict[str, list[str]] | None = None,
        tasks: dict[str, dict[str, int]] | None = None,
        num_candidates: int | None = None,
        radius: float = 0.1,
        search_steps: int = 16,
        search_lr: float = 0.05,
        points: int = 3,
        window_batches: int = 8,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if task in (tasks or {}):
            raise MisconfigurationException(f"`task` should be new, but {task!r} is one of `tasks`, and locked.")
        at_least = {"num_candidates": num_candidates, "points": points, "window_batches": window_batches}
        for name, number in at_least.items():
            if number is not None and number < 1:
                raise MisconfigurationException(f"`{name}` should be at least 1, found {number!r}.")
        if search_steps < 0:
            raise MisconfigurationException(f"`search_steps` should be at least 0, found {search_steps!r}.")
        for name, value in {"radius": radius, "search_lr": search_lr}.items():
            if not value > 0:
                raise MisconfigurationException(f"`{name}` should be above 0, found {value!r}.")
        self.task = task
        self.own = own or {}
        self.tasks = {name: dict(sizes) for name, sizes in (tasks or {}).items()}
        self.num_candidates = num_candidates
        self.radius = radius
        self.search_steps = search_steps
        self.search_lr = search_lr
        self.points = points
        self.window_batches = window_batches
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._masks: tuple[tuple[int, int], dict[str, Tensor]] | None = None

    # -- tasks -----------------------------------------------------------------------------------------------------

    def begin(self, task: str, model: nn.Module) -> None:
        """End the present task, lock all that it uses, and begin another. Between two fits.

        Args:
            task: Name of the new task.
            model: The model.

        Raises:
            MisconfigurationException: If the task was learned before, or nothing has been trained yet.
        """
        if task == self.task or task in self.tasks:
            raise MisconfigurationException(f"Task {task!r} was begun before: its units cannot be unlocked.")
        self.tasks[self.task] = self._known(model).sizes_in(model)
        self.task = task

    def network(self, model: Model, task: str) -> Model:
        """Return the network of a task: a copy of the model, without units that came later.

        Raises:
            MisconfigurationException: If there is no such task, or nothing has been trained yet.
        """
        if task != self.task and task not in self.tasks:
            raise MisconfigurationException(f"There is no task {task!r}, but {', '.join([*self.tasks, self.task])}.")
        structure = self._known(model)
        return task_network(model, structure, self.tasks.get(task, structure.sizes_in(model)))

    def _known(self, model: nn.Module) -> Structure:
        if self.structure is None:
            raise MisconfigurationException("The structure of the model is known once it has been trained.")
        return self.structure.resized(self.structure.sizes_in(model))

    # -- while training --------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._masks = None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._kept = {}
        if self.tasks:
            for name, mask in self._locked(pl_module).items():
                self._kept[name] = mask, tensor_of(pl_module, name).detach().clone()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for name, (mask, _) in self._kept.items():
            gradient = tensor_of(pl_module, name).grad
            if gradient is not None:
                gradient.masked_fill_(mask, 0)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with torch.no_grad():
            for name, (mask, value) in self._kept.items():
                tensor = tensor_of(pl_module, name)
                tensor.copy_(torch.where(mask, value, tensor))
        self._kept = {}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        groups = searchable(occasion.model, occasion.groups)
        if not groups:
            return []
        num_units = in_all(groups, self.num_units, self.fraction, default=0.1)
        generator = occasion.generator(type(self).__name__)
        num_new = self.num_candidates or max(16, *(group.size for group in groups))
        candidates = Candidates(
            occasion.model,
            groups,
            occasion.measured,
            generator,
            num_new=num_new,
            radius=self.radius,
            splits=False,
            copies=num_new // 2,
        )
        candidates.train_(self.search_steps, lr=self.search_lr)
        gains = {name: (candidates.groups[name], -e.new) for name, e in candidates.effects(self.points).items()}
        chosen = best_units(gains, num_units)
        return [
            Proposal(candidates.edit(name, [], new), float(gains[name][1][new].sum())) for name, new in chosen.items()
        ]

    def _locked(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """Return what all earlier tasks together use: the largest of them, since each task has all units before it.

        It is worked out again when the model or the tasks have changed, not for each batch.
        """
        state = len(self.record), len(self.tasks)
        if self._masks is None or self._masks[0] != state:
            self._masks = state, self._found_locked(pl_module)
        return self._masks[1]

    def _found_locked(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        structure = self._known(pl_module)
        sizes: dict[str, int] = {}
        for of_task in self.tasks.values():
            sizes = {name: max(size, sizes.get(name, 0)) for name, size in of_task.items()}
        free = [pattern for task, patterns in self.own.items() if task not in self.tasks for pattern in patterns]
        return locked_entries(pl_module, structure, sizes, free)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "task": self.task, "tasks": self.tasks}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.task, self.tasks = state_dict["task"], state_dict["tasks"]
