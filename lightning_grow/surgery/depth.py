"""Depth: insert blocks that start as the identity, remove blocks; optimizers take the parameters in and let them go.

A new block is a copy of its neighbour (its shapes, hooks, dtype, device, mode and frozen parts) with the weights that
keep it from being the identity set to zero. What the neighbour shares with the rest of the model (tied weights, rotary
tables, configurations) is shared with the new block too.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grow.structure.axes import Stack
from lightning_grow.structure.counts import changes_of_depth, renumbered
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.identity import make_identity_
from lightning_grow.structure.stacks import inserted, without
from lightning_grow.surgery.configs import depth_warnings
from lightning_grow.surgery.membership import Membership
from lightning_grow.surgery.swap import Commit

log = logging.getLogger(__name__)

_PLAIN = (int, float, complex, str, bytes, type(None), type)


def insert_(model: nn.Module, stack: Stack, at: int, optimizers: Iterable[Any] = (), *, preserve: bool = True) -> None:
    """Put one more block into a stack: the identity at first, a copy of its neighbour in all else. All or nothing.

    New parameters join the param groups of the neighbour's, where a newly built optimizer would have them. Names of
    later blocks may shift: trace the model again afterwards.

    Args:
        model: The model.
        stack: One of its stacks, as it is now.
        at: Position of the new block, ``stack.first <= at <= len(stack.blocks)``.
        optimizers: Optimizers of the model's parameters.
        preserve: Refuse where the new block would not be the identity. If False, what can be zero is zero.

    Raises:
        StructureError: If the block cannot start as the identity (``stack.obstacle``), or the model does not have the
            blocks of the stack. Nothing has changed then, as after any other error.
        ValueError: If ``at`` is out of range, or an optimizer holds none of the model's parameters.

    Example:
        >>> block = nn.Sequential(nn.Linear(2, 2))
        >>> model = nn.Sequential(block)
        >>> insert_(model, Stack("", ("0",), zeroed=("0.bias",), identity=("0.weight",)), at=1)
        >>> model[1][0].weight.detach()
        tensor([[1., 0.],
                [0., 1.]])
    """
    if not 0 <= at <= len(stack.blocks):
        raise ValueError(f"Stack '{stack.name}' has {len(stack.blocks)} blocks: at must be 0 to that, but is {at}.")
    if preserve and stack.obstacle is not None:
        raise StructureError(
            f"Cannot insert a block into '{stack.name}' and keep the function: {stack.obstacle}. Pass preserve=False "
            "to allow it, or leave this stack as it is."
        )
    if preserve and at < stack.first:
        raise StructureError(
            f"Cannot insert a block at {at} into '{stack.name}' and keep the function: a new block is the identity "
            f"only from position {stack.first} on."
        )
    path, blocks = _blocks(model, stack)
    container = model.get_submodule(path)
    neighbour = blocks[max(at - 1, 0)]
    children = dict(container.named_children())
    names = list(children)
    leaves = [name.rpartition(".")[2] for name in stack.blocks]
    behind = leaves[at] if at < len(leaves) else next(iter(names[names.index(leaves[-1]) + 1 :]), "")
    with torch.inference_mode(False), torch.no_grad():
        memberships, named = _memberships(model, optimizers), _names(model)
        with Commit(model, [*neighbour.parameters(), *neighbour.buffers()]) as commit:
            block = _copy(model, neighbour, (*stack.zeroed, *stack.identity), stack.name)
            _check_square(block, stack)
            make_identity_(block, stack.zeroed, stack.identity)
            later = _behind(container, blocks[-1])
            _count(commit, model, stack, at, insert=True)
            commit.contents(container._modules, inserted(container, behind, block))  # noqa: SLF001
            for change in renumbered(blocks, [*blocks[:at], block, *blocks[at:]], later):
                commit.attribute(*change)
            twins = _pairs(neighbour, block)
            for membership in memberships:
                membership.add_(commit, twins, list(model.parameters()))
                membership.rename_(commit, named, _names(model))
        _warn(model, stack)


def remove_(model: nn.Module, stack: Stack, at: int, optimizers: Iterable[Any] = ()) -> None:
    """Take one block out of a stack; its parameters leave the optimizers, with their state. All or nothing.

    The function is preserved only where the block is the identity. Names of later blocks may shift: trace the model
    again afterwards.

    Args:
        model: The model.
        stack: One of its stacks, as it is now, of at least two blocks.
        at: Position of the block, ``0 <= at < len(stack.blocks)``.
        optimizers: Optimizers of the model's parameters.

    Raises:
        StructureError: If the model does not have the blocks of the stack. Nothing has changed then.
        ValueError: If ``at`` is out of range, it is the only block, or an optimizer holds none of the model's
            parameters.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
        >>> remove_(model, Stack("", ("0", "1")), at=0)
        >>> len(model)
        1
    """
    if not 0 <= at < len(stack.blocks):
        raise ValueError(f"Stack '{stack.name}' has blocks 0 to {len(stack.blocks) - 1}, but at is {at}.")
    if len(stack.blocks) == 1:
        raise ValueError(f"'{stack.blocks[0]}' is the only block of stack '{stack.name}': at least one must stay.")
    path, blocks = _blocks(model, stack)
    container = model.get_submodule(path)
    leaf = stack.blocks[at].rpartition(".")[2]
    with torch.inference_mode(False), torch.no_grad():
        memberships, named = _memberships(model, optimizers), _names(model)
        with Commit(model, ()) as commit:
            later = _behind(container, blocks[-1])
            _count(commit, model, stack, at, insert=False)
            commit.contents(container._modules, without(container, leaf))  # noqa: SLF001
            for change in renumbered(blocks, [*blocks[:at], *blocks[at + 1 :]], later):
                commit.attribute(*change)
            left = {id(p) for p in model.parameters()}
            gone = [p for p in blocks[at].parameters() if id(p) not in left]
            for membership in memberships:
                membership.remove_(commit, gone)
                membership.rename_(commit, named, _names(model))
        _warn(model, stack)


def _warn(model: nn.Module, stack: Stack) -> None:
    for warning in depth_warnings(model, stack):
        log.warning(warning)


def _blocks(model: nn.Module, stack: Stack) -> tuple[str, list[nn.Module]]:
    """Return the container's name and the blocks; the stack may be called after its first block."""
    paths = {name.rpartition(".")[0] for name in stack.blocks}
    if len(paths) != 1:
        raise StructureError(f"The blocks of stack '{stack.name}' must be children of one module: {stack.blocks}.")
    try:
        return paths.pop(), [model.get_submodule(name) for name in stack.blocks]
    except AttributeError as error:
        raise StructureError(
            f"The model does not have the blocks of stack '{stack.name}' ({error}). Trace it again after each change "
            "of depth."
        ) from error


