"""Turn the size equations of a trace into unit counts.

Each axis starts with a symbol of its own. Solving leaves the independent ones: the unit counts, one for each group.
Every size is then a polynomial in unit counts with integer coefficients, for example ``16*u0 + 16*u1``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]

Expr = Any  # a sympy expression; sympy ships no types

_DIVISIONS = ("FloorDiv", "CleanDiv", "floor")


class Solution:
    """Substitutions from raw symbols to polynomials in unit counts.

    Attributes:
        known: What each eliminated symbol equals.
        reasons: Why symbols were fixed here, beyond what the trace itself says.
        roots: Symbols that the trace itself fixed.
        minor: Symbols of integers that modules keep and of no axis: rather than a width, they are fixed where an
            equation asks for it.
        fixed_by: For symbols that an equation fixed by itself, that equation.
        chose_ratio: Whether ``a // b`` was made exact by ``a == c*b`` for such an integer ``b``, which may have been
            fixed instead: heads of any size, where there may be any number of heads of this size.

    Args:
        hints: Present sizes of the symbols.
        keep_ratios: Whether to choose so.
    """

    def __init__(self, hints: Mapping[Expr, int], *, keep_ratios: bool = True) -> None:
        self.hints: dict[Expr, int] = dict(hints)
        self.keep_ratios = keep_ratios
        self.chose_ratio = False
        self.known: dict[Expr, Expr] = {}
        self.reasons: dict[Expr, str] = {}
        self.roots: set[Expr] = set()
        self.minor: set[Expr] = set()
        self.fixed_by: dict[Expr, Expr] = {}
        self._origin: dict[Expr, set[Expr]] = {}
        self._fact: Expr = sympy.Integer(0)
        self._cache: dict[Expr, Expr] = {}
        self._fresh = 0

    # -- reading ---------------------------------------------------------------------------------------------------

    def __call__(self, expr: Expr) -> Expr:
        """Return ``expr`` as a polynomial in unit counts; divisions that do not divide are left in."""
        if expr in self._cache:
            return self._cache[expr]
        result = self._last(expr) if expr.is_Symbol else expr
        while True:
            symbols = [s for s in result.free_symbols if s in self.known]
            if not symbols:
                break
            result = result.xreplace({s: self.known[s] for s in symbols})
            if expr.is_Symbol:
                self.known[expr] = result  # shortens chains of equal symbols
        result = sympy.expand(self._divide(result)) if result.free_symbols else self._divide(result)
        self._cache[expr] = result
        return result

    def _last(self, symbol: Expr) -> Expr:
        """Return the last of a chain of equal symbols, and shorten the chain."""
        last = symbol
        while (after := self.known.get(last)) is not None and after.is_Symbol:
            last = after
        if last is not symbol:
            self.known[symbol] = last
        return last

    def size(self, expr: Expr) -> int:
        """Return the size in the model at hand."""
        value = self(expr)
        value = value.xreplace({s: sympy.Integer(self.hints[s]) for s in value.free_symbols})
        return int(self._divide(value))

    def _divide(self, expr: Expr) -> Expr:
        """Carry out divisions that are exact for every size, and drop bounds that always hold."""
        if not expr.args or expr.is_Symbol:
            return expr
        args = tuple(self._divide(a) for a in expr.args)
        kind = type(expr).__name__
        if kind in _DIVISIONS and len(args) == 2:
            quotient = self._quotient(*args)
            return expr.func(*args) if quotient is None else quotient
        if kind == "Max":
            rest = [a for a in args if not (a.is_Integer and a <= 1)]
            return rest[0] if len(rest) == 1 else expr.func(*args)
        return expr.func(*args) if args != expr.args else expr

    @staticmethod
    def _quotient(top: Expr, bottom: Expr) -> Expr | None:
        """Return ``top // bottom`` if the terms with symbols divide exactly, else None."""
        if bottom.is_Add and bottom.is_polynomial() and top.is_polynomial():
            ratio, rest = sympy.div(top, bottom)
            fits = all(c.is_Integer for c in sympy.expand(ratio).as_coefficients_dict().values())
            return ratio + rest if fits and rest in (0, -1) else None
        terms = sympy.Add.make_args(sympy.expand(top))
        whole, rest = sympy.Integer(0), sympy.Integer(0)
        for term in terms:
            ratio = sympy.cancel(term / bottom)
            coefficients = list(ratio.as_coefficients_dict().values())
            if ratio.is_polynomial() and all(c.is_Integer for c in coefficients):
                whole += ratio
            elif term.is_Integer:
                rest += term
            else:
                return None
        if bottom.is_Integer:
            return whole + sympy.floor(rest / bottom)
        return whole + rest if rest in (0, -1) else None  # -1 // u is -1 for every u > 0

    # -- solving ---------------------------------------------------------------------------------------------------

    def solve(self, facts: Iterable[Expr], divisible: Iterable[tuple[Expr, Expr]]) -> None:
        """Use up all equations. Symbols in an equation that is not understood are fixed at their present size."""
        queue = deque(fact for fact in facts if not self._use_equality(fact))
        pairs = list(divisible)
        for top, bottom in pairs:
            if bottom.is_Integer:
                self._make_divisible(top, bottom)
        stalled = 0
        while queue:
            fact = self._fact = queue.popleft()
            left = self(fact)
            if self._use(left, last_resort=stalled > len(queue)):
                stalled = 0
            elif stalled <= len(queue):
                queue.append(fact)
                stalled += 1
            else:
                self._give_up(left)
                queue.append(fact)
                stalled = 0
        for top, bottom in pairs:
            self._make_divisible(top, bottom)

    def _give_up(self, left: Expr) -> None:
        """Fix what an equation that cannot be used is about; first what no axis shows (numbers kept in Python)."""
        self._fix_all(self._minor_in(left) or left, "a size equation that is not linear ties this axis")

    def make_whole(self, expr: Expr) -> Expr:
        """Return ``expr`` as a polynomial, restricting unit counts to multiples where a division asks for it."""
        for _ in range(8):
            value = self(expr)
            division = _division(value)
            if division is None:
                break
            self._make_divisible(*division)
        value = self(expr)
        if not value.is_polynomial(*value.free_symbols):
            self._fix_all(value, "its size is computed in a way that is not a sum of products")
            value = self(expr)
        return value

    def fix(self, expr: Expr, reason: str) -> None:
        """Fix every unit count in ``expr`` at its present size."""
        self._fix_all(self(expr), reason)

    def _use(self, left: Expr, last_resort: bool = False) -> bool:
        """Use the equation ``left == 0``; False if it cannot be used yet.

        Division by what varies itself is only settled when nothing else is left to use.
        """
        if not left.free_symbols:
            return True
        division = _division(left)
        if division is not None:
            if not last_resort and not self(division[1]).is_Integer:
                return False
            exact = self._make_divisible(*division)
            return exact and self(left) != left and self._use(self(left), last_resort)
        symbols = sorted(left.free_symbols, key=str)
        if not left.is_polynomial(*symbols):
            return False
        poly = sympy.Poly(left, *symbols)
        if poly.total_degree() > 1:
            return (
                self._use_product(left)
                or self._use_polynomial(left, symbols, squares=False)
                or (last_resort and self._use_polynomial(left, symbols, squares=True))
                or (last_resort and self._use_factors(left))
            )
        coefficients = {s: int(poly.coeff_monomial(s)) for s in symbols}
        constant = int(poly.coeff_monomial(1))
        return self._use_linear(coefficients, constant)

    def _use_equality(self, fact: Expr) -> bool:
        """Use an equation that says no more than that two symbols are equal, as most do; False if it says more."""
        terms = [term.as_coeff_Mul() for term in fact.args] if fact.is_Add and len(fact.args) == 2 else []
        if sorted(c for c, _ in terms) != [-1, 1] or not all(symbol.is_Symbol for _, symbol in terms):
            return False
        first, second = sorted((self._last(symbol) for _, symbol in terms), key=str)
        if first != second:
            self._set(first, second)
        return True

    def _use_linear(self, coefficients: dict[Expr, int], constant: int) -> bool:
        if len(coefficients) == 1:
            ((symbol, c),) = coefficients.items()
            self._fixed_by_fact(symbol)
            self._set(symbol, sympy.Integer(-constant // c))
            return True
        # A symbol that is a sum of the others with positive coefficients: a width made of widths.
        for symbol, c in sorted(coefficients.items(), key=lambda item: (abs(item[1]), str(item[0]))):
            others = {s: -k if c > 0 else k for s, k in coefficients.items() if s is not symbol}
            rest = -constant if c > 0 else constant
            if all(k > 0 for k in others.values()) and rest >= 0:
                return self._set_sum(symbol, abs(c), others, rest)
        return False

    def _set_sum(self, symbol: Expr, c: int, others: dict[Expr, int], rest: int) -> bool:
        """Use ``c*symbol == sum(k*s) + rest``."""
        if rest % c:
            return False
        total = sympy.Integer(rest // c)
        for s, k in others.items():
            g = math.gcd(c, k)
            if self.hints[s] % (c // g):
                return False
            total += (k // g) * (s if c == g else self._multiples(s, c // g))
        self._set(symbol, total)
        return True

    def _use_product(self, left: Expr) -> bool:
        """Use an equation with products if just one factor is zero now: ``h*d - h*e == 0`` says ``d == e``."""
        factors = [f.as_base_exp()[0] for f in sympy.Mul.make_args(sympy.factor(left)) if f.free_symbols]
        zero = [f for f in map(sympy.expand, factors) if not f.xreplace({s: self.hints[s] for s in f.free_symbols})]
        return len(zero) == 1 and zero[0] != left and self._use(zero[0])

    def _use_polynomial(self, left: Expr, symbols: list[Expr], *, squares: bool) -> bool:
        """Use an equation that says what one symbol is: ``rows - heads*d - 2*state == 0``."""
        for symbol in symbols:
            c = left.coeff(symbol, 1)
            rest = sympy.expand(left - c * symbol)
            if c.is_Integer and symbol not in rest.free_symbols:
                terms = [term / -c for term in sympy.Add.make_args(rest)]
                if all(_counts(*t.as_coeff_Mul(), squares=squares) for t in terms):
                    self._set(symbol, sympy.Add(*terms))
                    return True
        return False

    def _use_factors(self, left: Expr) -> bool:
        """Use an equation of two products, by letting those factors be equal that are so at present."""
        one, other = (_factors(t) for t in (*sympy.Add.make_args(left), 0, 0)[:2])
        if len(sympy.Add.make_args(left)) != 2 or sorted(map(self.size, one)) != sorted(map(self.size, other)):
            return False
        for a, b in zip(sorted(one, key=self.size), sorted(other, key=self.size), strict=True):
            symbol, value = (a, b) if a.is_Symbol else (b, a)
            if symbol.is_Symbol:
                self._set(symbol, value)
                self._origin[symbol] = left.free_symbols - {symbol}
        return True

    def _minor_in(self, expr: Expr) -> Expr | None:
        """Return a sum of the symbols in ``expr`` that stand for integers only and for no axis, or None."""
        axes = {self(s) for s in self.hints.keys() - self.minor} if expr.free_symbols & self.minor else set()
        found = [s for s in expr.free_symbols & self.minor if s not in axes]
        return sympy.Add(*found) if found else None

    def _make_divisible(self, top: Expr, bottom: Expr) -> bool:
        """Restrict unit counts so that ``bottom`` divides ``top`` (up to its constant); False if they do not now."""
        top, bottom = self(top), self(bottom)
        if not top.free_symbols or self._quotient(top, bottom) is not None:
            return True
        if not bottom.is_Integer:
            return self._use_symbolic_divisor(top, bottom)
        if not top.is_polynomial(*top.free_symbols):
            return False
        m = int(bottom)
        for term in sympy.Add.make_args(sympy.expand(top)):
            c, monomial = term.as_coeff_Mul()
            if monomial == 1 or int(c) % m == 0:
                continue
            need = m // math.gcd(int(c), m)
            for symbol in sorted(monomial.free_symbols, key=str):
                if self.hints[symbol] % need == 0:
                    self._multiples(symbol, need)
                    break
            else:
                return False
        return True

    def _use_symbolic_divisor(self, top: Expr, bottom: Expr) -> bool:
        """Let ``a // b`` be exact where ``b`` varies: keep the present ratio of one to the other, if it is whole.

        So it is in ``(a + b - 1) // b``, the number of chunks, where ``a // b`` is.
        """
        minor = self._minor_in(bottom)
        self.chose_ratio |= minor is not None
        if (minor is None or self.keep_ratios) and all(e.is_polynomial(*e.free_symbols) for e in (top, bottom)):
            ratio, rest = divmod(self.size(top), self.size(bottom))
            left = bottom - 1 if rest == self.size(bottom) - 1 else sympy.Integer(0)
            if rest in (0, self.size(left)) and self._use(sympy.expand(top - ratio * bottom - left)):
                return True
        self._fix_all(minor or bottom, "other sizes are divided by it")
        return True

    def _multiples(self, symbol: Expr, step: int) -> Expr:
        """Let ``symbol`` be ``step`` times a new unit count, and return that."""
        self._fresh += 1
        units = sympy.Symbol(f"u{self._fresh}", positive=True, integer=True)
        self.hints[units] = self.hints[symbol] // step
        self._set(symbol, step * units)
        return units

    def _fix_all(self, expr: Expr, reason: str) -> None:
        for symbol in sorted(expr.free_symbols & self.hints.keys(), key=str):
            self.reasons.setdefault(symbol, reason)
            self._set(symbol, sympy.Integer(self.hints[symbol]))

    def reason(self, expr: Expr) -> tuple[Expr, str | None]:
        """Return the symbol at the root of why ``expr`` is fixed, and why, if it was fixed here."""
        seen = set()
        queue = deque(sorted(expr.free_symbols, key=str))
        last = queue[0] if queue else expr
        while queue:
            symbol = queue.popleft()
            if symbol in seen:
                continue
            seen.add(symbol)
            if symbol in self.reasons:
                return symbol, self.reasons[symbol]
            last = symbol if symbol in self.roots or (symbol in self.fixed_by and last not in self.roots) else last
            queue.extend(sorted(self._origin.get(symbol, ()), key=str))
        return last, None

    def _fixed_by_fact(self, symbol: Expr) -> None:
        """Let a symbol that an equation fixes share the reason of the other symbols in that equation."""
        self._origin[symbol] = {s for s in self._fact.free_symbols if s is not symbol}
        self.fixed_by[symbol] = self._fact

    def _set(self, symbol: Expr, value: Expr) -> None:
        self.known[symbol] = value
        self._origin.setdefault(symbol, value.free_symbols)
        self._cache.clear()


def _counts(coefficient: Expr, monomial: Expr, *, squares: bool) -> bool:
    """Return whether this is a number of entries: a whole number of times a product of sizes, different ones or not."""
    powers = monomial.as_powers_dict().values()
    return bool(coefficient.is_Integer and coefficient > 0 and all(p == 1 or squares for p in powers))


def _factors(term: Expr) -> list[Expr]:
    """Return the factors of a product, without its sign: a number, unless it is 1, and symbols."""
    powers = sympy.sympify(term).as_powers_dict()
    number = abs(sympy.Mul(*(f**n for f, n in powers.items() if f.is_Number)))
    symbols = [f for f, n in powers.items() if f.is_Symbol for _ in range(int(n))]
    return [*([number] if number != 1 else []), *symbols]


def _division(expr: Expr) -> tuple[Expr, Expr] | None:
    """Return dividend and divisor of a division in ``expr``: first those by a number, and the innermost of them."""
    found = [d.args[:2] for d in sympy.postorder_traversal(expr) if type(d).__name__ in _DIVISIONS and len(d.args) == 2]
    return next((d for d in found if d[1].is_Integer), found[0] if found else None)
