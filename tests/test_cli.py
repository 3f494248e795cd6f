"""The command line: Lightning's own behaviour is kept, reports are true, and mistakes are named."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import lightning_grow as lg
from lightning_grow.cli import main
from lightning_grow.trainer.history import HISTORY_FILE

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1",
        "--trainer.limit_test_batches=1", "--trainer.log_every_n_steps=1"]  # fmt: skip


def fit(*args):
    return main(["fit", "--config", str(RECIPES / "digits.yaml"), *TINY, "--trainer.callbacks=null", *args])


def growing(*args):
    return fit(
        "--trainer.callbacks+=lightning_grow.Net2Net", "--trainer.callbacks.every_n_steps=2",
        "--trainer.callbacks.verbose=false", *args,
    )  # fmt: skip


def run_of_digits():
    (run,) = Path("logs/digits").iterdir()
    return run


# -- help and configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_names_every_command(args, capsys):
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(
        f"\n  {command} " in out for command in ("fit", "validate", "test", "predict", "inspect", "plan", "plot")
    )


@pytest.mark.parametrize("command", ["fit", "inspect", "plan", "plot"])
def test_each_command_has_its_own_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["digits", "fashion_mnist"])
def test_a_printed_configuration_is_a_configuration(recipe, capsys):
    def printed(path):
        with pytest.raises(SystemExit) as caught:
            main(["fit", "--config", str(path), "--print_config"])
        assert caught.value.code == 0
        return capsys.readouterr().out

    first = printed(RECIPES / f"{recipe}.yaml")
    Path("again.yaml").write_text(first)
    assert yaml.safe_load(printed("again.yaml")) == yaml.safe_load(first)
    assert yaml.safe_load(first)["trainer"]["callbacks"][0]["class_path"] == "lightning_grow.Net2Net"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("trainer: {max_epoch: 3}", "max_epoch"),
        ("modle: {class_path: Net}", "modle"),
        ("trainer: {callbacks: [{class_path: lightning_grow.Net2Net, init_args: {every_step: 3}}]}", "every_step"),
        ("trainer: {callbacks: [{class_path: lightning_grow.Net3Net}]}", "Net3Net"),
        ("trainer: {max_epochs: many}", "max_epochs"),
        ("report: {tests: true}", "tests"),
    ],
)
def test_a_wrong_key_or_value_is_named(line, named, capsys):
    Path("wrong.yaml").write_text(line)
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(RECIPES / "digits.yaml"), "--config", "wrong.yaml"])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["grow"])
    assert caught.value.code == 2
    assert "grow" in capsys.readouterr().err


def test_a_missing_data_file_ends_in_one_line_that_says_what_to_do(capsys):
    config = ["--config", str(RECIPES / "fashion_mnist.yaml"), "--data.init_args.download=false"]
    assert main(["fit", *config]) == 1
    err = capsys.readouterr().err
    assert "lightning-grow: error: There is no 'train-images-idx3-ubyte.gz'" in err
    assert "data_dir" in err


# -- what a run leaves behind ----------------------------------------------------------------------------------------


def test_a_growing_run_reports_its_events_and_compares_with_its_seed(capfd):
    assert growing() == 0
    out = capfd.readouterr().out
    run = run_of_digits()
    history = json.loads((run / HISTORY_FILE).read_text())
    widened = history["events"][0]
    assert f"widen ({widened['method']})" in out
    assert f"{widened['parameters']:,}" in out
    assert f"{widened['loss_before']:.4f}" in out
    assert "What to try next:" in out
    assert f"lightning-grow plot {run}" in out
    last = out.strip().splitlines()[-1]
    accuracies = [float(part.split()[0]) for part in last.removeprefix("test_acc").split("|")]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert f"grown, {history['snapshots'][-1]['parameters']:,} parameters" in last
    assert "ungrown, 252 parameters" in last


def test_the_history_follows_the_network(capfd):
    assert growing("--report.ungrown=false", "--report.test=false") == 0
    capfd.readouterr()
    history = json.loads((run_of_digits() / HISTORY_FILE).read_text())
    seed, *later = history["snapshots"]
    assert seed["parameters"] == 252
    assert [s["step"] for s in history["snapshots"]] == [0, 2, 4, 6]
    for before, after in zip([seed, *later], later, strict=False):
        assert after["parameters"] > before["parameters"]
        assert all(after["units"][name] > size for name, size in before["units"].items())
    losses = {curve["name"]: curve for curve in history["curves"]}
    assert losses["training loss"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert losses["val_loss"]["steps"] == [3, 6]


def test_the_comparison_is_the_run_without_its_growth(capfd):
    """The ungrown twin must be the seed itself: a run without structural callbacks is equal to it, loss by loss."""
    assert growing("--report.test=false") == 0
    grown = run_of_digits()
    assert fit("--report.ungrown=false", "--report.test=false") == 0
    capfd.readouterr()
    (plain,) = set(Path("logs/digits").iterdir()) - {grown}

    def losses(path):
        with path.open() as file:
            return [float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")]

    assert losses(grown / "ungrown" / "metrics.csv") == losses(plain / "metrics.csv")
    assert losses(grown / "metrics.csv") != losses(plain / "metrics.csv")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_saved_configuration_and_checkpoint_are_tested_by_another_process_at_their_size(capfd):
    assert growing() == 0
    out = capfd.readouterr().out
    command = next(line for line in out.splitlines() if "lightning-grow test" in line)
    args = command.partition("lightning-grow ")[2].partition("#")[0].split()
    assert main([*args, "--trainer.limit_test_batches=1"]) == 0
    tested = capfd.readouterr().out
    accuracy = float(out.strip().splitlines()[-1].split()[1])
    assert float(re.search(r"test_acc\W+([\d.]+)", tested)[1]) == pytest.approx(accuracy, abs=1e-4)


def test_a_run_without_events_says_so(capfd):
    assert fit("--report.ungrown=false", "--report.test=false") == 0
    assert "no event took place" in capfd.readouterr().out


def offline_records(path):
    """Yield the records of an offline W&B run: protocol buffers in a LevelDB log, whose blocks are of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def test_an_offline_wandb_run_has_losses_sizes_picture_and_final_widths(capfd):
    logger = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true", "--trainer.logger.project=grow"]
    import wandb

    wandb.teardown()  # what runs on from an earlier test would write where that one was
    assert growing(*logger, "--report.ungrown=false") == 0
    wandb.teardown()  # waits until everything is on disk
    capfd.readouterr()
    (path,) = Path("logs/wandb").glob("offline-run-*/run-*.wandb")
    logged, config = {}, {}
    for record in offline_records(path):
        for item in record.history.item:
            logged.setdefault(item.key or ".".join(item.nested_key), []).append(json.loads(item.value_json))
        for update in (record.run.config, record.config):
            for item in update.update:
                config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    assert len(logged["train_loss"]) == 6
    sizes = logged["grow/network.entries.0.0/size"]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 2
    assert any(name.startswith("architecture") for name in logged)
    assert config["grow"]["sizes"]["network.entries.0.0"] == sizes[-1]
    (folder,) = Path("logs/grow").iterdir()
    assert {HISTORY_FILE, "architecture.png", "config.yaml"} <= {file.name for file in folder.iterdir()}