def _check_square(block: nn.Module, stack: Stack) -> None:
    """Refuse a block that cannot be the identity any more, since what goes in and what comes out differ in width."""
    for name in stack.identity:
        shape = tuple(block.get_parameter(name).shape)
        if shape[0] != shape[1]:
            raise StructureError(
                f"A new block in '{stack.name}' cannot start as the identity: its '{name}' has shape {shape}, so what "
                "goes in is no longer as wide as what comes out. Trace the model again after widths have changed."
            )


def _memberships(model: nn.Module, optimizers: Iterable[Any]) -> list[Membership]:
    if hasattr(optimizers, "param_groups"):
        raise TypeError("optimizers must be a list of optimizers, but is one optimizer; pass [optimizer].")
    return [Membership(optimizer, list(model.parameters())) for optimizer in optimizers]


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def _copy(model: nn.Module, block: nn.Module, changed: Sequence[str], stack: str) -> nn.Module:
    """Return a deep copy that shares with the rest of the model what the block shares with it."""
    inside = set(block.modules())
    outside = [module for module in model.modules() if module not in inside]
    held = {id(value): value for module in outside for value in _values(module) if value is not block}
    hooks = {id(value): value for module in inside for value in _hooks(module)}
    shared = {key: value for key, value in held.items() if not isinstance(value, _PLAIN)}
    cached = {id(v): v.detach() for m in inside for v in vars(m).values() if isinstance(v, Tensor) and v.grad_fn}
    new = copy.deepcopy(block, {**shared, **hooks, **cached})
    twins = dict(new.named_parameters())
    unknown = [name for name in changed if name not in twins]
    if unknown:
        raise StructureError(f"The blocks of stack '{stack}' have no parameter '{unknown[0]}'. Trace the model again.")
    for name, parameter in block.named_parameters():
        if twins[name] is not parameter:
            vars(twins[name]).update(vars(parameter))
        elif name in changed:
            raise StructureError(
                f"A new block in '{stack}' cannot start as the identity: its parameter '{name}' of shape "
                f"{tuple(parameter.shape)} is shared with other parts of the model."
            )
    return new


def _values(module: nn.Module) -> Iterable[Any]:
    """Yield the tensors, children and other attributes of a module."""
    yield module
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            yield from value.values()
        elif not name.startswith("_"):
            yield value


def _hooks(module: nn.Module) -> Iterable[Any]:
    """Yield the hooks of a module: they are kept, not copied with all that they belong to."""
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, Mapping):
            yield from value.values()


def _pairs(block: nn.Module, twin: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return parameters of a block and those of its copy, without shared ones."""
    return [(old, new) for old, new in zip(block.parameters(), twin.parameters(), strict=True) if old is not new]


def _behind(container: nn.Module, block: nn.Module) -> list[nn.Module]:
    """Return the children of a container behind one of them."""
    children = list(container.children())
    return children[next(i for i, child in enumerate(children) if child is block) + 1 :]


def _count(commit: Commit, model: nn.Module, stack: Stack, at: int, *, insert: bool) -> None:
    """Let numbers of blocks and lists with an entry for each of them follow."""
    path, _, leaf = stack.blocks[0].rpartition(".")
    first = [name for name, _ in model.get_submodule(path).named_children()].index(leaf)
    kept = (stack.counts, stack.per_block)
    try:
        changes = list(changes_of_depth(model, kept, len(stack.blocks), first, at, insert=insert))
    except (AttributeError, LookupError, TypeError) as error:
        raise StructureError(
            f"The model does not keep how many blocks '{stack.name}' has where it did ({error}). Trace it again."
        ) from error
    for change in changes:
        commit.attribute(*change)
