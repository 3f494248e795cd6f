"""The entries of a plan as tables that a person can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_grow.planning.entries import GroupLimits, GroupPlan, Span, StackLimits, StackPlan


def group_table(entries: Mapping[str, GroupPlan]) -> str:
    """Return one line for each entry of groups."""
    head = ("width", "groups", "units", "step", "parameters per unit", "may", "widening")
    return table([head, *(_group_row(name, entry) for name, entry in entries.items())])


def stack_table(entries: Mapping[str, StackPlan]) -> str:
    """Return one line for each entry of stacks."""
    head = ("depth", "stacks", "blocks", "parameters per block", "may", "a new block")
    return table([head, *(_stack_row(name, entry) for name, entry in entries.items())])


def _group_row(name: str, entry: GroupPlan) -> tuple[str, ...]:
    found = entry.found
    facts = ("", "", "", "")
    if found is not None:
        units = f"{found.units:,}" + (f" of {found.entries_per_unit}" if found.entries_per_unit > 1 else "")
        facts = (f"{found.groups}", units, f"{found.step}", _span(found.parameters_per_unit))
    widening = "keeps the function" if entry.obstacle is None else f"changes it: {entry.obstacle}"
    return (name, *facts, _may(entry.change), widening)


def _stack_row(name: str, entry: StackPlan) -> tuple[str, ...]:
    found = entry.found
    facts = ("", "", "")
    if found is not None:
        facts = (f"{found.stacks}", f"{found.blocks}", _span(found.parameters_per_block))
    start = "starts as the identity" if entry.obstacle is None else f"changes the function: {entry.obstacle}"
    return (name, *facts, _may(entry.change), start)


def _may(limits: GroupLimits | StackLimits) -> str:
    least, most = limits.bounds
    grow = "grow" + ("" if most is None else f" to {most:,}")
    prune = f"prune to {least:,}"
    return ", ".join([grow] * limits.grow + [prune] * limits.prune) or "stay"


def _span(value: Span) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value[0]:,} to {value[1]:,}"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows, of which the first is the head, in columns; numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    to_right = [all(_is_number(row[i]) for row in rows[1:]) for i in range(len(widths))]
    lines = []
    for row in rows:
        cells = zip(row, widths, to_right, strict=True)
        lines.append("  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return not set(cell) - set("0123456789, tof")
