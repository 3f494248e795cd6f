"""What all structural callbacks of one module share: its structure, and the record of what was done to it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Structure, layout_length
from lightning_grow.structure.states import is_state, state_at
from lightning_grow.trainer.record import Event, Record

CHECKPOINT_KEY = "lightning_grow"
_VERSION = 1


class Run:
    """The structure and the history of one LightningModule; plain data.

    Attributes:
        structure: The structure as it is now; None until it was traced or restored.
        record: What happened so far.
        last_event_step: Optimizer steps done at the last event: one event each step.
    """

    def __init__(self) -> None:
        self.structure: Structure | None = None
        self.record = Record()
        self.last_event_step = -1
        self._parameter_order: list[list[list[str]]] = []
        self._unanswered: list[Event] = []
        self._sizes: tuple[dict[str, int], int] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self  # copies of a module (weight averaging, trials) follow the same history

    def is_current(self, module: nn.Module) -> bool:
        """Return whether the structure describes the module as it is now, whatever its unit counts."""
        if self.structure is None:
            return False
        try:
            sizes = self.structure.sizes_in(module)
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            return all(
                tensors[axis.tensor].shape[axis.dim] == layout_length(axis.layout, sizes)
                for group in self.structure.groups.values()
                for axis in group.axes
            )
        except (AttributeError, KeyError, IndexError):
            return False

    def live_structure(self, module: nn.Module) -> Structure:
        """Return the structure with the unit counts that the module has now."""
        if self.structure is None:
            raise RuntimeError("The structure is known from the first training batch on.")
        self.structure = self.structure.resized(self.structure.sizes_in(module))
        return self.structure

    def sizes(self, module: nn.Module) -> tuple[dict[str, int], int]:
        """Return the units of each group and the blocks of each stack, and the number of parameters: read once."""
        if self._sizes is None:
            structure = self.live_structure(module)
            sizes = {name: group.size for name, group in structure.groups.items()}
            sizes |= {name: len(stack.blocks) for name, stack in structure.stacks.items()}
            self._sizes = sizes, sum(parameter.numel() for parameter in module.parameters())
        return self._sizes

    def begin(self, module: nn.Module) -> None:
        """Note the sizes that training begins with, once."""
        self._sizes = None
        if not self.record.parameters:
            sizes, self.record.parameters = self.sizes(module)
            self.record.sizes = dict(sizes)

    def add(self, events: Sequence[Event], step: int) -> None:
        """Add the events of one step to the record."""
        self._sizes = None
        self.record.events.extend(events)
        self._unanswered.extend(events)
        self.last_event_step = step

    @property
    def awaits_loss(self) -> bool:
        """Whether there are events whose effect on the loss is not known yet."""
        return bool(self._unanswered)

    def answer(self, loss: float | None) -> None:
        """Note the training loss of the first batch after the last events."""
        for event in self._unanswered:
            event.loss_after = loss
        self._unanswered = []

    def to_checkpoint(self, module: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, Any]:
        """Return everything that another process needs to take on the shape of this module, as plain data."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return {
            "version": _VERSION,
            "structure": None if self.structure is None else self.live_structure(module).to_dict(),
            "record": self.record.to_dict(),
            "buffers": self._unsaved_buffers(module),
            "states": self._states(module),
            "optimizers": [
                [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
                for optimizer in optimizers
            ],
        }

    def _unsaved_buffers(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the buffers that follow widths and are in no state dict, once something has changed.

        Which of the first entries are left in them, and where copies went, only their values tell.
        """
        if self.structure is None or not self.record.events:
            return {}
        saved = module.state_dict().keys()
        names = {axis.tensor for group in self.structure.groups.values() for axis in group.axes} - saved
        buffers = dict(module.named_buffers(remove_duplicate=False))
        return {name: buffers[name].detach().clone() for name in sorted(names & buffers.keys())}

    def _states(self, module: nn.Module) -> list[tuple[str, str, Tensor]]:
        """Return the tensors that modules keep beside parameters and buffers, and that follow widths, likewise."""
        if self.structure is None or not self.record.events:
            return []
        attributes = (a for group in self.structure.groups.values() for a in group.attributes if is_state(a.name))
        places = sorted({(a.module, a.name) for a in attributes})
        found = [(path, name, state_at(module.get_submodule(path), name)) for path, name in places]
        return [(path, name, state.detach().clone()) for path, name, state in found if state is not None]

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `to_checkpoint` wrote; the module has its shape already."""
        self.structure = None if saved["structure"] is None else Structure.from_dict(saved["structure"])
        self.record = Record.from_dict(saved["record"])
        self._parameter_order = saved["optimizers"]
        self._sizes = None
        last = {event.step for event in self.record.events[-1:]}
        self._unanswered = [e for e in self.record.events if e.step in last and e.loss_after is None]

    def reorder_(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Give the parameters of new optimizers the order, and groups, that they have in the checkpoint.

        ``Optimizer.load_state_dict`` goes by position. Parameters of blocks that were inserted in mid-run may have
        another position in an optimizer that is made after the fact.
        """
        parameters = dict(module.named_parameters())
        for optimizer, groups in zip(optimizers, self._parameter_order, strict=False):
            wanted = [[parameters.get(name) for name in group] for group in groups]
            flat = [p for group in wanted for p in group if p is not None]
            found = {id(p) for group in optimizer.param_groups for p in group["params"]}
            complete = len(flat) == sum(len(group) for group in groups) and {id(p) for p in flat} == found
            if complete and len(groups) == len(optimizer.param_groups):
                for group, order in zip(optimizer.param_groups, wanted, strict=True):
                    group["params"][:] = order
        self._parameter_order = []


_RUNS: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()


def run_of(module: pl.LightningModule) -> Run:
    """Return the run of a module: one for each module and process, whichever callbacks and trainers work on it."""
    return _RUNS.setdefault(module, Run())
