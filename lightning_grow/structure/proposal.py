"""From what a trace has seen to a proposal: groups with axes, layouts and attributes; what is pinned, and why."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_grow.structure.axes import Attribute, Axis, AxisGroup, Block, Layout, Units, layout_units
from lightning_grow.structure.modules import bookkeeping
from lightning_grow.structure.observe import ADDS_UP, SCALES, Bound, Trace
from lightning_grow.structure.resolve import Resolver
from lightning_grow.structure.solve import Solution
from lightning_grow.structure.states import is_state

Expr = Any  # a sympy expression; sympy ships no types

_MOST_CHOICES = 64
_QUOTED = re.compile(r"'([^']*)' \(")


class Subject:
    """A model under study: its tensors and modules by name, and what of it is closed.

    Attributes:
        model: The model.
        named: Its parameters and buffers, tied ones once.
        modules: Its modules.
        closed: Why modules are not run while tracing, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.named: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self.modules = dict(model.named_modules())
        self.closed: dict[str, str] = {}
        self._canonical = {id(t): n for n, t in reversed(self.named.items())}

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
                return self._canonical[id(tensor)]
        buffer = module._buffers.get(leaf)
        return self._canonical[id(buffer)] if buffer is not None else None

    def closed_by(self, name: str) -> str | None:
        """Return why a tensor lies in a module that is not traced, or None."""
        inside = (p for p in self.closed if name.startswith(f"{p}."))
        return next((self.closed[p] for p in inside), None)


def propose(subject: Subject, seen: Trace) -> Proposal:
    """Return what a trace suggests: with more heads rather than larger ones, where both are possible."""
    proposal = Proposal(subject, seen)
    if not proposal.solution.chose_ratio:
        return proposal
    other = Proposal(subject, seen, keep_ratios=False)
    return min(proposal, other, key=lambda p: (len(p.pinned), sum(group.size == 1 for group in p.groups), len(p.parts)))