# -- plot --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "some" / "version_3"
    folder.mkdir(parents=True)
    snapshots = [
        {"step": 0, "units": {"fc1": 4}, "depth": {"blocks": 1}, "parameters": 50},
        {"step": 10, "units": {"fc1": 6}, "depth": {"blocks": 2}, "parameters": 70},
    ]
    curves = [{"name": "training loss", "steps": [1, 20], "values": [2.0, float("nan")], "held_out": False}]
    (folder / HISTORY_FILE).write_text(json.dumps({"snapshots": snapshots, "curves": curves}))
    return folder


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_writes_the_picture_that_was_asked_for(run, suffix, capsys):
    assert main(["plot", str(run), "--output", f"picture.{suffix}"]) == 0
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert Path(f"picture.{suffix}").read_bytes().startswith(start)
    assert f"picture.{suffix}" in capsys.readouterr().out


def test_plot_takes_the_newest_run_below_a_folder(run, capsys):
    assert main(["plot", str(run.parents[1])]) == 0
    assert (run / "architecture.png").is_file()


@pytest.mark.parametrize(
    ("content", "match"),
    [(None, "There is no 'growth.json'"), ("{", "is not the history of a run"), ('{"snapshots": []}', "no snapshot")],
)
def test_plot_says_what_is_missing(tmp_path, content, match, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    if content is not None:
        (folder / HISTORY_FILE).write_text(content)
    assert main(["plot", str(folder)]) == 1
    assert match in capsys.readouterr().err
    assert main(["plot", str(folder / "nowhere")]) == 1
    assert "There is no folder" in capsys.readouterr().err


def test_plot_refuses_a_format_it_does_not_know(run, capsys):
    assert main(["plot", str(run), "-o", "picture.docx"]) == 1
    assert "picture.docx" in capsys.readouterr().err


# -- inspect -----------------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens, scale=1.0):
        return self.head(self.embedding(tokens) * scale)


def make_tagger(width):
    return Tagger(width)


ready = Tagger(4)
number = 3


def talkative():
    sys.stdout.write("I am a model that says so")
    return Tagger(4)


def tokens():
    return {"tokens": torch.zeros(2, 5, dtype=torch.int64), "scale": 2.0}


@pytest.mark.parametrize(
    "args",
    [
        ["tests.test_cli.Tagger", "--args", '{"width": 7}'],
        ["tests.test_cli:Tagger", "--args", "[7]"],
        ["tests.test_cli:make_tagger", "--args", "[7]"],
        [f"{__file__}:make_tagger", "--args", "[7]"],
    ],
)
@pytest.mark.parametrize(
    "inputs", [["--input-shape", "2,5", "--input-dtype", "int64"], ["--inputs", "tests.test_cli:tokens"]]
)
def test_inspect_prints_sizes_costs_and_reasons(args, inputs, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES.parent))
    assert main(["inspect", *args, *inputs]) == 0
    out = capsys.readouterr().out
    assert "Tagger: 101 parameters" in out
    (row,) = [line.split() for line in out.splitlines() if line.split()[:2] == ["embedding", "7"]]
    assert row[2:5] == ["1", "98", "14"]
    assert "keeps the function" in out
    assert "model output" in out


