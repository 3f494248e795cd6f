"""Configurations follow a resize where they can express it, and the log says so where they cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from lightning_grow.structure.axes import AxisGroup, Setting, Stack
from lightning_grow.structure.holders import get, located, read, replaced
from lightning_grow.surgery.attributes import Change


class Configured(NamedTuple):
    """Changes of entries of configurations, and what cannot be said in them."""

    changes: list[Change]
    warnings: list[str]


def configured(model: nn.Module, groups: Iterable[AxisGroup], new_sizes: Mapping[str, int]) -> Configured:
    """Return the entries of configurations that change with groups: those for which all their groups agree.

    Args:
        model: The model, not resized yet.
        groups: The groups that change.
        new_sizes: Units of each of them afterwards.
    """
    changes: dict[tuple[int, object], Change] = {}
    problems: dict[str, list[str]] = {}
    done: set[Setting] = set()
    for group in groups:
        for setting in group.settings:
            if not setting.counts:
                problem = f"no entry stands for '{group.name}'"
                problems.setdefault(setting.module, []).append(problem)
            elif setting not in done:
                done.add(setting)
                _agree(model, setting, new_sizes, changes, problems)
    return Configured(list(changes.values()), [_warning(model, *item) for item in problems.items()])


def _agree(
    model: nn.Module,
    setting: Setting,
    new_sizes: Mapping[str, int],
    changes: dict[tuple[int, object], Change],
    problems: dict[str, list[str]],
) -> None:
    """Add a change if all groups ask for the same value of an entry, else a problem."""
    try:
        module = model.get_submodule(setting.module)
        before = read(module, setting.name)
        wanted = {u.group: times * new_sizes.get(u.group, u.size_in(model)) for u, times in setting.counts}
    except (AttributeError, LookupError):
        return  # the configuration is gone, and what it said
    if len(set(wanted.values())) > 1:
        values = ", ".join(map(str, sorted(set(wanted.values()))))
        problems.setdefault(setting.module, []).append(f"'{setting.name}' is one number, but stands for {values}")
    elif (value := next(iter(wanted.values()))) != before:
        owner, step, inside = located(module, setting.name)
        key = (id(owner), step)
        content = changes[key].value if key in changes else get(owner, step)
        changes[key] = Change(owner, step, replaced(content, inside, value))


def depth_warnings(model: nn.Module, stack: Stack) -> list[str]:
    """Return what to say of configurations when a stack gets or loses a block: those in which nothing counts them."""
    held = [path for path in stack.uncounted if getattr(model.get_submodule(path), "config", None) is not None]
    return [_warning(model, path, [f"no entry counts the blocks of '{stack.name}'"]) for path in held]


def _warning(model: nn.Module, path: str, problems: list[str]) -> str:
    kind = type(model.get_submodule(path)).__name__
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return (
        f"The configuration of {kind}{f' ({path!r})' if path else ''} cannot express the model any more: "
        f"{'; '.join(problems[:3])}{more}. A model built from it will be another one: let it "
        "take on depth and shapes, with lg.replay_ and lg.resize_like_, before loading weights."
    )
