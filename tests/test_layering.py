"""Imports point downwards only, and the lower half of the house knows torch alone. Read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_grow"

# Each part may import itself and what stands to the right of it. Names without a folder are modules of the package.
METHODS = ("growth", "pruning", "activations", "binary", "streams", "search")
CORE = ("structure",)
MAY_IMPORT = {
    "structure": (),
    "surgery": CORE,
    "criteria": (*CORE, "surgery"),  # candidates are tried in copies, resized by the surgery that will be done
    "costs": CORE,
    "planning": (*CORE, "costs"),
    "optim": (),
    "trainer": (
        *CORE,
        "surgery",
        "criteria",
        "costs",
        "planning",
        "optim",
        "plot",
    ),  # losses are fed to optimizers, rates drawn
    **dict.fromkeys(METHODS, (*CORE, "surgery", "criteria", "costs", "planning", "trainer")),
    "testing": (*CORE, "surgery", "criteria", "costs"),
    "data": (),
    "examples": (),
    "plot": (),
    "inspection": (*CORE, "costs"),
    "report": ("plot", "trainer"),
    "cli": ("", *CORE, "planning", "trainer", "data", "inspection", "report"),
    "": (*CORE, "surgery", "criteria", "costs", "planning", "trainer", *METHODS, "optim", "testing"),
}
TORCH_ONLY = ("structure", "surgery", "criteria", "costs", "planning", "optim")
FORBIDDEN_BELOW = ("lightning", "pytorch_lightning", "torchmetrics", "matplotlib", "rich", "wandb", "sklearn")


def part_of(module: str) -> str:
    """Return the folder or module of the package that a qualified name lies in; "" is the package itself."""
    pieces = module.split(".")
    if len(pieces) == 1:
        return ""
    inside = PACKAGE / pieces[1]
    return pieces[1] if inside.is_dir() or inside.with_suffix(".py").is_file() else ""


def imports_of(path: Path) -> set[str]:
    """Return the qualified name of everything that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path):
    inside = path.relative_to(PACKAGE)
    part = inside.parts[0] if len(inside.parts) > 1 else inside.stem.replace("__init__", "")
    assert part in MAY_IMPORT, f"{part} is new: say in this test what it may import"
    own = {name for name in imports_of(path) if name.split(".")[0] == "lightning_grow"}
    wrong = {name for name in own if part_of(name) not in {part, *MAY_IMPORT[part]}}
    assert not wrong, f"{inside} imports {sorted(wrong)}, but may import only {MAY_IMPORT[part]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_only_the_upper_half_knows_lightning(path):
    inside = path.relative_to(PACKAGE)
    if inside.parts[0] in TORCH_ONLY:
        wrong = {name for name in imports_of(path) if name.split(".")[0] in FORBIDDEN_BELOW}
        assert not wrong, f"{inside} imports {sorted(wrong)}: torch only, please"


def test_an_upward_import_would_be_seen(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("def f():\n    from lightning_grow.trainer import record\n    import lightning.pytorch as pl\n")
    assert {part_of(name) for name in imports_of(path) if name.startswith("lightning_grow")} == {"trainer"}
    assert "lightning.pytorch" in imports_of(path)


def test_methods_do_not_know_each_other():
    for folder in METHODS:
        for path in (PACKAGE / folder).glob("[!_]*.py"):
            others = {f"lightning_grow.{folder}.{p.stem}" for p in (PACKAGE / folder).glob("[!_]*.py")} - {
                f"lightning_grow.{folder}.{path.stem}"
            }
            wrong = {name for name in imports_of(path) if any(name == o or name.startswith(f"{o}.") for o in others)}
            assert not wrong, f"{path.name} imports {sorted(wrong)}"