def test_inspect_takes_a_module_that_is_there_already(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES.parent))
    assert main(["inspect", "tests.test_cli:ready", "--inputs", "tests.test_cli:tokens", "--axes"]) == 0
    assert "head.weight[1] = embedding" in capsys.readouterr().out


def test_inspect_needs_no_input_where_the_module_brings_one(capsys):
    assert main(["inspect", "lightning_grow.examples.ImageClassifier", "--args", '{"image_size": 8}']) == 0
    out = capsys.readouterr().out
    assert "ImageClassifier: 1,926 parameters" in out
    assert "network.stages.1" in out
    assert "starts as the identity" in out


def test_inspect_finds_models_of_the_current_folder(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in {"", str(Path.cwd())}])
    Path("my_own_model.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(4, 2)\n")
    assert main(["inspect", "my_own_model:make", "--input-shape", "1,4"]) == 0
    assert "Linear: 10 parameters" in capsys.readouterr().out


def test_inspect_writes_the_plan_and_nothing_else(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES.parent))
    args = ["inspect", "tests.test_cli:talkative", "--inputs", "tests.test_cli:tokens", "--yaml"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert "I am a model" in err
    plan = lg.Plan.from_yaml(out)
    assert plan == lg.plan(Tagger(4), **tokens())
    assert main([*args, "plan.yaml"]) == 0
    assert capsys.readouterr().out == "plan.yaml\n"
    assert lg.Plan.load("plan.yaml") == plan
    assert main([*args, "no/folder/plan.yaml"]) == 1
    assert "Cannot write 'no/folder/plan.yaml'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["no_such_module.Net"], "No module named 'no_such_module'"),
        (["torch.nn.Linaer"], "Did you mean Linear"),
        (["torch.nn:Linear.nothing"], "has no 'nothing'"),
        (["missing.py:make"], "There is no file 'missing.py'"),
        (["tests.test_cli:number"], "expected a module, a class or a function"),
        (["torch:zeros", "--args", "[2]"], "calling it gave Tensor, expected an nn.Module"),
        (["torch.nn.Linear"], "Cannot build 'torch.nn.Linear': TypeError"),
        (["torch.nn.Linear", "--args", "4, 2"], "--args should be JSON"),
        (["torch.nn.Linear", "--args", "4"], "--args should be a JSON object or list"),
        (["torch.nn.Linear", "--args", "[4, 2]"], "--input-shape"),
        (["torch.nn.Linear", "--args", "[4, 2]", "--input-shape", "a,b"], "found 'a,b'"),
        (["torch.nn.Linear", "--args", "[4, 2]", "--input-shape", "1,4", "--input-dtype", "real"], "found 'real'"),
        (["torch.nn.Linear", "--args", "[4, 2]", "--input-shape", "1,4", "--input-dtype", "int64",
          "--input-dtype", "int64"], "one for each of the 1"),
        (["torch.nn.Linear", "--args", "[4, 2]", "--input-shape", "1,5"], "Linear"),
        (["torch.nn.ReLU", "--input-shape", "1,5"], "ReLU has no parameters"),
    ],
)  # fmt: skip
def test_inspect_says_what_is_wrong(args, match, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES.parent))
    assert main(["inspect", *args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("lightning-grow: error: ")
    assert match in err


# -- plan --------------------------------------------------------------------------------------------------------------


def test_the_plan_of_a_recipe_is_written_before_anything_is_trained_and_bounds_its_growth(capsys):
    recipe = ["--config", str(RECIPES / "digits.yaml")]
    assert main(["plan", *recipe]) == 0
    out = capsys.readouterr().out
    plan = lg.Plan.from_yaml(out)
    assert plan.parameters == 252
    assert not list(Path().iterdir())
    assert main(["plan", *recipe, "-o", "plan.yaml", "--model.init_args.depth=2"]) == 0
    assert capsys.readouterr().out == "plan.yaml\n"
    assert lg.Plan.load("plan.yaml").stacks["network.stages.0"].found.blocks == 2

    Path("plan.yaml").write_text(out.replace("max_units: null", "max_units: 3"))
    assert growing("--trainer.callbacks.groups=plan.yaml", "--report.ungrown=false", "--report.test=false") == 0
    history = json.loads((run_of_digits() / HISTORY_FILE).read_text())
    assert set(history["snapshots"][-1]["units"].values()) == {3}


def test_a_plan_can_be_made_of_the_configuration_that_a_run_saved(capsys):
    assert fit("--report.ungrown=false", "--report.test=false") == 0
    capsys.readouterr()
    assert main(["plan", "--config", str(run_of_digits() / "config.yaml")]) == 0
    assert lg.Plan.from_yaml(capsys.readouterr().out).model == "ImageClassifier"