class Proposal:
    """What a trace suggests, before it is verified.

    Args:
        subject: The model.
        seen: What was seen of it.
        keep_ratios: See `Solution`.

    Attributes:
        groups: Groups with their likeliest layouts.
        options: The same groups with other layouts, where the order of entries was not seen.
        pinned: Axes that do not vary, with the reason.
        unused: Parameters that took no part.
        mixing: What mixes along the axes of a group.
        written: Labels of axes that make units, some of which also read them.
        fixed_sizes: Sizes at which axes became fixed, and those that they are made of, and the module in which they
            became so.
        parts: Groups that are the size of a fixed number of parts, as that of heads is: these numbers, with the modules
            that have them.
    """

    def __init__(self, subject: Subject, seen: Trace, *, keep_ratios: bool = True) -> None:
        self.subject, self.seen = subject, seen
        self.solution = solution = Solution(seen.hints, keep_ratios=keep_ratios)
        solution.roots = set(seen.fixed)
        solution.minor = {s for a in seen.attributes.values() for s in a.free_symbols} - set(seen.symbols.values())
        for expr in sorted(seen.looked_up, key=str):  # before the rest: fewer unknowns in products
            solution.fix(expr, "its entries are looked up by their index")
        solution.solve(seen.facts, seen.divisible)
        for expr in seen.outputs:
            solution.fix(expr, "model output")
        for expr, path in seen.opaque:
            solution.fix(expr, f"goes into '{path}', which cannot be traced")
        for raw in seen.symbols.values():
            solution.make_whole(raw)
        sizes, self.units = self._name_all_units()
        self.attributes = self._attributes()
        self.resolver = Resolver(seen, solution, self.units)
        self.pinned: dict[str, str] = {}
        self.unused = [n for n, t in subject.named.items() if n not in seen.used and isinstance(t, nn.Parameter)]
        self.fixed_sizes: set[tuple[int, str]] = set()
        self._parts: dict[Expr, set[int]] = {}
        for whole, parts in (*seen.views, *seen.sums):
            self._parts.setdefault(whole, set()).update(int(p) for p in parts if p.is_Integer and p > 1)
        layouts = self._layouts(sizes)
        self.groups, self.options = self._make_groups(layouts)
        self.parts = {group.name: found for group in self.groups if (found := _fixed_parts(group))}
        self.mixing = self._mixing()
        self.written = {
            f"{tensor}[{dim}]"
            for (tensor, dim), raw in seen.symbols.items()
            if raw in seen.produced or seen.roles.get(raw) == "produced"
        }

    def varies(self, key: tuple[str, int]) -> bool:
        """Return whether an axis is in a group."""
        return f"{key[0]}[{key[1]}]" not in self.pinned

    def has_more_parts(self, other: Proposal) -> bool:
        """Return whether this is the other proposal, but that the number of some parts varies and not their size."""
        mine, others = ({g.name: g.size for g in p.groups} for p in (self, other))
        rest = [{n: size for n, size in sizes.items() if n not in other.parts} for sizes in (mine, others)]
        changed = [n for n in other.parts if n in mine and n not in self.parts]
        same = rest[0] == rest[1] and len(self.pinned) == len(other.pinned)
        return same and len(self.parts) < len(other.parts) and all(mine[n] > 1 for n in changed)

    def _name_all_units(self) -> tuple[dict[tuple[str, int], Expr], dict[Expr, Units]]:
        """Return the size of each axis and the name of each unit count; what no single axis shows is fixed."""
        while True:
            sizes = {key: self.solution(raw) for key, raw in self.seen.symbols.items()}
            units = self._name_units(sizes)
            hidden = {s for expr in sizes.values() for s in expr.free_symbols} - set(units)
            if not hidden:
                return sizes, units
            inner = {s: i for _, parts in self.seen.views for i, p in enumerate(parts) for s in self._symbols_of(p)}
            symbol = max(hidden, key=lambda s: (inner.get(s, 0), str(s)))  # the size of heads before their number
            self.solution.fix(symbol, "its size is a sum or a product of sizes that no single axis shows")

    def _symbols_of(self, expr: Expr) -> set[Expr]:
        return set(self.solution(expr).free_symbols)

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
        position = {name: i for i, name in enumerate(self.subject.named)}
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
        for path, module in self.subject.modules.items():
            for kept in bookkeeping(module):
                tensor = self.subject.tensor_name(path, kept.parameter)
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
            closed = self.subject.closed_by(tensor)
            if closed is not None:
                self.pinned[label] = closed
            elif tensor not in self.seen.used:
                self.pinned[label] = "not used by the forward pass"
            elif expr is None:
                self.pinned[label] = self._why_static(tensor, dim)
            elif not expr.free_symbols:
                self.pinned[label] = self._why_fixed(raw, isinstance(self.subject.named[tensor], nn.Parameter))
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
        t = self.subject.named[tensor]
        if t.shape[dim] < 2:
            return f"size {t.shape[dim]}"
        if not t.is_floating_point():
            return "not a floating-point tensor"
        return "kernel extent"

    def _why_fixed(self, raw: Expr, matters: bool) -> str:
        symbol, reason = self.solution.reason(raw)
        if reason is not None:
            return reason
        if symbol in self.seen.from_input:
            return "model input"
        fact = self.solution.fixed_by.get(symbol)
        operator, where = self.seen.fixed.get(symbol) or self.seen.origins.get(fact, ("", ""))
        size = self.solution.size(raw)
        if not where:
            return f"fixed at {size}"
        path = where.split("'")[1] if where.startswith("'") else ""
        if matters:  # a buffer alone does not: what it is for shows in the parameters
            self.fixed_sizes |= {(size, path), *((part, path) for part in self._parts.get(raw, ()))}
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
            if not any(isinstance(self.subject.named[t], nn.Parameter) for t, _ in mine):
                self.pinned |= {f"{t}[{d}]": "belongs to no parameter" for t, d in mine}
                continue
            attributes = tuple(
                Attribute(*bound, layout)
                for bound, expr in self.attributes
                if symbol in expr.free_symbols and (layout := self._attribute_layout(bound, expr))
            )
            size = self.subject.named[units.tensor].shape[units.dim]
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
        grouped = {axis.label for group in groups for axis in group.axes}
        for label in (f"{tensor}[{dim}]" for tensor, dim in layouts):
            if label not in grouped:  # its entries are those of axes that became fixed
                self.pinned.setdefault(label, "tied to an axis whose order of entries is not visible")
        return groups, options

    def _role(self, tensor: str, dim: int) -> Any:
        return self.seen.roles.get(self.seen.symbols[tensor, dim], "carried")

    def _attribute_layout(self, bound: Bound, expr: Expr) -> Layout:
        """Return the layout of a size; empty for that of a tensor whose order of entries is not visible."""
        if not is_state(bound[1]):
            return self._amount(expr)
        known = expr.free_symbols <= set(self.units)
        return next(iter(self.resolver.layouts(self.seen.attributes[bound]) if known else ()), ())

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
        """Return what mixes along the axes of each group: a norm before a scale, and that before a sum."""
        mixing: dict[str, str] = {}
        for expr, reason in sorted(self.seen.mixing, key=lambda m: (ADDS_UP in m[1], SCALES in m[1])):
            for symbol in self.solution(expr).free_symbols:
                if symbol in self.units:
                    mixing.setdefault(self.units[symbol].group, reason)
        return mixing

    def norms(self) -> dict[str, list[str]]:
        """Return the modules that average over the units of a group, by the name of the group."""
        found: dict[str, dict[str, None]] = {}
        for expr, reason in self.seen.mixing:
            for symbol in self.solution(expr).free_symbols:
                where = _QUOTED.findall(reason)
                if symbol in self.units and where and where[-1] in self.subject.modules:
                    found.setdefault(self.units[symbol].group, {})[where[-1]] = None
        return {name: list(paths) for name, paths in found.items()}


def _fixed_parts(group: AxisGroup) -> set[tuple[int, str]]:
    """Return the fixed numbers of parts of which a group is the size, with the module that has them."""
    return {
        (block.factors[-2], axis.tensor.rpartition(".")[0])
        for axis in group.axes
        for block in axis.layout
        if len(block.factors) > 1 and isinstance(block.factors[-2], int) and isinstance(block.factors[-1], Units)
    }


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
