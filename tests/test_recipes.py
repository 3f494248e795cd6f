"""Every recipe runs from its file, made fast by laying one more file over it, and each constant says why."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml

from lightning_grow.cli import main
from lightning_grow.trainer import StructuralCallback
from tests.test_data import small_fashion, write

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "fast")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_grows_tests_and_leaves_a_picture(name, tmp_path, capfd):
    write(tmp_path / "files", small_fashion(num_train=400, num_test=40, size=8))
    args = ["fit", "--config", str(RECIPES / f"{name}.yaml"), "--config", str(RECIPES / "fast.yaml")]
    if name == "fashion_mnist":
        args += [f"--data.init_args.data_dir={tmp_path / 'files'}", "--data.init_args.verify=false"]
        args += ["--data.init_args.download=false", "--model.init_args.image_size=8", "--trainer.max_epochs=2"]
    assert main(args) == 0
    out = capfd.readouterr().out
    config = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for callback in config["trainer"]["callbacks"]:
        module, _, method = callback["class_path"].rpartition(".")
        if not issubclass(getattr(import_module(module), method), StructuralCallback):
            continue
        assert f"({method})" in out, f"{method} did nothing"
        assert f"insert ({method})" in out or not callback["init_args"].get("depth")
    last = out.strip().splitlines()[-1]
    assert last.startswith("test_acc")
    assert "grown" in last
    assert "the same seed ungrown" in last
    (run,) = (tmp_path / "logs" / name).iterdir()
    for file in ("config.yaml", "metrics.csv", "growth.json", "architecture.png", "ungrown/metrics.csv"):
        assert (run / file).is_file()


def test_the_fast_recipe_is_laid_over_others_and_names_nothing_of_its_own():
    assert set(yaml.safe_load((RECIPES / "fast.yaml").read_text())) == {"trainer"}


@pytest.mark.parametrize("name", [*NAMES, "fast"])
def test_a_recipe_says_how_it_is_run(name):
    head = (RECIPES / f"{name}.yaml").read_text().split("\n\n")[0]
    assert "lightning-grow fit --config recipes/" in head
