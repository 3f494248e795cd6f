"""Write `models.md`: what is found in models that others wrote, beside what Torch-Pruning finds in them.

``python docs/models.py`` measures each model in a process of its own, with a limit of time, and keeps what was measured
in ``build/models.json``; ``--page`` only writes the page anew, ``--models "gpt*"`` measures some models again.
"""

# ruff: noqa: T201 (a command that reports how far it is)

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from models_further import FURTHER, further  # noqa: E402 (beside this file)
from models_page import write_page  # noqa: E402
from models_peer import ours_cut, outcome, torch_pruning_finds  # noqa: E402

import lightning_grow as lg  # noqa: E402
from tests.zoo_entry import Entry  # noqa: E402
from tests.zoo_third_party import THIRD_PARTY  # noqa: E402

RESULTS = HERE.parent / "build" / "models.json"
TOOLS = ("ours", "peer")
Result = dict[str, Any]


def entries() -> dict[str, Entry]:
    """Return the models of the page, the zoo's first."""
    return THIRD_PARTY | further()


def ours(entry: Entry) -> Result:
    """Return what `trace` finds, and what becomes of each group when it is pruned and widened by a step."""
    lg.trace(torch.nn.Linear(2, 3), torch.zeros(1, 2))  # what is imported at first use
    model = entry.build()
    args, kwargs = entry.inputs()
    begin = time.process_time()
    structure = lg.trace(model, *args, **kwargs)
    seconds = time.process_time() - begin
    whole = [t.detach() for t in entry.outputs(entry.build().eval())]
    outcomes, errors, kept = Counter[str](), Counter[str](), 0
    for name, group in structure.groups.items():
        if group.size > group.step:
            end, _, error = outcome(entry, ours_cut(structure, name), whole)
            outcomes[end] += 1
            errors.update([f"{name}: {error}"] if error else [])
        if group.obstacle is None:
            wider = entry.build().eval()
            lg.apply_(wider, [lg.widen(group, group.step)])
            moved = max(float((a - b).abs().max()) for a, b in zip(entry.outputs(wider), whole, strict=True))
            kept += moved < 1e-10 * max(1.0, *(float(t.abs().max()) for t in whole))
    parameters = {f"{n}[{d}]" for n, p in model.named_parameters() for d in range(p.ndim)}
    varying = {axis.label for group in structure.groups.values() for axis in group.axes} & parameters
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "groups": len(structure.groups),
        "verified": sum(group.obstacle is None for group in structure.groups.values()),
        "kept": kept,
        "obstacles": Counter(_short(g.obstacle) for g in structure.groups.values() if g.obstacle),
        "stacks": {s.name or "(model)": [len(s.blocks), s.obstacle] for s in structure.stacks.values()},
        "pinned": Counter(_short(reason) for reason in structure.pinned.values()),
        "axes": len(varying),
        "of": len(parameters),
        "outcomes": outcomes,
        "errors": errors,
    }


def _short(reason: str) -> str:
    """Return a reason without the names of modules, so that like reasons can be counted."""
    reason = re.sub(r" in '[^']*'", "", reason)
    reason = re.sub(r"'[^']*'", "a module", reason)
    return re.sub(r"\s+", " ", re.sub(r"\b\d+\b", "n", reason)).strip()[:150]


def measure(entry: Entry, tool: str, limit: float) -> Result:
    """Return what a tool finds in a model, from a process of its own, or why there is nothing to return."""
    context = multiprocessing.get_context("fork")  # what is imported is imported once
    reader, writer = context.Pipe(duplex=False)

    def work() -> None:
        try:
            writer.send((ours if tool == "ours" else torch_pruning_finds)(entry))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is what the page tells)
            writer.send({"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"})

    process = context.Process(target=work)
    process.start()
    answer = reader.recv() if reader.poll(limit) else {"failed": f"no answer in {limit:.0f} s"}
    process.kill()
    process.join()
    return answer


def kept() -> dict[str, dict[str, Result]]:
    """Return what has been measured so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["*"], help="names of models, as glob patterns")
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=TOOLS)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one tool and one model")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names = [name for name in entries() if any(fnmatch.fnmatch(name, p) for p in arguments.models)]
    for name in [] if arguments.page else names:
        for tool in arguments.tools:
            begin = time.perf_counter()
            answer = measure(entries()[name], tool, arguments.limit)
            said = answer.get("failed") or dict(answer["outcomes"])
            print(f"{name}, {tool}: {time.perf_counter() - begin:.0f} s, {said}", flush=True)
            results = kept()
            results.setdefault(name, {})[tool] = answer
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1))
    results = kept()
    write_page({name: results[name] for name in entries() if name in results}, set(FURTHER))


if __name__ == "__main__":
    main()
