"""What every method must keep, run over the table of `contract.py`."""

import copy
from functools import cache
from tempfile import TemporaryDirectory
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lightning_grow.trainer import StructuralCallback
from tests.contract import CONTRACT
from tests.trainer.models import build, loader, state_of, trainer
from tests.trainer.processes import run_ranks

METHODS = pytest.mark.parametrize("method", CONTRACT.values(), ids=CONTRACT.keys())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Train every method on two ranks over gloo, once; return the folder with the results."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.trainer.ddp_worker", 2, folder)
    return folder


class Around(pl.Callback):
    """Looks at a run right before and right after the structural callback had its turn."""

    def __init__(self, notes, name):
        self.notes, self.name = notes, name

    @property
    def state_key(self):
        return f"Around {self.name}"

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        probe = copy.deepcopy(pl_module).eval()
        with torch.no_grad():
            output = probe(batch[0])
        self.notes.setdefault(trainer.global_step, {})[self.name] = output, state_of(pl_module, trainer)


class Watched(NamedTuple):
    """What a run ended with, its events, and what was seen right before and right after each step with some."""

    state: dict
    events: list
    notes: dict


@cache
def watched_run(name):
    """Run a method in double precision, once for all tests that look at it."""
    notes, method = {}, CONTRACT[name]
    callback = method.make()
    module = build(method.module, **method.module_arguments).double()
    with TemporaryDirectory() as folder:
        run = trainer(folder, Around(notes, "before"), callback, Around(notes, "after"), max_epochs=2)
        run.fit(module, loader(dtype=torch.float64))
    events = callback.record.events
    assert events, "the method did nothing within 12 steps"
    return Watched(state_of(module, run), events, {step: notes[step] for step in sorted({e.step for e in events})})


@pytest.mark.parametrize("name", CONTRACT)
def test_the_function_is_kept_where_that_is_promised(name):
    method = CONTRACT[name]
    for step, seen in watched_run(name).notes.items():
        moved = float((seen["after"][0] - seen["before"][0]).abs().max())
        assert (moved < 1e-10) == method.preserves, f"step {step}: outputs moved by {moved:.2g}"


@pytest.mark.parametrize("name", CONTRACT)
def test_optimizer_state_follows(name):
    """Every state has the shape of its parameter; what belongs to an untouched parameter has not changed."""
    for seen in watched_run(name).notes.values():
        before, after = seen["before"][1], seen["after"][1]
        for key, value in after.items():
            if key.startswith("optimizer0.") and value.ndim:
                name = key.removeprefix("optimizer0.").rpartition(".")[0]
                assert value.shape == after[f"model.{name}"].shape, key
                assert torch.isfinite(value).all()
                untouched = f"model.{name}" in before and torch.equal(before[f"model.{name}"], after[f"model.{name}"])
                if untouched and before[key].shape == value.shape and name.startswith("stem"):
                    assert torch.equal(before[key], value), key
        squares = [value for key, value in after.items() if key.endswith("exp_avg_sq")]
        assert squares
        assert all((square >= 0).all() for square in squares)


@METHODS
def test_training_goes_on_after_events(method, tmp_path):
    """All parameters that there are at the end have moved since the last event, new ones included."""
    callback = method.make(stop=8)
    module = build(method.module, **method.module_arguments)
    kept = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if callback.record.events and callback.record.events[-1].step == trainer.global_step:
                kept.clear()
                kept.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    run = trainer(tmp_path, callback, Keep(), max_epochs=4)
    run.fit(module, loader())
    for name, parameter in module.named_parameters():
        moved = (parameter - kept[name]).abs()
        assert (moved.flatten(1).amax(1) if moved.ndim > 1 else moved).max() > 0, name


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@METHODS
def test_resume_equals_the_uninterrupted_run(method, tmp_path):
    """A fresh process would have a fresh model of the first size: it takes on the checkpoint's, and ends bit-equal."""
    data = loader()
    whole = build(method.module, **method.module_arguments)
    callback = method.make()
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, callback, saving, max_epochs=4, enable_checkpointing=True)
    run.fit(whole, data)
    expected = state_of(whole, run)
    for epoch in (0, 1, 2):
        fresh, again = build(method.module, **method.module_arguments), method.make()
        saving = ModelCheckpoint(dirpath=tmp_path / "again", filename="{epoch}", save_top_k=-1)
        resumed = trainer(tmp_path, again, saving, max_epochs=4, enable_checkpointing=True)
        resumed.fit(fresh, data, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        found = state_of(fresh, resumed)
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), f"resumed after epoch {epoch}: {name}"
        assert again.record.to_dict() == callback.record.to_dict()


@pytest.mark.parametrize("name", CONTRACT)
def test_two_processes_equal_one(name, two_processes):
    """The same global batch: ranks end bit-identical, and equal to a single process up to round-off."""
    first, second = (torch.load(two_processes / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
    assert first["state"].keys() == second["state"].keys()
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    single = watched_run(name)
    sizes = [(event["step"], event["group"], event["after"]) for event in first["record"]["events"]]
    assert sizes == [(event.step, event.group, event.after) for event in single.events]
    for key, value in single.state.items():
        torch.testing.assert_close(
            first["state"][key], value, rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )


def cli(folder, method, monkeypatch, **arguments):
    """Build a Trainer with a method from a YAML file, as ``LightningCLI`` does."""
    path = f"{method.cls.__module__}.{method.cls.__qualname__}"
    callback = {"class_path": path, "init_args": {**method.arguments, **arguments}}
    file = folder / "config.yaml"
    monkeypatch.setattr("sys.argv", ["train"])
    file.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback], "accelerator": "cpu", "logger": False}}))
    return LightningCLI(method.module, run=False, args=["--config", str(file)], seed_everything_default=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # between Lightning and jsonargparse
@METHODS
def test_it_is_built_from_yaml(method, tmp_path, monkeypatch):
    """From plain types, and the configuration reads back as it was written."""
    first = cli(tmp_path, method, monkeypatch)
    (callback,) = (c for c in first.trainer.callbacks if isinstance(c, StructuralCallback))
    assert type(callback) is method.cls
    assert callback.state_key == method.make().state_key
    assert callback.trigger == method.make().trigger
    assert callback.budget == method.make().budget
    (tmp_path / "config.yaml").write_text(first.parser.dump(first.config))
    again = LightningCLI(method.module, run=False, args=["--config", str(tmp_path / "config.yaml")])
    assert again.config["trainer"]["callbacks"] == first.config["trainer"]["callbacks"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # between Lightning and jsonargparse
@METHODS
def test_a_wrong_yaml_key_is_named(method, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        cli(tmp_path, method, monkeypatch, evry_n_steps=3)
    assert "evry_n_steps" in capsys.readouterr().err
