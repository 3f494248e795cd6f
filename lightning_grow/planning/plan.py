"""A plan: every width and depth of a model with its size, its cost and its limits, in a table or an editable file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lightning_grow.costs import count_parameters
from lightning_grow.planning.entries import GroupFacts, GroupLimits, GroupPlan, StackFacts, StackLimits, StackPlan
from lightning_grow.planning.errors import PlanError
from lightning_grow.planning.files import check_type, checked, from_text, mapping, plain, to_text
from lightning_grow.planning.found import counted, group_plans, stack_plans
from lightning_grow.planning.patterns import most_specific
from lightning_grow.planning.table import group_table, stack_table, table
from lightning_grow.structure.axes import Structure
from lightning_grow.structure.trace import trace

_HEAD = """\
# What may change in {model}, and how far. Edit it, then give it to a callback as its scope:
# `groups: {file}` in a recipe, lightning_grow.Net2Net(groups="{file}") in Python.
#
#   grow, prune            whether there may be more units (blocks), and fewer
#   min_units, max_units   limits for each group, in multiples of its step; null: no limit
#
# What no entry matches stays as it is, so take entries out as you like. Names may hold *, ? and [0-9]; where several
# match, the most specific counts: to treat one of many groups differently, give it an entry of its own. `found`,
# `obstacle` and `pinned` tell what was there when this was written; to change them changes nothing.
"""

Entry = TypeVar("Entry", GroupPlan, StackPlan)


@dataclass(frozen=True)
class Plan:
    """What may change in a model, and how far. Names and numbers only: printable, comparable, saveable.

    Attributes:
        groups: Entries by the name of a group, or by a pattern for many groups that are alike. A group that no entry
            matches stays as it is; where several match, the one with the most literal characters counts.
        stacks: The same for stacks of blocks.
        model: Name of the model's class; only told.
        parameters: Parameters of the model; only told.
        pinned: How many axes are pinned, by reason; only told.

    Example:
        >>> import lightning_grow as lg, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = lg.plan(model, torch.zeros(1, 4))
        >>> plan.groups["0"].found.parameters_per_unit
        7
        >>> lg.Plan.from_yaml(plan.to_yaml()) == plan
        True
    """

    groups: Mapping[str, GroupPlan] = field(default_factory=dict)
    stacks: Mapping[str, StackPlan] = field(default_factory=dict)
    model: str = ""
    parameters: int = 0
    pinned: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = (
            ("groups", GroupPlan, "a GroupPlan"),
            ("stacks", StackPlan, "a StackPlan"),
            ("pinned", int, "a number"),
        )
        for name, kind, words in kinds:
            for key, entry in mapping(getattr(self, name), f"`{name}`").items():
                check_type(f"{name}[{key!r}]", entry, kind, words)
        check_type("model", self.model, str, "the name of a class")
        check_type("parameters", self.parameters, int, "a whole number")

    @classmethod
    def of(cls, structure: Structure, model: nn.Module) -> Plan:
        """Return the plan of a model whose structure is known already.

        Args:
            structure: As `trace` returned it.
            model: The model; only read.
        """
        structure = structure.resized(structure.sizes_in(model))
        blocks = {block for stack in structure.stacks.values() for block in stack.blocks}
        return cls(
            groups=group_plans(model, structure, blocks),
            stacks=stack_plans(model, structure, blocks),
            model=type(model).__name__,
            parameters=count_parameters(model, structure),
            pinned=counted(structure.pinned.values()),
        )

    def for_group(self, name: str) -> GroupPlan | None:
        """Return the entry that counts for a group; None if there is none, and the group stays as it is."""
        return _entry(self.groups, name)

    def for_stack(self, name: str) -> StackPlan | None:
        """Return the entry that counts for a stack; None if there is none, and the stack stays as it is."""
        return _entry(self.stacks, name)

    # -- as a file -------------------------------------------------------------------------------------------------

    def to_yaml(self, file: str = "plan.yaml") -> str:
        """Return the plan as YAML, with a head that says how to edit and to use it.

        Args:
            file: What the head calls the file.
        """
        facts = {"model": self.model, "parameters": self.parameters}
        parts = [_HEAD.format(model=self.model or "a model", file=file), to_text(facts)]
        parts += [to_text({"groups": plain(self.groups)}), to_text({"stacks": plain(self.stacks)})]
        parts.append(to_text({"pinned": dict(self.pinned)}))
        return "\n".join(parts)

    @classmethod
    def from_yaml(cls, text: str, source: str = "The plan") -> Plan:
        """Read what `to_yaml` wrote and a person edited.

        Args:
            text: The YAML.
            source: What to call it in messages.

        Raises:
            PlanError: If it is not the YAML of a plan: with the entry, what was found and what was expected.
        """
        data = from_text(text, source)
        if not {"groups", "stacks"} & set(data):
            raise PlanError(f"{source} is not a plan: it has neither `groups` nor `stacks`.")
        groups = _entries(data, "groups", source, GroupPlan, GroupLimits, GroupFacts)
        stacks = _entries(data, "stacks", source, StackPlan, StackLimits, StackFacts)
        pinned = mapping(data.get("pinned") or {}, f"{source}, `pinned`,")
        return checked(cls, data, source, groups=groups, stacks=stacks, pinned=pinned)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a YAML file."""
        Path(path).write_text(self.to_yaml(str(path)), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a YAML file.

        Raises:
            PlanError: If there is no such file, or it does not hold a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise PlanError(f"The plan '{path}' cannot be read in '{Path.cwd()}': {reason}.") from error
        return cls.from_yaml(text, source=f"The plan '{path}'")

    # -- as a table ------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        groups = sum(entry.found.groups for entry in self.groups.values() if entry.found)
        stacks = sum(entry.found.stacks for entry in self.stacks.values() if entry.found)
        parts = [
            f"{self.model or 'A model'}: {self.parameters:,} parameters, groups of units: {groups}, stacks: {stacks}"
        ]
        if self.groups:
            parts.append(group_table(self.groups))
        if self.stacks:
            parts.append(stack_table(self.stacks))
        if self.pinned:
            parts.append(table([("pinned", "axes"), *((r, f"{n:,}") for r, n in self.pinned.items())]))
        return "\n\n".join(parts)


def plan(model: nn.Module, *args: Any, **kwargs: Any) -> Plan:
    """Trace a model, and return what may change in it: names, sizes, steps, cost per unit, obstacles, limits to edit.

    Groups whose widening would change the function have ``grow: false`` to begin with, everything else may change
    without limits. Groups and stacks that are alike but for numbers in their names share one entry.

    Args:
        model: Any module, as for `trace`.
        *args: Example inputs, as for ``model(*args, **kwargs)``; without any, ``model.example_input_array``.
        **kwargs: Further example inputs.

    Returns:
        The plan: print it, save it as YAML, or give it to a callback as ``groups``.

    Raises:
        StructureError: As `trace` does.

    Example:
        >>> import lightning_grow as lg, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(lg.plan(model, torch.zeros(1, 4)))
        Sequential: 58 parameters, groups of units: 1, stacks: 0
        ...
    """
    if not args and not kwargs:
        example = getattr(model, "example_input_array", None)
        if isinstance(example, Mapping):
            kwargs = dict(example)
        elif example is not None:
            args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    return Plan.of(trace(model, *args, **kwargs), model)


def _entry(entries: Mapping[str, Entry], name: str) -> Entry | None:
    pattern = most_specific(name, entries)
    return None if pattern is None else entries[pattern]


def _entries(
    data: Mapping[str, Any],
    section: str,
    source: str,
    cls: type[Entry],
    limits: type,
    facts: type,
) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name, given in mapping(data.get(section) or {}, f"{source}, `{section}`,").items():
        where = f"{source}, {section}, '{name}'"
        entry = mapping({} if given is None else given, where)
        parts: dict[str, object] = {}
        if entry.get("change") is not None:
            parts["change"] = checked(limits, entry["change"], f"{where}, `change`")
        if entry.get("found") is not None:
            parts["found"] = checked(facts, entry["found"], f"{where}, `found`")
        entries[name] = checked(cls, {k: v for k, v in entry.items() if v is not None}, where, **parts)
    return entries
