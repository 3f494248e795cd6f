"""Run a model on fake tensors whose parameter sizes are symbols, and write down what PyTorch works out about them.

This is the only file that touches PyTorch's semi-private symbolic-shape engine (`torch._subclasses.fake_tensor`,
`torch.fx.experimental.symbolic_shapes`). What leaves it is plain: one symbol for each axis that may vary, the equations
between them, and what an `Observer` sees on the way.

No data is touched: the tensors have sizes and types but no values.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv, ValueRangesSLoc
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.symbol import SymT, make_symbol
from torch.utils._sympy.value_ranges import ValueRanges

from lightning_grow.structure.axes import Attribute
from lightning_grow.structure.elementwise import elementwise, is_elementwise
from lightning_grow.structure.modules import of_input
from lightning_grow.structure.observe import INPUT, Bound, DataDependentSizeError, Expr, Observer, Trace, evaluate
from lightning_grow.structure.probe import probe
from lightning_grow.structure.repeat import Repeats
from lightning_grow.structure.replay import READS_VALUES, Made, plain_kernels
from lightning_grow.structure.reshape import viewed
from lightning_grow.structure.sandbox import set_size, swap_in, tensors_in, unchanged
from lightning_grow.structure.states import is_state, put_state, state_at, states
from lightning_grow.structure.twins import PlainTwins

_FIRST_SYMBOL = 10**9  # far from the numbers that the engine itself gives
_ABOVE_ONE = ValueRanges(2, int_oo)

Source = tuple[str, int, int] | int
"""What a size kept as a Python integer follows: tensor, dimension, divisor; or its value, to vary by itself."""


class UntraceableError(RuntimeError):
    """The model's own code failed on fake tensors, in the module ``path``; perhaps because it reads their values."""

    def __init__(self, path: str, error: Exception, reads_values: bool) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.path = path
        self.reads_values = reads_values
        self.wants_numbers = torch.SymInt.__name__ in str(error)  # what is kept here can never be a symbol


class _Specialised(Exception):  # noqa: N818
    """A kernel asked for a plain number while it was tried whether it can do without."""


