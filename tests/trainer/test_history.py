"""The history of a run: bounded, true to the network, continued after a resume, and readable by people's tools."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_grow as lg
from lightning_grow.data import Digits
from lightning_grow.examples import ImageClassifier
from lightning_grow.trainer.history import HISTORY_FILE, LossCurve, run_folder


def train(history, *, epochs=2, growth=True, ckpt_path=None, logger=False, widths=(2,), **kwargs):
    torch.manual_seed(0)
    model = ImageClassifier(image_size=8, widths=widths)
    grow = [lg.Net2Net(every_n_steps=2, depth=True, verbose=False)] if growth else []
    trainer = pl.Trainer(
        max_epochs=epochs, limit_train_batches=3, limit_val_batches=1, accelerator="cpu", log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, logger=logger, callbacks=[*grow, history], **kwargs,
    )  # fmt: skip
    trainer.fit(model, Digits(), ckpt_path=ckpt_path)
    return trainer, model


@pytest.mark.parametrize("most", [2, 8])
@pytest.mark.parametrize("number", [1, 7, 100, 1000])
def test_a_loss_curve_is_bounded_and_keeps_the_mean(most, number):
    curve = LossCurve(most=most)
    for step in range(1, number + 1):
        curve.add(step, float(step))
    assert len(curve.steps) <= most
    assert curve.steps == sorted(curve.steps)
    seen = len(curve.values) * curve.stride
    assert seen + len(curve.waiting) == number
    if curve.values:
        assert sum(curve.values) * curve.stride == pytest.approx(seen * (seen + 1) / 2)


def test_snapshots_are_the_network_as_it_was(tmp_path):
    history = lg.History(dirpath=str(tmp_path / "here"))
    _, model = train(history, widths=(2, 2), enable_checkpointing=False)
    saved = json.loads((tmp_path / "here" / HISTORY_FILE).read_text())
    first, last = saved["snapshots"][0], saved["snapshots"][-1]
    assert first["parameters"] == sum(p.numel() for p in ImageClassifier(image_size=8, widths=[2, 2]).parameters())
    assert last["parameters"] == sum(p.numel() for p in model.parameters())
    structure = lg.trace(model, model.example_input_array)
    assert last["units"] == {name: group.size for name, group in structure.groups.items()}
    assert last["depth"] == {name: len(stack.blocks) for name, stack in structure.stacks.items()}
    assert [s["step"] for s in saved["snapshots"]] == [0, 2, 4, 6]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_continues_its_history(tmp_path):
    whole = lg.History(dirpath=str(tmp_path / "whole"))
    train(whole, epochs=3, enable_checkpointing=False)
    trainer, _ = train(lg.History(dirpath=str(tmp_path / "part")), epochs=1, default_root_dir=tmp_path / "part")
    resumed = lg.History(dirpath=str(tmp_path / "part"))
    train(resumed, epochs=3, ckpt_path=trainer.checkpoint_callback.best_model_path, default_root_dir=tmp_path / "more")
    assert [s["step"] for s in resumed.snapshots] == [s["step"] for s in whole.snapshots]
    assert [s["depth"] for s in resumed.snapshots] == [s["depth"] for s in whole.snapshots]
    assert resumed.train.steps == whole.train.steps


def test_losses_are_kept_without_any_growth_but_nothing_is_written(tmp_path):
    history = lg.History(dirpath=str(tmp_path / "here"))
    train(history, growth=False, enable_checkpointing=False)
    assert history.train.steps == [1, 2, 3, 4, 5, 6]
    assert history.val.steps == [3, 6]
    assert history.snapshots == []
    assert not (tmp_path / "here").exists()


def test_the_folder_of_a_run_is_where_its_checkpoints_are(tmp_path):
    trainer, _ = train(lg.History(), logger=CSVLogger(tmp_path, name="some"))
    folder = run_folder(trainer)
    assert folder == tmp_path / "some" / "version_0"
    assert Path(trainer.checkpoint_callback.dirpath) == folder / "checkpoints"
    assert (folder / HISTORY_FILE).is_file()


def test_without_a_logger_there_is_no_folder():
    assert run_folder(pl.Trainer(logger=False, accelerator="cpu")) is None


class ThroughDict(ImageClassifier):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "more": 1}


def test_a_training_step_may_return_a_dict():
    history = lg.History()
    trainer = pl.Trainer(
        max_steps=2, limit_val_batches=0, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        logger=False, enable_checkpointing=False, callbacks=[history], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(ThroughDict(image_size=8, widths=[2, 2]), Digits())
    assert history.train.steps == [1, 2]
