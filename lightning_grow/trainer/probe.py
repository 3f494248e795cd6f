"""Look at a LightningModule on the side: trace it, or run a step of it, on a copy that logs and steps nothing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_grow.criteria.objective import MeasurementError, Objective
from lightning_grow.structure import Structure, StructureError, trace, trace_call
from lightning_grow.structure.sandbox import reseed
from lightning_grow.structure.stacks import find_stacks

log = logging.getLogger(__name__)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def example_inputs(trainer: pl.Trainer, module: pl.LightningModule) -> Inputs | None:
    """Return ``example_input_array`` as arguments of ``forward``, where the module is; None if it has none."""
    example = module.example_input_array
    if example is None:
        return None
    example = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(example))
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def trace_module(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> Structure:
    """Return the structure of a module, from a training step on ``batch`` and, if it has an example input, ``forward``.

    Both together, because a step may use more than ``forward`` does (a decoder, an auxiliary head), whose sizes depend
    on the same widths; and the other way round. Where only one of them can be traced, that one counts; where a run in
    train mode fails (batch norm on a single example), eval mode is tried too.

    Raises:
        StructureError: If it cannot be traced in any of these ways, with the reason of each.
    """
    attempts: list[tuple[str, Callable[[pl.LightningModule], Structure]]] = []
    inputs = example_inputs(trainer, module)
    steps: list[tuple[Any, ...]] = []
    with contextlib.suppress(StructureError):
        some = _first_examples(batch)
        steps = [_step_arguments(module, b, batch_idx) for b in (some, batch) if b is not None]
    args, kwargs = inputs or ((), {})
    if inputs is not None:
        both = f"{_STEP} and {_FORWARD}"
        attempts += [(both, partial(_both, step=step, args=args, kwargs=kwargs)) for step in steps]
    attempts += [(_STEP, partial(_step_alone, step=step)) for step in steps]
    if inputs is not None:
        attempts.append((_FORWARD, lambda probe: _whole(trace(probe, *args, **kwargs), probe)))
    reasons = []
    for name, attempt in attempts:
        for mode in ("train", "eval"):
            with quiet_copy(trainer, module) as probe, _eagerly():
                if mode == "eval":
                    probe.eval()
                try:
                    return _shared(trainer, attempt(probe))
                except StructureError as error:
                    reasons.append(f"{name} in {mode} mode: {error}")
    raise StructureError(
        f"{type(module).__name__} could not be traced. Set `example_input_array` to inputs of `forward` on which it "
        "runs without looking at the values of tensors. Tried: " + (" | ".join(reasons) or "nothing, as there was none")
    )


def _step_alone(probe: pl.LightningModule, step: tuple[Any, ...]) -> Structure:
    return trace_call(probe, _Step(probe), *step)


def _first_examples(batch: Any, number: int = 4) -> Any | None:
    """Return a batch of the first few examples, on which trials are cheaper; None if it is small or not all tensors."""
    leaves = pytree.tree_leaves(batch)
    lengths = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    if len(lengths) != 1 or not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
        return None
    return pytree.tree_map(lambda leaf: leaf[:number], batch) if lengths.pop() > 2 * number else None


def _shared(trainer: pl.Trainer, structure: Structure) -> Structure:
    """Return the structure that rank zero found: other ranks have other batches."""
    if trainer.world_size == 1:
        return structure
    return Structure.from_dict(trainer.strategy.broadcast(structure.to_dict()))


_STEP, _FORWARD = "training_step(first batch)", "forward(example_input_array)"


def _whole(structure: Structure, module: nn.Module) -> Structure:
    """Warn of parameters that ``forward`` does not use: what else uses them may depend on widths that will change."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    unused = {label.partition("[")[0] for label, reason in structure.pinned.items() if "not used" in reason} & trained
    if unused:
        rank_zero_only(log.warning)(
            "forward(example_input_array) does not use %s, and training_step could not be traced: they keep their "
            "sizes. If training_step uses them with units that grow, exclude those units with `groups`.",
            ", ".join(sorted(unused)),
        )
    return structure


def step_outputs(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> list[Tensor]:
    """Return what a training step on ``batch`` returns in eval mode, and the outputs that it computed on the way.

    These are what ``forward`` returned, or else what the last of the module's children returned.
    Random draws are the same at each call; the random state, the module and its logs are left as they were.
    """
    seen: dict[bool, Any] = {}

    def remember(inner: nn.Module, _args: object, output: Any) -> None:
        if _tensors(output):
            seen[inner is probe] = output

    devices = [torch.cuda.current_device()] if module.device.type == "cuda" else []
    with quiet_copy(trainer, module) as probe, torch.random.fork_rng(devices=devices), torch.no_grad():
        reseed(0)
        probe.eval()
        for inner in (probe, *probe.children()):
            inner.register_forward_hook(remember)
        with _eagerly(), trainer.precision_plugin.train_step_context():
            returned = _Step(probe)(*_step_arguments(module, batch, batch_idx))
    return [t.detach().to("cpu", torch.float64) for t in _tensors([returned, seen.get(True, seen.get(False))])]


def outputs_if_possible(
    trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
) -> list[Tensor] | None:
    """Do as `step_outputs`; None, with a line in the log, where a step cannot be run on the side."""
    try:
        return step_outputs(trainer, module, batch, batch_idx)
    except Exception as error:  # noqa: BLE001  (the user's own step: anything can happen)
        rank_zero_only(log.warning)("`verify` could not run a step on a copy: %s", error)
        return None


def largest_difference(before: Sequence[Tensor], after: Sequence[Tensor] | None) -> float | None:
    """Return the largest absolute difference of outputs; infinite if their shapes differ, None if one is missing."""
    if after is None:
        return None
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    return max((float((a - b).abs().max()) for a, b in zip(before, after, strict=True) if a.numel()), default=0.0)


def objective_of(trainer: pl.Trainer, batches: Sequence[tuple[Any, int]]) -> Objective:
    """Return the loss of training steps on some batches, for copies of a LightningModule.

    With manual optimization it is the sum of what the step hands to ``manual_backward``. Copies log nothing, step no
    optimizer, and see the trainer's precision.
    """

    def loss(model: nn.Module, batch: tuple[Any, int]) -> Tensor:
        assert isinstance(model, pl.LightningModule)
        try:
            with _quiet(trainer, model), _eagerly(), trainer.precision_plugin.train_step_context():
                returned, backward = _Step(model)(*_step_arguments(model, *batch))
        except MeasurementError:
            raise
        except Exception as error:  # the user's own step, on a copy: anything can happen
            raise MeasurementError(f"a training step fails on a copy of the model: {error}") from error
        return _scalar_loss(model, returned, backward)

    def reduce(tensor: Tensor) -> Tensor:
        if trainer.world_size == 1:
            return tensor
        on_device = tensor.to(trainer.strategy.root_device)  # some backends add up nowhere else
        summed: Tensor = trainer.strategy.reduce(on_device, reduce_op="sum")
        return summed.to(tensor.device)

    return Objective(loss, batches, reduce)


def _scalar_loss(model: nn.Module, returned: Any, backward: Sequence[Any]) -> Tensor:
    if backward:
        return torch.stack([loss.sum() for loss in backward]).sum()
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise MeasurementError(f"`{type(model).__name__}.training_step` returned no loss to measure.")
    return loss.reshape(())


@contextlib.contextmanager
def quiet_copy(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[pl.LightningModule]:
    """Give a deep copy of a module whose steps log nothing and step no optimizer.

    Raises:
        StructureError: If the module cannot be copied.
    """
    try:
        probe = copy.deepcopy(module)
    except Exception as error:  # the module's own attributes: anything can happen
        raise StructureError(
            f"{type(module).__name__} cannot be copied to try something on it: {error}. An attribute that holds a "
            "tensor with a graph (a loss kept between batches) should be detached."
        ) from error
    with _quiet(trainer, probe):
        yield probe


@contextlib.contextmanager
def _quiet(trainer: pl.Trainer, probe: pl.LightningModule) -> Iterator[None]:
    """Let a copy see the trainer, but log nothing and step no optimizer."""
    quiet = _quiet_methods(trainer)
    inner = [module for module in probe.modules() if isinstance(module, pl.LightningModule)]
    for module in inner:
        vars(module).update(quiet)
    probe.trainer = trainer
    try:
        yield
    finally:
        probe.trainer = None
        for module in inner:
            for name in quiet:
                vars(module).pop(name, None)


def run_eagerly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``call(*args, **kwargs)``, with nothing compiled for it."""
    with _eagerly():
        return call(*args, **kwargs)


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Run what is compiled as if it were not; hooks that look on see the same modules."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules.*")
        yield


class _Step:
    """A training step whose losses are outputs, also those that it hands to ``manual_backward``."""

    def __init__(self, probe: pl.LightningModule) -> None:
        self._probe = probe

    def __call__(self, *arguments: Any) -> Any:
        losses: list[Any] = []
        vars(self._probe)["manual_backward"] = lambda loss, *_, **__: losses.append(loss)
        returned = self._probe.training_step(*arguments)
        if not pytree.tree_leaves([returned, losses]):
            raise StructureError(
                f"`{type(self._probe).__name__}.training_step` returns no loss and gives none to `manual_backward`"
            )
        return [returned, losses]


def _both(probe: pl.LightningModule, step: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Structure:
    """Trace a training step and ``forward`` together; stacks from one of them, for a block that runs twice is none."""
    structure = trace_call(probe, _Both(probe), step, args, kwargs)
    return dataclasses.replace(structure, stacks=find_stacks(probe, _Step(probe), step, {}))


class _Both(_Step):
    """A training step, and ``forward`` on the example input."""

    def __call__(self, step: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return [super().__call__(*step), self._probe(*args, **kwargs)]


def _quiet_methods(trainer: pl.Trainer) -> dict[str, Callable[..., Any]]:
    inert = [_InertOptimizer(optimizer) for optimizer in trainer.optimizers]
    optimizers = inert[0] if len(inert) == 1 else inert

    def nothing(*_args: object, **_kwargs: object) -> None:
        return None

    names = ("log", "log_dict", "print", "clip_gradients", "toggle_optimizer", "untoggle_optimizer", "backward")
    return dict.fromkeys(names, nothing) | {
        "optimizers": lambda use_pl_optimizer=True: optimizers,  # noqa: ARG005
        "lr_schedulers": nothing,
    }


class _InertOptimizer:
    """Stands in for an optimizer in ``training_step`` with manual optimization: reads like it, changes nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def step(self, closure: Callable[[], Any] | None = None, **_kwargs: object) -> Any:
        return None if closure is None else closure()

    def zero_grad(self, *_args: object, **_kwargs: object) -> None:
        """Keep the gradients."""

    def toggle_model(self, *_args: object, **_kwargs: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _step_arguments(module: pl.LightningModule, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """Return the arguments that Lightning would give to ``training_step``."""
    parameters = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in parameters:
        raise StructureError(
            f"`{type(module).__name__}.training_step` takes its batches itself, from `dataloader_iter`, so it cannot "
            "be run on the side. Set `example_input_array`."
        )
    batch = pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, batch)
    return (batch, batch_idx) if len(parameters) > 1 else (batch,)


def _tensors(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())]


def count_of(module: nn.Module) -> int:
    """Return the number of parameters of a module, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
