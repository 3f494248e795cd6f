"""Depth: runs of blocks that can be repeated or removed.

One forward pass shows which children of a container run, in which order and on what. What makes a new block the
identity (`identity`) and which numbers count the blocks (`counts`) is found by trial, with one block more in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_grow.structure.axes import Stack
from lightning_grow.structure.counts import Kept, changes_of_depth, find_counts, renumbered
from lightning_grow.structure.identity import (
    Call,
    Identity,
    find_identity,
    make_identity_,
    same,
    why_no_identity,
)
from lightning_grow.structure.rerun import Runner, Trial

_CHANGES = "a new block changes the output, although it returns its input"


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
    runner = Runner(model, call, args, kwargs, written)
    try:
        with runner.holders.noting():
            calls, reference = runner.first_run(blocks, [path for path, _ in candidates])
    except Exception:  # the model's own code; `trace` has said so already
        return {}
    finder = _Finder(runner, calls, reference)
    for path, children in candidates:
        runs = list(_runs(children, calls))
        for run in runs:
            if len(run) < 2 and not _is_list(model.get_submodule(path)):
                continue
            first = f"{path}.{run[0]}".removeprefix(".")
            name = path if len(runs) == 1 and path else first
            finder.add(name, path, run)
    finder.check()
    return finder.stacks


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


class _Finder:
    """Tries the runs of blocks of one model.

    Args:
        runner: Runs the model.
        calls: What each block was called with, in the model as it is.
        reference: What the model returned.
    """

    def __init__(self, runner: Runner, calls: Mapping[int, Call], reference: list[Tensor]) -> None:
        self.runner, self.calls, self.reference = runner, calls, reference
        self.stacks: dict[str, Stack] = {}
        self._nearby: dict[str, tuple[Trial, list[str]]] = {}

    def add(self, name: str, path: str, run: list[str], *, whole: bool = False) -> None:
        """Add a stack, unless a new child would not be run at all and nothing suggests that it should.

        Args:
            name: The name of the stack.
            path: The container.
            run: Names of the blocks in it.
            whole: Whether to try it in the whole model at once.
        """
        container = self.runner.model.get_submodule(path)
        block = container.get_submodule(run[-1])
        call = self.calls[id(block)]
        first, found = 0, find_identity(block, call)
        if found is None:  # behind a block the input may be better behaved: not negative after a ReLU
            first, found = 1, find_identity(block, call.behind())
        trial = self._trial(path, run, found)
        names = [n for n, _ in container.named_children()]
        kept: Kept = ((), ())
        runs, obstacle = (False, None) if whole else self._tried_nearby(trial, found)
        if runs and obstacle is None and found:
            self._nearby[name] = trial, run
        elif not runs:
            runs, obstacle = self._tried([trial], kept, exact=bool(found))
        if not runs and (len(run) > 1 or len(run) == len(names)):
            lengths = {len(run), len(names), sum(id(c) in self.calls for c in container.children())}
            works = lambda k: self._tried([trial], k, exact=bool(found)) == (True, None)  # noqa: E731
            counts = find_counts(self.runner.holders, path, sorted(lengths), works)
            if counts is not None:
                kept, runs, obstacle = counts, True, None
        if (not runs or obstacle is not None) and (not _is_list(container) or 1 == len(run) < len(names)):
            return  # children that run one after the other, but of different kinds, are no depth
        if found is None:
            obstacle = obstacle or why_no_identity(block, call)
        blocks = tuple(f"{path}.{n}".removeprefix(".") for n in run)
        self.stacks[name] = Stack(
            name, blocks, *(found or ((), ())), first=first, obstacle=obstacle, counts=kept[0], per_block=kept[1]
        )

    def check(self) -> None:
        """Try what was tried nearby only in the whole model: all of it together, and each by itself if that fails."""
        names = list(self.stacks)
        of_container = {trial.path: trial for trial, _ in self._nearby.values()}
        together = self._tried(list(of_container.values()))
        for name, (trial, run) in self._nearby.items():
            if together != (True, None) or of_container[trial.path] is not trial:
                del self.stacks[name]
                self.add(name, trial.path, run, whole=True)
        self.stacks = {name: self.stacks[name] for name in names if name in self.stacks}

    def _trial(self, path: str, run: list[str], found: Identity | None) -> Trial:
        """Return the container with one block more behind the last of a run."""
        container = self.runner.model.get_submodule(path)
        new = copy.deepcopy(container.get_submodule(run[-1]))
        make_identity_(new, *(found or ((), ())))
        names = [n for n, _ in container.named_children()]
        like = [container.get_submodule(n) for n in run]
        later = [container.get_submodule(n) for n in names[names.index(run[-1]) + 1 :]]
        behind = names[names.index(run[-1]) + 1] if run[-1] != names[-1] else ""
        moves = list(renumbered(like, [*like, new], later))
        return Trial(path, new, inserted(container, behind, new), moves, len(run), names.index(run[0]))

    def _tried_nearby(self, trial: Trial, found: Identity | None) -> tuple[bool, str | None]:
        """Return whether a new block is run where its container is, and what is wrong then; False if it may be told."""
        near = self.runner.near(trial.path)
        if near is None:
            return False, None
        try:
            seen, outputs = self.runner.run([trial], trial.moves, near)
        except Exception:  # the model's own code: perhaps it counts its blocks further up
            return False, None
        if id(trial.new) not in seen:
            return False, None
        return True, None if not found or same(outputs, near.outputs) else _CHANGES

    def _tried(self, trials: Sequence[Trial], kept: Kept = ((), ()), *, exact: bool = True) -> tuple[bool, str | None]:
        """Return whether new blocks are run in the whole model, if counts follow, and what is wrong if something is."""
        try:
            changes = [change for trial in trials for change in trial.moves]
            for t in trials:
                changes += changes_of_depth(self.runner.model, kept, t.blocks, t.position, t.blocks, insert=True)
            seen, outputs = self.runner.run(trials, changes)
        except Exception as error:  # the model's own code: anything can happen
            return False, f"the model fails with one more block ({type(error).__name__})"
        if any(id(trial.new) not in seen for trial in trials):
            return False, "the forward pass does not run a block that is added"
        return True, None if not exact or same(outputs, self.reference) else _CHANGES
