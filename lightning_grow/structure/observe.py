"""What operators tell besides sizes: the order of entries, the role of an axis, and where units are mixed.

A `Trace` is plain data: one symbol for each axis that may vary, the equations between them, and what was seen on the
way. The `Observer` fills it in, one outermost operator at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from lightning_grow.structure.axes import Role

Expr = Any  # a sympy expression; sympy ships no types
Dims = tuple[Expr, ...]

Bound = tuple[str, str, int | None]
"""A size kept as a Python integer: module, attribute, and position if the attribute is a tuple."""

INPUT = "<input>"
"""Owner of what is computed from the model's inputs alone."""

_ADDITIVE = {"add", "add_", "sub", "sub_", "rsub", "addmm", "baddbmm", "addmv", "linear", "addr", "addcmul"}
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten"}
_CATS = {"cat", "concatenate"}
_SPLITS = {
    "split",
    "split_with_sizes",
    "chunk",
    "unsafe_split",
    "unsafe_chunk",
    "unsafe_split_with_sizes",
    "tensor_split",
}
_REDUCTIONS = {"sum", "mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "linalg_vector_norm", "norm"}
_NAMES_OF_MIXING = {
    "native_layer_norm": "LayerNorm averages over this axis",
    "native_group_norm": "GroupNorm averages over groups of this axis",
    "_fused_rms_norm": "RMSNorm averages over this axis",
    "_softmax": "softmax normalises over this axis",
    "_log_softmax": "log-softmax normalises over this axis",
    "_safe_softmax": "softmax normalises over this axis",
}
_OF_VALUES = {"mul", "mul_", "div", "div_", "add", "add_", "sub", "sub_", "rsub", "pow", "pow_", "true_divide", "clamp"}

ADDS_UP, SCALES = "adds up over this axis", "enters the values that are computed"
"""How reasons read that say little or more of why new units change the output."""


@dataclass
class Trace:
    """What one run on fake tensors says.

    Attributes:
        symbols: Raw symbol of each axis that may vary, by ``(tensor, dim)``.
        hints: The size that each symbol has in the model at hand.
        sizes: Size of every axis of every tensor: a raw symbol or a plain integer.
        attributes: Size of every bound attribute.
        facts: Expressions that are zero.
        divisible: Pairs ``(expression, divisor)``.
        views: For each merged or split axis, its ordered factors.
        sums: For each concatenated or divided axis, its ordered parts.
        roles: For each raw symbol, what the parameter's axis does.
        mixing: For each expression of an activation's axis, why operators mix along it.
        outputs: Expressions of the sizes of the model's outputs.
        fixed: For each raw symbol that became a constant, the operator and the module at which it did.
        origins: The operator and the module at which each fact was found.
        used: Names of the tensors that took part in an operation.
        looked_up: Raw symbols of axes along which an operator looks entries up by their index.
        produced: Raw symbols of axes that make units somewhere, whatever else they do (a tied embedding reads them).
        opaque: Sizes that go into modules that cannot be traced, and which.
        repeated: Modules that were taken for others, and for which.
        from_input: Raw symbols that became constants where they met the model's input.
    """

    symbols: dict[tuple[str, int], Expr] = field(default_factory=dict)
    hints: dict[Expr, int] = field(default_factory=dict)
    sizes: dict[tuple[str, int], Expr] = field(default_factory=dict)
    attributes: dict[Bound, Expr] = field(default_factory=dict)
    facts: list[Expr] = field(default_factory=list)
    divisible: list[tuple[Expr, Expr]] = field(default_factory=list)
    views: list[tuple[Expr, Dims]] = field(default_factory=list)
    sums: list[tuple[Expr, Dims]] = field(default_factory=list)
    roles: dict[Expr, Role] = field(default_factory=dict)
    mixing: list[tuple[Expr, str]] = field(default_factory=list)
    outputs: set[Expr] = field(default_factory=set)
    fixed: dict[Expr, tuple[str, str]] = field(default_factory=dict)
    origins: dict[Expr, tuple[str, str]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    looked_up: set[Expr] = field(default_factory=set)
    produced: set[Expr] = field(default_factory=set)
    opaque: list[tuple[Expr, str]] = field(default_factory=list)
    repeated: dict[str, str] = field(default_factory=dict)
    from_input: set[Expr] = field(default_factory=set)


class DataDependentSizeError(RuntimeError):
    """What comes next depends on the values of tensors."""


Mark = tuple[int, ...]
"""How much there was in each list of a trace at some moment."""


class Observer:
    """Collects from each operator what sizes alone do not tell: order, role, and mixing.

    Args:
        expr: Returns the expression that a size was made with, before later facts replaced its symbols.
        buffers: Names of buffers, which are no weights.

    Attributes:
        trace: What has been seen.
        env: The shape environment, which knows what symbols are equal.
        owner: For tensors computed from a single parameter or from the inputs alone, its name.
        modules: The modules that are running, outermost first: name and type.
        operator: Returns the name of the operator that is running.
    """

    def __init__(self, expr: Callable[[Any], Expr], buffers: Collection[str] = ()) -> None:
        self.trace = Trace()
        self._buffers = buffers
        self._masked: list[tuple[Dims, Dims]] = []
        self.env: Any = None
        self.expr = expr
        self.owner: Any = WeakIdKeyDictionary()
        self.modules: list[tuple[str, str]] = []
        self.operator: Callable[[], str] = str
        self._guards = 0
        self._fixed: list[Expr] = []
        self._long_sums: dict[Expr, Expr] = {}

    @property
    def where(self) -> str:
        """The innermost module that is running, as ``'name' (Type)``."""
        name, kind = self.modules[-1] if self.modules else ("", "the model")
        return f"'{name}' ({kind})" if name else kind

    def note_guards(self) -> None:
        """Write the equations that the engine has found since the last call into the trace."""
        guards = self.env.guards
        for guard in guards[self._guards :]:
            if isinstance(guard.expr, sympy.Eq):
                for one, other in ((guard.expr.lhs, guard.expr.rhs), (guard.expr.rhs, guard.expr.lhs)):
                    if one.is_Symbol and other.is_Add and one not in other.free_symbols:
                        self._long_sums.setdefault(one, other)
                self._add_fact(guard.expr.lhs, guard.expr.rhs, (self.operator(), self.where))
        self._guards = len(guards)

    def finish(self) -> None:
        """Write down all that the engine knows to be equal."""
        self.note_guards()
        self.trace.facts += [s - e for s, e in self.env.replacements.items()]
        roles = self.trace.roles
        for buffer, parameter in self._masked:  # of a masked weight, it is the weight that makes or reads units
            for a, b in zip(buffer, parameter, strict=True):
                if roles.get(a, "carried") != "carried":
                    roles[a], roles[b] = "carried", roles[a]

    def mark(self) -> Mark:
        """Return how much has been seen so far."""
        self.note_guards()
        trace = self.trace
        return tuple(map(len, (trace.facts, trace.divisible, trace.views, trace.sums, trace.mixing)))

    def repeat(self, start: Mark, end: Mark, symbols: Mapping[Expr, Expr], paths: tuple[str, str]) -> None:
        """Write down again what was seen between two marks, with other symbols and in another module."""
        trace = self.trace
        spans = [slice(a, b) for a, b in zip(start, end, strict=True)]

        def moved(text: str) -> str:
            return text.replace(f"'{paths[0]}", f"'{paths[1]}")

        for fact in trace.facts[spans[0]]:
            new = fact.xreplace(symbols)
            trace.facts.append(new)
            if fact in trace.origins:
                operator, where = trace.origins[fact]
                trace.origins.setdefault(new, (operator, moved(where)))
        trace.divisible += [(a.xreplace(symbols), b.xreplace(symbols)) for a, b in trace.divisible[spans[1]]]
        for seen, span in ((trace.views, spans[2]), (trace.sums, spans[3])):
            seen += [(w.xreplace(symbols), tuple(p.xreplace(symbols) for p in parts)) for w, parts in seen[span]]
        trace.mixing += [(e.xreplace(symbols), moved(reason)) for e, reason in trace.mixing[spans[4]]]
        for old, new in symbols.items():
            if old is new or not new.is_Symbol:
                continue
            if old in trace.roles and (new not in trace.roles or trace.roles[old] == "consumed"):
                trace.roles[new] = trace.roles[old]
            if old in trace.fixed:
                operator, where = trace.fixed[old]
                trace.fixed.setdefault(new, (operator, moved(where)))
            for noted in (trace.looked_up, trace.produced, trace.from_input):
                if old in noted:
                    noted.add(new)

    def _add_fact(self, lhs: Expr, rhs: Expr, origin: tuple[str, str]) -> None:
        for one, other in ((lhs, rhs), (rhs, lhs)):
            if type(one).__name__ in ("Mod", "PythonMod") and other == 0:
                self.trace.divisible.append((one.args[0], one.args[1]))
                return
        self.trace.facts.append(lhs - rhs)
        self.trace.origins.setdefault(lhs - rhs, origin)

    def on_constant(self, symbol: Expr) -> None:
        """Note where a symbol became a constant."""
        self.trace.fixed.setdefault(symbol, (self.operator(), self.where))
        self._fixed.append(symbol)

    def on_value(self, expr: Expr) -> None:
        """Note that a number that depends on sizes is used as a value, and not as a size."""
        if expr.free_symbols:
            self.trace.mixing.append((expr, f"its size {SCALES} in {self.where}, as in a scale"))

    def dims(self, tensor: Tensor) -> Dims:
        """Return the expressions of a tensor's sizes."""
        return tuple(self.expr(size) for size in tensor.shape)

    def _known(self, expr: Expr) -> Expr:
        """Return an expression with known equalities used, also those that the engine finds too long to use."""
        expr = self.env.replace(expr)
        long = expr.free_symbols & self._long_sums.keys()
        return self.env.replace(expr.xreplace({s: self._long_sums[s] for s in long})) if long else expr

    def _free(self, dims: Sequence[Expr]) -> set[Expr]:
        return {s for d in dims for s in self._known(d).free_symbols}

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note what one operator tells."""
        self.note_guards()
        name = func.__name__.split(".")[0]
        inputs = tensors_of((args, kwargs))
        outputs = tensors_of(out)
        if self._fixed:
            if any(self.owner.get(t) == INPUT for t in inputs):
                self.trace.from_input.update(self._fixed)
            self._fixed.clear()
        if not inputs or not outputs:
            return
        owners = {self.owner[t] for t in inputs if t in self.owner}
        weights_only = all(t in self.owner for t in inputs) and (len(owners) == 1 or INPUT not in owners)
        if weights_only:
            for t in outputs:
                self.owner[t] = self.owner[inputs[0]]
        self.trace.used |= owners
        self._lookups(name, args)
        self._values(name, args, kwargs)
        if name in _VIEWS:
            self._view(self.dims(inputs[0]), self.dims(outputs[0]))
        elif name in _CATS:
            self._cat(args, kwargs, inputs, outputs[0])
        elif name in _SPLITS:
            self._split(inputs[0], outputs)
        elif weights_only and len(inputs) > 1:
            self._roles_among_weights(name, args, inputs)
        elif len(inputs) > 1 and any(o != INPUT for o in owners):
            self._roles(func, args, inputs, outputs)
        by_entry = getattr(func, "is_view", False) or torch.Tag.pointwise in getattr(func, "tags", ())
        if not by_entry and (weights_only or not owners - {INPUT} or name in _NAMES_OF_MIXING):
            self._mixing(name, args, inputs, outputs)

    def _values(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Numbers among the arguments of an operator that are made of sizes: a scale, or a mean."""
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.SymFloat) or (isinstance(leaf, torch.SymInt) and name in _OF_VALUES):
                self.on_value(self.expr(leaf))

    # -- order ---------------------------------------------------------------------------------------------------

    def _view(self, before: Dims, after: Dims) -> None:
        """Match the two shapes from the left: equal running products close a run of merged or split axes."""
        one = sympy.Integer(1)
        i = j = 0
        while i < len(before) and j < len(after):
            run_i, run_j = [before[i]], [after[j]]
            left, right = self._known(before[i]), self._known(after[j])
            i, j = i + 1, j + 1
            while not self._equal(left, right):
                if self._hint(left) < self._hint(right) and i < len(before):
                    run_i.append(before[i])
                    left = left * self._known(before[i])
                    i += 1
                elif j < len(after):
                    run_j.append(after[j])
                    right = right * self._known(after[j])
                    j += 1
                else:
                    return
            many_i = tuple(d for d in run_i if d != one)
            many_j = tuple(d for d in run_j if d != one)
            if len(many_i) == 1 and len(many_j) > 1:
                self.trace.views.append((many_i[0], many_j))
            elif len(many_j) == 1 and len(many_i) > 1:
                self.trace.views.append((many_j[0], many_i))

    def _equal(self, left: Expr, right: Expr) -> bool:
        return left == right or self._hint(left) == self._hint(right)

    def _hint(self, expr: Expr) -> int:
        return int(sympy.Integer(evaluate(expr, self.trace.hints)))

    def _cat(self, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], out: Tensor) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        parts = tuple(self.expr(t.shape[dim]) for t in inputs if t.ndim == out.ndim)
        self.trace.sums.append((self.expr(out.shape[dim]), parts))

    def _split(self, whole: Tensor, parts: list[Tensor]) -> None:
        for dim in range(whole.ndim):
            sizes = tuple(self.expr(p.shape[dim]) for p in parts)
            if len(parts) > 1 and sum(self._hint(s) for s in sizes) == self._hint(self.expr(whole.shape[dim])):
                self.trace.sums.append((self.expr(whole.shape[dim]), sizes))

    def _lookups(self, name: str, args: tuple[Any, ...]) -> None:
        table = args[0] if args else None
        if not isinstance(table, Tensor) or self.owner.get(table, INPUT) == INPUT:
            return
        if name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
            dims = [0]
        elif name in ("index_select", "gather"):
            dims = [args[1]]
        elif name == "index":
            dims = [d for d, index in enumerate(args[1]) if index is not None]
        else:
            return
        for dim in dims:
            self.trace.looked_up |= self.dims(table)[dim].free_symbols

    # -- roles ---------------------------------------------------------------------------------------------------

    def _roles(self, func: Any, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = func.__name__.split(".")[0]
        entrywise = torch.Tag.pointwise in getattr(func, "tags", ())
        kept = self._free([d for t in outputs for d in self.dims(t)])
        for tensor in inputs:
            if self.owner.get(tensor, INPUT) == INPUT:
                continue
            others = self._free([d for t in inputs if t is not tensor for d in self.dims(t)])
            for dim, expr in enumerate(self.dims(tensor)):
                role: Role
                contracted = self._contracted_dim(name, args, tensor)
                symbols = self._known(expr).free_symbols
                if not symbols:
                    continue
                if dim == contracted or (contracted is None and not symbols & kept and not entrywise):
                    role = "consumed"
                elif contracted is None and symbols & others and not self._adds(name, args, tensor):
                    role = "carried"
                else:
                    role = "produced"
                for symbol in self._own_symbols(tensor, expr):
                    if role == "produced":
                        self.trace.produced.add(symbol)
                    if role == "consumed" or symbol not in self.trace.roles:
                        self.trace.roles[symbol] = role

    def _own_symbols(self, tensor: Tensor, expr: Expr) -> set[Expr]:
        """Return the symbols of a size: those of the weight itself, where the engine put equal ones in their place."""
        name = self.owner[tensor]
        own = {s for d in range(tensor.ndim + 1) if (s := self.trace.symbols.get((name, d))) is not None}
        if expr.free_symbols & own:
            return set(expr.free_symbols & own)
        equal = {s for s in own if self._known(s) == self._known(expr)}
        return equal if len(equal) == 1 else set(expr.free_symbols)

    def _roles_among_weights(self, name: str, args: tuple[Any, ...], inputs: list[Tensor]) -> None:
        """In a product of two weights, the left one's units are consumed: zeros there are enough."""
        kinds = {self.owner[t] in self._buffers: self.dims(t) for t in inputs}
        if len(inputs) == 2 and len(kinds) == 2 and inputs[0].ndim == inputs[1].ndim:
            self._masked.append((kinds[True], kinds[False]))
        dims = {id(t): d for t in inputs if (d := self._contracted_dim(name, args, t)) is not None}
        for tensor, role in zip([t for t in inputs if id(t) in dims], ("consumed", "produced"), strict=False):
            for symbol in self.dims(tensor)[dims[id(tensor)]].free_symbols:
                self.trace.roles[symbol] = role  # type: ignore[assignment]

    @staticmethod
    def _adds(name: str, args: tuple[Any, ...], tensor: Tensor) -> bool:
        return name in _ADDITIVE or (name == "convolution" and len(args) > 2 and tensor is args[2])

    def _mixing(self, name: str, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """An operator without parameters that loses an axis, or normalises along it, mixes its units."""
        reason = _NAMES_OF_MIXING.get(name)
        if reason is None:
            kept = self._free([d for t in outputs for d in self.dims(t)])
            for t in inputs:
                for expr in self.dims(t):
                    symbols = self._known(expr).free_symbols
                    gone = name in _REDUCTIONS and not any(expr in self.dims(o) for o in outputs)
                    if symbols and (gone or symbols - kept):
                        self.trace.mixing.append((expr, f"'{name}' in {self.where} {ADDS_UP}"))
            return
        x = inputs[0]
        if name in ("_softmax", "_log_softmax", "_safe_softmax"):
            dims = [args[1] % x.ndim]
        elif name == "native_group_norm":
            dims = [1]
        else:
            dims = [x.ndim - 1 - i for i in range(len(args[1]))]
        for dim in dims:
            self.trace.mixing.append((self.dims(x)[dim], f"{reason} ({self.where})"))

    def _contracted_dim(self, name: str, args: tuple[Any, ...], tensor: Tensor) -> int | None:
        """Return which dimension of ``tensor`` a contraction sums over; None if the operator is none."""
        operands = {"mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "addmv": (1, 2)}.get(
            name
        )
        if operands is not None:
            if tensor is args[operands[0]]:
                return int(tensor.ndim) - 1
            return max(int(tensor.ndim) - 2, 0) if tensor is args[operands[1]] else None
        if name == "linear":
            return 1 if tensor is args[1] else None
        if name == "convolution" and tensor is args[1]:
            depthwise = args[8] != 1 and self.expr(tensor.shape[1]) == 1
            return None if depthwise else 0 if args[6] else 1
        return None


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operator."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def evaluate(expr: Expr, hints: Mapping[Expr, int]) -> Expr:
    """Return an expression with numbers in the place of its symbols.

    Raises:
        DataDependentSizeError: If one of them has no present value.
    """
    unknown = expr.free_symbols - hints.keys()
    if unknown:
        raise DataDependentSizeError(f"the size {expr} depends on the values of tensors")
    return expr.xreplace({s: sympy.Integer(hints[s]) for s in expr.free_symbols}) if expr.free_symbols else expr
