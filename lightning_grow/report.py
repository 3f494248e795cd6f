"""What a run leaves behind for people: the table of its events, and the picture of its architecture over time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from lightning_grow.plot import Curve, Snapshot, plot_architecture
from lightning_grow.trainer.history import HISTORY_FILE
from lightning_grow.trainer.record import Record

PICTURE_FILE = "architecture.png"
"""Name of the picture in the folder of a run."""


class RunError(ValueError):
    """A folder holds no run that could be drawn. The message says what was looked for."""


def read_history(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """Read the history of a run.

    Args:
        folder: The folder of a run, a folder of runs (the newest is taken), or the file itself.

    Returns:
        The folder of the run, and what was written there.

    Raises:
        RunError: If there is none, or it cannot be read.
    """
    folder = Path(folder)
    if not folder.exists():
        raise RunError(f"There is no folder '{folder}'.")
    files = [folder] if folder.is_file() else sorted(folder.rglob(HISTORY_FILE), key=lambda f: f.stat().st_mtime)
    if not files:
        raise RunError(
            f"There is no '{HISTORY_FILE}' in '{folder}' or below. 'lightning-grow fit' writes it in the folder of the "
            "run, beside its logs; other trainings write it with the callback lightning_grow.History()."
        )
    try:
        history = json.loads(files[-1].read_text())
        if not history["snapshots"]:
            raise RunError(f"'{files[-1]}' holds no snapshot yet: the run has not done its first step.")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise RunError(f"'{files[-1]}' is not the history of a run: {error}.") from error
    return files[-1].parent, history


def picture(history: Mapping[str, Any], title: str = "") -> Figure:
    """Draw a history: units, depth and losses against optimizer steps.

    Args:
        history: As `History` writes it.
        title: Stands above the picture.

    Example:
        >>> snapshots = [{"step": 0, "units": {"fc1": 4}}, {"step": 9, "units": {"fc1": 6}}]
        >>> [axes.get_ylabel() for axes in picture({"snapshots": snapshots}).axes]
        ['units']
    """
    snapshots = [
        Snapshot(entry["step"], entry["units"], entry.get("depth", {}), entry.get("parameters"))
        for entry in history["snapshots"]
    ]
    curves = {
        c["name"]: Curve(c["steps"], c["values"], c.get("held_out", False), c.get("faint", False))
        for c in history.get("curves", ())
    }
    return plot_architecture(snapshots, curves, title=title)


def events_table(record: Record) -> Table:
    """Return the events of a run for a terminal: step, what, from, to, parameters, loss before and after.

    Args:
        record: What happened.
    """
    table = Table(title="What changed while it trained", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("step", "epoch"):
        table.add_column(column, justify="right")
    for column in ("what", "where"):
        table.add_column(column, no_wrap=True)
    for column in ("from", "to", "parameters", "loss before", "loss after"):
        table.add_column(column, justify="right")
    for event, following in zip(record.events, [*record.events[1:], None], strict=True):
        table.add_row(
            str(event.step),
            str(event.epoch),
            f"{event.what} ({event.method})",
            event.group,
            f"{event.before:,}",
            f"{event.after:,}",
            f"{event.parameters:,}",
            _loss(event.loss_before),
            _loss(event.loss_after),
            end_section=following is not None and following.step != event.step,
        )
    return table


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
