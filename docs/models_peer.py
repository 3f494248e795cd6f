"""What pruning by one unit does to a model, asked in the same way of this library and of Torch-Pruning.

A tool says which entries of which parameters belong to a unit. They are removed, the model runs, and its output is
compared with that of the whole model in which the same entries are zero. No tool is asked whether it was right.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lightning_grow as lg
from tests.zoo_entry import Entry, tensors_in

EQUAL, NORM, DIFFERS, RAISES, OUTPUT = "equal", "norm", "differs", "raises", "output"
ORDER = (EQUAL, NORM, OUTPUT, DIFFERS, RAISES)
_TOLERANCE = 1e-8

Cut = Callable[[nn.Module], Callable[[], Any]]
"""Looks at a model, and returns what removes a unit from it, in place."""


def outcome(entry: Entry, cut: Cut, whole: Sequence[Tensor]) -> tuple[str, set[str], str]:
    """Return how a cut ends, the labels of the parameter axes that it shortens, and the error if there is one."""
    try:
        model = entry.build().eval()
        cut(model)()
        axes = shortened(entry.build(), model)
        with torch.no_grad():
            outputs = entry.outputs(model.eval())
    except Exception as error:  # noqa: BLE001 (whatever it is, it is what the page tells)
        return RAISES, set(), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"
    if [t.shape for t in outputs] != [t.shape for t in whole]:
        return OUTPUT, set(), ""
    reference, through_norm = silenced(entry, cut)
    with torch.no_grad():
        expected = entry.outputs(reference.eval())
    if all(_close(a, b) for a, b in zip(outputs, expected, strict=True)):
        return EQUAL, axes, ""
    return (NORM if through_norm else DIFFERS), axes, ""


def silenced(entry: Entry, cut: Cut) -> tuple[nn.Module, bool]:
    """Return the whole model with zeros where the cut removes entries, and whether a norm loses entries of its own.

    A copy whose parameters hold the numbers of their own entries is cut: what is missing afterwards was removed.
    """
    numbered, model = entry.build(), entry.build()
    remove = cut(numbered.eval())
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
    remove()
    left = dict(numbered.named_parameters(remove_duplicate=False))
    through_norm = False
    for name, parameter in model.named_parameters():
        gone = torch.ones(parameter.numel(), dtype=torch.bool)
        gone[left[name].detach().flatten().long()] = False
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        through_norm |= bool(gone.any()) and "norm" in owner.lower() and "batch" not in owner.lower()
        with torch.no_grad():
            parameter.view(-1)[gone] = 0
    return model, through_norm


def shortened(before: nn.Module, after: nn.Module) -> set[str]:
    """Return the labels of the parameter axes that became shorter."""
    shapes = {name: p.shape for name, p in after.named_parameters(remove_duplicate=False)}
    return {
        f"{name}[{dim}]"
        for name, p in before.named_parameters()
        for dim, size in enumerate(p.shape)
        if shapes[name][dim] < size
    }


def torch_pruning_finds(entry: Entry) -> dict[str, Any]:
    """Return what Torch-Pruning's dependency graph finds in a model, and what becomes of each of its groups.

    A group is cut by one channel; where the model has heads, also by a whole head and by one channel of each head, with
    the sizes that its attention modules keep set as Torch-Pruning's own examples set them. The best outcome counts.
    """
    whole = [t.detach() for t in entry.outputs(entry.build().eval())]
    begin = time.process_time()
    roots, failed = _roots_of(_graph_of(entry, entry.build()))
    seconds = time.process_time() - begin
    outcomes, axes, errors = Counter({RAISES: len(failed)} if failed else {}), set[str](), Counter(failed)
    for name, size in roots:
        results = []
        for units, sizes in _units(entry.build(), size):
            cut = _torch_pruning_cut(entry, name, units, sizes)
            results.append(outcome(entry, cut, whole))
            if results[-1][0] == EQUAL:
                break
        best = min(results, key=lambda result: ORDER.index(result[0]))
        outcomes[best[0]] += 1
        errors.update([best[2]] if best[2] else [])
        if best[0] in (EQUAL, NORM):
            axes |= best[1]
    return {
        "seconds": seconds,
        "groups": len(roots) + len(failed),
        "outcomes": outcomes,
        "axes": len(axes),
        "errors": errors,
    }


def _graph_of(entry: Entry, model: nn.Module) -> Any:
    import torch_pruning as tp  # noqa: PLC0415 (the `peers` extra)

    args, kwargs = entry.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(
            model,
            example_inputs=kwargs or args,
            output_transform=lambda out: [t for t in tensors_in(out) if t.grad_fn is not None],
            verbose=False,
        )


def _roots_of(graph: Any) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the layers that its groups start from, with their channels, and the errors of those without a group.

    As its `get_all_groups` does, from the types of layers that its pruners start from by default; but one group that
    cannot be made does not end the search.
    """
    visited: set[Any] = set()
    found, failed = [], []
    for module in list(graph.module2node):
        if module in visited or not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM)):
            continue
        pruner = graph.get_pruner_of_module(module)
        size = pruner.get_out_channels(module)
        try:
            group = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(size)))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is what the page tells)
            failed.append(f"{type(error).__name__}: {error}"[:110])
            continue
        visited |= {dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)}
        found.append((graph._module2name[module], size))
    return found, failed


def _torch_pruning_cut(entry: Entry, root: str, units: list[int], sizes: dict[str, int]) -> Cut:
    def cut(model: nn.Module) -> Callable[[], None]:
        graph = _graph_of(entry, model)
        module = model.get_submodule(root)
        group = graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, units)

        def remove() -> None:
            group.prune()
            for name, owner in model.named_modules():
                for attribute, size in sizes.items() if root.startswith(f"{name}.") else ():
                    if attribute in vars(owner):
                        setattr(owner, attribute, size)

        return remove

    return cut


def _units(model: nn.Module, size: int) -> Iterable[tuple[list[int], dict[str, int]]]:
    """Yield channels to cut and sizes to set around: one channel, one head, one channel of each head."""
    yield [0], {}
    for heads in _heads(model):
        if size % heads or size == heads:
            continue
        each = size // heads
        head, channel = list(range(each)), list(range(0, size, each))
        fewer = dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), heads - 1)
        smaller = dict.fromkeys(("attention_head_size", "head_dim", "head_size", "key_value_proj_dim"), each - 1)
        wide = ("all_head_size", "inner_dim", "embed_dim")
        for units, sizes in ((head, fewer), (channel, smaller)):
            yield units, {}
            yield units, {**sizes, **dict.fromkeys(wide, size - len(units))}


def _heads(model: nn.Module) -> list[int]:
    """Return the numbers of heads that a model's configurations state."""
    found: dict[int, None] = {}
    stack = [vars(m).get("config") for m in model.modules()] + [m for m in model.modules() if hasattr(m, "num_heads")]
    for config in stack:
        for name, value in vars(config).items() if config is not None and hasattr(config, "__dict__") else ():
            numbers = value if isinstance(value, (list, tuple)) else [value]
            found |= {n: None for n in numbers if "head" in name and "dim" not in name and type(n) is int and n > 1}
    return list(found)


def ours_cut(structure: Any, name: str) -> Cut:
    """Prune one step of a group."""
    group = structure[name]
    return lambda model: lambda: lg.apply_(model, [lg.prune(group, range(group.step))])


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return not a.numel() or float((a - b).abs().max()) <= _TOLERANCE * max(1.0, float(b.abs().max()))
