"""Size equations become unit counts."""

from __future__ import annotations

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv

from lightning_grow.structure.solve import Solution


def symbols(**hints: int) -> tuple[list[sympy.Symbol], Solution]:
    """Symbols with their present sizes."""
    made = [sympy.Symbol(name, positive=True, integer=True) for name in hints]
    return made, Solution(dict(zip(made, hints.values(), strict=True)))


def test_equal_sizes_share_one_unit_count() -> None:
    (a, b, c), solution = symbols(a=8, b=8, c=8)
    solution.solve([a - b, b - c], [])
    assert len({solution(s) for s in (a, b, c)}) == 1
    assert solution(a).is_Symbol


def test_a_number_fixes_all_that_equals_it() -> None:
    (a, b, c), solution = symbols(a=8, b=8, c=5)
    solution.solve([a - b, b - 8], [])
    assert (solution(a), solution(b)) == (8, 8)
    assert solution(c).is_Symbol


def test_a_concatenation_is_a_sum() -> None:
    (left, right, both), solution = symbols(left=3, right=4, both=12)
    solution.solve([both - left - right - 5], [])
    assert solution(both) == solution(left) + solution(right) + 5
    assert solution.size(both) == 12


def test_a_flatten_is_a_multiple_whichever_side_comes_first() -> None:
    for fact in (1, -1):
        (flat, channels), solution = symbols(flat=48, channels=3)
        solution.solve([fact * (flat - 16 * channels)], [])
        assert solution(flat) == 16 * solution(channels)
        assert solution(channels).is_Symbol


def test_divisibility_makes_units_of_several_entries() -> None:
    (rows,), solution = symbols(rows=24)
    solution.solve([], [(rows, sympy.Integer(3))])
    units = solution.make_whole(rows)
    assert units.as_coeff_Mul()[0] == 3
    assert solution.size(rows) == 24


def test_heads_of_two_projections_move_together() -> None:
    """``q // 4 == k // 4`` with both divisible: whole heads."""
    (q, k), solution = symbols(q=12, k=12)
    solution.solve([FloorDiv(q, 4) - FloorDiv(k, 4)], [(q, sympy.Integer(4)), (k, sympy.Integer(4))])
    assert solution(q) == solution(k)
    assert solution(q).as_coeff_Mul()[0] == 4


def test_common_factors_cancel() -> None:
    (heads, d, e), solution = symbols(heads=2, d=4, e=4)
    solution.solve([heads * d - heads * e], [])
    assert solution(d) == solution(e)
    assert solution(heads).is_Symbol


def test_the_factor_that_is_zero_now_is_meant() -> None:
    (a, b, c), solution = symbols(a=8, b=3, c=3)
    solution.solve([sympy.expand((a - 8) ** 2), sympy.expand((a + b) * (b - c))], [])
    assert solution(a) == 8
    assert solution(b) == solution(c)
    assert solution(b).is_Symbol


def test_what_a_multiple_of_another_divides_keeps_its_ratio() -> None:
    """``view(batch, -1, heads, 8)`` of 17 steps: rows are divided by eight times the heads."""
    (rows, heads), solution = symbols(rows=32, heads=4)
    solution.solve([], [(34 * rows, 16 * heads)])
    assert solution(rows) == 8 * solution(heads)
    assert solution(heads).is_Symbol


def test_order_of_equations_does_not_matter() -> None:
    found = set()
    for flip in (1, -1):
        (a, b, c, d), solution = symbols(a=8, b=8, c=16, d=6)
        facts = [a - b, c - a - b, d - 6][::flip]
        solution.solve(facts, [])
        found.add((solution(c) == 2 * solution(a), solution(a) == solution(b), solution(d)))
    assert found == {(True, True, sympy.Integer(6))}


def test_what_is_not_understood_is_fixed_with_a_reason() -> None:
    (a, b), solution = symbols(a=3, b=7)
    solution.solve([a**2 - 2 - b], [])
    assert (solution.size(a), solution.size(b)) == (3, 7)
    assert not solution(a).free_symbols
    assert "not linear" in str(solution.reason(a)[1])


def test_a_width_may_be_a_product() -> None:
    (a, b, c, d), solution = symbols(a=3, b=4, c=12, d=16)
    solution.solve([a * b - c, b**2 - d], [])
    assert (solution(c), solution(d)) == (a * b, b**2)


def test_equal_products_have_equal_factors() -> None:
    (a, b, c), solution = symbols(a=3, b=3, c=8)
    solution.solve([8 * a - b * c], [])
    assert solution(a) == solution(b) != 3
    assert solution(c) == 8


def test_a_quotient_by_a_product_keeps_their_ratio() -> None:
    (rows, heads, size), solution = symbols(rows=8, heads=2, size=4)
    solution.solve([], [(6 * rows, heads * size)])
    assert solution(rows) == heads * size


def test_a_number_of_chunks_keeps_its_ratio() -> None:
    """``fused.split(width)`` makes ``ceil(fused / width)`` parts."""
    (fused, width), solution = symbols(fused=96, width=32)
    solution.solve([FloorDiv(fused + width - 1, width) - 3], [])
    assert solution(fused) == 3 * solution(width)
    assert solution(width).is_Symbol


def test_integers_that_stand_for_no_axis_are_fixed_first() -> None:
    (width, side), solution = symbols(width=6, side=2)
    solution.minor = {side}
    solution.solve([width * side**2 - 4 * width * (4 // 2) ** 2 // 4], [])
    assert (solution(side), solution(width)) == (2, width)


def test_fixing_keeps_the_first_reason() -> None:
    (a,), solution = symbols(a=3)
    solution.fix(a, "model output")
    solution.fix(a, "something else")
    assert solution.reason(a) == (a, "model output")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_lone_symbol_stays_free(size: int) -> None:
    (a,), solution = symbols(a=size)
    solution.solve([], [])
    assert solution.make_whole(a) == a
    assert solution.size(2 * a + 1) == 2 * size + 1
