"""Depth: runs of blocks that can be repeated or removed.

One forward pass shows which children of a container run, in which order and on what. What makes a new block the
identity (`identity`) and which numbers count the blocks (`counts`) is found by trial, with one block more in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Stack
from lightning_grow.structure.counts import Kept, changes_of_depth, find_counts, renumbered
from lightning_grow.structure.holders import Holders, Step, put
from lightning_grow.structure.identity import (
    Call,
    find_identity,
    make_identity_,
    private,
    same,
    why_no_identity,
)
from lightning_grow.structure.sandbox import plain_layers, swap_in, tensors_in, unchanged


def find_stacks(
    model: nn.Module,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    written: Collection[str] = (),
) -> dict[str, Stack]:
    """Return the runs of like blocks of a model, by name; none if the model cannot be run on real data.

    Args:
        model: The model. It is left unchanged.
        call: Runs it on ``args`` and ``kwargs``.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        written: Parameters that the model itself writes to when it runs.
    """
    candidates = list(_candidates(model))
    blocks = {id(block): block for _, children in candidates for block in children.values()}
    if not blocks or any(p.device.type == "meta" for p in model.parameters()):
        return {}
    runner = _Runner(model, call, args, kwargs, written)
    try:
        with runner.holders.noting():
            calls, reference = runner.run(blocks)
    except Exception:  # the model's own code; `trace` has said so already
        return {}
    stacks: dict[str, Stack] = {}
    for path, children in candidates:
        runs = list(_runs(children, calls))
        for run in runs:
            if len(run) < 2 and not _is_list(model.get_submodule(path)):
                continue
            first = f"{path}.{run[0]}".removeprefix(".")
            name = path if len(runs) == 1 and path else first
            stack = _stack(runner, name, path, run, calls, reference)
            if stack is not None:
                stacks[name] = stack
    return stacks


def inserted(container: nn.Module, at: str, block: nn.Module) -> dict[str, nn.Module]:
    """Return the children of a container with a block put in front of child ``at`` (``""``: behind the last).

    Children that are numbered, alone or behind a common name (``layer1``), are numbered again from there on; a child
    among others gets the name of its neighbour with the next free number.
    """
    children = dict(container.named_children())
    names = list(children)
    position = names.index(at) if at else len(names)
    values = list(children.values())
    values.insert(position, block)
    # Behind the last of a run, the next child may be of another kind, and so may the one before its first.
    near = [names[i] for i in (position, position - 1) if 0 <= i < len(names)]
    stem = _stem(next((n for n in near if type(children[n]) is type(block)), near[0]))
    like = _numbered(names, stem)
    if like is None:
        number = next(i for i in range(len(names) + 2) if f"{stem}{i}" not in children)
        names.insert(position, f"{stem}{number}")
    else:
        names.insert(position, stem)
        _number(names, stem, like)
    return dict(zip(names, values, strict=True))


def without(container: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return the children of a container without one; those that are numbered like it are numbered again."""
    children = {n: child for n, child in container.named_children() if n != name}
    stem = _stem(name)
    like = _numbered([n for n, _ in container.named_children()], stem)
    names = list(children)
    if like is not None:
        _number(names, stem, like)
    return dict(zip(names, children.values(), strict=True))


def _stem(name: str) -> str:
    return name.rstrip("0123456789")


def _numbered(names: Sequence[str], stem: str) -> int | None:
    """Return the first number of the children with a stem, if their numbers count up; else None."""
    numbers = [n.removeprefix(stem) for n in names if _stem(n) == stem]
    if not all(n.isdigit() for n in numbers):
        return None
    first = int(numbers[0])
    return first if numbers == [str(first + i) for i in range(len(numbers))] else None


def _number(names: list[str], stem: str, first: int) -> None:
    """Number the names with a stem, from the first on."""
    like = [i for i, n in enumerate(names) if _stem(n) == stem]
    for number, i in enumerate(like, first):
        names[i] = f"{stem}{number}"


def _candidates(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    for path, module in model.named_modules():
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            continue
        children = {n: c for n, c in module.named_children() if _is_block(c)}
        if children and (_is_list(module) or len(children) > 1):
            yield path, children


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))


def _is_block(module: nn.Module) -> bool:
    composite = any(True for _ in module.children()) or not type(module).__module__.startswith("torch.nn")
    return composite and any(p.ndim > 1 for p in module.parameters())


def _signature(block: nn.Module) -> tuple[type, tuple[tuple[str, int], ...]]:
    return type(block), tuple((n, p.ndim) for n, p in block.named_parameters())


