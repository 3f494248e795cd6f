"""A picture of an architecture over time: units, depth, and the loss they buy.

Only plain numbers come in, so a picture can be drawn while a run lives, or long after from its files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

_INK = "#22303c"
_FAINT = "#8a97a3"
_GRID = "#e6eaee"
_LOSS = "#2b6cb0"
_HELD_OUT = "#c05621"
_LEVELS = (_INK, _LOSS, "#2f855a", _HELD_OUT, "#6b46c1")
_PALETTES = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")
_MAX_LABELS = 14


@dataclass(frozen=True)
class Snapshot:
    """What a network looked like from one step on.

    Attributes:
        step: Optimizer steps done.
        units: Number of units of each group.
        depth: Number of blocks of each stack.
        parameters: Number of parameters.
        what: What had just happened, empty at the start.
    """

    step: int
    units: Mapping[str, int]
    depth: Mapping[str, int] = field(default_factory=dict)
    parameters: int | None = None
    what: str = ""


@dataclass(frozen=True)
class Curve:
    """A logged quantity over the steps.

    Attributes:
        steps: Optimizer steps done.
        values: The values there.
        held_out: Whether it was measured on held-out data: drawn as it is, where a training loss is smoothed.
        faint: Draw it in the background: another run, for comparison.
    """

    steps: Sequence[float]
    values: Sequence[float]
    held_out: bool = False
    faint: bool = False


@dataclass(frozen=True)
class RateCurve:
    """A learning rate over the steps, or many of one level.

    Attributes:
        steps: Optimizer steps done.
        values: The rate there, or the mean of many.
        low: The lowest of many.
        high: The highest of many.
    """

    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def plot_architecture(
    snapshots: Sequence[Snapshot],
    curves: Mapping[str, Curve] | None = None,
    *,
    title: str = "",
    last_step: int | None = None,
) -> Figure:
    """Draw units per group, blocks per stack and losses against optimizer steps.

    Args:
        snapshots: The network at the start and after each event, in order of their steps; at least one.
        curves: Losses by name, drawn below.
        title: Stands above the picture; the change in parameters is added.
        last_step: Where the run ended; default: the last step that anything is known of.

    Returns:
        A figure; ``figure.savefig(path)`` writes it. No window is opened and pyplot is left alone.

    Raises:
        ValueError: If there is no snapshot.

    Example:
        >>> figure = plot_architecture([Snapshot(0, {"fc1": 4}), Snapshot(100, {"fc1": 8})], last_step=200)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['units']
    """
    if not snapshots:
        raise ValueError("There is nothing to draw: expected at least one snapshot of the network, found none.")
    curves = curves or {}
    ends = [snapshots[-1].step, *(max(c.steps, default=0) for c in curves.values())]
    end = int(max(last_step or 0, *ends, 1))
    snapshots = _without_common_prefix(snapshots)
    shades = _families(snapshots)
    heights = {"units": 3.2}
    if any(s.depth for s in snapshots):
        heights["depth"] = 1.0
    if curves:
        heights["loss"] = 1.7
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 10, "axes.edgecolor": _FAINT}):
        figure = Figure(figsize=(9, 1.0 + 1.15 * sum(heights.values())), layout="constrained", facecolor="white")
        panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=list(heights.values()), squeeze=False)[
            :, 0
        ]
        axes = dict(zip(heights, panels, strict=True))
        _draw_units(axes["units"], snapshots, shades, end)
        if "depth" in axes:
            _draw_depth(axes["depth"], snapshots, shades, end)
        if "loss" in axes:
            _draw_curves(axes["loss"], curves)
        for panel in panels:
            _tidy(panel, snapshots, end)
        panels[-1].set_xlabel("optimizer steps", color=_INK)
        figure.align_ylabels()
        axes["units"].set_title(_headline(title, snapshots), loc="left", color=_INK, fontsize=12, pad=12)
    return figure


def plot_learning_rates(rates: Mapping[str, RateCurve], *, title: str = "") -> Figure:
    """Draw learning rates against optimizer steps, a panel for each level, and the weights of the levels.

    Args:
        rates: By name. What stands before the first slash is the level (``layer/fc1``, ``unit/fc1``, ``weight/unit``);
            names without a slash, such as ``lr``, are those of everything.
        title: Stands above the picture.

    Returns:
        A figure; ``figure.savefig(path)`` writes it. No window is opened and pyplot is left alone.

    Raises:
        ValueError: If there is no rate.

    Example:
        >>> curves = {"lr": RateCurve([1, 2], [0.1, 0.2]), "weight/global": RateCurve([1, 2], [0.5, 0.6])}
        >>> [axes.get_ylabel() for axes in plot_learning_rates(curves).axes]
        ['learning rate', 'weight of level']
    """
    if not rates:
        raise ValueError("There is nothing to draw: expected at least one learning rate, found none.")
    panels: dict[str, dict[str, RateCurve]] = {}
    for name, curve in rates.items():
        level, _, rest = name.partition("/")
        is_of_all = not rest or rest.isdigit() or rest.startswith("optimizer")
        panels.setdefault("" if is_of_all else level, {})[name if is_of_all else rest] = curve
    order: list[str] = [level for level in ("", "layer", "unit", "parameter") if level in panels]
    order += [level for level in panels if level not in (*order, "weight")]
    order += ["weight"] * ("weight" in panels)
    labels = {"": "learning rate", "weight": "weight of level"} | {
        level: f"rate of each {level}" for level in order if level not in ("", "weight")
    }
    members = [name for level in ("layer", "unit", "parameter") for name in _shortened(panels.get(level, {}))]
    own = set(_shortened(panels.get("parameter", {})))
    layers = list(dict.fromkeys(name.rpartition(".")[0] if name in own else name for name in members))
    shades = dict(zip(layers, mpl.colormaps["turbo"](np.linspace(0.08, 0.92, len(layers))), strict=True))
    end = max((curve.steps[-1] for curve in rates.values() if len(curve.steps)), default=1)
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 10, "axes.edgecolor": _FAINT}):
        figure = Figure(figsize=(9, 1.0 + 2.3 * len(order)), layout="constrained", facecolor="white")
        named: set[str] = set()
        for level, panel in zip(order, figure.subplots(len(order), 1, sharex=True, squeeze=False)[:, 0], strict=True):
            curves = panels[level] if level in ("", "weight") else _shortened(panels[level])
            has_names = not set(curves) <= named  # colours of layers are explained once
            _draw_rates(panel, curves, shades, end, is_log=level != "weight", has_names=has_names)
            named |= set(curves)
            panel.set_ylabel(labels[level], color=_INK)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(colors=_INK, length=3)
            panel.grid(axis="y", color=_GRID, linewidth=0.8)
            panel.set_axisbelow(True)
            panel.set_xlim(0, end)
        figure.axes[-1].set_xlabel("optimizer steps", color=_INK)
        figure.align_ylabels()
        figure.axes[0].set_title(title, loc="left", color=_INK, fontsize=12, pad=12)
    return figure


def _draw_rates(
    panel: Axes,
    curves: Mapping[str, RateCurve],
    shades: Mapping[str, Any],
    end: float,
    *,
    is_log: bool,
    has_names: bool,
) -> None:
    """Draw the rates of one level, the range of those that they stand for, and names where there is room."""
    ends, lowest, highest = [], math.inf, 0.0
    for number, (name, curve) in enumerate(curves.items()):
        layer = name if name in shades else name.rpartition(".")[0]
        colour = shades.get(layer, _LEVELS[number % len(_LEVELS)])
        values = np.asarray(curve.values, float)
        panel.plot(curve.steps, values, color=colour, linewidth=1.6, label=name)
        lowest, highest = min([lowest, *values[values > 0]]), max([highest, *values])
        ends.append((name, float(values[-1]), colour))
    ranges = [curve for curve in curves.values() if curve.low is not None and curve.high is not None]
    if ranges:
        steps = sorted({step for curve in ranges for step in curve.steps})
        low = np.min([_held(curve, curve.low or (), steps) for curve in ranges], axis=0)
        high = np.max([_held(curve, curve.high or (), steps) for curve in ranges], axis=0)
        panel.fill_between(steps, low, high, color=_FAINT, alpha=0.18, linewidth=0)
        highest = max(highest, float(high.max()))
    bottom = 0.0
    if not is_log:
        panel.set_ylim(0, 1)
    elif highest > 5 * lowest:
        bottom = lowest / 2
        panel.set_yscale("log")
        panel.set_ylim(bottom, highest * 1.5)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_ylim(0, highest * 1.1 or 1)
    if not has_names or len(ends) > _MAX_LABELS:
        note = f"{len(ends)} of them" if len(ends) > _MAX_LABELS else ""
        panel.annotate(note, xy=(1.01, 0.5), xycoords="axes fraction", va="center", fontsize=8.5, color=_INK)
        return
    to_axes = panel.transScale + panel.transLimits
    heights = [float(to_axes.transform((end, max(y, bottom)))[1]) for _, y, _ in ends]
    order = np.argsort(heights, kind="stable")
    places = _spread([heights[i] for i in order], 0.085)
    places = [at - max(0.0, places[-1] - 1.0) for at in places]
    for i, at in zip(order, places, strict=True):
        name, _, colour = ends[i]
        panel.annotate(
            name,
            xy=(1.0, heights[i]),
            xytext=(1.05, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            fontsize=8.5,
            color=_INK,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 1.2,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def _held(curve: RateCurve, values: Sequence[float], steps: Sequence[float]) -> NDArray[Any]:
    """Return values at given steps, between those that are known in a straight line."""
    found: NDArray[Any] = np.interp(steps, curve.steps, values)
    return found


def _headline(title: str, snapshots: Sequence[Snapshot]) -> str:
    first, last = snapshots[0].parameters, snapshots[-1].parameters
    change = "" if first is None or last is None else f"{first:,} → {last:,} parameters"
    return "   ".join(part for part in (title, change) if part)


def _tidy(panel: Axes, snapshots: Sequence[Snapshot], end: int) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=_INK, length=3)
    panel.set_axisbelow(True)
    panel.grid(axis="y", color=_GRID, linewidth=0.8)
    panel.set_xlim(0, end)
    for snapshot in snapshots[1:]:
        panel.axvline(snapshot.step, color=_FAINT, linewidth=0.6, linestyle=(0, (1, 3)), zorder=0.5)


def _series(
    snapshots: Sequence[Snapshot], names: Sequence[str], which: str, end: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return step edges and one row of values per name, drawn as steps after the edges."""
    steps = np.array([*(s.step for s in snapshots), end], dtype=float)
    rows = np.array([[getattr(s, which).get(name, 0) for s in (*snapshots, snapshots[-1])] for name in names])
    return steps, rows.reshape(len(names), len(steps))


