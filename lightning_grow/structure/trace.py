"""Find what may be resized in any model: ``trace(model, *args, **kwargs) -> Structure``.

One run on fake tensors with symbolic sizes gives equations (`symbolic`), solving them gives unit counts (`solve`), what
was seen on the way gives the order of entries (`resolve`), and every proposal is tried on resized tensors before it
counts (`verify`). No rule per operator, no change to the model, no gradient.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_grow.structure.axes import Attribute, Axis, AxisGroup, Block, Layout, Structure, Units, layout_units
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.modules import bookkeeping
from lightning_grow.structure.observe import Bound, Trace
from lightning_grow.structure.resolve import Resolver
from lightning_grow.structure.solve import Solution
from lightning_grow.structure.stacks import find_stacks
from lightning_grow.structure.symbolic import Source, UntraceableError, record, record_outputs, run
from lightning_grow.structure.trials import Trials, UnrunnableError
from lightning_grow.structure.verify import choose_layouts, judge

log = logging.getLogger(__name__)

_MOST_CHOICES = 64
_MOST_KINDS = 6
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
    return _Tracer(model, call, args, kwargs).structure()


class _Tracer:
    """One call of `trace`."""

    def __init__(
        self, model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.model, self.call, self.args, self.kwargs = model, call, args, kwargs
        self.named: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self.canonical = {id(t): n for n, t in reversed(self.named.items())}
        self.modules = dict(model.named_modules())
        self.narrow: dict[tuple[str, int], int] = {}
        self.replay: list[Any] | None = None
        self.written: set[str] = set()
        self.opaque: dict[str, list[Any]] = {}
        self.failures: dict[str, str] = {}

    def structure(self) -> Structure:
        bound = self._kept_by_torch() | self._own_sizes()
        proposal = self._freed(self._propose(bound), bound)
        groups, pinned = self._verified(proposal)
        stacks = find_stacks(self.model, self.call, self.args, self.kwargs, self.written)
        return Structure(groups=groups, stacks=stacks, pinned=_in_order(proposal.pinned | pinned, self.named))

    # -- running -------------------------------------------------------------------------------------------------

    def _propose(self, bound: Mapping[Bound, Source]) -> _Proposal:
        """Return the first proposal.

        Widths of one unit are traced as if they were wider. Where that does not fit (the input has one channel, the
        output one entry), the axes of the module that complains keep their size, the consumed ones first.
        """
        narrow = dict.fromkeys(self._axes_of_one(), _PRETENDED)
        while True:
            try:
                proposal = _Proposal(self, self._run(bound, narrow))
            except UntraceableError as error:
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

    def _closed(self, error: UntraceableError) -> bool:
        """Close a module that cannot be traced, and others of its class: they are not run, and nothing in them varies.

        Returns whether there was one to close.
        """
        failing = self.modules.get(error.path)
        if failing is None or failing is self.model or error.path in self.opaque:
            return False
        paths = [p for p, m in self.modules.items() if type(m) is type(failing) and m is not self.model]
        try:
            recorded = record_outputs(self.model, lambda: self.call(*self.args, **self.kwargs), {*paths, *self.opaque})
        except Exception:  # the model's own code: anything can happen
            return False
        log.info("'%s' and all other %s stay as they are: %s", error.path, type(failing).__name__, error)
        self.opaque = recorded
        self.failures |= dict.fromkeys(paths, f"{type(failing).__name__} cannot be traced ({error})")
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
                name = self.tensor_name(path, parameter)
                if name is not None and self.named[name].shape[dim] == 1:
                    axes[name, dim] = None
        return list(axes)

    def _run(self, bound: Mapping[Bound, Source], narrow: Mapping[tuple[str, int], int]) -> Trace:
        tensors = [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

        def call() -> Any:
            return self.call(*self.args, **self.kwargs)

        def attempt() -> Trace:
            return run(self.model, call, self._static, bound, narrow, tensors, self.replay, self.opaque)

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

    def closed_by(self, name: str) -> str | None:
        """Return why a tensor lies in a module that is not traced, or None."""
        inside = (p for p in self.failures if name.startswith(f"{p}."))
        return next((self.failures[p] for p in inside), None)

    def _static(self, name: str, tensor: Tensor) -> Sequence[int]:
        if (not tensor.is_floating_point() and not tensor.is_complex()) or self.closed_by(name) is not None:
            return range(tensor.ndim)
        owner = self.modules.get(name.rpartition(".")[0])
        if isinstance(owner, nn.modules.conv._ConvNd) or tensor.ndim >= 4:
            return range(2, tensor.ndim)
        return ()

    # -- sizes kept in Python ------------------------------------------------------------------------------------

    def _kept_by_torch(self) -> dict[Bound, Source]:
        bound: dict[Bound, Source] = {}
        for path, module in self.modules.items():
            for kept in bookkeeping(module):
                tensor = self.tensor_name(path, kept.parameter)
                if tensor is not None and kept.times == 1:
                    bound[path, kept.name, kept.index] = (tensor, kept.dim, kept.divisor)
        return bound

    def tensor_name(self, path: str, parameter: str) -> str | None:
        """Return the name under which a parameter is listed: tied, or behind a parametrization (weight norm)."""
        owner, _, leaf = f"{path}.{parameter}".removeprefix(".").rpartition(".")
        module = self.modules[owner]
        shape = getattr(module, leaf).shape
        behind = f"parametrizations.{leaf}.original"
        for name in (leaf, behind, f"{behind}1", f"{behind}0", f"{leaf}_v", f"{leaf}_orig"):
            holder, _, last = f"{owner}.{name}".removeprefix(".").rpartition(".")
            tensor = self.modules[holder]._parameters.get(last) if holder in self.modules else None
            if tensor is not None and tensor.shape == shape:
                return self.canonical[id(tensor)]
        buffer = module._buffers.get(leaf)
        return self.canonical[id(buffer)] if buffer is not None else None

    def _own_sizes(self) -> dict[Bound, Source]:
        """Sizes that a module which is not torch's own keeps beside its own parameters: let them vary."""
        bound: dict[Bound, Source] = {}
        for path, module in self.modules.items():
            if bookkeeping(module):
                continue
            widths = {s for t in module.parameters(recurse=False) for s in t.shape}
            for name, index, value in _integers(module):
                if value in widths:
                    bound[path, name, index] = value
        return bound

    def _sizes_that_pin(self, proposal: _Proposal, bound: Mapping[Bound, Source]) -> list[dict[Bound, Source]]:
        """Return integers of modules that may be why axes are fixed, in the order in which to let them vary.

        First all those that equal a fixed size, where it became fixed or in a module around it; then, one kind after
        the other, those that divide one (heads, of which a fixed number makes a width).
        """
        equal: dict[Bound, Source] = {}
        dividing: dict[tuple[str, str, int | None], dict[Bound, Source]] = {}
        for size, where in proposal.fixed_sizes:
            path = where
            while True:
                module = self.modules[path]
                for name, index, value in _integers(module):
                    key = (path, name, index)
                    if key in bound or size % value:
                        continue
                    if value == size:
                        equal[key] = value
                    elif path == where:
                        dividing.setdefault((type(module).__qualname__, name, index), {})[key] = value
                if not path:
                    break
                path = path.rpartition(".")[0]
        kinds = sorted(dividing.values(), key=lambda kind: min(v for v in kind.values() if isinstance(v, int)))
        return ([equal] if equal else []) + kinds[:_MOST_KINDS]

    def _freed(self, proposal: _Proposal, bound: dict[Bound, Source]) -> _Proposal:
        """Return the proposal with sizes kept in Python varying as well, where the model still runs and that helps."""
        tried: set[Bound] = set()
        trials = self._sizes_that_pin(proposal, bound)
        while trials:
            freed = trials.pop(0)
            tried |= set(freed)
            try:
                other = _Proposal(self, self._run(bound | freed, self.narrow))
            except UntraceableError as error:
                log.debug("sizes kept in Python stay fixed: %s", error)
                continue
            if len(other.pinned) < len(proposal.pinned):
                proposal, bound = other, bound | freed
                trials = [t for t in self._sizes_that_pin(proposal, bound) if not set(t) <= tried]
        return proposal

    # -- verification --------------------------------------------------------------------------------------------

    def _verified(self, proposal: _Proposal) -> tuple[dict[str, AxisGroup], dict[str, str]]:
        if not proposal.groups:
            return {}, {}
        tensors = {a.tensor for g in proposal.groups for a in g.axes}
        try:
            trials = Trials(self.model, self.call, self.args, self.kwargs, tensors)
        except UnrunnableError as error:
            log.warning("The structure of %s is not verified: %s.", type(self.model).__name__, error)
            return {g.name: g for g in proposal.groups}, {}
        trials.sizes = {g.name: g.size for g in proposal.groups}
        self.written = trials.written
        chosen, reasons = choose_layouts(trials, proposal.groups, proposal.options)
        judged, more = judge(trials, chosen, proposal.mixing)
        reasons |= more
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


