"""Run a model on fake tensors whose parameter sizes are symbols, and write down what PyTorch works out about them.

This is the only file that touches PyTorch's semi-private symbolic-shape engine (`torch._subclasses.fake_tensor`,
`torch.fx.experimental.symbolic_shapes`). What leaves it is plain: one symbol for each axis that may vary, the equations
between them, and what an `Observer` sees on the way.

No data is touched: the tensors have sizes and types but no values.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lightning_grow.structure.axes import Attribute
from lightning_grow.structure.observe import INPUT, Bound, Expr, Observer, Trace
from lightning_grow.structure.sandbox import set_size, swap_in, tensors_in, unchanged
from lightning_grow.structure.twins import PlainTwins

Source = tuple[str, int, int] | int
"""What a size kept as a Python integer follows: tensor, dimension, divisor; or its value, to vary by itself."""


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
    return size.node._expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


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
    observer = Observer(_expr)
    trace = observer.trace
    env = observer.env = _Env(observer.on_constant)
    mode = _Mode(env, observer.observe)
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
        stack.enter_context(_watched(model, observer))
        stack.enter_context(_plain_kernels())
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        for tensor in inputs:
            observer.owner[mode.from_tensor(tensor, static_shapes=True)] = INPUT
        try:
            outputs = call()
        except Exception as error:  # the model's own code: anything can happen
            raise UntraceableError(observer.modules[-1][0] if observer.modules else "", error) from error
        trace.outputs |= {d for t in tensors_in(outputs) for d in observer.dims(t)}
    observer.facts()
    return trace


def _pretend(name: str, tensor: Tensor, sizes: Mapping[tuple[str, int], int]) -> Tensor:
    """Return a tensor that differs in the pretended sizes; its values are never read."""
    shape = [sizes.get((name, dim), size) for dim, size in enumerate(tensor.shape)]
    return tensor if shape == list(tensor.shape) else tensor.new_empty(shape)


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
        observer.note_guards()
        if id(module) in names:
            observer.modules.append((names[id(module)], type(module).__name__))

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
