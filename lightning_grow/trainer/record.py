"""The history of a run: what changed, when, by which method, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_grow.structure.axes import Stack, plain

_COLUMNS = ("step", "method", "what", "group", "from", "to", "parameters", "loss before", "loss after")

Kind = Literal["widen", "prune", "regroup", "insert", "remove", "enlarge"]


@dataclass
class Event:
    """One change of one group (width), one stack (depth) or one convolution (kernel size).

    Attributes:
        step: Optimizer steps done when it happened.
        epoch: Epoch in which it happened, from 0.
        method: Name of the callback class.
        what: ``"widen"``, ``"prune"``, ``"regroup"`` (as many units as before), ``"insert"``, ``"remove"`` or
            ``"enlarge"``.
        group: Name of the group, of the stack for depth, or of the convolution, and ``.kernel``.
        before: Units (blocks, length of the kernel) before.
        after: Units (blocks, length of the kernel) after.
        parameters: Parameters of the whole model after all changes of this step.
        loss_before: Training loss of the last batch before; None when the step returns none.
        loss_after: Training loss of the first batch afterwards; None until there is one.
        predicted: Gain that the method predicted, in its own unit; None when it predicts nothing.
        difference: With ``verify``, the largest absolute change of an output in eval mode.
        at: Position of the block, for depth.
        stack: The stack before the change, for depth: what repeating it needs.
        stack_after: The stack after the change: what taking it back needs.
    """

    step: int
    epoch: int
    method: str
    what: Kind
    group: str
    before: int
    after: int
    parameters: int
    loss_before: float | None = None
    loss_after: float | None = None
    predicted: float | None = None
    difference: float | None = None
    at: int | None = None
    stack: dict[str, Any] | None = None
    stack_after: dict[str, Any] | None = None

    @property
    def measured(self) -> float | None:
        """How much the training loss fell over the event, from the last batch before to the first batch after."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_before - self.loss_after

    @property
    def is_depth(self) -> bool:
        """Whether this event inserted or removed a block."""
        return self.stack is not None

    def __str__(self) -> str:
        line = f"step {self.step}: {self.method} {self.what} '{self.group}' {self.before} -> {self.after}"
        line += f", {self.parameters:,} parameters"
        if self.loss_before is not None:
            line += f", loss {self.loss_before:.4g}"
        if self.predicted is not None:
            line += f", predicted gain {self.predicted:.3g}"
        if self.difference is not None:
            line += f", outputs moved by {self.difference:.2g}"
        return line


@dataclass
class Record:
    """All events of a run, in order, and the sizes it started from. Holds plain data only.

    Attributes:
        sizes: Units of each group, and blocks of each stack, when training began.
        parameters: Parameters when training began.
        events: What happened since.

    Example:
        >>> record = Record(sizes={"fc1": 4}, parameters=50)
        >>> record.add(Event(10, 0, "Net2Net", "widen", "fc1", 4, 6, 70, loss_before=2.0))
        >>> record.curve("fc1")
        [(0, 4), (10, 6)]
    """

    sizes: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    events: list[Event] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Append an event."""
        self.events.append(event)

    def __len__(self) -> int:
        return len(self.events)

    def curve(self, group: str) -> list[tuple[int, int]]:
        """Return ``(step, size)`` of a group or stack, from its first appearance: what a plot over time needs."""
        points = [(0, self.sizes[group])] if group in self.sizes else []
        for event in self.events:
            if event.group == group:
                points = points or [(0, event.before)]
                points.append((event.step, event.after))
        return points

    def depth_events(self) -> list[Event]:
        """Return the events that inserted or removed blocks, in order."""
        return [event for event in self.events if event.is_depth]

    @property
    def has_larger_kernels(self) -> bool:
        """Whether kernels were enlarged."""
        return any(event.what == "enlarge" for event in self.events)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as dicts, lists, strings and numbers, for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Return the record that `to_dict` described."""
        events = [Event(**event) for event in data["events"]]
        return cls(sizes=dict(data["sizes"]), parameters=int(data["parameters"]), events=events)

    def __str__(self) -> str:
        """Return a table of the events that a person can read."""
        rows: list[tuple[str, ...]] = [_COLUMNS]
        for e in self.events:
            losses = ("" if loss is None else f"{loss:.4f}" for loss in (e.loss_before, e.loss_after))
            size = (str(e.before), str(e.after))
            rows.append((str(e.step), e.method, e.what, e.group, *size, f"{e.parameters:,}", *losses))
        return _table(rows)


def stack_to_dict(stack: Stack) -> dict[str, Any]:
    """Return a stack as plain data, for a checkpoint."""
    data: dict[str, Any] = plain(stack)
    return data


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: Iterable[str] = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