class _Env(ShapeEnv):
    """A shape environment that is linear in depth, and remembers where a symbol became a constant.

    Attributes:
        strict: Raise instead of letting a symbol become a constant.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.strict = False
        self._made = 0
        self._place: Any = None
        super().__init__(duck_shape=False)

    # What a `probe` needs to know of sizes.

    def expr(self, size: Any) -> Expr:
        """Return the expression of a size, with known equalities used."""
        return self.replace(_expr(size))

    def hint(self, expr: Expr, changed: Mapping[Expr, int]) -> int:
        """Return the number that an expression has now, with some symbols changed."""
        return int(evaluate(expr, {**self._observer.trace.hints, **changed}))

    @staticmethod
    def outside() -> Any:
        """Return a context in which tensors are ordinary ones."""
        return unset_fake_temporarily()

    def equate(self, one: Expr, other: Expr) -> None:
        """Note that a symbol equals an expression."""
        sizes = [self.create_symintnode(expr, hint=self.hint(expr, {})) for expr in (one, other)]
        if sizes[0] != sizes[1]:
            raise RuntimeError(f"{one} and {other} cannot be equal")

    def symbolic(self, terms: Mapping[Expr, Fraction], constant: Fraction) -> Any:
        """Return ``sum(c*s) + constant`` as a size."""
        bottom = math.lcm(constant.denominator, *(c.denominator for c in terms.values()))
        total: Any = int(constant * bottom)
        for symbol, c in terms.items():
            total += int(c * bottom) * self.create_symintnode(symbol, hint=self.hint(symbol, {}))
        return total // bottom if bottom > 1 else total

    def new_size(self, label: str, size: int) -> Any:
        """Return a size above 1 that may vary, as a symbol of its own.

        Does what ``create_symbol`` does but for its proof that a size above 1 is above 1, which takes most of the time.
        Names count up, so that sympy knows the symbols again in the next run.
        """
        symbol = make_symbol(SymT.SIZE, _FIRST_SYMBOL + self._made, positive=True, integer=True)
        self._made += 1
        source = ConstantSource(label)
        if self._place is None:
            self._place = ValueRangesSLoc(self._get_sloc(), self._get_sloc())
        values = self.backed_var_to_val if hasattr(self, "backed_var_to_val") else self.var_to_val  # torch 2.9 to 2.11
        values[symbol] = sympy.Integer(size)
        self.source_to_var[source.name] = symbol
        self.var_to_sources[symbol] = [source]
        self.var_to_range[symbol] = _ABOVE_ONE
        self.var_to_range_sloc[symbol] = self._place
        self.symbol_guard_counter[symbol] = 0
        return self.create_symintnode(symbol, hint=size, source=source)

    # Re-simplifying every floor division at each new fact makes tracing quadratic in depth, and finds nothing more.
    @property
    def _resimplify_floor_div_axioms(self) -> bool:
        return False

    @_resimplify_floor_div_axioms.setter
    def _resimplify_floor_div_axioms(self, value: bool) -> None:
        pass

    # Bounds true of the present sizes only would fix widths: ``8*a // b == 8`` does, where ``a == b`` is meant.
    def _refine_ranges(self, expr: Expr) -> None:
        pass

    # Where in the code a symbol came up is for error messages that nobody sees, and costs more than the symbol.
    def _get_user_frame(self) -> None:
        return None

    def _set_replacement(self, a: Expr, tgt: Expr, msg: str) -> None:
        if not tgt.free_symbols:
            if self.strict:
                raise _Specialised
            self._observer.on_constant(a)
        super()._set_replacement(a, tgt, msg)


class _Mode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors with an observer of the outermost operators.

    Observed from a subclass, not from a second dispatch mode: on torch 2.9 to 2.11 another mode on top turns symbolic
    sizes into concrete ones.
    """

    def __init__(
        self,
        env: _Env,
        observe: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None],
        replay: Sequence[Any] | None,
    ) -> None:
        super().__init__(shape_env=env, allow_non_fake_inputs=True)
        self.env = env
        self.cache_enabled = False  # symbolic sizes hardly ever repeat: filling the cache takes half the time
        self.observe = observe
        self._replay = replay
        self.position = 0
        self._depth = 0
        self.operator = ""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":
            return super().dispatch(func, types, args, kwargs)
        outermost = self._depth == 0
        name = func.__name__.split(".")[0]
        if outermost and self._replay is not None and name in READS_VALUES:
            return self._replayed()
        if self._replay is not None and name == "nonzero":  # of a mask that is an index
            return self._replayed()
        if name in READS_VALUES and name != "_local_scalar_dense":
            raise DataDependentSizeError(f"'{name}' returns as much as the values say")
        if outermost:
            self.operator = name
        self._depth += 1
        try:
            out: Any = self._view(*args) if func in _VIEWS else None
            if out is None and is_elementwise(func):
                out = self._elementwise(func, args, kwargs or {})
            if out is None:
                out = super().dispatch(func, types, args, kwargs)
        finally:
            self._depth -= 1
        if outermost and out is not NotImplemented:
            self.observe(func, args, kwargs or {}, out)
        return out

    def _view(self, tensor: Tensor, size: Sequence[Any], *_: Any) -> Tensor | None:
        """Return a view of a tensor; None if it is left to the engine."""
        if not isinstance(tensor, FakeTensor) or tensor.layout != torch.strided:
            return None
        found = viewed(tensor.shape, tensor.stride(), size, self._now)
        return None if found is None else torch.as_strided(tensor, found.shape, found.stride)

    def _elementwise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return what an operator makes entry by entry; None if it is left to the engine."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        plain = all(isinstance(t, FakeTensor) and t.layout == torch.strided and t.constant is None for t in tensors)
        devices = {tensor.device for tensor in tensors}
        if not plain or len(devices) != 1:
            return None
        with unset_fake_temporarily():
            made = elementwise(func, args, kwargs, self._now)
        if made is None:
            return None
        new = {"dtype": made.dtype, "device": devices.pop()}
        out: Any = super().dispatch(_ATEN.empty_strided.default, (), (made.shape, made.stride), new)
        return out  # type: ignore[no-any-return]

    def _now(self, size: Any) -> Any:
        """Return the number that a size is at present."""
        if isinstance(size, torch.SymFloat):
            return float(size.node.hint)
        return self.env.hint(_expr(size), {}) if isinstance(size, torch.SymInt) else size

    def size(self, expr: Expr) -> Any:
        """Return an expression as a size."""
        number = self.env.hint(expr, {})
        return self.env.create_symintnode(expr, hint=number) if expr.free_symbols else number

    def _replayed(self) -> Any:
        """Return what the operator returned when the model ran on data: a number, or sizes that depended on data."""
        if self._replay is None or self.position >= len(self._replay):
            raise DataDependentSizeError("the model reads other values of tensors than it did on data")
        value = self._replay[self.position]
        self.position += 1
        return pytree.tree_map_only(Made, lambda m: torch.empty(m.shape, dtype=m.dtype, device=m.device), value)


_ATEN = torch.ops.aten
_VIEWS = {_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN._reshape_alias.default}

