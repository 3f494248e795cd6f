"""The entries of a plan from a structure: groups and stacks that are alike share one, under a pattern of names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from lightning_grow.costs import unit_parameters
from lightning_grow.planning.entries import (
    GroupFacts,
    GroupLimits,
    GroupPlan,
    StackFacts,
    StackLimits,
    StackPlan,
    span,
)
from lightning_grow.planning.patterns import merged, without_numbers
from lightning_grow.structure.axes import AxisGroup, Stack, Structure


def group_plans(model: nn.Module, structure: Structure, blocks: Collection[str]) -> dict[str, GroupPlan]:
    """Return the entries for the groups of a model, in its own order.

    Args:
        model: The model; only read.
        structure: Its structure, with the unit counts that it has now.
        blocks: Names of the blocks of all its stacks.
    """

    def kind(group: AxisGroup) -> tuple[object, ...]:
        obstacle = without_numbers(group.obstacle or "")
        return group.size, group.step, group.units.per_unit, bool(group.with_role("consumed")), obstacle

    names = merged({name: kind(group) for name, group in structure.groups.items()}, blocks)
    return {
        pattern: _group_plan(model, structure, [structure.groups[name] for name in found])
        for pattern, found in names.items()
    }


def _group_plan(model: nn.Module, structure: Structure, groups: Sequence[AxisGroup]) -> GroupPlan:
    first = groups[0]
    obstacle = _shared([group.obstacle for group in groups])
    is_output = not first.with_role("consumed")
    if is_output:
        obstacle = "nothing consumes its units"
    facts = GroupFacts(
        groups=len(groups),
        units=first.size,
        step=first.step,
        entries_per_unit=first.units.per_unit,
        parameters_per_unit=span(unit_parameters(model, structure, group.name) for group in groups),
        axes=span(len(group.axes) for group in groups),
    )
    return GroupPlan(GroupLimits(grow=obstacle is None, prune=not is_output, min_units=first.step), facts, obstacle)


def stack_plans(model: nn.Module, structure: Structure, blocks: Collection[str]) -> dict[str, StackPlan]:
    """Return the entries for the stacks of a model; see `group_plans`."""

    def kind(stack: Stack) -> tuple[object, ...]:
        return len(stack.blocks), without_numbers(stack.obstacle or "")

    names = merged({name: kind(stack) for name, stack in structure.stacks.items()}, blocks, inside=True)
    return {pattern: _stack_plan(model, [structure.stacks[name] for name in found]) for pattern, found in names.items()}


def _stack_plan(model: nn.Module, stacks: Sequence[Stack]) -> StackPlan:
    obstacle = _shared([stack.obstacle for stack in stacks])
    costs = (sum(p.numel() for p in model.get_submodule(stack.blocks[0]).parameters()) for stack in stacks)
    facts = StackFacts(len(stacks), len(stacks[0].blocks), span(costs))
    return StackPlan(StackLimits(grow=obstacle is None), facts, obstacle)


def _shared(texts: Sequence[str | None]) -> str | None:
    """Return what several obstacles say that are alike but for numbers in names."""
    first = texts[0]
    return first if first is None or len(set(texts)) == 1 else without_numbers(first)


def counted(reasons: Iterable[str]) -> dict[str, int]:
    """Return how often each reason is given, those that are alike but for numbers in names as one; most often first."""
    alike: dict[str, list[str]] = {}
    for reason in reasons:
        alike.setdefault(without_numbers(reason), []).append(reason)
    counted = {_shared(found) or "": len(found) for found in alike.values()}
    return dict(Counter(counted).most_common())
