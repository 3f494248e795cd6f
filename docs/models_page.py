"""Turn measurements into `models.md` and its picture."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("Agg")
HERE = Path(__file__).parent
PAGE, PICTURE = HERE / "models.md", HERE / "images" / "models.png"
Results = Mapping[str, Mapping[str, Any]]

_INTRODUCTION = """# Models that others wrote

{count} architectures that nobody here wrote, with random weights and tiny sizes (two layers, widths of 12 to 32): what
[`trace`](structure.md) finds in them, and what Torch-Pruning's dependency graph finds in the same models in the same
run. The first {zoo} are part of the tests, where each property of the library is checked on each of them; the others
are here only. Nothing in the library knows any of these classes.

This page is generated: `python docs/models.py` measures again and writes it.

![Share of parameter axes that may vary](images/models.png)

## What is found

*Verified* groups grow without changing the function; the others have an *obstacle*, a reason why they cannot. *Axes* is
the share of parameter axes that some group varies; each of the others has a reason, listed below. *Trace* is in
seconds of processor time.

"""
_PEER = """
## Pruned by a unit, beside Torch-Pruning

Every group that a tool finds is pruned by one unit in a fresh copy. The reference is the whole model with zeros where
entries were removed, so no tool is asked whether it was right:

- **equal**: the output is that of the reference;
- **norm**: it runs, and a norm averages over what was removed, so there is nothing to compare with;
- **differs**: it runs, and computes something else: entries were removed that do not belong together;
- **raises**: pruning or the forward pass fails.

Groups of Torch-Pruning that change the size of the model's output are left out: a user would list them in
`ignored_layers`. It gets what its documentation asks for: example inputs by keyword, an `output_transform`, and for
models with heads three tries for each group, of which the best counts: one channel, a whole head, one channel of each
head, the latter two also with the sizes that attention modules keep set as its own examples set them. Beyond that it is
used as a library that does not know the model: no customised pruners, default dimensions for parameters outside of
layers. It only prunes; growing, splitting, optimizer state and depth have no counterpart.

