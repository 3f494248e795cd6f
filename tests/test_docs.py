"""What the documentation says is there, is there; what it shows, runs; what it promises to a newcomer, CI does."""

import importlib
import os
import re
from pathlib import Path

import pytest

import lightning_grow as lg

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text()) if found == language]


def quick_start() -> list[str]:
    section = (ROOT / "README.md").read_text().partition("\n## Quick start\n")[2].partition("\n## ")[0]
    fenced = FENCE.findall(section)
    assert len(fenced) == 1, "the quick start is one fenced block"
    return fenced[0][1].splitlines()


def test_the_quick_start_is_two_lines():
    assert len(quick_start()) == 2
    assert all(line.strip() for line in quick_start())


def test_the_first_line_installs_and_runs_the_main_job():
    first = quick_start()[0]
    assert first.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert first.endswith(".venv/bin/lightning-grow fit --config recipes/digits.yaml")


def test_ci_is_the_second_line_of_the_quick_start():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == [quick_start()[1]]


@pytest.mark.parametrize("name", [name for name in lg.__all__ if not name.startswith("_")])
def test_every_exported_name_is_documented(name):
    where = importlib.import_module("lightning_grow")
    assert hasattr(where, name)
    documented = re.findall(r"^::: lightning_grow\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    is_namespace = type(getattr(where, name)).__name__ == "module"
    assert is_namespace or name in documented, f"add '::: lightning_grow.{name}' to docs/api.md"
    assert getattr(where, name).__doc__


def test_the_api_page_names_nothing_that_is_not_there():
    for path in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_the_examples_of_a_page_run(page):
    """The blocks of one page run one after the other, as a reader would paste them."""
    names = {"__name__": "__example__"}
    for body in blocks(page, "python"):
        exec(compile(body, str(page), "exec"), names)


def test_links_between_files_lead_somewhere():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text()))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken
