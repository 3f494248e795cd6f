"""Find out by trying how an operator's output sizes follow its input sizes.

Some kernels ask for plain numbers where symbols would do (padding, interpolation, unfolding), others have no working
fake. Such an operator is run on tensors without values of the present sizes, and again with one unit count changed at a
time (or two together, where the operator wants them equal). If every output size is then a linear function of the
unit counts, that function is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import Any, Protocol

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_grow.structure.observe import Expr

_LARGEST_REAL = 1 << 22
_TRIES = (1, 2, 3, 4, 6, 8, 12, 16)


class Sizes(Protocol):
    """What a shape engine can tell and make."""

    def outside(self) -> AbstractContextManager[Any]:
        """Return a context in which tensors are ordinary ones."""

    def expr(self, size: Any) -> Expr:
        """Return the expression of a size, with known equalities used."""

    def hint(self, expr: Expr, changed: Mapping[Expr, int]) -> int:
        """Return the number that an expression has now, with some symbols changed."""

    def equate(self, one: Expr, other: Expr) -> None:
        """Note that a symbol equals an expression."""

    def symbolic(self, terms: Mapping[Expr, Fraction], constant: Fraction) -> Any:
        """Return ``sum(c*s) + constant`` as a size."""


def probe(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Sizes, *, fix: bool = False
) -> Any | None:
    """Return what ``func`` returns, with sizes that follow those of its arguments; None if they do not do so linearly.

    Args:
        func: Any function of torch.
        args: Its arguments; tensors may have symbolic sizes.
        kwargs: Its keyword arguments.
        sizes: The engine.
        fix: Let unit counts that the operator cannot have otherwise, or does not follow linearly, stay as they are.
    """
    symbols = sorted({s for d in _dims((args, kwargs), sizes) for s in d.free_symbols}, key=str)
    if not symbols:
        return None
    for real in (False, True):
        base = _run(func, args, kwargs, sizes, {}, real)
        if base is not None:
            break
    else:
        return None
    leaves, spec = pytree.tree_flatten(base)
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not inputs or not any(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    slopes: dict[Expr, list[tuple[Fraction, ...]]] = {}
    while symbols:
        symbol = symbols.pop(0)
        for tied in _ties(symbol, _dims((args, kwargs), sizes), sizes):
            found = _slopes(func, args, kwargs, sizes, symbol, tied, leaves, real)
            if found is not None:
                break
        else:
            if not fix:
                return None
            sizes.equate(symbol, sympy.Integer(sizes.hint(symbol, {})))
            continue
        slopes[symbol] = found
        for other, expr in tied.items():
            sizes.equate(other, expr)
            if other in symbols:
                symbols.remove(other)
    device = inputs[0].device
    return pytree.tree_unflatten([_result(leaf, i, slopes, sizes, device) for i, leaf in enumerate(leaves)], spec)


def _ties(symbol: Expr, dims: set[Expr], sizes: Sizes) -> Iterator[dict[Expr, Expr]]:
    """Yield what might have to follow a unit count: nothing, one size as large as one of its own, all of those."""
    yield {}
    mine = [d for d in dims if symbol in d.free_symbols]
    others = [d for d in dims if d.is_Symbol and d != symbol]
    pairs = [(o, d) for o in others for d in mine if sizes.hint(o, {}) == sizes.hint(d, {})]
    pairs = sorted(pairs, key=str)
    for other, expr in pairs:
        yield {other: expr}
    if len(pairs) > 1:
        yield dict(pairs)


def _slopes(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: Sizes,
    symbol: Expr,
    tied: Mapping[Expr, Expr],
    leaves: list[Any],
    real: bool,
) -> list[tuple[Fraction, ...]] | None:
    """Return how much each output size grows with a unit count and what is tied to it; None if not in proportion."""
    now = sizes.hint(symbol, {})
    seen: list[list[tuple[Fraction, ...]]] = []
    for delta in (*_TRIES, now, 2 * now):
        changed = {symbol: now + delta}
        changed |= {other: sizes.hint(expr, changed) for other, expr in tied.items()}
        out = _run(func, args, kwargs, sizes, changed, real)
        if out is None:
            continue
        others = pytree.tree_leaves(out)
        if len(others) != len(leaves):
            return None
        rows: list[tuple[Fraction, ...]] = []
        for a, b in zip(leaves, others, strict=True):
            if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.ndim != b.ndim:
                rows.append(())
                continue
            rows.append(tuple(Fraction(y - x, delta) for x, y in zip(a.shape, b.shape, strict=True)))
        seen.append(rows)
        if len(seen) == 2:
            return rows if seen[0] == seen[1] else None
    return None


def _result(
    leaf: Any, position: int, slopes: Mapping[Expr, list[tuple[Fraction, ...]]], sizes: Sizes, device: torch.device
) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    shape = []
    for dim, size in enumerate(leaf.shape):
        terms = {s: rows[position][dim] for s, rows in slopes.items() if rows[position][dim]}
        constant = size - sum((c * sizes.hint(s, {}) for s, c in terms.items()), Fraction(0))
        shape.append(sizes.symbolic(terms, constant) if terms else size)
    return torch.empty(shape, dtype=leaf.dtype, device=device)


def _dims(tree: Any, sizes: Sizes) -> set[Expr]:
    found: set[Expr] = set()
    for leaf in pytree.tree_leaves(tree):
        values = leaf.shape if isinstance(leaf, Tensor) else [leaf] if isinstance(leaf, torch.SymInt) else []
        found |= {sizes.expr(size) for size in values}
    return found


def _run(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: Sizes,
    changed: Mapping[Expr, int],
    real: bool,
) -> Any | None:
    """Run on tensors without values, or on small tensors of zeros; None if that fails."""

    def concrete(leaf: Any) -> Any:
        if isinstance(leaf, torch.SymInt):
            return sizes.hint(sizes.expr(leaf), changed)
        if not isinstance(leaf, Tensor):
            return leaf
        shape = [sizes.hint(sizes.expr(s), changed) for s in leaf.shape]
        if real and math.prod(shape) > _LARGEST_REAL:
            raise ValueError("too large to be run")
        return torch.zeros(shape, dtype=leaf.dtype, device="cpu" if real else "meta")

    try:
        with sizes.outside(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            concrete_args, concrete_kwargs = pytree.tree_map(concrete, (args, kwargs))
            return func(*concrete_args, **concrete_kwargs)
    except Exception:  # whatever the operator finds wrong with these sizes
        return None