class _Proposal:
    """What a trace suggests, before it is verified."""

    def __init__(self, tracer: _Tracer, seen: Trace) -> None:
        self.tracer, self.seen = tracer, seen
        self.solution = solution = Solution(seen.hints)
        solution.roots = set(seen.fixed)
        solution.solve(seen.facts, seen.divisible)
        for expr in seen.outputs:
            solution.fix(expr, "model output")
        for expr, path in seen.opaque:
            solution.fix(expr, f"goes into '{path}', which cannot be traced")
        for expr in sorted(seen.looked_up, key=str):
            solution.fix(expr, "its entries are looked up by their index")
        for raw in seen.symbols.values():
            solution.make_whole(raw)
        sizes = {key: solution(raw) for key, raw in seen.symbols.items()}
        self.attributes = self._attributes()
        self.units = self._name_units(sizes)
        self.resolver = Resolver(seen, solution, self.units)
        self.pinned: dict[str, str] = {}
        self.fixed_sizes: set[tuple[int, str]] = set()
        layouts = self._layouts(sizes)
        self.groups, self.options = self._make_groups(layouts)
        self.mixing = self._mixing()

    def varies(self, key: tuple[str, int]) -> bool:
        """Return whether an axis is in a group."""
        return f"{key[0]}[{key[1]}]" not in self.pinned

    def _name_units(self, sizes: Mapping[tuple[str, int], Expr]) -> dict[Expr, Units]:
        """Name each unit count after the first module that produces it."""
        order: dict[Expr, tuple[str, int, int]] = {}
        for wanted in ("produced", "carried", "consumed"):
            for (tensor, dim), expr in sizes.items():
                symbols = expr.free_symbols
                if len(symbols) == 1 and self.seen.roles.get(self.seen.symbols[tensor, dim], "carried") == wanted:
                    (symbol,) = symbols
                    coefficient = expr.as_coeff_Mul()
                    if coefficient[1] == symbol:
                        order.setdefault(symbol, (tensor, dim, int(coefficient[0])))
        position = {name: i for i, name in enumerate(self.tracer.named)}
        units: dict[Expr, Units] = {}
        taken: set[str] = set()
        for symbol, (tensor, dim, per_unit) in sorted(order.items(), key=lambda o: (position[o[1][0]], o[1][1])):
            name = _group_name(tensor, dim, taken)
            taken.add(name)
            units[symbol] = Units(name, tensor, dim, per_unit)
        return units

    def _attributes(self) -> list[tuple[Bound, Expr]]:
        """Return every size kept in Python with its expression, also where the trace had no need to bind it."""
        found: dict[Bound, Expr] = {}
        for path, module in self.tracer.modules.items():
            for kept in bookkeeping(module):
                tensor = self.tracer.tensor_name(path, kept.parameter)
                if tensor is None:
                    continue
                raw = self.seen.sizes[tensor, kept.dim]
                found[path, kept.name, kept.index] = self.solution(raw) * kept.times / kept.divisor
        for bound, raw in self.seen.attributes.items():
            found.setdefault(bound, self.solution(raw))
        return [(bound, expr) for bound, expr in found.items() if expr.free_symbols]

    def _layouts(self, sizes: Mapping[tuple[str, int], Expr]) -> dict[tuple[str, int], list[Layout]]:
        layouts: dict[tuple[str, int], list[Layout]] = {}
        for (tensor, dim), raw in self.seen.sizes.items():
            label = f"{tensor}[{dim}]"
            expr = sizes.get((tensor, dim))
            closed = self.tracer.closed_by(tensor)
            if closed is not None:
                self.pinned[label] = closed
            elif tensor not in self.seen.used:
                self.pinned[label] = "not used by the forward pass"
            elif expr is None:
                self.pinned[label] = self._why_static(tensor, dim)
            elif not expr.free_symbols:
                self.pinned[label] = self._why_fixed(raw)
            elif not expr.free_symbols <= set(self.units):
                self.pinned[label] = "its size is a sum that no single axis shows"
            else:
                options = self.resolver.layouts(raw)
                if options:
                    layouts[tensor, dim] = options
                else:
                    self.solution.fix(expr, "the order of its entries is not visible")
                    self.pinned[label] = "the order of its entries is not visible"
        fixed = {s for s in self.units if not self.solution(s).free_symbols}
        for key in [k for k, o in layouts.items() if any(u in _symbols(o, self.units) for u in fixed)]:
            self.pinned[f"{key[0]}[{key[1]}]"] = "tied to an axis whose order of entries is not visible"
            del layouts[key]
        return layouts

    def _why_static(self, tensor: str, dim: int) -> str:
        t = self.tracer.named[tensor]
        if t.shape[dim] < 2:
            return f"size {t.shape[dim]}"
        if not t.is_floating_point():
            return "not a floating-point tensor"
        return "kernel extent"

    def _why_fixed(self, raw: Expr) -> str:
        symbol, reason = self.solution.reason(raw)
        if reason is not None:
            return reason
        fact = self.solution.fixed_by.get(symbol)
        operator, where = self.seen.fixed.get(symbol) or self.seen.origins.get(fact, ("", ""))
        size = self.solution.size(raw)
        if not where:
            return f"fixed at {size}"
        self.fixed_sizes.add((size, where.split("'")[1] if where.startswith("'") else ""))
        if operator in ("view", "_unsafe_view", "reshape", "expand"):
            return f"literal {size} in a {operator} in {where}"
        return f"meets a fixed size of {size} in {where}"

    def _make_groups(
        self, layouts: Mapping[tuple[str, int], list[Layout]]
    ) -> tuple[list[AxisGroup], dict[str, list[AxisGroup]]]:
        groups: list[AxisGroup] = []
        options: dict[str, list[AxisGroup]] = {}
        for symbol, units in self.units.items():
            mine = {key: o for key, o in layouts.items() if units.group in layout_units(o[0])}
            if not any(isinstance(self.tracer.named[t], nn.Parameter) for t, _ in mine):
                self.pinned |= {f"{t}[{d}]": "belongs to no parameter" for t, d in mine}
                continue
            attributes = tuple(
                Attribute(*bound, self._amount(expr)) for bound, expr in self.attributes if symbol in expr.free_symbols
            )
            size = self.tracer.named[units.tensor].shape[units.dim]
            candidates = [
                AxisGroup(
                    units.group,
                    size // units.per_unit,
                    1,
                    tuple(Axis(t, d, self._role(t, d), layout) for (t, d), layout in zip(mine, choice, strict=True)),
                    attributes,
                )
                for choice in itertools.islice(_choices(list(mine.values())), _MOST_CHOICES)
            ]
            groups.append(candidates[0])
            if len(candidates) > 1:
                options[units.group] = candidates[1:]
        return groups, options

    def _role(self, tensor: str, dim: int) -> Any:
        return self.seen.roles.get(self.seen.symbols[tensor, dim], "carried")

    def _amount(self, expr: Expr) -> Layout:
        """Return a layout of the right length; the order of an amount means nothing."""
        blocks = []
        for monomial, c in sorted(expr.as_coefficients_dict().items(), key=str):
            factors: list[int | Units] = [int(c)] if c != 1 or not monomial.free_symbols else []
            for factor, power in monomial.as_powers_dict().items():
                if factor.free_symbols:
                    factors += [self.units[factor]] * int(power)
            blocks.append(Block(tuple(factors)))
        return tuple(blocks)

    def _mixing(self) -> dict[str, str]:
        mixing: dict[str, str] = {}
        for expr, reason in self.seen.mixing:
            for symbol in self.solution(expr).free_symbols:
                if symbol in self.units and "adds up" not in reason:
                    mixing.setdefault(self.units[symbol].group, reason)
        for expr, reason in self.seen.mixing:
            for symbol in self.solution(expr).free_symbols:
                if symbol in self.units:
                    mixing.setdefault(self.units[symbol].group, reason)
        return mixing