def _shortened(curves: Mapping[str, RateCurve]) -> dict[str, RateCurve]:
    """Drop the leading modules that all names share."""
    names = [name.split(".") for name in curves]
    cut = 0
    while names and all(len(name) > cut + 1 and name[cut] == names[0][cut] for name in names):
        cut += 1
    return {".".join(name.split(".")[cut:]): curve for name, curve in curves.items()}


def _without_common_prefix(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Drop the leading modules that all names share, unless only numbers would be left: they tell nothing apart."""
    names = [name.split(".") for s in snapshots for name in (*s.units, *s.depth)]
    cut = 0
    while names and all(
        len(name) > cut + 1 and name[cut] == names[0][cut] and not name[cut + 1].isdigit() for name in names
    ):
        cut += 1

    def short(sizes: Mapping[str, int]) -> dict[str, int]:
        return {".".join(name.split(".")[cut:]): size for name, size in sizes.items()}

    return [replace(s, units=short(s.units), depth=short(s.depth)) for s in snapshots]


def _family(name: str) -> str:
    """Return the part of the network that a group or stack belongs to: its name up to the first number."""
    parts = name.split(".")
    cut = next((i for i, part in enumerate(parts) if part.isdigit()), 0) + 1
    return ".".join(parts[:cut])


def _families(snapshots: Sequence[Snapshot]) -> dict[str, str]:
    """Give groups and stacks of one part of the network shades of one colour."""
    groups, stacks = _names(snapshots, "units"), _names(snapshots, "depth")
    families: dict[str, list[str]] = {}
    for name in (*groups, *stacks):
        families.setdefault(_family(name), []).append(name)
    palettes = [mpl.colormaps[name] for name in _PALETTES]
    if len(families) > len(palettes):
        anchors = mpl.colormaps["turbo"](np.linspace(0.08, 0.92, len(families)))
        palettes = [LinearSegmentedColormap.from_list("family", ["white", colour]) for colour in anchors]
    shades = {}
    for palette, members in zip(palettes, families.values(), strict=False):
        varying = [name for name in members if name in groups]
        for name, at in zip(varying, np.linspace(0.72, 0.32, max(len(varying), 1)), strict=False):
            shades[name] = to_hex(palette(at))
        shades |= {name: to_hex(palette(0.72)) for name in members if name not in groups}
    return shades


def _names(snapshots: Sequence[Snapshot], which: str) -> list[str]:
    """Return all names in the order of the last network; what did not last comes after."""
    return list(dict.fromkeys(name for s in reversed(snapshots) for name in getattr(s, which)))


def _draw_units(panel: Axes, snapshots: Sequence[Snapshot], shades: Mapping[str, str], end: int) -> None:
    names = _names(snapshots, "units")
    steps, rows = _series(snapshots, names, "units", end)
    tops = np.cumsum(rows, axis=0)
    for name, row, top in zip(names, rows, tops, strict=True):
        panel.fill_between(
            steps, top - row, top, step="post", facecolor=shades[name], edgecolor="white", linewidth=0.8, label=name
        )
    total = max(1, tops[-1].max() if names else 1)
    last = [(name, top[-1] - row[-1] / 2, row[-1]) for name, row, top in zip(names, rows, tops, strict=True) if row[-1]]
    if len(last) <= _MAX_LABELS:
        heights = _spread([y for _, y, _ in last], total * 0.062)
        for (name, y, size), at in zip(last, heights, strict=True):
            panel.annotate(
                f"{name}  {size}",
                xy=(end, y),
                xytext=(end * 1.03, at),
                annotation_clip=False,
                va="center",
                fontsize=8.5,
                color=_INK,
                arrowprops={"arrowstyle": "-", "color": shades[name], "linewidth": 1.2, "shrinkA": 1, "shrinkB": 0},
            )
    else:
        note = f"{len(last)} groups"
        panel.annotate(note, xy=(1.01, 0.5), xycoords="axes fraction", va="center", fontsize=8.5, color=_INK)
    panel.set_ylim(0, total * 1.04)
    panel.set_ylabel("units", color=_INK)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move rising label heights apart until they do not touch, as little as possible."""
    placed: list[float] = []
    for y in wanted:
        placed.append(max(y, placed[-1] + gap) if placed else y)
    excess = 0.0 if not placed else (placed[-1] - wanted[-1]) / 2
    for i, y in enumerate(placed):
        low = placed[i - 1] + gap if i else 0.0
        placed[i] = max(low, y - excess)
    return placed


def _draw_depth(panel: Axes, snapshots: Sequence[Snapshot], shades: Mapping[str, str], end: int) -> None:
    names = _names(snapshots, "depth")
    steps, rows = _series(snapshots, names, "depth", end)
    heights = _spread(sorted(row[-1] for row in rows), max(1.0, rows.max()) * 0.24)
    order = np.argsort([row[-1] for row in rows], kind="stable")
    for at, i in zip(heights, order, strict=True):
        nudge = 0.03 * (i - (len(names) - 1) / 2)  # lines of equal depth stay visible
        panel.step(steps, rows[i] + nudge, where="post", color=shades[names[i]], linewidth=2)
        panel.annotate(
            f"{names[i]}  {rows[i][-1]}",
            xy=(end, rows[i][-1] + nudge),
            xytext=(end * 1.03, at),
            annotation_clip=False,
            va="center",
            fontsize=8.5,
            color=_INK,
            arrowprops={"arrowstyle": "-", "color": shades[names[i]], "linewidth": 1.2, "shrinkA": 1, "shrinkB": 0},
        )
    panel.set_ylim(0, rows.max() * 1.2 + 0.3)
    panel.set_ylabel("blocks", color=_INK)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))


