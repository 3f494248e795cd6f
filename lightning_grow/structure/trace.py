"""Find what may be resized in any model: ``trace(model, *args, **kwargs) -> Structure``.

One run on fake tensors with symbolic sizes gives equations (`symbolic`), solving them gives unit counts (`solve`), what
was seen on the way gives the order of entries (`resolve`), and every proposal is tried on resized tensors before it
counts (`verify`). No rule per operator, no change to the model, no gradient.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_grow.structure.axes import AxisGroup, Block, Layout, Stack, Structure, Units
from lightning_grow.structure.configs import expressed
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.exact import with_exact_recipes
from lightning_grow.structure.holders import Holders, is_own
from lightning_grow.structure.modules import bookkeeping, of_input
from lightning_grow.structure.observe import Bound, Trace
from lightning_grow.structure.proposal import Proposal, Subject, propose
from lightning_grow.structure.replay import record, record_outputs
from lightning_grow.structure.stacks import find_stacks
from lightning_grow.structure.states import is_state, states
from lightning_grow.structure.symbolic import Source, UntraceableError, run
from lightning_grow.structure.trials import Trials, UnrunnableError, with_values
from lightning_grow.structure.verify import choose_layouts, judge

log = logging.getLogger(__name__)

_MOST_KINDS = 6
_MOST_HELD = 3
_MOST_PAIRS = 3
_MOST_TRIALS = 12
_PRETENDED = 3

Expr = Any  # a sympy expression; sympy ships no types


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Structure:
    r"""Find every width and depth of a model that its code allows to vary.

    The model runs once on fake tensors (sizes without values) and a few times on resized copies of single tensors, to
    verify what was found. Parameters, buffers, attributes, train or eval mode and random generators are left as they
    were.

    Args:
        model: Any module. For a ``LightningModule``, its ``forward`` is run.
        *args: Example inputs, as for ``model(*args, **kwargs)``. Their sizes count as fixed.
        **kwargs: Further example inputs.

    Returns:
        The groups of coupled axes, the stacks of blocks, and each remaining axis with the reason why it is pinned.

    Raises:
        StructureError: If the model has no parameters, or its forward cannot be run on fake tensors.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
        >>> structure = trace(model, torch.zeros(2, 1, 4, 4))
        >>> [str(axis) for axis in structure["0"].axes if axis.role == "consumed"]
        ['3.weight[1] = 0*4']
    """
    return trace_call(model, model, *args, **kwargs)


def trace_call(model: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Structure:
    """Do as `trace`, running ``call(*args, **kwargs)`` in the place of the model's own forward.

    For example ``trace_call(module, module.training_step, batch, 0)``.
    """
    if not any(True for _ in model.parameters()):
        raise StructureError(f"{type(model).__name__} has no parameters, so there is nothing to resize.")
    lazy = [n for n, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise StructureError(f"'{lazy[0]}' is not initialised yet. Run the model once, then trace it.")
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise StructureError(
            f"{type(model).__name__} is compiled by TorchScript. Trace the Python model before scripting it."
        )
    if not pytree.tree_leaves((args, kwargs)) and call is model:
        raise StructureError(
            f"Tracing {type(model).__name__} needs example inputs: trace(model, *args, **kwargs), "
            "or set 'example_input_array' on a LightningModule."
        )
    with torch.inference_mode(False):
        return _Tracer(model, call, args, kwargs).structure()


class _Tracer:
    """One call of `trace`."""

    def __init__(
        self, model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.model, self.call = model, call
        self.args, self.kwargs = pytree.tree_map_only(Tensor, with_values, (args, kwargs))
        self.subject = Subject(model)
        self.modules = self.subject.modules
        self.holders = Holders(self.modules)
        self.states: dict[str, list[tuple[Bound, int]]] = {}
        for (path, name), tensor in states(self.modules).items():
            sizes = [((path, name, dim), size) for dim, size in enumerate(tensor.shape) if size > 1]
            self.states.setdefault(path, []).extend(sizes)
        self.narrow: dict[tuple[str, int], int] = {}
        self.replay: list[Any] | None = None
        self.trials: Trials | None = None
        self.opaque: dict[str, list[Any]] = {}
        self.modes: tuple[bool | None, ...] = (None,)
        self.singly: set[str] = set()
        self.bound: dict[Bound, Source] = self._kept_by_torch() | self._own_sizes()
        self.in_vain: list[dict[Bound, Source]] = []

    def structure(self) -> Structure:
        groups, pinned, doubtful = self._found()
        if doubtful:
            # Blocks may look alike and behave differently, by their position or what hooks do: look at each of them.
            trials, self.singly = self.trials, doubtful
            others, still, _ = self._found()
            if len(still) < len(pinned):
                groups, pinned = others, still
            else:
                self.trials = trials
        stacks = self._stacks()
        groups, stacks = expressed(self.model, groups, stacks)
        return Structure(groups=groups, stacks=stacks, pinned=_in_order(pinned, self.subject.named))

    def _stacks(self) -> dict[str, Stack]:
        """Look for stacks in the miniature, if there is one."""
        if self.trials is None:
            return find_stacks(self.model, self.call, self.args, self.kwargs)
        with self.trials.miniature() as (args, kwargs):
            return find_stacks(self.model, self.call, args, kwargs, self.trials.written)

    def _found(self) -> tuple[dict[str, AxisGroup], dict[str, str], set[str]]:
        """Return groups and pinned axes, and modules about which tracing repeated blocks once may hide something."""
        proposal = self._freed(self._in_both_modes(self._propose(self.bound)))
        groups, pinned = self._verified(proposal)
        seen = proposal.seen.repeated
        doubtful = _taken_for_others(proposal.unused, seen)
        refused = {axis.tensor for g in proposal.groups if g.name not in groups for axis in g.axes}
        doubtful |= _taken_for_others(sorted(refused), seen)
        return groups, proposal.pinned | pinned, doubtful

    def _in_both_modes(self, proposal: Proposal) -> Proposal:
        """Return what is found in eval and train mode together, if parameters are used in one of them only."""
        if not proposal.unused or len(self.modes) > 1:
            return proposal
        self.modes = (False, True)
        try:
            both = propose(self.subject, self._run(self.bound, self.narrow))
        except UntraceableError as error:
            log.debug("it runs in one mode only: %s", error)
        else:
            if len(both.unused) < len(proposal.unused):
                return both
        self.modes = (None,)
        return proposal

    # -- running -------------------------------------------------------------------------------------------------

    def _propose(self, bound: Mapping[Bound, Source]) -> Proposal:
        """Return the first proposal.

        Widths of one unit are traced as if they were wider. Where that does not fit (the input has one channel, the
        output one entry), the axes of the module that complains keep their size, the consumed ones first.
        """
        narrow = dict.fromkeys(self._axes_of_one(), _PRETENDED)
        while True:
            try:
                proposal = propose(self.subject, self._run(bound, narrow))
            except UntraceableError as error:
                if not narrow and self.modes == (None,) and self.model.training and self._runs_in_eval_mode():
                    self.modes = (False,)  # a batch norm of a single example, for one
                    narrow = dict.fromkeys(self._axes_of_one(), _PRETENDED)
                    continue
                if not narrow and self._closed(error):
                    narrow = dict.fromkeys(self._axes_of_one(), _PRETENDED)
                    continue
                if not narrow:
                    raise StructureError(
                        f"{type(self.model).__name__} cannot be traced: {error} (in '{error.path or 'forward'}'). Its "
                        "forward must run on the example inputs without looking at the values of tensors."
                    ) from error
                here = [key for key in narrow if key[0].rpartition(".")[0] == error.path]
                drop = [key for key in here if key[1] == 1] or here or list(narrow)
            else:
                drop = [key for key in narrow if not proposal.varies(key)]
                if not drop:
                    self.narrow = narrow
                    return proposal
            for key in drop:
                del narrow[key]

    def _runs_in_eval_mode(self) -> bool:
        """Return whether the model fails on data in the mode that it is in, and runs in eval mode."""
        runs = []
        for mode in (None, False):
            try:
                record_outputs(self.model, partial(self._call_in, mode), ())
            except Exception:  # the model's own code: anything can happen
                runs.append(False)
            else:
                runs.append(True)
        return runs == [False, True]

    def _closed(self, error: UntraceableError) -> bool:
        """Close a module that cannot be traced, and others of its class: they are not run, and nothing in them varies.

        Returns whether there was one to close.
        """
        failing = self.modules.get(error.path)
        if failing is None or failing is self.model or error.path in self.opaque:
            return False
        paths = [p for p, m in self.modules.items() if type(m) is type(failing) and m is not self.model]
        try:
            modes = self.modes
            recorded = record_outputs(self.model, lambda: [self._call_in(m) for m in modes], {*paths, *self.opaque})
        except Exception:  # the model's own code: anything can happen
            return False
        log.info("'%s' and all other %s stay as they are: %s", error.path, type(failing).__name__, error)
        self.opaque = recorded
        self.subject.closed |= dict.fromkeys(paths, f"{type(failing).__name__} cannot be traced ({error})")
        return True

    def _axes_of_one(self) -> list[tuple[str, int]]:
        """Return the axes of size 1 in torch's own modules that could be widths of one unit."""
        axes: dict[tuple[str, int], None] = {}
        for path, module in self.modules.items():
            widths = [(k.parameter, k.dim) for k in bookkeeping(module) if k.times == 1]
            beside = [
                n for n, t in [*module._parameters.items(), *module._buffers.items()] if t is not None and t.ndim == 1
            ]
            for parameter, dim in [*widths, *((n, 0) for n in beside if widths)]:
                name = self.subject.tensor_name(path, parameter)
                if name is not None and self.subject.named[name].shape[dim] == 1:
                    axes[name, dim] = None
        return list(axes)

    def _run(self, bound: Mapping[Bound, Source], narrow: Mapping[tuple[str, int], int]) -> Trace:
        tensors = [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

        def call() -> Any:
            with self.holders.noting():
                return [self._call_in(mode) for mode in self.modes]

        def attempt() -> Trace:
            closed = (self.replay, self.opaque)
            return run(self.model, call, self._static, bound, narrow, tensors, *closed, singly=self.singly)

        try:
            return attempt()
        except UntraceableError as error:
            if self.replay is not None or not error.reads_values:
                raise
            try:
                self.replay = record(self.model, call)
            except Exception as failure:  # the model's own code: anything can happen
                raise error from failure
            return attempt()

    def _call_in(self, mode: bool | None) -> Any:
        """Run the model in train or eval mode; in the mode that it is in if None. Use inside `unchanged`."""
        for module in self.model.modules() if mode is not None else ():
            module.__dict__["training"] = mode
        return self.call(*self.args, **self.kwargs)

    def _static(self, name: str, tensor: Tensor) -> Sequence[int]:
        if (not tensor.is_floating_point() and not tensor.is_complex()) or self.subject.closed_by(name) is not None:
            return range(tensor.ndim)
        path = name.rpartition(".")[0].partition(".parametrizations.")[0]
        owner = self.modules.get(path)
        if isinstance(owner, nn.modules.conv._ConvNd) or tensor.ndim >= 4:
            return range(2, tensor.ndim)
        return ()

    # -- sizes kept in Python ------------------------------------------------------------------------------------

    def _kept_by_torch(self) -> dict[Bound, Source]:
        bound: dict[Bound, Source] = {}
        for path, module in self.modules.items():
            for kept in bookkeeping(module):
                tensor = self.subject.tensor_name(path, kept.parameter)
                if tensor is not None and kept.times == 1:
                    bound[path, kept.name, kept.index] = (tensor, kept.dim, kept.divisor)
        return bound

    def _own_sizes(self) -> dict[Bound, Source]:
        """Sizes that a module which is not torch's own keeps beside its own parameters: let them vary."""
        bound: dict[Bound, Source] = {}
        for path, module in self.modules.items():
            if bookkeeping(module):
                continue
            for name, index in of_input(module, 0):
                value = getattr(module, name)
                bound[path, name, index] = value if index is None else value[index]
            widths = {s for t in module.parameters(recurse=False) for s in t.shape}
            bound |= {place: value for place, value in self.holders.own(path) if value in widths}
        return bound

    def _sizes_that_pin(self, proposal: Proposal, bound: Mapping[Bound, Source]) -> list[dict[Bound, Source]]:
        """Return integers of modules that may be why axes are fixed, in the order in which to let them vary.

        First all those that equal a fixed size, where it became fixed or in a module around it; then these with one
        kind of those that divide one (heads, of which a fixed number makes a width); then one such kind after the
        other, those that the module itself keeps before those in objects that it holds; then the first ones without
        one kind; at last those that equal one in all modules of a class, though the equation was met in one of them.
        """
        equal: dict[tuple[str, str, int | None], dict[Bound, Source]] = {}
        dividing: dict[tuple[str, str, int | None], dict[Bound, Source]] = {}
        for size, where in sorted(proposal.fixed_sizes):
            path = where
            while True:
                module = self.modules[path]
                for key, value in [*self.holders.integers(path), *self.states.get(path, ())]:
                    if key in bound or size % value or (is_state(key[1]) and size != value):
                        continue
                    kind = (type(module).__qualname__, *key[1:])
                    if value == size:
                        equal.setdefault(kind, {})[key] = value
                    elif path == where:
                        dividing.setdefault(kind, {})[key] = value
                if not path:
                    break
                path = path.rpartition(".")[0]
        kinds = sorted(dividing.values(), key=lambda kind: min(v for v in kind.values() if isinstance(v, int)))
        own = [kind for kind in kinds if all(is_own(name) for _, name, _ in kind)]
        held = [kind for kind in kinds if kind not in own]
        together = {key: value for kind in equal.values() for key, value in kind.items()}
        single = list(equal.values())
        both = [together | kind for kind in own[:_MOST_PAIRS]] if together else []
        fewer = [
            {k: v for k, v in together.items() if k not in kind} for kind in single[:_MOST_PAIRS] if len(single) > 1
        ]
        trials = ([together] if together else []) + both + own[:_MOST_KINDS] + fewer + held[:_MOST_HELD]
        wide: dict[Bound, Source] = {
            key: value
            for path, module in (self.modules.items() if equal else ())
            for key, value in self.holders.integers(path)
            if key not in bound and value in equal.get((type(module).__qualname__, *key[1:]), {}).values()
        }
        return [*trials[:_MOST_TRIALS], *([wide] if len(wide) > len(together) else [])]

    def _freed(self, proposal: Proposal) -> Proposal:
        """Return the proposal with sizes kept in Python varying as well, where the model still runs and that helps."""
        tried: set[Bound] = set()
        done: list[dict[Bound, Source]] = []
        refused: set[Bound] = set()
        trials = self._sizes_that_pin(proposal, self.bound)
        while trials:
            freed = {place: source for place, source in trials.pop(0).items() if place not in refused}
            if not freed or freed in done:
                continue
            done.append(freed)
            tried |= set(freed)
            try:
                other = propose(self.subject, self._run(self.bound | freed, self.narrow))
            except UntraceableError as error:
                log.debug("sizes kept in Python stay fixed: %s", error)
                kinds = _kind_by_kind(freed)  # one of them may be no size at all
                trials = kinds + trials
                if not kinds and error.wants_numbers:
                    refused |= set(freed)
                continue
            if len(other.pinned) < len(proposal.pinned):
                proposal, self.bound = other, self.bound | freed
                trials = [t for t in self._sizes_that_pin(proposal, self.bound) if not set(t) <= tried]
        return self._with_more_parts(proposal)

    def _with_more_parts(self, proposal: Proposal) -> Proposal:
        """Return the proposal with numbers of heads that vary in the place of their size, where modules keep them."""
        freed: dict[Bound, Source] = {}
        for size, where in sorted({part for parts in proposal.parts.values() for part in parts}):
            path = where
            while path:
                path = path.rpartition(".")[0]
                if bookkeeping(self.modules[path]):
                    break
                equal = {
                    k: v for k, v in self.holders.integers(path) if v == size and k not in self.bound and is_own(k[1])
                }
                freed |= equal
                if equal:
                    break
        if not freed or freed in self.in_vain:
            return proposal
        try:
            other = propose(self.subject, self._run(self.bound | freed, self.narrow))
        except UntraceableError as error:
            log.debug("numbers of parts stay fixed: %s", error)
        else:
            if other.has_more_parts(proposal):
                self.bound |= freed
                return other
        self.in_vain.append(freed)
        return proposal

    # -- verification --------------------------------------------------------------------------------------------

    def _verified(self, proposal: Proposal) -> tuple[dict[str, AxisGroup], dict[str, str]]:
        if not proposal.groups:
            return {}, {}
        train = len(self.modes) > 1
        try:
            trials = Trials(self.model, self.call, self.args, self.kwargs, proposal.groups, train=train)
        except UnrunnableError as error:
            log.warning("The structure of %s is not verified: %s.", type(self.model).__name__, error)
            return {g.name: replace(g, obstacle=f"not verified: {error}") for g in proposal.groups}, {}
        self.trials = trials
        options = {name: [trials.cut(g) for g in others] for name, others in proposal.options.items()}
        chosen, reasons = choose_layouts(trials, [trials.cut(g) for g in proposal.groups], options)
        judged, more = judge(trials, chosen, proposal.mixing)
        reasons |= more
        with trials.with_noise():
            judged = with_exact_recipes(trials, judged, proposal.norms(), proposal.written)
        full = {g.name: g.size for g in proposal.groups}
        judged = [replace(g, size=full[g.name]) for g in judged]
        groups, pinned = _without(judged, proposal.groups, reasons)
        if self.call is not self.model:
            ends = {
                g.name: "model output: nothing consumes it"
                for g in groups
                if g.obstacle and not g.with_role("consumed")
            }
            groups, more = _without([g for g in groups if g.name not in ends], groups, ends)
            pinned |= more
        return {g.name: g for g in groups}, pinned


def _kind_by_kind(bound: Mapping[Bound, Source]) -> list[dict[Bound, Source]]:
    """Return sizes kept in Python sorted by their name; none if they all have one."""
    kinds: dict[tuple[str, int | None], dict[Bound, Source]] = {}
    for (path, name, index), source in bound.items():
        kinds.setdefault((name, index), {})[path, name, index] = source
    return list(kinds.values())[:_MOST_KINDS] if len(kinds) > 1 else []


def _taken_for_others(tensors: Iterable[str], repeated: Collection[str]) -> set[str]:
    """Return the modules that lead to some tensors, from one that was taken for another down."""
    found: set[str] = set()
    for tensor in tensors:
        above = list(itertools.accumulate(tensor.split(".")[:-1], lambda path, name: f"{path}.{name}"))
        first = next((i for i, path in enumerate(above) if path in repeated), len(above))
        found |= set(above[first:])
    return found


def _without(
    groups: Sequence[AxisGroup], all_groups: Sequence[AxisGroup], reasons: Mapping[str, str]
) -> tuple[list[AxisGroup], dict[str, str]]:
    """Leave out groups; their axes become pinned, and fixed parts of the composite axes of other groups."""
    pinned: dict[str, str] = {}
    gone = {g.name: g for g in all_groups if g.name in reasons}
    for g in gone.values():
        for axis in g.axes:
            pinned[axis.label] = reasons[g.name]
    sizes = {name: g.size for name, g in gone.items()}
    kept = []
    for g in groups:
        axes = tuple(replace(a, layout=_fixed(a.layout, sizes)) for a in g.axes)
        attributes = tuple(replace(a, layout=_fixed(a.layout, sizes)) for a in g.attributes)
        kept.append(replace(g, axes=axes, attributes=attributes))
        for axis in axes:
            pinned.pop(axis.label, None)
    return kept, pinned


def _fixed(layout: Layout, sizes: Mapping[str, int]) -> Layout:
    blocks = []
    for block in layout:
        factors = tuple(sizes.get(f.group, f) if isinstance(f, Units) else f for f in block.factors)
        blocks.append(Block(factors))
    return tuple(blocks)


def _in_order(pinned: Mapping[str, str], named: Mapping[str, Tensor]) -> dict[str, str]:
    position = {f"{n}[{d}]": i for i, (n, d) in enumerate((n, d) for n, t in named.items() for d in range(t.ndim))}
    return dict(sorted(pinned.items(), key=lambda item: position[item[0]]))
