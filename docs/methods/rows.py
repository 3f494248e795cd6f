"""Runs as rows of a CSV file, and tables in pages: what the evidence commands do not do twice."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Return the rows there are, as objects of a dataclass with fields of int, float and str."""
    if not path.is_file():
        return []
    kinds = {"int": int, "float": float, "str": str}
    names: Any = fields(kind)  # type: ignore[arg-type]
    with path.open(newline="") as file:
        return [kind(**{f.name: kinds[str(f.type)](row[f.name]) for f in names}) for row in csv.DictReader(file)]


def append(path: Path, row: Any) -> None:
    """Add a row."""
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def write_table(page: Path, text: str, name: str = "table") -> None:
    """Put text between the marks of that name in a page; what stands around them is kept."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    whole = page.read_text()
    page.write_text(f"{whole.split(begin)[0]}{begin}\n\n{text}\n\n{end}{whole.split(end)[1]}")
