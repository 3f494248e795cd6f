"""Run a model on real data again, whole or in part, with more blocks in it, and leave it as it was.

A block that is added shows what it does in the module around it: to run that alone takes as long for one stack as the
whole model takes for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grow.structure.holders import Holders, Step, put
from lightning_grow.structure.identity import Call, private, same
from lightning_grow.structure.sandbox import plain_layers, reseed, swap_in, tensors_in, unchanged


@dataclass(frozen=True, eq=False)
class Trial:
    """A container with one block more.

    Attributes:
        path: The container.
        new: The block that is added.
        children: All children of the container then.
        moves: What to change, where in it, and the new content, so that blocks keep their position as they did.
        blocks: How many like blocks there were.
        position: Position of the first of them among the children.
    """

    path: str
    new: nn.Module
    children: Mapping[str, nn.Module]
    moves: Sequence[tuple[Any, Step, Any]]
    blocks: int
    position: int


@dataclass(frozen=True, eq=False)
class Near:
    """A module around a container, what it was called with, and what it returns."""

    module: nn.Module
    call: Call
    outputs: list[Tensor]


class Runner:
    """Runs the model on real data in eval mode, and leaves it as it was."""

    def __init__(
        self,
        model: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: Collection[str],
    ) -> None:
        self.model, self.call, self.args, self.kwargs = model, call, args, kwargs
        self.holders = Holders(dict(model.named_modules()))
        named = [*model.named_parameters(), *model.named_buffers()]
        self._written = {id(t) for n, t in named if n in written or not isinstance(t, nn.Parameter)}
        self._around: dict[int, Call] = {}
        self._near: dict[int, Near | None] = {}

    def first_run(
        self, blocks: Mapping[int, nn.Module], containers: Iterable[str]
    ) -> tuple[dict[int, Call], list[Tensor]]:
        """Return what blocks are called with, by id, and the outputs; note it of the modules around containers, too."""
        around: dict[int, nn.Module] = {}
        for path in containers:
            for module in self._above(path):
                around[id(module)] = module
        calls, outputs = self._watched(self.model, lambda: self.call(*self.args, **self.kwargs), {**around, **blocks})
        self._around = {key: call for key, call in calls.items() if key in around}
        return {key: call for key, call in calls.items() if key in blocks}, outputs

    def near(self, path: str) -> Near | None:
        """Return the innermost module around a container that ran once, and does again as it did; None if none does."""
        module = next((m for m in self._above(path) if id(m) in self._around), None)
        if module is None or self._around[id(module)].times > 1:
            return None
        key = id(module)
        if key not in self._near:
            call = self._around[key]
            try:
                _, outputs = self.run((), (), Near(module, call, []))
            except Exception:  # the model's own code: anything can happen
                outputs = []
            self._near[key] = Near(module, call, outputs) if outputs and same(outputs[:1], [call.after]) else None
        return self._near[key]

    def run(
        self,
        trials: Sequence[Trial],
        changes: Iterable[tuple[Any, Step, Any]] = (),
        near: Near | None = None,
    ) -> tuple[dict[int, Call], list[Tensor]]:
        """Return the calls of new blocks, by id, and the outputs: of the model, or of a module in it.

        Args:
            trials: Blocks that are added, at most one for each container.
            changes: What else to change, where in it, and the new content; in the module, if only that is run.
            near: What to run, if not the whole model.
        """

        def prepared() -> Any:
            for change in changes:
                put(*change)
            containers = [self.model.get_submodule(trial.path) for trial in trials]  # before names move
            for container, trial in zip(containers, trials, strict=True):
                container._modules.clear()
                container._modules.update(trial.children)
            for module in (self.model if near is None else near.module).modules():
                module.__dict__["training"] = False
            if near is None:
                return self.call(*self.args, **self.kwargs)
            args, kwargs = private((near.call.args, near.call.kwargs))
            return near.module(*args, **kwargs)

        new = {id(trial.new): trial.new for trial in trials}
        return self._watched(self.model if near is None else near.module, prepared, new)

    def _watched(
        self, module: nn.Module, call: Callable[[], Any], blocks: Mapping[int, nn.Module]
    ) -> tuple[dict[int, Call], list[Tensor]]:
        calls: dict[int, Call] = {}
        named = [*module.named_parameters(), *module.named_buffers()]
        with unchanged(module), plain_layers(), torch.no_grad():
            swap_in(module, {name: t.detach().clone() for name, t in named if id(t) in self._written})
            for inner in module.modules():
                inner.__dict__["training"] = False
            handles = [handle for block in blocks.values() for handle in _recorded(block, calls)]
            reseed(0)
            try:
                outputs = tensors_in(call())
            finally:
                for handle in handles:
                    handle.remove()
        return calls, [t.detach().clone() for t in outputs]

    def _above(self, path: str) -> list[nn.Module]:
        """Return a container and the modules around it, from the inside out, without the model itself."""
        found = []
        while path:
            found.append(self.model.get_submodule(path))
            path = path.rpartition(".")[0]
        return found


def _recorded(block: nn.Module, calls: dict[int, Call]) -> list[Any]:
    """Write down what a block is called with, before it can write to it, and what it returns."""
    given: list[Any] = []

    def before(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[:] = private((args, kwargs)) if id(block) not in calls else (args, kwargs)

    def after(_block: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        inputs, outputs = tensors_in(tuple(given)), tensors_in(output)
        if id(block) in calls:
            calls[id(block)].times += 1
        elif inputs and outputs:
            calls[id(block)] = Call(given[0], given[1], inputs[0], outputs[0])

    return [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after, with_kwargs=True),
    ]
