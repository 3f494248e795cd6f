"""Trace repeated blocks once.

Deep models repeat the same block. When a module is called that is like one that has been traced before (same types,
sizes and settings, inputs of the same symbolic shapes), its forward is not run again: what was seen the first time is
written down once more with the new block's symbols, and outputs of the right sizes are returned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Protocol

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from lightning_grow.structure.holders import contents, held
from lightning_grow.structure.modules import is_position
from lightning_grow.structure.observe import INPUT, Expr, Mark, Observer

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)


_MODULE = {*vars(nn.Module()), "forward"} - {"training"}


class Engine(Protocol):
    """What makes sizes, and knows how far the replay of values has come."""

    position: int

    def size(self, expr: Expr) -> Any:
        """Return an expression as a size."""


@dataclass
class _Seen:
    """One traced call."""

    path: str
    tensors: list[str]
    symbols: list[Expr]
    raw: list[Expr]
    start: Mark
    end: Mark
    values_read: int
    outputs: list[tuple[str, Any]]
    spec: Any


@dataclass
class _Call:
    """What decides whether a call is like another one, with the symbols in the order in which they occur."""

    observer: Observer
    key: list[Hashable] = field(default_factory=list)
    symbols: dict[Expr, Expr] = field(default_factory=dict)
    raw: list[Expr] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    inside: Mapping[int, Sequence[torch.SymInt]] = field(default_factory=dict)

    def size(self, size: Any, own: bool = False) -> None:
        raw = self.observer.expr(size)
        if own:
            self._expr(raw)
        self._expr(self.observer.env.replace(raw))
        self.raw.append(raw)

    def _expr(self, expr: Expr) -> None:
        for symbol in sorted(expr.free_symbols, key=_name):
            if symbol not in self.symbols:
                self.symbols[symbol] = sympy.Symbol(f"x{len(self.symbols)}")
                self.key.append(self.observer.trace.hints.get(symbol))
        self.key.append(self.symbols[expr] if expr.is_Symbol else expr.xreplace(self.symbols))

    def value(self, value: Any) -> None:
        """Add a setting or an argument."""
        if isinstance(value, torch.SymInt):
            self.size(value)
        elif isinstance(value, _PLAIN):
            self.key.append((type(value), repr(value)))
        elif isinstance(value, (tuple, list)):
            self.key.append((type(value), len(value)))
            for item in value:
                self.value(item)
        elif isinstance(value, FunctionType):
            self.key.append(id(value.__code__))
            self.value([cell.cell_contents for cell in value.__closure__ or ()])
            self.value(list(value.__defaults__ or ()))
        else:
            self.key.append(id(value))
            for size in self.inside.get(id(value), ()):
                self.size(size)


def _name(symbol: Expr) -> str:
    return str(symbol.name)


class Repeats:
    """Stands in front of the forward of every module with parameters.

    Args:
        observer: Has seen what came before.
        engine: Makes sizes.
    """

    def __init__(self, observer: Observer, engine: Engine) -> None:
        self._observer, self._engine = observer, engine
        self._seen: dict[Hashable, _Seen] = {}
        self._inside: dict[int, list[torch.SymInt]] = {}

    def install(self, model: nn.Module, singly: Collection[str] = ()) -> None:
        """Replace the forward of the modules inside a model, but for those of these names. Use inside `unchanged`."""
        for value in held(model.modules()):
            sizes = [size for _, size in contents(value) if isinstance(size, torch.SymInt)]
            if sizes:
                self._inside[id(value)] = sizes
        for path, module in model.named_modules():
            if path and path not in singly and any(True for _ in module.parameters()):
                module.__dict__["forward"] = self._wrapped(path, module, module.forward)

    def _wrapped(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        inside = list(module.modules())

        def call(*args: Any, **kwargs: Any) -> Any:
            mine = self._describe(module, args, kwargs)
            key = tuple(mine.key)
            first = self._seen.get(key)
            if first is not None:
                return self._again(first, path, mine)
            start, position = self._observer.mark(), self._engine.position
            out = forward(*args, **kwargs)
            leaves, spec = pytree.tree_flatten(out)
            outputs = [self._output(leaf, mine) for leaf in leaves]
            if None not in outputs and not _keeps_tensors(inside):
                symbols = list(mine.symbols)
                read = self._engine.position - position
                found = [o for o in outputs if o is not None]
                end = self._observer.mark()
                self._seen[key] = _Seen(path, mine.tensors, symbols, mine.raw, start, end, read, found, spec)
            return out

        return call

    def _describe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        call = _Call(self._observer, inside=self._inside)
        for part, inner in module.named_modules():
            call.key.append((part, type(inner)))
            for name, value in vars(inner).items():
                if name not in _MODULE and not (is_position(name) and type(value) is int):
                    call.key.append(name)
                    call.value(value)
            if inner._forward_hooks or inner._forward_pre_hooks:
                call.key.append(id(inner))  # hooks may do anything
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            call.key.append((name, tensor.dtype))
            call.tensors.append(self._observer.owner.get(tensor, ""))
            for size in tensor.shape:
                call.size(size, own=True)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        call.key.append(spec)
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                call.value(leaf)
                continue
            same = next((i for i, t in enumerate(call.inputs) if t is leaf), None)
            owner = self._observer.owner.get(leaf)
            call.key.append((same, leaf.dtype, leaf.device, owner))
            call.inputs.append(leaf)
            for size in leaf.shape:
                call.size(size)
        return call

    def _output(self, leaf: Any, call: _Call) -> tuple[str, Any] | None:
        """Describe an output; None if it is nothing that could be made again."""
        if isinstance(leaf, Tensor):
            same = next((i for i, t in enumerate(call.inputs) if t is leaf), None)
            if same is not None:
                return "input", same
            owner = self._observer.owner.get(leaf)
            if owner not in (None, INPUT):
                return None
            dims = [self._translatable(raw, call) for raw in self._observer.dims(leaf)]
            return None if None in dims else ("tensor", (dims, leaf.dtype, leaf.device, owner))
        if isinstance(leaf, torch.SymInt):
            size = self._translatable(self._observer.expr(leaf), call)
            return None if size is None else ("size", size)
        return ("value", leaf) if isinstance(leaf, _PLAIN) else None

    def _translatable(self, raw: Expr, call: _Call) -> Expr | None:
        """Return a size in symbols of which those of another call are known; None if there is no such form."""
        known = call.symbols.keys() | {r for r in call.raw if r.is_Symbol}
        forms = (self._observer.env.replace(raw), raw)
        return next((form for form in forms if form.free_symbols <= known), None)

    def _again(self, first: _Seen, path: str, call: _Call) -> Any:
        symbols = dict(zip(first.raw, call.raw, strict=True)) | dict(zip(first.symbols, call.symbols, strict=True))
        symbols = {a: b for a, b in symbols.items() if a.is_Symbol}
        self._observer.trace.repeated[path] = first.path
        self._observer.repeat(first.start, first.end, symbols, (first.path, path))
        used = self._observer.trace.used
        used |= {mine for theirs, mine in zip(first.tensors, call.tensors, strict=True) if theirs in used}
        self._engine.position += first.values_read
        made = []
        for kind, value in first.outputs:
            if kind == "input":
                made.append(call.inputs[value])
            elif kind == "size":
                made.append(self._engine.size(value.xreplace(symbols)))
            elif kind == "tensor":
                dims, dtype, device, owner = value
                sizes = [self._engine.size(d.xreplace(symbols)) for d in dims]
                made.append(torch.empty(sizes, dtype=dtype, device=device))
                if owner is not None:
                    self._observer.owner[made[-1]] = owner
            else:
                made.append(value)
        return pytree.tree_unflatten(made, first.spec)


def _keeps_tensors(modules: Sequence[nn.Module]) -> bool:
    """Return whether modules have kept tensors that they computed: a state, which each block has of its own."""
    values = (value for module in modules for value in module.__dict__.values())
    return any(type(v) is FakeTensor for value in values for v in (value if type(value) in (tuple, list) else (value,)))
