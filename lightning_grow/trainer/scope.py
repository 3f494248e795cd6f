"""Where a callback may change a model, and how far: patterns of names, or a plan with limits for each of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_grow.planning import GroupPlan, Plan, PlanError, StackPlan
from lightning_grow.planning.patterns import matches, merged, near
from lightning_grow.structure.axes import AxisGroup, Stack, Structure
from lightning_grow.surgery.kernels import KernelEdit
from lightning_grow.trainer.proposal import BlockEdit, Change, Proposal, size_after, size_before, spared, trimmed

Groups = Sequence[str] | str | os.PathLike[str] | Plan
"""What a callback's ``groups`` may be: patterns, the path of a plan, or a plan."""


@dataclass(frozen=True)
class Scope:
    """Which groups and stacks a callback may change, and between which sizes.

    Attributes:
        patterns: Glob patterns; ``"!pattern"`` excludes.
        plan: A plan, which has limits too; in the place of patterns.
        source: What messages call the plan.

    Example:
        >>> scope = Scope.of(["encoder.*", "!*.1"])
        >>> scope.names(["encoder.0", "encoder.1", "head"])
        ['encoder.0']
    """

    patterns: tuple[str, ...] = ()
    plan: Plan | None = None
    source: str = "`groups`"

    @classmethod
    def of(cls, groups: Groups | None) -> Scope:
        """Read what a user gave as ``groups``.

        Raises:
            MisconfigurationException: If it is none of what it may be, or the file of a plan cannot be read.
        """
        if isinstance(groups, Plan):
            return cls(plan=groups, source="the plan")
        if isinstance(groups, (str, os.PathLike)):
            return _from_file(os.fspath(groups))
        listed = groups or ()
        if not isinstance(listed, (list, tuple)) or not all(isinstance(pattern, str) for pattern in listed):
            raise MisconfigurationException(
                f"`groups` should be a list of patterns, a plan, or the path of a plan's file, found {groups!r}."
            )
        return cls(patterns=tuple(listed))

    # -- which ------------------------------------------------------------------------------------------------------

    def names(self, names: Iterable[str]) -> list[str]:
        """Return the names that the patterns select.

        Any pattern without ``!`` includes, any with ``!`` excludes. With nothing but excludes, or no patterns at all,
        every other name is included.
        """
        includes = [p for p in self.patterns if not p.startswith("!")] or ["*"]
        excludes = [p[1:] for p in self.patterns if p.startswith("!")]
        return [n for n in names if _any_matches(n, includes) and not _any_matches(n, excludes)]

    def groups(self, structure: Structure, *, shrink: bool, with_room: bool = False) -> list[AxisGroup]:
        """Return the groups that may change, without those whose units nothing consumes: they are outputs.

        Args:
            structure: The structure, with the unit counts of now.
            shrink: Whether there are to be fewer units, or more.
            with_room: Without the groups that a limit keeps from changing any further.
        """
        names = structure.groups if self.plan is not None else self.names(structure.groups)
        groups = (structure[name] for name in names)
        return [
            group
            for group in groups
            if group.with_role("consumed")
            and self._allows(self.of_group(group.name), group.size, group.step, shrink, with_room)
        ]

    def stacks(self, structure: Structure, *, shrink: bool, with_room: bool = False) -> list[Stack]:
        """Return the stacks that may change; see `groups`."""
        names = structure.stacks if self.plan is not None else self.names(structure.stacks)
        stacks = (structure.stacks[name] for name in names)
        return [s for s in stacks if self._allows(self.of_stack(s.name), len(s.blocks), 1, shrink, with_room)]

    def of_group(self, name: str) -> GroupPlan | None:
        """Return the entry of a group; patterns give each an entry without limits."""
        return GroupPlan() if self.plan is None else self.plan.for_group(name)

    def of_stack(self, name: str) -> StackPlan | None:
        """Return the entry of a stack; patterns give each an entry without limits."""
        return StackPlan() if self.plan is None else self.plan.for_stack(name)

    def least_units(self, groups: Iterable[AxisGroup]) -> dict[str, int]:
        """Return how many units pruning has to leave in each of some groups."""
        entries = {group.name: self.of_group(group.name) for group in groups}
        return {name: 1 if entry is None else entry.change.min_units for name, entry in entries.items()}

    def check(self, structure: Structure, *, shrink: bool) -> None:
        """Raise if a name matches no group and no stack, or there is nothing left to change.

        Raises:
            MisconfigurationException: With the names there are.
        """
        there = f"Groups: {_listed(structure.groups)}. Stacks: {_listed(structure.stacks)}."
        if self.plan is None:
            names = [*structure.groups, *structure.stacks]
            for pattern in self.patterns:
                _check_name(self.source, "group or stack", pattern.removeprefix("!"), names, structure.pinned, there)
        else:
            for pattern in self.plan.groups:
                _check_name(f"{self.source}, `groups`,", "group", pattern, structure.groups, structure.pinned, there)
            for pattern in self.plan.stacks:
                _check_name(f"{self.source}, `stacks`,", "stack", pattern, structure.stacks, {}, there)
        if not self.groups(structure, shrink=shrink) and not self.stacks(structure, shrink=shrink):
            pinned = "; ".join(f"{label}: {reason}" for label, reason in structure.pinned.items())
            what = "be pruned" if shrink else "grow"
            why = "Nothing in this model may change."
            if self.plan is not None:
                why = f"{_capital(self.source)} lets nothing in this model {what}."
            raise MisconfigurationException(f"{why} {there} Pinned: {pinned or 'nothing'}.")

    # -- how far ----------------------------------------------------------------------------------------------------

    def within_limits(self, proposals: Sequence[Proposal], structure: Structure) -> list[Proposal]:
        """Return the proposals, shortened so that all sizes stay within the limits; those that cannot are left out.

        Args:
            proposals: What a method wants.
            structure: The structure, with the unit counts of now.
        """
        if self.plan is None:
            return list(proposals)
        sizes = {name: group.size for name, group in structure.groups.items()}
        limited = ((p, self._limited(p.change, sizes)) for p in proposals)
        return [p if p.change is change else replace(p, change=change) for p, change in limited if change is not None]

    def _limited(self, change: Change, sizes: Mapping[str, int]) -> Change | None:
        if isinstance(change, KernelEdit):
            return change  # a plan has no entries for kernels
        name, step = (change.stack.name, 1) if isinstance(change, BlockEdit) else (change.group.name, change.group.step)
        entry = self.of_stack(name) if isinstance(change, BlockEdit) else self.of_group(name)
        before, after = size_before(change), size_after(change)
        if after == before:
            return change if entry is not None and (entry.change.grow or entry.change.prune) else None
        if not self._allows(entry, before, step, after < before, with_room=True) or entry is None:
            return None
        least, most = entry.change.bounds
        if isinstance(change, BlockEdit):
            return change
        if after > before and most is not None and after > most:
            return trimmed(change, most // step * step, sizes)
        if after < before and after < least:
            return spared(change, -(-least // step) * step)
        return change

    @staticmethod
    def _allows(entry: GroupPlan | StackPlan | None, size: int, step: int, shrink: bool, with_room: bool) -> bool:
        if entry is None or not (entry.change.prune if shrink else entry.change.grow):
            return False
        least, most = entry.change.bounds
        if not with_room:
            return True
        return size - step >= max(least, step) if shrink else most is None or size + step <= most


def _from_file(path: str) -> Scope:
    try:
        return Scope(plan=Plan.load(path), source=f"the plan '{path}'")
    except PlanError as error:
        rank = getattr(rank_zero_only, "rank", 0)
        where = f" (on rank {rank})" if rank else ""
        hint = "" if os.path.exists(path) else f" For a pattern of names, write a list: groups=[{path!r}]."  # noqa: PTH110
        raise MisconfigurationException(f"{error}{where}{hint}") from error


def _check_name(
    source: str, kind: str, pattern: str, names: Iterable[str], pinned: Mapping[str, str], there: str
) -> None:
    names = list(names)
    if any(matches(name, pattern) for name in names):
        return
    reasons = [f"{label} is pinned: {reason}." for label, reason in pinned.items() if label.startswith(f"{pattern}.")]
    raise MisconfigurationException(
        f"{_capital(source)} names '{pattern}', but no {kind} of this model matches it.{near(pattern, names)} "
        + " ".join([*reasons[:1], there])
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(merged(dict.fromkeys(names))) or "none"


def _any_matches(name: str, patterns: Iterable[str]) -> bool:
    return any(matches(name, pattern) for pattern in patterns)