"""


def write_page(results: Results, further: set[str]) -> None:
    """Write the page and its picture."""
    done = {name: r for name, r in results.items() if "failed" not in r.get("ours", {"failed": 1})}
    parts = [_INTRODUCTION.format(count=len(results), zoo=len(set(results) - further))]
    parts += [_found(results), _PEER, _beside(results), _sums(results), _reasons(done), _failures(results), _machine()]
    PAGE.write_text("".join(parts))
    _draw({name: r for name, r in done.items() if "peer" in r})


def _found(results: Results) -> str:
    rows = []
    for name, tools in results.items():
        r = tools.get("ours", {"failed": "not measured"})
        if "failed" in r:
            rows.append([f"`{name}`", "", "", "", "", "", "", r["failed"]])
            continue
        stacks = [blocks for blocks, obstacle in r["stacks"].values()]
        free = sum(obstacle is None for _, obstacle in r["stacks"].values())
        rows.append(
            [
                f"`{name}` ({r['class']})",
                f"{r['parameters']:,}",
                r["groups"],
                r["verified"],
                r["groups"] - r["verified"],
                f"{free} of {len(stacks)}" if stacks else "",
                f"{_percent(r['axes'], r['of'])}",
                f"{r['seconds']:.1f}",
            ]
        )
    head = ["model", "parameters", "groups", "verified", "obstacles", "stacks that grow", "axes", "trace"]
    return _table(head, rows)


def _beside(results: Results) -> str:
    rows = []
    for name, tools in results.items():
        of = tools.get("ours", {}).get("of", 0)
        rows.append([f"`{name}`", *_ends(tools.get("ours", {}), of), *_ends(tools.get("peer", {}), of)])
    ends = "equal · norm · differs · raises"
    return _table(["model", f"ours: {ends}", "axes", f"Torch-Pruning: {ends}", "axes"], rows)


def _ends(r: Mapping[str, Any], of: int) -> list[str]:
    if "failed" in r or not r:
        return [r.get("failed", "not measured"), ""]
    counts = [r["outcomes"].get(end, 0) for end in ("equal", "norm", "differs", "raises")]
    return [" · ".join(str(count) for count in counts), _percent(r["axes"], of) if of else ""]


def _sums(results: Results) -> str:
    lines = []
    for tool, called in (("ours", "`trace`"), ("peer", "Torch-Pruning")):
        measured = [t[tool] for t in results.values() if "failed" not in t.get(tool, {"failed": 1})]
        ends: Counter[str] = Counter()
        for r in measured:
            ends.update(r["outcomes"])
        right = sum(not r["outcomes"].get("differs") and not r["outcomes"].get("raises") for r in measured)
        lines.append(
            f"- {called}: {len(measured)} of {len(results)} models analysed; of its groups {ends['equal']} end equal, "
            f"{ends['norm']} under a norm, {ends['differs']} differ, {ends['raises']} raise. In {right} models no "
            "group differs or raises."
        )
    kept = sum(t["ours"].get("kept", 0) for t in results.values() if "ours" in t)
    verified = sum(t["ours"].get("verified", 0) for t in results.values() if "ours" in t)
    lines.append(f"- Widened by a step, {kept} of {verified} verified groups keep the output to 1e-10.")
    return "\nIn sum:\n\n" + "\n".join(lines) + "\n"


def _reasons(results: Results) -> str:
    text = "\n## Reasons\n\nObstacles, and what keeps axes pinned, with the number of groups and axes.\n"
    for name, tools in results.items():
        r = tools["ours"]
        stacks = Counter(obstacle for _, obstacle in r["stacks"].values() if obstacle)
        lines = [f"  - obstacle: {reason} ({count})" for reason, count in Counter(r["obstacles"]).most_common()]
        lines += [f"  - stack: {reason} ({count})" for reason, count in stacks.most_common()]
        lines += [f"  - pinned: {reason} ({count})" for reason, count in Counter(r["pinned"]).most_common()]
        text += f"\n- `{name}`\n" + "\n".join(f"  {line}" for line in lines) + "\n"
    return text


def _failures(results: Results) -> str:
    """What goes wrong in Torch-Pruning, by message."""
    errors: Counter[str] = Counter()
    for tools in results.values():
        peer = tools.get("peer", {})
        errors.update([peer["failed"]] if "failed" in peer else [])
        errors.update(peer.get("errors", {}))
    lines = [f"- {count} x `{error.replace('`', '')}`" for error, count in errors.most_common(12)]
    return "\n## What Torch-Pruning raises\n\nThe most frequent messages:\n\n" + "\n".join(lines) + "\n"


def _machine() -> str:
    names = ("torch", "transformers", "lightning", "torch-pruning")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    load = os.getloadavg()[2]
    return (
        f"\n## The machine\n\n{os.cpu_count()} cores of an {platform.machine()} server shared with other processes\n"
        f"(load average {load:.0f} when this was written), one thread for each measurement, no accelerator;\n"
        f"Python {platform.python_version()}, {versions}.\n"
        "Models run in float64, without the casts to single precision that some make inside.\n"
    )


def _draw(results: Results) -> None:
    names = list(results)
    figure, axes = plt.subplots(figsize=(8, 0.26 * len(names) + 1.2), layout="constrained")
    for shift, tool, label, colour in (
        (0.2, "ours", "lightning_grow", "#3f51b5"),
        (-0.2, "peer", "Torch-Pruning", "#bbb"),
    ):
        shares = [100 * results[n][tool].get("axes", 0) / results[n]["ours"]["of"] for n in names]
        axes.barh([len(names) - i + shift for i in range(len(names))], shares, 0.38, label=label, color=colour)
    axes.set_yticks([len(names) - i for i in range(len(names))], names, fontsize=8)
    axes.set(
        xlim=(0, 100),
        xlabel="parameter axes that may vary, %",
    )
    axes.xaxis.label.set_size(8)
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(PICTURE, dpi=110)


def _percent(part: int, of: int) -> str:
    return f"{100 * part / of:.0f} %"


def _table(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
