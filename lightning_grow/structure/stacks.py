"""Depth: runs of blocks that can be repeated or removed, and what makes a new block the identity.

One forward pass shows which children of a container run, in which order and on what. Which parameters must be zero for
a block to return its input is found by trying, not listed for each class: with all of them zero, a residual block is
the identity; every one that can have its value back without spoiling that gets it back.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_grow.structure.axes import Stack
from lightning_grow.structure.sandbox import plain_layers, swap_in, tensors_in, unchanged
from lightning_grow.structure.trials import perturbed

_POSITION = re.compile(r"(^|_)(layer|block|depth|stage)?_?(idx|index|id|number)$")

Identity = tuple[tuple[str, ...], tuple[str, ...]]
"""Parameters of a block to set to zero, and parameters to set to the identity."""


@dataclass
class _Call:
    """What a block was called with, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: Tensor
    after: Tensor
    times: int = 1


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

    Numbered children are numbered again; children with names get the name of a neighbour with the next free number.
    """
    children = dict(container.named_children())
    names = list(children)
    position = names.index(at) if at else len(names)
    values = list(children.values())
    values.insert(position, block)
    if all(n.isdigit() for n in names):
        return {str(i): child for i, child in enumerate(values)}
    stem = names[min(position, len(names) - 1)].rstrip("0123456789")
    number = next(i for i in range(len(names) + 2) if f"{stem}{i}" not in children)
    names.insert(position, f"{stem}{number}")
    return dict(zip(names, values, strict=True))


def make_identity_(block: nn.Module, zeroed: tuple[str, ...], identity: tuple[str, ...]) -> None:
    """Let a block return its input: zero and identity weights, and neutral batch norms where weights are identities.

    A batch norm returns its input, given its running statistics, with their inverse as its scale and shift
    (Net2DeeperNet, step 3).
    """
    parameters = dict(block.named_parameters())
    with torch.no_grad():
        for name in (*zeroed, *identity):
            parameters[name].zero_()
        for name in identity:
            weight = parameters[name]
            centre = tuple(size // 2 for size in weight.shape[2:])
            for i in range(weight.shape[0]):
                weight[(i, i, *centre)] = 1
        for module in block.modules() if identity else ():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
                mean, var = module.running_mean, module.running_var
                if module.affine and mean is not None:
                    module.weight.copy_(torch.sqrt(var + module.eps))
                    module.bias.copy_(mean)


def counted(blocks: Sequence[nn.Module]) -> list[tuple[str, str, int]]:
    """Return what blocks keep as their own position, such as ``layer_idx``: path in a block, attribute, first value.

    It is a position if it counts up from block to block; in a stack of one block, if it is called so.
    """
    found = []
    for path, module in blocks[0].named_modules():
        others = [submodule(block, path) for block in blocks]
        for name, first in list(vars(module).items()):
            values = [None if other is None else vars(other).get(name) for other in others]
            counts = type(first) is int and values == list(range(first, first + len(values)))
            if counts and (len(values) > 1 or _POSITION.search(name)):
                found.append((path, name, first))
    return found


def submodule(block: nn.Module, path: str) -> nn.Module | None:
    """Return the module of this name in a block, or None."""
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


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


def _runs(children: Mapping[str, nn.Module], calls: Mapping[int, _Call]) -> Iterator[list[str]]:
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
        named = [*model.named_parameters(), *model.named_buffers()]
        self.written = {n: t.detach() for n, t in named if n in written or not isinstance(t, nn.Parameter)}

    def run(self, blocks: Mapping[int, nn.Module], children: tuple[str, dict[str, nn.Module]] | None = None) -> Any:
        """Return the calls of the blocks by id, and the outputs; with other children of one container if asked."""
        calls: dict[int, _Call] = {}
        with unchanged(self.model), plain_layers(), torch.no_grad():
            swap_in(self.model, {name: tensor.clone() for name, tensor in self.written.items()})
            if children is not None:
                container = self.model.get_submodule(children[0])
                container._modules.clear()
                container._modules.update(children[1])
            for module in self.model.modules():
                module.__dict__["training"] = False
            handles = [b.register_forward_hook(_recorder(calls), with_kwargs=True) for b in blocks.values()]
            torch.manual_seed(0)
            try:
                outputs = tensors_in(self.call(*self.args, **self.kwargs))
            finally:
                for handle in handles:
                    handle.remove()
        return calls, [t.detach().clone() for t in outputs]


def _recorder(calls: dict[int, _Call]) -> Callable[..., None]:
    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(output)
        if id(block) in calls:
            calls[id(block)].times += 1
        elif inputs and outputs:
            calls[id(block)] = _Call(args, kwargs, inputs[0], outputs[0])

    return record


def _stack(
    runner: _Runner, name: str, path: str, run: list[str], calls: Mapping[int, _Call], reference: list[Tensor]
) -> Stack | None:
    """Return the stack, or None where a new child would not be run at all and nothing suggests that it should."""
    container = runner.model.get_submodule(path)
    block = container.get_submodule(run[-1])
    blocks = tuple(f"{path}.{n}".removeprefix(".") for n in run)
    first, found = 0, _identity(block, calls[id(block)], at_start=True)
    if found is None:  # behind a block the input may be better behaved: not negative after a ReLU
        first, found = 1, _identity(block, calls[id(block)], at_start=False)
    new = copy.deepcopy(block)
    make_identity_(new, *(found or ((), ())))
    for inner, attribute, start in counted([container.get_submodule(n) for n in run]):
        setattr(new.get_submodule(inner), attribute, start + len(run))
    names = [n for n, _ in container.named_children()]
    behind = names[names.index(run[-1]) + 1] if run[-1] != names[-1] else ""
    obstacle = None if found else "a block is not the identity when its weights are zero"
    try:
        seen, outputs = runner.run({id(new): new}, (path, inserted(container, behind, new)))
        if id(new) not in seen:
            obstacle = "the forward pass does not run a block that is added"
        elif found and not _same(outputs, reference):
            obstacle = "a new block changes the output, although it returns its input"
    except Exception as error:  # the model's own code: anything can happen
        seen = {}
        obstacle = f"the model fails with one more block ({type(error).__name__})"
    if id(new) not in seen and not _is_list(container):
        return None
    return Stack(name, blocks, *(found or ((), ())), first=first, obstacle=obstacle)


def _identity(block: nn.Module, call: _Call, at_start: bool) -> Identity | None:
    """Return the parameters to set to zero and to the identity, or None if neither makes the block the identity.

    The block is tried on what it was called with, or on that with the first tensor replaced by what it returned.
    """
    if not at_start:
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: call.after if t is call.before else t, (call.args, call.kwargs)
        )
        call = _Call(args, kwargs, call.after, call.after)
    trial = copy.deepcopy(block).eval()
    parameters = dict(trial.named_parameters())
    values = {n: perturbed(n, p.detach()) for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.data.zero_()
    if _returns_input(trial, call):
        zeroed = list(values)
        for name, value in values.items():
            parameters[name].data.copy_(value)
            if _returns_input(trial, call):
                zeroed.remove(name)
            else:
                parameters[name].data.zero_()
        return tuple(zeroed), ()
    for name, value in values.items():
        parameters[name].data.copy_(value)
    square = tuple(n for n, p in parameters.items() if p.ndim > 1 and p.shape[0] == p.shape[1])
    norms = {
        f"{path}.{name}".removeprefix(".")
        for path, module in trial.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name in ("weight", "bias")
    }
    biases = tuple(n for n, p in parameters.items() if p.ndim == 1 and n not in norms)
    if square and {*square, *biases, *norms} >= set(parameters):
        make_identity_(trial, biases, square)
        if _returns_input(trial, call):
            return biases, square
    return None


def _returns_input(block: nn.Module, call: _Call) -> bool:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            outputs = tensors_in(block(*call.args, **call.kwargs))
        except Exception:  # the model's own code: anything can happen
            return False
    return bool(outputs) and _same(outputs[:1], [call.before])


def _same(outputs: list[Tensor], reference: list[Tensor]) -> bool:
    if [t.shape for t in outputs] != [t.shape for t in reference]:
        return False
    pairs = zip(outputs, reference, strict=True)
    return all(not a.is_floating_point() or torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