def _runs(children: Mapping[str, nn.Module], calls: Mapping[int, Call]) -> Iterator[list[str]]:
    """Yield names of like blocks of which each takes in what the one before gave out."""
    run: list[str] = []
    for name, block in children.items():
        call = calls.get(id(block))
        fits = (
            call is not None
            and call.times == 1
            and call.before.shape == call.after.shape
            and call.before.dtype == call.after.dtype
        )
        if run and fits and call is not None:
            previous = children[run[-1]]
            joined = calls[id(previous)].after.data_ptr() == call.before.data_ptr()
            if joined and _signature(previous) == _signature(block):
                run.append(name)
                continue
        if run:
            yield run
        run = [name] if fits else []
    if run:
        yield run


class _Runner:
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
        self.written = {n: t.detach() for n, t in named if n in written or not isinstance(t, nn.Parameter)}

    def run(
        self,
        blocks: Mapping[int, nn.Module],
        children: tuple[str, dict[str, nn.Module]] | None = None,
        changes: Iterable[tuple[Any, Step, Any]] = (),
    ) -> Any:
        """Return the calls of the blocks by id, and the outputs.

        If asked, with other children of one container, and with changes of what modules keep in Python.
        """
        calls: dict[int, Call] = {}
        with unchanged(self.model), plain_layers(), torch.no_grad():
            swap_in(self.model, {name: tensor.clone() for name, tensor in self.written.items()})
            for change in list(changes):
                put(*change)
            if children is not None:
                container = self.model.get_submodule(children[0])
                container._modules.clear()
                container._modules.update(children[1])
            for module in self.model.modules():
                module.__dict__["training"] = False
            handles = [handle for block in blocks.values() for handle in _recorded(block, calls)]
            torch.manual_seed(0)
            try:
                outputs = tensors_in(self.call(*self.args, **self.kwargs))
            finally:
                for handle in handles:
                    handle.remove()
        return calls, [t.detach().clone() for t in outputs]


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


def _stack(
    runner: _Runner, name: str, path: str, run: list[str], calls: Mapping[int, Call], reference: list[Tensor]
) -> Stack | None:
    """Return the stack, or None where a new child would not be run at all and nothing suggests that it should."""
    container = runner.model.get_submodule(path)
    block = container.get_submodule(run[-1])
    blocks = tuple(f"{path}.{n}".removeprefix(".") for n in run)
    call = calls[id(block)]
    first, found = 0, find_identity(block, call)
    if found is None:  # behind a block the input may be better behaved: not negative after a ReLU
        first, found = 1, find_identity(block, call.behind())
    new = copy.deepcopy(block)
    make_identity_(new, *(found or ((), ())))
    names = [n for n, _ in container.named_children()]
    like = [container.get_submodule(n) for n in run]
    later = [container.get_submodule(n) for n in names[names.index(run[-1]) + 1 :]]
    moves = list(renumbered(like, [*like, new], later))
    behind = names[names.index(run[-1]) + 1] if run[-1] != names[-1] else ""
    children = inserted(container, behind, new)
    position = names.index(run[0])

    def attempt(kept: Kept) -> tuple[bool, str | None]:
        """Return whether a new block is run, and what is wrong if something is."""
        try:
            grown = changes_of_depth(runner.model, kept, len(run), position, len(run), insert=True)
            seen, outputs = runner.run({id(new): new}, (path, children), [*moves, *grown])
        except Exception as error:  # the model's own code: anything can happen
            return False, f"the model fails with one more block ({type(error).__name__})"
        if id(new) not in seen:
            return False, "the forward pass does not run a block that is added"
        if found and not same(outputs, reference):
            return True, "a new block changes the output, although it returns its input"
        return True, None

    kept: Kept = ((), ())
    runs, obstacle = attempt(kept)
    if not runs and (len(run) > 1 or len(run) == len(names)):
        lengths = {len(run), len(names), sum(id(c) in calls for c in container.children())}
        counts = find_counts(runner.holders, path, sorted(lengths), lambda k: attempt(k) == (True, None))
        if counts is not None:
            kept, runs, obstacle = counts, True, None
    if (not runs or obstacle is not None) and (not _is_list(container) or 1 == len(run) < len(names)):
        return None  # children that run one after the other, but of different kinds, are no depth
    if found is None:
        obstacle = obstacle or why_no_identity(block, call)
    return Stack(name, blocks, *(found or ((), ())), first=first, obstacle=obstacle, counts=kept[0], per_block=kept[1])