def _draw_curves(panel: Axes, curves: Mapping[str, Curve]) -> None:
    low, high = [], []
    for name, curve in curves.items():
        steps, values = np.asarray(curve.steps, float), np.asarray(curve.values, float)
        usable = np.isfinite(values)
        steps, values = steps[usable], values[usable]
        if not len(values):
            continue
        colour = _HELD_OUT if curve.held_out else _LOSS
        if curve.faint:
            colour = _FAINT
        elif not curve.held_out:
            panel.plot(steps, values, color=_LOSS, linewidth=0.6, alpha=0.25)
        smooth = values if curve.held_out else _smoothed(values)
        panel.plot(steps, smooth, color=colour, linewidth=1.6, linestyle="--" if curve.faint else "-", label=name)
        low.append(smooth.min())
        high.append(smooth.max())
    if low and min(low) > 0:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if max(high) < 30 * min(low):  # too few powers of ten to read the scale from
            panel.yaxis.set_minor_formatter(
                FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
            )
        else:
            panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_ylabel("loss", color=_INK)
    if low:
        panel.legend(frameon=False, fontsize=8.5, labelcolor=_INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _smoothed(values: NDArray[Any]) -> NDArray[Any]:
    """Return a centred running mean over about a fortieth of the run."""
    half = len(values) // 80
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    smoothed: NDArray[Any] = (sums[high] - sums[low]) / (high - low)
    return smoothed