_SAME_MEMORY = {
    "view",
    "view_as",
    "expand",
    "expand_as",
    "narrow",
    "select",
    "squeeze",
    "unsqueeze",
    "as_strided",
    "size",
}


class _Probing(TorchFunctionMode):
    """Lets a function that insists on plain numbers, or has no fake, show what it does to sizes."""

    def __init__(self, mode: _Mode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        env = self._mode.env
        name = getattr(func, "__name__", "")
        if env.strict or name.endswith("_") or name in _SAME_MEMORY:
            return func(*args, **kwargs)
        env.strict = True
        try:
            return func(*args, **kwargs)
        except Exception as error:  # the engine wraps what is raised inside it
            env.strict = False
            if _reads_values(error):
                raise
            found = probe(func, args, kwargs, env)
        finally:
            env.strict = False
        if found is None:
            try:
                return func(*args, **kwargs)
            except Exception as error:  # as above; perhaps it runs where some sizes stay as they are
                found = None if _reads_values(error) else probe(func, args, kwargs, env, fix=True)
                if found is None:
                    raise
        self._mode.operator = name
        self._mode.observe(func, args, kwargs, found)
        return found


def _reads_values(error: Exception) -> bool:
    return any(word in type(error).__name__ for word in ("DataDependent", "DynamicOutputShape"))


def _expr(size: Any) -> Expr:
    return size.node._expr if isinstance(size, (torch.SymInt, torch.SymFloat)) else sympy.Integer(size)


_NUMBERS: tuple[type, ...] = (torch.SymInt, torch.SymFloat)


@contextlib.contextmanager
def _floats(observer: Observer) -> Iterator[None]:
    """Let ``math.sqrt`` and others have the present value of a size: a float is no size, so nothing becomes fixed."""

    def value(number: Any) -> float:
        observer.on_value(_expr(number))
        return float(number.node.hint)

    before = {kind: vars(kind).get("__float__") for kind in _NUMBERS}
    for kind in _NUMBERS:
        setattr(kind, "__float__", value)  # noqa: B010 (typed as never assigned)
    try:
        yield
    finally:
        for kind, method in before.items():
            if method is None:
                delattr(kind, "__float__")
            else:
                setattr(kind, "__float__", method)  # noqa: B010 (typed as never assigned)


def run(
    model: nn.Module,
    call: Callable[[], Any],
    static: Callable[[str, Tensor], Sequence[int]],
    bound: Mapping[Bound, Source],
    pretended: Mapping[tuple[str, int], int],
    inputs: Sequence[Tensor] = (),
    replay: Sequence[Any] | None = None,
    opaque: Mapping[str, Sequence[Any]] | None = None,
    *,
    singly: Collection[str] = (),
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
        opaque: Modules that are not run, with what they returned on data (`record_outputs`).
        replay: What the model reads from tensors, as `record` returned it; None if it is not to read any.
        singly: Modules that are run each; others are not run again where they are like one that was run.

    Raises:
        UntraceableError: If the model raises. The model is unchanged then, too.
    """
    observer = Observer(_expr, {name for name, _ in model.named_buffers()})
    trace = observer.trace
    env = observer.env = _Env(observer)
    mode = _Mode(env, observer.observe, replay)
    observer.operator = lambda: mode.operator
    named = {n: _pretend(n, t, pretended) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    fakes = {name: _symbolic(mode, name, tensor, static(name, tensor)) for name, tensor in named.items()}
    for name, fake in fakes.items():
        observer.owner[fake] = name
        for dim, expr in enumerate(observer.dims(fake)):
            trace.sizes[name, dim] = expr
            if expr.is_Symbol:
                trace.symbols[name, dim] = expr
                trace.hints[expr] = named[name].shape[dim]
    with contextlib.ExitStack() as stack:
        stack.enter_context(unchanged(model))
        swap_in(model, fakes)
        _bind(model, mode, fakes, bound, trace)
        Repeats(observer, mode).install(model, singly)
        for path, outputs in (opaque or {}).items():
            model.get_submodule(path).__dict__["forward"] = _opaque(path, outputs, observer)
        stack.enter_context(_whole_sizes())
        stack.enter_context(_watched(model, observer))
        stack.enter_context(_floats(observer))
        stack.enter_context(plain_kernels())
        stack.enter_context(_Probing(mode))
        stack.enter_context(PlainTwins())
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        for tensor in inputs:
            observer.owner[tensor] = observer.owner[mode.from_tensor(tensor, static_shapes=True)] = INPUT
        try:
            outputs = call()
        except Exception as error:  # the model's own code: anything can happen
            where = observer.modules[-1][0] if observer.modules else ""
            raise UntraceableError(where, error, _reads_values(error)) from error
        trace.outputs |= {d for t in tensors_in(outputs) for d in observer.dims(t)}
        _note_states(model, trace, observer)
    observer.finish()
    return trace


def _opaque(path: str, outputs: Sequence[Any], observer: Observer) -> Callable[..., Any]:
    """Return a forward that gives back tensors of the sizes that a module returned on data, call by call."""
    left = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        for tensor in tensors_in((args, kwargs)):
            observer.trace.opaque += [(dim, path) for dim in observer.dims(tensor)]
        return pytree.tree_map_only(Made, lambda m: torch.empty(m.shape, dtype=m.dtype, device=m.device), next(left))

    return forward


def _pretend(name: str, tensor: Tensor, sizes: Mapping[tuple[str, int], int]) -> Tensor:
    """Return a tensor that differs in the pretended sizes; its values are never read."""
    shape = [sizes.get((name, dim), size) for dim, size in enumerate(tensor.shape)]
    return tensor if shape == list(tensor.shape) else tensor.new_empty(shape)


def _symbolic(mode: _Mode, name: str, tensor: Tensor, static: Sequence[int]) -> Tensor:
    """Return a fake tensor whose axes are symbols, except those that are static or of size 0 or 1.

    What is on the meta device counts as being on the CPU, where example inputs are.
    """
    shape = [
        size if d in static or size < 2 else mode.env.new_size(f"{name}[{d}]", size)
        for d, size in enumerate(tensor.shape)
    ]
    device = "cpu" if tensor.is_meta else tensor.device
    with mode:
        return torch.empty(shape, dtype=tensor.dtype, device=device)


@contextlib.contextmanager
def _whole_sizes() -> Iterator[None]:
    """Let sizes be copied as the numbers that they stand for: a copied configuration does not copy the engine."""
    kind: Any = torch.SymInt
    kind.__deepcopy__ = lambda size, _memo: size
    try:
        yield
    finally:
        del kind.__deepcopy__


@contextlib.contextmanager
def _watched(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Keep the stack of running modules, and note the outputs of the model itself wherever it is called."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        observer.note_guards()
        if id(module) in names:
            observer.modules.append((names[id(module)], type(module).__name__))
            _meet(module, args)

    def leave(module: nn.Module, _args: Any, output: Any) -> None:
        observer.note_guards()
        if id(module) in names:
            observer.modules.pop()
        if module is model:
            observer.trace.outputs |= {d for t in tensors_in(output) for d in observer.dims(t)}

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*global hooks on modules.*")  # compiled modules run as Python
            yield
    finally:
        for handle in handles:
            handle.remove()


def _meet(module: nn.Module, args: Any) -> None:
    """Let the sizes that a norm without parameters keeps be those of its input, which it need not look at."""
    if not args or not isinstance(args[0], Tensor):
        return
    for (name, index), dim in of_input(module, args[0].ndim).items():
        size = getattr(module, name) if index is None else getattr(module, name)[index]
        _ = bool(args[0].shape[dim] == size)  # the engine writes down what it compares


def _bind(
    model: nn.Module, mode: _Mode, fakes: Mapping[str, Tensor], bound: Mapping[Bound, Source], trace: Trace
) -> None:
    """Give sizes that modules keep as Python integers the symbols of the axes that they stand for."""
    shapes: dict[tuple[str, str], dict[int, Any]] = {}
    for (path, name, index), source in bound.items():
        if isinstance(source, int):
            label = f"{path}.{name}" if index is None else f"{path}.{name}[{index}]"
            size: Any = mode.env.new_size(label, source)
            trace.hints[_expr(size)] = source
        else:
            tensor, dim, divisor = source
            size = fakes[tensor].shape[dim] // divisor if divisor > 1 else fakes[tensor].shape[dim]
        trace.attributes[path, name, index] = _expr(size)
        if is_state(name) and index is not None:
            shapes.setdefault((path, name), {})[index] = size
        else:
            set_size(model, Attribute(path, name, index, ()), size)
    for (path, name), sizes in shapes.items():
        module = model.get_submodule(path)
        state = state_at(module, name)
        if state is not None:
            with mode:
                shape = [sizes.get(dim, size) for dim, size in enumerate(state.shape)]
                put_state(module, name, torch.empty(shape, dtype=state.dtype, device=state.device))


def _note_states(model: nn.Module, trace: Trace, observer: Observer) -> None:
    """Note the shapes of tensors that modules have kept while they ran."""
    for (path, name), state in states(dict(model.named_modules())).items():
        for dim, expr in enumerate(observer.dims(state)):
            if expr.free_symbols:
                trace.attributes.setdefault((path, name, dim), expr)
