"""The order of entries along an axis: from what the observer saw to layouts.

Solving tells that an axis has ``16*u0 + 16*u1`` entries. Which entry belongs to which unit follows from the views,
concatenations and splits on the way. Where none was seen, the alternatives are listed, and verification decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import sympy  # type: ignore[import-untyped]

from lightning_grow.structure.axes import Block, Layout, Units
from lightning_grow.structure.observe import Trace
from lightning_grow.structure.solve import Solution

Expr = Any  # a sympy expression; sympy ships no types


class Resolver:
    """Finds the layout of an axis.

    Args:
        trace: What the observer saw.
        solution: Sizes as polynomials in unit counts.
        units: The factor that stands for each unit count.
    """

    def __init__(self, trace: Trace, solution: Solution, units: Mapping[Expr, Units]) -> None:
        self.units = units
        self.solution = solution
        self._raw: dict[Expr, list[Callable[[int], list[Layout]]]] = {}
        self._final: dict[Expr, list[Callable[[int], list[Layout]]]] = {}
        for whole, factors in trace.views:
            self._note(whole, partial(self._product, factors))
        for whole, parts in trace.sums:
            self._note(whole, partial(self._sum, parts))

    def _note(self, whole: Expr, make: Callable[[int], list[Layout]]) -> None:
        self._raw.setdefault(whole, []).append(make)
        self._final.setdefault(self.solution(whole), []).append(make)

    def layouts(self, raw: Expr, depth: int = 0) -> list[Layout]:
        """Return the possible layouts of an axis, the likeliest first; empty if none makes sense."""
        final = self.solution(raw)
        if not final.free_symbols:
            return [(Block((self.solution.size(raw),)),)]
        if depth > 8:
            return []
        found: list[Layout] = []
        if final in self.units:
            found.append((Block((self.units[final],)),))
        for seen in (self._raw.get(raw, ()), self._final.get(final, ())):
            for make in seen:
                for layout in make(depth + 1):
                    if layout not in found and self._length(layout) == final:
                        found.append(layout)
            if found:
                return found
        return self._unseen(final)

    def _length(self, layout: Layout) -> Expr:
        names = {units.group: symbol for symbol, units in self.units.items()}
        total = sympy.Integer(0)
        for block in layout:
            product = sympy.Integer(1)
            for f in block.factors:
                product *= f if isinstance(f, int) else names[f.group]
            total += product
        return sympy.expand(total)

    def _product(self, factors: Iterable[Expr], depth: int) -> list[Layout]:
        """Multiply the layouts of the factors, outermost first."""
        products: list[Layout] = [(Block(()),)]
        for factor in factors:
            options = self.layouts(factor, depth)
            products = [p for left in products for right in options if (p := _times(left, right)) is not None]
        return products

    def _sum(self, parts: Iterable[Expr], depth: int) -> list[Layout]:
        """Join the layouts of the parts, in order. Equal parts make a product: three blocks of hidden units."""
        parts = list(parts)
        first = self.solution(parts[0])
        if len(parts) > 1 and all(self.solution(p) == first for p in parts):
            return self._product([sympy.Integer(len(parts)), parts[0]], depth)
        sums: list[Layout] = [()]
        for part in parts:
            sums = [left + right for left in sums for right in self.layouts(part, depth)]
        return sums

    def _unseen(self, final: Expr) -> list[Layout]:
        """Offer the orders that a multiple of one unit count can have: entries of a unit together, or in blocks."""
        coefficient, rest = final.as_coeff_Mul()
        if rest in self.units and coefficient.is_Integer:
            c, units = int(coefficient), self.units[rest]
            return [(Block((units, c)),), (Block((c, units)),)]
        return []


def _times(left: Layout, right: Layout) -> Layout | None:
    """Return the layout of ``left * right``, the right one varying fastest; None if it is no sum of products."""
    if len(right) == 1:
        return tuple(Block(_merge(block.factors + right[0].factors)) for block in left)
    if len(left) == 1 and all(isinstance(f, int) for f in left[0].factors):
        times = 1
        for f in left[0].factors:
            times *= f  # type: ignore[operator]
        return right * times
    return None


def _merge(factors: tuple[int | Units, ...]) -> tuple[int | Units, ...]:
    """Multiply neighbouring integers, and drop ones."""
    merged: list[int | Units] = []
    for f in factors:
        if f == 1:
            continue
        if isinstance(f, int) and merged and isinstance(merged[-1], int):
            merged[-1] *= f
        else:
            merged.append(f)
    return tuple(merged) or (1,)