def _choices(options: Sequence[Sequence[Layout]]) -> Iterator[tuple[Layout, ...]]:
    """Yield choices of one layout for each axis: first the same kind of layout for all axes, then every mixture."""
    for kind in range(max(len(o) for o in options)):
        yield tuple(o[min(kind, len(o) - 1)] for o in options)
    yield from itertools.product(*options)


def _symbols(options: Iterable[Layout], units: Mapping[Expr, Units]) -> set[Expr]:
    names = {name for layout in options for name in layout_units(layout)}
    return {symbol for symbol, u in units.items() if u.group in names}


def _group_name(tensor: str, dim: int, taken: set[str]) -> str:
    """Return ``fc1`` for ``fc1.weight``; where that is taken, the tensor's own name, then with its dimension."""
    module = tensor.rpartition(".")[0].partition(".parametrizations.")[0]
    candidates = (module or tensor, tensor, f"{tensor}[{dim}]")
    return next(name for name in candidates if name not in taken)


def _integers(module: nn.Module) -> list[tuple[str, int | None, int]]:
    """Return the integers above 1 that a module keeps as attributes, also inside tuples and lists."""
    found: list[tuple[str, int | None, int]] = []
    for name, value in vars(module).items():
        if type(value) is int and value > 1:
            found.append((name, None, value))
        elif isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            found += [(name, i, v) for i, v in enumerate(value) if type(v) is int and v > 1]
    return found


def _in_order(pinned: Mapping[str, str], named: Mapping[str, Tensor]) -> dict[str, str]:
    position = {f"{n}[{d}]": i for i, (n, d) in enumerate((n, d) for n, t in named.items() for d in range(t.ndim))}
    return dict(sorted(pinned.items(), key=lambda item: position[item[0]]))
