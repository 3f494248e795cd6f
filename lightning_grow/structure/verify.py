"""Try every proposal on resized tensors: nothing that was discovered counts before it has run.

Four trials, each a forward pass of the real model in eval mode: permuting the units of a group must leave the output
unchanged (so the layout is right); more units with silent fan-out, and units split in two, must leave it unchanged (or
the group has an obstacle); fewer units must run. All groups are tried at once, each by another number of units, so that
groups that belong together cannot hide it; only when a joint trial fails are they tried by halves.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_grow.structure.axes import AxisGroup, Layout
from lightning_grow.structure.trials import Trials

_STEPS = (2, 4, 8, 16)
_ATTEMPTS = 4

Plan = Callable[[AxisGroup], tuple[Tensor, Tensor]]
"""Index and shares, as in an edit, for a group."""


def _kept(index: Tensor) -> tuple[Tensor, Tensor]:
    return index, torch.ones(len(index), dtype=torch.float64)


def _many(group: AxisGroup, most: int) -> int:
    """Return a number of units that differs from group to group, an odd multiple of the step.

    Odd, because kernels that want rows aligned to a power of two would take an even one.
    """
    return group.step * (2 * (zlib.crc32(group.name.encode()) % most) + 1)


def _exchanged(group: AxisGroup) -> tuple[Tensor, Tensor]:
    """Exchange the first two units; a single one is put behind a new, silent one."""
    rest = range(2, group.size)
    return _kept(torch.tensor([1, 0, *rest] if group.size > 1 else [-1, 0]))


def _rotated(group: AxisGroup) -> tuple[Tensor, Tensor]:
    """Move all units up by one: with exchanging two, this makes every order."""
    return _kept(torch.arange(group.size).roll(1))


def _widened(group: AxisGroup) -> tuple[Tensor, Tensor]:
    return _kept(torch.cat([torch.arange(group.size), torch.full((_many(group, 5),), -1)]))


def _split(group: AxisGroup) -> tuple[Tensor, Tensor]:
    many = min(_many(group, 3), group.size)
    index = torch.cat([torch.arange(group.size), torch.arange(many)])
    share = torch.ones(len(index), dtype=torch.float64)
    share[:many], share[group.size :] = 0.37, 0.63
    return index, share


def _pruned(group: AxisGroup) -> tuple[Tensor, Tensor]:
    return _kept(torch.arange(max(group.size - _many(group, 3), group.step)))


def try_each(trials: Trials, groups: Sequence[AxisGroup], plan: Plan, exact: bool) -> dict[str, str]:
    """Return the groups for which a trial fails, with the error, or '' where only the output differs.

    Args:
        trials: The model.
        groups: Groups to resize, all at once and, if that fails, by halves.
        plan: Index and shares for a group.
        exact: Whether the output must stay the same.
    """
    if not groups:
        return {}
    plans = _allowed(trials, groups, plan)
    try:
        out = trials.resized(groups, {n: i for n, (i, _) in plans.items()}, {n: s for n, (_, s) in plans.items()})
        error = None if not exact or trials.same(out) else ""
    except Exception as e:  # the model's own code: anything can happen
        error = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    if error is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: error}
    half = len(groups) // 2
    return try_each(trials, groups[:half], plan, exact) | try_each(trials, groups[half:], plan, exact)


def _allowed(trials: Trials, groups: Sequence[AxisGroup], plan: Plan) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a plan for each group, by other numbers of units where a module cannot have the first ones."""
    plans = {g.name: plan(g) for g in groups}
    for g in groups:
        for attempt in range(_ATTEMPTS):
            if trials.allowed({name: index for name, (index, _) in plans.items()}):
                return plans
            plans[g.name] = plan(replace(g, name=f"{g.name} {attempt}"))
    return plans


def _told_apart(groups: Sequence[AxisGroup]) -> Iterator[list[AxisGroup]]:
    """Yield sets of groups, together all, so that any two of one size are apart in some: else they could be one."""
    of_size: dict[int, list[AxisGroup]] = {}
    for group in groups:
        of_size.setdefault(group.size, []).append(group)
    code = {g.name: i for same in of_size.values() for i, g in enumerate(same, 1)}
    for bit in range(max(code.values(), default=0).bit_length()):
        yield [g for g in groups if code[g.name] >> bit & 1]


def _unordered(trials: Trials, groups: Sequence[AxisGroup]) -> dict[str, str]:
    """Return the groups whose order of units matters."""
    failed: dict[str, str] = {}
    for part in _told_apart(groups):
        failed |= try_each(trials, [g for g in part if g.name not in failed], _exchanged, exact=True)
    rest = [g for g in groups if g.name not in failed and g.size > 2]
    return failed | try_each(trials, rest, _rotated, exact=True)


