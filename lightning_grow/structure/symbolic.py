"""Run a model on fake tensors whose parameter sizes are symbols, and write down what PyTorch works out about them.

This is the only file that touches PyTorch's semi-private symbolic-shape engine (`torch._subclasses.fake_tensor`,
`torch.fx.experimental.symbolic_shapes`). What leaves it is plain: one symbol for each axis that may vary, the equations
between them (`Trace.facts`), and the few structural operations that tell the order and the role of entries
(`Trace.views`, `Trace.sums`, `Trace.roles`, ...).

No data is touched: the tensors have sizes and types but no values.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from lightning_grow.structure.axes import Attribute, Role
from lightning_grow.structure.sandbox import set_size, swap_in, tensors_in, unchanged
from lightning_grow.structure.twins import PlainTwins

Expr = Any  # a sympy expression; sympy ships no types
Dims = tuple[Expr, ...]

Bound = tuple[str, str, int | None]
"""A size kept as a Python integer: module, attribute, and position if the attribute is a tuple."""
Source = tuple[str, int, int] | int
"""What it follows: tensor, dimension, divisor; or its present value, to vary by itself."""

_INPUT = "<input>"

_aten = torch.ops.aten
_ADDITIVE = {"add", "add_", "sub", "sub_", "rsub", "addmm", "baddbmm", "addmv", "linear", "addr", "addcmul"}
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten"}
_NAMES_OF_MIXING = {
    "native_layer_norm": "LayerNorm averages over this axis",
    "native_group_norm": "GroupNorm averages over groups of this axis",
    "_fused_rms_norm": "RMSNorm averages over this axis",
    "_softmax": "softmax normalises over this axis",
    "_log_softmax": "log-softmax normalises over this axis",
    "_safe_softmax": "softmax normalises over this axis",
}


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
        fixed: For each raw symbol that became a constant, why.
        used: Names of the tensors that took part in an operation.
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
    used: set[str] = field(default_factory=set)


class UntraceableError(RuntimeError):
    """The model's own code failed on fake tensors, in the module ``path``."""

    def __init__(self, path: str, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.path = path


class _Env(ShapeEnv):
    """A shape environment that is linear in depth, and remembers where a symbol became a constant."""

    def __init__(self, on_constant: Callable[[Expr], None]) -> None:
        self._on_constant = on_constant
        super().__init__(duck_shape=False)

    # Re-simplifying every floor division at each new fact makes tracing quadratic in depth, and finds nothing more.
    @property
    def _resimplify_floor_div_axioms(self) -> bool:
        return False

    @_resimplify_floor_div_axioms.setter
    def _resimplify_floor_div_axioms(self, value: bool) -> None:
        pass

    def _set_replacement(self, a: Expr, tgt: Expr, msg: str) -> None:
        if not tgt.free_symbols:
            self._on_constant(a)
        super()._set_replacement(a, tgt, msg)


class _Mode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors with an observer of the outermost operators.

    Observed from a subclass, not from a second dispatch mode: on torch 2.9 to 2.11 another mode on top turns symbolic
    sizes into concrete ones.
    """

    def __init__(self, env: ShapeEnv, observe: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]) -> None:
        super().__init__(shape_env=env, allow_non_fake_inputs=True)
        self._observe = observe
        self._depth = 0
        self.operator = ""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":
            return super().dispatch(func, types, args, kwargs)
        outermost = self._depth == 0
        if outermost:
            self.operator = func.__name__.split(".")[0]
        self._depth += 1
        try:
            out = super().dispatch(func, types, args, kwargs)
        finally:
            self._depth -= 1
        if outermost and out is not NotImplemented:
            self._observe(func, args, kwargs or {}, out)
        return out


def _expr(size: Any) -> Expr:
    """Return the expression that a size was made with, before later facts replaced its symbols."""
    return size.node._expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _dims(tensor: Tensor) -> Dims:
    return tuple(_expr(size) for size in tensor.shape)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class Observer:
    """Collects from each operator what sizes alone do not tell: order, role, and mixing."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.env: Any = None
        self.owner: Any = WeakIdKeyDictionary()
        self.modules: list[tuple[str, str]] = []
        self.operator: Callable[[], str] = str

    @property
    def where(self) -> str:
        """The innermost module that is running, as ``'name' (Type)``."""
        name, kind = self.modules[-1] if self.modules else ("", "the model")
        return f"'{name}' ({kind})" if name else kind

    def on_constant(self, symbol: Expr) -> None:
        """Note where a symbol became a constant."""
        self.trace.fixed.setdefault(symbol, (self.operator(), self.where))

    def _free(self, dims: Sequence[Expr]) -> set[Expr]:
        return {s for d in dims for s in self.env.replace(d).free_symbols}

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note what one operator tells."""
        name = func.__name__.split(".")[0]
        inputs = _tensors((args, kwargs))
        outputs = _tensors(out)
        if not inputs or not outputs:
            return
        owners = {self.owner[t] for t in inputs if t in self.owner}
        weights_only = all(t in self.owner for t in inputs) and (len(owners) == 1 or _INPUT not in owners)
        if weights_only:
            for t in outputs:
                self.owner[t] = self.owner[inputs[0]]
        self.trace.used |= owners
        if name in _VIEWS:
            self._view(_dims(inputs[0]), _dims(outputs[0]))
        elif name in ("cat", "concatenate"):
            self._cat(args, kwargs, inputs, outputs[0])
        elif name in (
            "split",
            "split_with_sizes",
            "chunk",
            "unsafe_split",
            "unsafe_chunk",
            "unsafe_split_with_sizes",
            "tensor_split",
        ):
            self._split(inputs[0], outputs)
        elif weights_only and len(inputs) > 1:
            self._roles_among_weights(name, args, inputs)
        elif len(inputs) > 1 and any(o != _INPUT for o in owners):
            self._roles(name, args, inputs, outputs)
        if not owners - {_INPUT} or name in _NAMES_OF_MIXING:
            self._mixing(name, args, inputs, outputs)

    # -- order ---------------------------------------------------------------------------------------------------

    def _view(self, before: Dims, after: Dims) -> None:
        """Match the two shapes from the left: equal running products close a run of merged or split axes."""
        one = sympy.Integer(1)
        i = j = 0
        while i < len(before) and j < len(after):
            run_i, run_j = [before[i]], [after[j]]
            left, right = self.env.replace(before[i]), self.env.replace(after[j])
            i, j = i + 1, j + 1
            while not self._equal(left, right):
                if self._hint(left) < self._hint(right) and i < len(before):
                    run_i.append(before[i])
                    left = left * self.env.replace(before[i])
                    i += 1
                elif j < len(after):
                    run_j.append(after[j])
                    right = right * self.env.replace(after[j])
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
        return int(sympy.Integer(_evaluate(expr, self.trace.hints)))

    def _cat(self, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], out: Tensor) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        parts = tuple(_expr(t.shape[dim]) for t in inputs if t.ndim == out.ndim)
        self.trace.sums.append((_expr(out.shape[dim]), parts))

    def _split(self, whole: Tensor, parts: list[Tensor]) -> None:
        for dim in range(whole.ndim):
            sizes = tuple(_expr(p.shape[dim]) for p in parts)
            if len(parts) > 1 and sum(self._hint(s) for s in sizes) == self._hint(_expr(whole.shape[dim])):
                self.trace.sums.append((_expr(whole.shape[dim]), sizes))

    # -- roles ---------------------------------------------------------------------------------------------------

    def _roles(self, name: str, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        kept = self._free([d for t in outputs for d in _dims(t)])
        for tensor in inputs:
            if self.owner.get(tensor, _INPUT) == _INPUT:
                continue
            others = self._free([d for t in inputs if t is not tensor for d in _dims(t)])
            for dim, expr in enumerate(_dims(tensor)):
                role: Role
                contracted = _contracted_dim(name, args, tensor)
                symbols = self.env.replace(expr).free_symbols
                if not symbols:
                    continue
                if dim == contracted or (contracted is None and not symbols & kept):
                    role = "consumed"
                elif contracted is None and symbols & others and not self._adds(name, args, tensor):
                    role = "carried"
                else:
                    role = "produced"
                for symbol in expr.free_symbols:
                    if role == "consumed" or symbol not in self.trace.roles:
                        self.trace.roles[symbol] = role

    def _roles_among_weights(self, name: str, args: tuple[Any, ...], inputs: list[Tensor]) -> None:
        """In a product of two weights, the left one's units are consumed: zeros there are enough."""
        dims = {id(t): d for t in inputs if (d := _contracted_dim(name, args, t)) is not None}
        for tensor, role in zip([t for t in inputs if id(t) in dims], ("consumed", "produced"), strict=False):
            for symbol in _dims(tensor)[dims[id(tensor)]].free_symbols:
                self.trace.roles[symbol] = role  # type: ignore[assignment]

    @staticmethod
    def _adds(name: str, args: tuple[Any, ...], tensor: Tensor) -> bool:
        return name in _ADDITIVE or (name == "convolution" and len(args) > 2 and tensor is args[2])

    def _mixing(self, name: str, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """An operator without parameters that loses an axis, or normalises along it, mixes its units."""
        reason = _NAMES_OF_MIXING.get(name)
        if reason is None:
            kept = self._free([d for t in outputs for d in _dims(t)])
            for t in inputs:
                for expr in _dims(t):
                    if self.env.replace(expr).free_symbols - kept and not name.startswith(("size", "select", "slice")):
                        self.trace.mixing.append((expr, f"'{name}' in {self.where} adds up over this axis"))
            return
        x = inputs[0]
        if name in ("_softmax", "_log_softmax", "_safe_softmax"):
            dims = [args[1] % x.ndim]
        elif name == "native_group_norm":
            dims = [1]
        else:
            dims = [x.ndim - 1 - i for i in range(len(args[1]))]
        for dim in dims:
            self.trace.mixing.append((_dims(x)[dim], f"{reason} ({self.where})"))


def _contracted_dim(name: str, args: tuple[Any, ...], tensor: Tensor) -> int | None:
    """Return which dimension of ``tensor`` a contraction sums over; None if the operator is no contraction of it."""
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
        depthwise = args[8] != 1 and _expr(tensor.shape[1]) == 1
        return None if depthwise else 0 if args[6] else 1
    return None


def _evaluate(expr: Expr, hints: Mapping[Expr, int]) -> Expr:
    return expr.xreplace({s: sympy.Integer(hints[s]) for s in expr.free_symbols}) if expr.free_symbols else expr


def run(
    model: nn.Module,
    call: Callable[[], Any],
    static: Callable[[str, Tensor], Sequence[int]],
    bound: Mapping[Bound, Source],
    pretended: Mapping[tuple[str, int], int],
    inputs: Sequence[Tensor] = (),
) -> Trace:
    """Run ``call`` once with symbolic sizes and return what was seen.

    Args:
        model: The model whose parameters and buffers become symbolic. It is left unchanged.
        call: Runs the model (its forward, or a training step) and returns its outputs.
        static: Dimensions of a named tensor that cannot be widths, such as the extent of a kernel.
        bound: Sizes that modules keep as Python integers, by ``(module, attribute, index)``: each follows an axis,
            ``(tensor, dim, divisor)``, or varies by itself (its present value).
        pretended: Sizes to run with in the place of the model's own, by ``(tensor, dim)``: a width of one unit cannot
            be told from an axis that broadcasts, a width of more can.
        inputs: Tensors that the call closes over: fixed sizes, and known as the model's input.

    Raises:
        UntraceableError: If the model raises. The model is unchanged then, too.
    """
    trace = Trace()
    observer = Observer(trace)
    env = observer.env = _Env(observer.on_constant)
    mode = _Mode(env, observer.observe)
    observer.operator = lambda: mode.operator
    named = {n: _pretend(n, t, pretended) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    fakes = {name: _symbolic(mode, name, tensor, static(name, tensor)) for name, tensor in named.items()}
    for name, fake in fakes.items():
        observer.owner[fake] = name
        for dim, expr in enumerate(_dims(fake)):
            trace.sizes[name, dim] = expr
            if expr.is_Symbol:
                trace.symbols[name, dim] = expr
                trace.hints[expr] = named[name].shape[dim]
    with contextlib.ExitStack() as stack:
        stack.enter_context(unchanged(model))
        swap_in(model, fakes)
        _bind(model, mode, fakes, bound, trace)
        stack.enter_context(_watched(model, observer))
        stack.enter_context(_plain_kernels())
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        for tensor in inputs:
            observer.owner[mode.from_tensor(tensor, static_shapes=True)] = _INPUT
        try:
            outputs = call()
        except Exception as error:  # the model's own code: anything can happen
            raise UntraceableError(observer.modules[-1][0] if observer.modules else "", error) from error
        trace.outputs |= {d for t in tensors_in(outputs) for d in _dims(t)}
    trace.facts = [s - e for s, e in env.replacements.items()]
    for guard in env.guards:
        if isinstance(guard.expr, sympy.Eq):
            _add_fact(trace, guard.expr.lhs, guard.expr.rhs)
    return trace


def _pretend(name: str, tensor: Tensor, sizes: Mapping[tuple[str, int], int]) -> Tensor:
    """Return a tensor that differs in the pretended sizes; its values are never read."""
    shape = [sizes.get((name, dim), size) for dim, size in enumerate(tensor.shape)]
    return tensor if shape == list(tensor.shape) else tensor.new_empty(shape)


def _add_fact(trace: Trace, lhs: Expr, rhs: Expr) -> None:
    for one, other in ((lhs, rhs), (rhs, lhs)):
        if type(one).__name__ in ("Mod", "PythonMod") and other == 0:
            trace.divisible.append((one.args[0], one.args[1]))
            return
    trace.facts.append(lhs - rhs)


def _symbolic(mode: FakeTensorMode, name: str, tensor: Tensor, static: Sequence[int]) -> Tensor:
    """Return a fake tensor whose axes are symbols, except those that are static or of size 0 or 1."""
    dynamic = [
        DimDynamic.STATIC if d in static or size < 2 else DimDynamic.DYNAMIC for d, size in enumerate(tensor.shape)
    ]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic, constraint_sizes=[None] * tensor.ndim)
    fake: Tensor = mode.from_tensor(tensor.detach(), source=ConstantSource(name), symbolic_context=context)
    return fake


@contextlib.contextmanager
def _watched(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Keep the stack of running modules, and note the outputs of the model itself wherever it is called."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _args: Any) -> None:
        if id(module) in names:
            observer.modules.append((names[id(module)], type(module).__name__))

    def leave(module: nn.Module, _args: Any, output: Any) -> None:
        if id(module) in names:
            observer.modules.pop()
        if module is model:
            observer.trace.outputs |= {d for t in tensors_in(output) for d in _dims(t)}

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bind(
    model: nn.Module, mode: FakeTensorMode, fakes: Mapping[str, Tensor], bound: Mapping[Bound, Source], trace: Trace
) -> None:
    """Give sizes that modules keep as Python integers the symbols of the axes that they stand for."""
    for (path, name, index), source in bound.items():
        if isinstance(source, int):
            label = f"{path}.{name}" if index is None else f"{path}.{name}[{index}]"
            size: Any = _symbolic(mode, label, torch.empty(source, device="meta"), ()).shape[0]
            if isinstance(size, torch.SymInt):
                trace.hints[_expr(size)] = source
        else:
            tensor, dim, divisor = source
            size = fakes[tensor].shape[dim] // divisor if divisor > 1 else fakes[tensor].shape[dim]
        trace.attributes[path, name, index] = _expr(size)
        set_size(model, Attribute(path, name, index, ()), size)


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Let attention, encoder and recurrent layers run as the operators that they are made of."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    engine = logging.getLogger("torch._subclasses.fake_tensor")  # logs what the caller gets as an exception
    silent, engine.disabled = engine.disabled, True
    try:
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]), PlainTwins():
            yield
    finally:
        engine.disabled = silent
        torch.backends.mha.set_fastpath_enabled(fast)
