"""Take on the shape of a checkpoint before its weights are loaded: larger, smaller, deeper, or of a fresh model.

On resume Lightning goes through setup hooks, ``LightningModule.on_load_checkpoint``, the weights, callbacks' states,
``configure_optimizers`` and optimizer states, in this order. So for as long as a stage runs, the module's own
``on_load_checkpoint`` is extended to remember what the checkpoint says under ``"lightning_grow"``; a pre-hook on
``load_state_dict`` then repeats (or takes back) changes of depth and gives every tensor its shape, and the optimizers
are made for the right parameters afterwards. ``on_save_checkpoint`` is extended too, so that checkpoints of weights
only carry the history as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_grow.structure.axes import Structure, layout_length, stack_from_dict
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.states import put_state, state_at
from lightning_grow.surgery.depth import insert_, remove_
from lightning_grow.surgery.kernels import kernels_of
from lightning_grow.surgery.restore import resize_like_
from lightning_grow.trainer.record import Event, Record
from lightning_grow.trainer.run import CHECKPOINT_KEY, Run, run_of
from lightning_grow.trainer.twins import twins_of

Module = TypeVar("Module", bound=pl.LightningModule)
_EXTENDED = ("on_save_checkpoint", "on_load_checkpoint")


class Restorer:
    """Lets one module take any checkpoint of its run, from `install` to `release`.

    Args:
        module: The module.
        trainer: The trainer that runs it; its optimizers and its callbacks' copies of the module are looked up there.
    """

    def __init__(self, module: pl.LightningModule, trainer: pl.Trainer | None = None) -> None:
        self.module = module
        self.trainer = trainer
        self._pending: dict[str, Any] | None = None
        self._handle: RemovableHandle | None = None
        self._own: dict[str, Any] = {}

    @property
    def run(self) -> Run:
        """The run of the module."""
        return run_of(self.module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Restorer:
        return self  # a copy of the module calls us with itself, or never

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "trainer": None, "_pending": None, "_handle": None, "_own": {}}

    def install(self) -> None:
        """Hook into loading and saving, unless another callback already has."""
        attributes = vars(self.module)
        if isinstance(getattr(getattr(attributes.get(_EXTENDED[0]), "func", None), "__self__", None), Restorer):
            return
        self._handle = self.module.register_load_state_dict_pre_hook(self._before_weights)  # type: ignore[no-untyped-call]
        self._own = {name: attributes[name] for name in _EXTENDED if name in attributes}
        for name in _EXTENDED:
            attributes[name] = partial(getattr(self, f"_{name}"), getattr(self.module, name))

    def release(self) -> None:
        """Undo `install`."""
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        for name in _EXTENDED:
            vars(self.module).pop(name, None)
        vars(self.module).update(self._own)

    def _on_save_checkpoint(self, original: Any, checkpoint: dict[str, Any]) -> None:
        optimizers = () if self.trainer is None else self.trainer.optimizers
        checkpoint.setdefault(CHECKPOINT_KEY, self.run.to_checkpoint(self.module, optimizers))
        original(checkpoint)

    def _on_load_checkpoint(self, original: Any, checkpoint: dict[str, Any]) -> None:
        original(checkpoint)
        saved = checkpoint.get(CHECKPOINT_KEY)
        self._pending = None if saved is None else dict(saved)
        for twin in () if self.trainer is None else twins_of(self.module, self.trainer):
            take_shape_(twin.within(self.module), checkpoint["state_dict"], self.run, self._pending)

    def _before_weights(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_other: object) -> None:
        state_dict = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        take_shape_(module, state_dict, self.run, self._pending)
        if module is self.module and self._pending is not None:
            self.run.restore(self._pending)
            self._pending = None


def take_shape_(module: nn.Module, state_dict: Mapping[str, Any], run: Run, saved: Mapping[str, Any] | None) -> None:
    """Give a module the depth and the widths of a state dict, whose values are loaded afterwards.

    With ``strict_loading=False``, tensors that are missing stay as they are.

    Args:
        module: A fresh model, or one of the run at any other time.
        state_dict: What will be loaded.
        run: What was done to the module in this process.
        saved: What the checkpoint says about its run; None if it says nothing.

    Raises:
        StructureError: If the state dict is of another model. The module is unchanged.
    """
    done, wanted = run.record.depth_events(), run.record.depth_events()
    structure, buffers, states = run.structure, {}, []
    kernels = run.record.has_larger_kernels
    if saved is not None:
        kernels = kernels or Record.from_dict(saved["record"]).has_larger_kernels
        buffers, states = saved.get("buffers", {}), saved.get("states", [])
        structure = structure if saved["structure"] is None else Structure.from_dict(saved["structure"])
        if set(state_dict) != set(module.state_dict()):
            wanted = Record.from_dict(saved["record"]).depth_events()
    _follow_depth_(module, done, wanted)
    try:
        if structure is not None and (buffers or states or _other_shapes(module, state_dict)):
            _refuse_other_model(module, state_dict, structure, kernels=kernels)
            if not getattr(module, "strict_loading", True):
                state_dict = {name: state_dict.get(name, own) for name, own in module.state_dict().items()}
            resize_like_(module, {**state_dict, **buffers}, structure)
            for path, name, state in states:
                own = state_at(module.get_submodule(path), name)
                if own is not None:  # else there will be one when the module has run
                    put_state(module.get_submodule(path), name, state.to(own.device, own.dtype))
    except BaseException:
        _follow_depth_(module, wanted, done)
        raise


def load_from_checkpoint(cls: type[Module], checkpoint_path: str | Path, **kwargs: Any) -> Module:
    """Do as ``cls.load_from_checkpoint(checkpoint_path, **kwargs)``, for a model that grew or shrank during training.

    The model is built with the hyperparameters it began with, takes on the depth and the widths of the checkpoint, and
    then its weights.

    Args:
        cls: The class of the LightningModule.
        checkpoint_path: A checkpoint that was saved with a structural callback in the Trainer.
        **kwargs: As for ``LightningModule.load_from_checkpoint``.

    Raises:
        StructureError: If the checkpoint is of another model.

    Example::

        model = lg.load_from_checkpoint(MyModel, "best.ckpt")
    """
    with _taking_shape(cls):
        return cls.load_from_checkpoint(checkpoint_path, **kwargs)


@contextlib.contextmanager
def _taking_shape(cls: type[pl.LightningModule]) -> Iterator[None]:
    own = vars(cls).get("on_load_checkpoint")
    original = cls.on_load_checkpoint

    def on_load_checkpoint(self: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        original(self, checkpoint)
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None:
            raise MisconfigurationException(
                f"The checkpoint holds no '{CHECKPOINT_KEY}' entry: it was saved without a structural callback. Use "
                f"{cls.__name__}.load_from_checkpoint, with the hyperparameters of the model that was saved."
            )
        run = run_of(self)
        take_shape_(self, checkpoint["state_dict"], run, saved)
        run.restore(saved)

    cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if own is None:
            del cls.on_load_checkpoint
        else:
            cls.on_load_checkpoint = own  # type: ignore[method-assign]


def _follow_depth_(module: nn.Module, done: Sequence[Event], wanted: Sequence[Event]) -> None:
    """Take back the changes of depth that the checkpoint does not know, and repeat those it does."""
    common = 0
    while common < min(len(done), len(wanted)) and _same(done[common], wanted[common]):
        common += 1
    for event in reversed(done[common:]):
        _change_depth_(module, event, undo=True)
    for event in wanted[common:]:
        _change_depth_(module, event)


def _change_depth_(module: nn.Module, event: Event, *, undo: bool = False) -> None:
    stack, at = (event.stack_after if undo else event.stack), event.at
    if stack is None or at is None:
        raise StructureError(f"The record does not say how to repeat: {event}.")
    if (event.what == "remove") != undo:
        remove_(module, stack_from_dict(stack), at)
    else:
        insert_(module, stack_from_dict(stack), at, preserve=False)  # its weights are loaded afterwards


def _same(first: Event, second: Event) -> bool:
    return (first.what, first.stack, first.at) == (second.what, second.stack, second.at)


def _other_shapes(module: nn.Module, state_dict: Mapping[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
    mine = module.state_dict()
    pairs = ((name, mine[name], theirs) for name, theirs in state_dict.items() if name in mine)
    return [(n, a, b) for n, a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape]


def _refuse_other_model(
    module: nn.Module, state_dict: Mapping[str, Any], structure: Structure, *, kernels: bool
) -> None:
    """Raise unless the state dict differs along axes of the structure only, all axes of a group alike.

    Args:
        module: The module.
        state_dict: What will be loaded.
        structure: The structure that both should have.
        kernels: Whether kernels of convolutions may be of another size, too: they were enlarged in one of the runs.
    """
    weights = kernels_of(module) if kernels else set()
    convolutions = {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in weights}
    sizes = {
        name: state_dict[group.units.tensor].shape[group.units.dim] // group.units.per_unit
        for name, group in structure.groups.items()
        if group.units.tensor in state_dict
    }
    layouts = {(axis.tensor, axis.dim): axis.layout for group in structure.groups.values() for axis in group.axes}
    aliases = _aliases(module)
    for name, mine, theirs in _other_shapes(module, state_dict):
        first = aliases.get(name, name)
        expected = [
            layout_length(layouts[first, dim], sizes)
            if (first, dim) in layouts
            else (theirs.shape[dim] if dim > 1 and dim < theirs.ndim and name in convolutions else size)
            for dim, size in enumerate(mine.shape)
        ]
        if list(theirs.shape) != expected:
            pinned = [r for dim in range(mine.ndim) if (r := structure.pinned.get(f"{first}[{dim}]"))]
            raise StructureError(
                f"The checkpoint is of another model: '{name}' has shape {tuple(theirs.shape)} in it, but "
                f"{type(module).__name__} has {tuple(mine.shape)}, and could have {tuple(expected)}"
                + (f" ({'; '.join(pinned)})" if pinned else "")
                + ". Build the model with the hyperparameters that the run began with."
            )


def _aliases(module: nn.Module) -> dict[str, str]:
    """Map each name of a tensor to the first of its names."""
    first: dict[int, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}