def choose_layouts(
    trials: Trials, groups: Sequence[AxisGroup], options: Mapping[str, Sequence[AxisGroup]]
) -> tuple[list[AxisGroup], dict[str, str]]:
    """Return the groups whose units can be permuted, with the layout that allows it, and why others cannot.

    Args:
        trials: The model.
        groups: Proposals, each with its likeliest layout.
        options: For groups whose order was not seen, the same group with other layouts.
    """
    failed = _unordered(trials, groups)
    others: dict[str, AxisGroup] = {}
    for choice in range(max((len(options.get(name, ())) for name in failed), default=0)):
        left = [options[name][choice] for name in failed if name not in others and choice < len(options.get(name, ()))]
        wrong = _unordered(trials, left)
        others |= {other.name: other for other in left if other.name not in wrong}
    layouts: dict[str, Layout] = {axis.label: axis.layout for other in others.values() for axis in other.axes}
    reasons = {
        name: f"resizing fails ({error})" if error else "its units are not interchangeable"
        for name, error in failed.items()
        if name not in others
    }
    chosen = [others.get(g.name, g) for g in groups if g.name not in reasons]
    # A composite axis has one layout in all the groups that it depends on.
    for i, group in enumerate(chosen):
        axes = tuple(replace(axis, layout=layouts.get(axis.label, axis.layout)) for axis in group.axes)
        chosen[i] = replace(group, axes=axes)
    return chosen, reasons


def judge(
    trials: Trials, groups: Sequence[AxisGroup], mixing: Mapping[str, str]
) -> tuple[list[AxisGroup], dict[str, str]]:
    """Return the groups with their obstacles, and reasons for those that cannot be resized at all.

    Args:
        trials: The model.
        groups: Groups with known layouts.
        mixing: What mixes along the axes of a group, where the trace saw an operator do so.
    """
    groups = [_with_closing_axes(trials, g) for g in groups]
    clear = [g for g in groups if g.name not in mixing]
    mixed = [g for g in groups if g.name in mixing]
    failed: dict[str, str] = {}
    for part in (clear, mixed):
        failed |= try_each(trials, part, _widened, exact=True)
    rest = [g for g in groups if g.name not in failed]
    failed |= {n: e or "copies" for n, e in try_each(trials, rest, _split, exact=True).items()}
    broken = {n: e for n, e in failed.items() if e and e != "copies"}
    groups, broken, failed = _in_larger_steps(trials, groups, broken, failed)
    runnable = [g for g in groups if g.name not in broken]
    broken |= try_each(trials, [g for g in runnable if g.size > g.step], _pruned, exact=False)
    noisy = _drawn_for_units(trials, [g for g in groups if g.name not in broken | failed])
    judged = []
    for g in groups:
        if g.name in broken:
            continue
        obstacle = None
        if g.name in failed:
            why = "the sum over two copies differs from the unit" if failed[g.name] else "new units change the output"
            obstacle = mixing.get(g.name, why)
        elif g.name in noisy:
            obstacle = "random numbers are drawn for each of its units"
        judged.append(replace(g, obstacle=obstacle))
    return judged, {n: f"resizing fails ({e})" for n, e in broken.items()}


def _drawn_for_units(trials: Trials, groups: Sequence[AxisGroup]) -> set[str]:
    """Return the groups whose number of units says which random numbers the model draws."""
    if not trials.random:
        return set()
    with trials.with_noise():
        failed = set(try_each(trials, groups, _widened, exact=True))
        rest = [g for g in groups if g.name not in failed]
        return failed | set(try_each(trials, rest, _split, exact=True))


def _in_larger_steps(
    trials: Trials, groups: Sequence[AxisGroup], broken: dict[str, str], failed: dict[str, str]
) -> tuple[list[AxisGroup], dict[str, str], dict[str, str]]:
    """Give groups that cannot grow by one unit the smallest power of two by which they can: kernels that align rows."""
    stepped = {g.name: g for g in groups}
    for name in list(broken):
        for step in _STEPS:
            if stepped[name].size % step:
                continue
            candidate = replace(stepped[name], step=step)
            error = try_each(trials, [candidate], _widened, exact=True).get(name)
            if error is None or not error:
                stepped[name] = candidate
                del broken[name], failed[name]
                failed |= {} if error is None else {name: ""}
                copies = try_each(trials, [candidate], _split, exact=True) if error is None else {}
                failed |= dict.fromkeys(copies, "copies")
                break
    return list(stepped.values()), broken, failed


def _with_closing_axes(trials: Trials, group: AxisGroup) -> AxisGroup:
    """Give a group without fan-out weights a side that can be silenced.

    Where units of two activations are multiplied and summed (queries with keys), zeros on one side silence new units:
    the axes of the last such module then take the part of fan-out weights.
    """
    if group.with_role("consumed"):
        return group
    modules = dict.fromkeys(axis.tensor.rpartition(".")[0] for axis in group.axes)
    for module in reversed(modules):
        axes = tuple(
            replace(axis, role="consumed") if axis.tensor.rpartition(".")[0] == module else axis for axis in group.axes
        )
        candidate = replace(group, axes=axes)
        if not try_each(trials, [candidate], _widened, exact=True) and trials.learns(candidate, *_widened(candidate)):
            return candidate
    return group
