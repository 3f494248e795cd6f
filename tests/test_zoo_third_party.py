"""Models that others wrote: how much of each is found, and every property of the zoo.

The table of counts is frozen in `zoo_third_party.csv`, so that a regression shows. Where more is found than before,
``python -m tests.test_zoo_third_party`` writes it anew; read the difference before it is committed.
"""

from __future__ import annotations

import csv
from pathlib import Path

from tests import test_zoo
from tests.test_zoo import pytest_generate_tests, structure_of  # noqa: F401 (pytest calls the first)
from tests.zoo import THIRD_PARTY, Entry

MODELS = THIRD_PARTY
FROZEN = Path(__file__).with_suffix(".csv").with_stem("zoo_third_party")

globals().update({name: test for name, test in vars(test_zoo).items() if name.startswith("test_")})


def counts(entry: Entry) -> dict[str, str]:
    """What is found in a model."""
    structure = structure_of(entry)
    obstacles = sum(group.obstacle is not None for group in structure.groups.values())
    parameters = {f"{n}[{d}]" for n, p in entry.build().named_parameters() for d in range(p.ndim)}
    varying = {axis.label for group in structure.groups.values() for axis in group.axes} & parameters
    numbers = {
        "groups": len(structure.groups),
        "verified": len(structure.groups) - obstacles,
        "obstacles": obstacles,
        "varying axes": len(varying),
        "pinned axes": len(structure.pinned),
        "stacks": len(structure.stacks),
    }
    return {"model": entry.name, **{name: str(number) for name, number in numbers.items()}}


def frozen() -> dict[str, dict[str, str]]:
    """The table as it was written."""
    with FROZEN.open(newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def test_as_much_is_found_as_before(entry: Entry) -> None:
    assert counts(entry) == frozen()[entry.name], structure_of(entry)


def test_the_frozen_table_knows_every_model() -> None:
    assert list(frozen()) == list(MODELS)


def write() -> None:
    """Write the table of counts anew."""
    rows = [counts(entry) for entry in MODELS.values()]
    with FROZEN.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    write()
