"""What makes a block the identity: which of its parameters to zero is found by trying, not listed for each class.

With all parameters zero, a residual block returns its input. Every parameter that can have its value back without
spoiling that gets it back, gains and biases first, so that what stays zero is the fan-out of each branch: it learns
from the first step on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_grow.structure.sandbox import tensors_in
from lightning_grow.structure.trials import perturbed

_PLAIN = (Tensor, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, nn.Module)

Identity = tuple[tuple[str, ...], tuple[str, ...]]
"""Parameters of a block to set to zero, and parameters to set to the identity."""


@dataclass
class Call:
    """What a block was called with, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: Tensor
    after: Tensor
    times: int = 1

    def behind(self) -> Call:
        """Return a call with what the block returned in the place of its input."""
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: self.after if t is self.before else t, (self.args, self.kwargs)
        )
        return Call(args, kwargs, self.after, self.after)


def private(tree: Any) -> Any:
    """Return arguments with copies of what a block could write to, such as the cache of keys and values."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, _PLAIN) or callable(leaf):
            return leaf
        try:
            return copy.deepcopy(leaf)
        except Exception:  # the model's own objects: anything can happen
            return leaf

    return pytree.tree_map(copied, tree)


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


def find_identity(block: nn.Module, call: Call) -> Identity | None:
    """Return the parameters to set to zero and to the identity, or None if neither makes the block the identity."""
    trial = copy.deepcopy(block).eval()
    for path, module in trial.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):  # statistics do not stay as they are before training
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    statistic.data.copy_(perturbed(path, statistic))
    parameters = dict(trial.named_parameters())
    values = {n: perturbed(n, p.detach()) for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.data.zero_()
    if _returns_input(trial, call):
        zeroed = set(values)
        for name in sorted(values, key=lambda n: parameters[n].ndim > 1):
            parameters[name].data.copy_(values[name])
            if _returns_input(trial, call):
                zeroed.remove(name)
            else:
                parameters[name].data.zero_()
        return tuple(name for name in values if name in zeroed), ()
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


def why_no_identity(block: nn.Module, call: Call) -> str:
    """Say what keeps a block from being the identity: what it ends in, with all of its weights zero."""
    ends: list[tuple[str, nn.Module, Tensor]] = []

    def recorder(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            ends.extend((path, module, t) for t in tensors_in(output)[:1])

        return hook

    trial = copy.deepcopy(block).eval()
    handles = [m.register_forward_hook(recorder(n)) for n, m in trial.named_modules() if n]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            args, kwargs = private((call.args, call.kwargs))
            output = tensors_in(trial(*args, **kwargs))[0]
    except Exception as error:  # the model's own code: anything can happen
        return f"a block cannot be run by itself ({type(error).__name__})"
    finally:
        for handle in handles:
            handle.remove()
    last = [(p, m) for p, m, t in ends if t.data_ptr() == output.data_ptr() and t.shape == output.shape]
    if not last:
        return "no block returns its input when its weights are zero: nothing carries the input to the output unchanged"
    path, module = last[0]
    kind = type(module).__name__
    if "Norm" in kind:
        return f"each block ends in a {kind} (post-norm, '{path}'), which normalises anew what it is given"
    return f"each block ends in a {kind} ('{path}'): no sum carries its input past it to the output"


def _returns_input(block: nn.Module, call: Call) -> bool:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        args, kwargs = private((call.args, call.kwargs))
        try:
            outputs = tensors_in(block(*args, **kwargs))
        except Exception:  # the model's own code: anything can happen
            return False
    return bool(outputs) and same(outputs[:1], [call.before])


def same(outputs: list[Tensor], reference: list[Tensor]) -> bool:
    """Return whether tensors are equal, up to rounding."""
    if [t.shape for t in outputs] != [t.shape for t in reference]:
        return False
    pairs = zip(outputs, reference, strict=True)
    return all(not a.is_floating_point() or torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
