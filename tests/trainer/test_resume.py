"""Checkpoints of a run whose model changed: taken up by fresh, larger, smaller, deeper models, or refused."""

from collections import UserDict

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import lightning_grow as lg
from lightning_grow.growth import Net2Net
from lightning_grow.pruning import MagnitudePruning
from lightning_grow.structure import StructureError
from tests.trainer import kill_worker
from tests.trainer.models import Perceptron, Residual, build, loader, state_of, trainer
from tests.trainer.processes import run_once, run_until_killed
from tests.trainer.test_structural_callback import Measuring, Taylor

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")


def fitted(folder, *callbacks, cls=Residual, max_epochs=3, **saving):
    """Train with one checkpoint each epoch; return the trainer and the module."""
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", **({"save_top_k": -1} | saving))
    run = trainer(folder, *callbacks, saver, max_epochs=max_epochs, enable_checkpointing=True)
    module = build(cls)
    run.fit(module, loader(), loader())
    return run, module


def test_killed_between_two_epochs_it_ends_as_if_it_had_not_been(tmp_path):
    """Grown in width and depth, pruned, killed by SIGKILL, resumed in a fresh process: bit-equal at the end."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_worker.run(whole, 99)
    run_until_killed("tests.trainer.kill_worker", killed, 2)
    run_once("tests.trainer.kill_worker", killed, 99, killed / "epoch=1.ckpt")
    expected, found = (torch.load(folder / "end.pt", weights_only=True) for folder in (whole, killed))
    assert {event["what"] for event in expected["record"]["events"]} == {"widen", "insert", "prune"}
    assert found["record"] == expected["record"]
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        assert torch.equal(found["state"][name], value), name


def test_the_best_checkpoint_is_tested_after_more_growth(tmp_path):
    """The best is the first: smaller and shallower than the live model, which takes its shape and back again."""
    callback = Net2Net(every_n_steps=4, num_units=1, depth=True, start=7)
    run, module = fitted(tmp_path, callback, monitor="val_loss", mode="max", save_top_k=1)
    assert run.checkpoint_callback.best_model_path.endswith("epoch=0.ckpt")
    live = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run.save_checkpoint(tmp_path / "live.ckpt")
    (result,) = run.test(module, loader(), ckpt_path="best", verbose=False)
    best = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)
    assert {n: t.shape for n, t in module.state_dict().items()} == {n: t.shape for n, t in best["state_dict"].items()}
    plain = build(Residual)
    plain.load_state_dict(best["state_dict"])
    (expected,) = trainer(tmp_path).test(plain, loader(), verbose=False)
    assert result == expected
    run.validate(module, loader(), ckpt_path=tmp_path / "live.ckpt", verbose=False)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, live[name]), name


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_any_checkpoint_of_the_run_fits_a_fresh_model(tmp_path, epoch):
    fitted(tmp_path, Net2Net(every_n_steps=4, num_units=1, depth=True))
    path = tmp_path / f"epoch={epoch}.ckpt"
    fresh = build(Residual)
    trainer(tmp_path, Net2Net()).validate(fresh, loader(), ckpt_path=path, verbose=False, weights_only=True)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fresh.state_dict().items())


def test_weights_only_checkpoints_carry_the_shape_too(tmp_path):
    _, module = fitted(tmp_path, Net2Net(every_n_steps=4, num_units=1, depth=True), save_weights_only=True)
    fresh = build(Residual)
    trainer(tmp_path, Net2Net()).test(fresh, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert len(fresh.blocks) == len(module.blocks) > 2


def test_a_run_resumed_by_another_trainer_goes_on_growing(tmp_path):
    fitted(tmp_path, Net2Net(every_n_steps=4, num_units=1, depth=True), max_epochs=2)
    callback = Net2Net(every_n_steps=4, num_units=1, depth=True)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    run = trainer(tmp_path, callback, saver, max_epochs=4, enable_checkpointing=True)
    run.fit(build(Residual), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    steps = sorted({event.step for event in callback.record.events})
    assert steps == [4, 8, 12, 16, 20, 24]


def test_a_resumed_optimizer_has_the_order_of_the_saved_one(tmp_path):
    """Parameters of inserted blocks join where they are; a user may list parameters in any order."""

    class Backwards(Residual):
        def configure_optimizers(self):
            groups = [{"params": list(self.head.parameters())}, {"params": list(self.blocks.parameters())[::-1]}]
            return torch.optim.Adam([*groups, {"params": list(self.stem.parameters())}], lr=1e-2)

    run, module = fitted(tmp_path, Net2Net(every_n_steps=4, num_units=1, depth=True), cls=Backwards)
    expected = state_of(module, run)
    fresh = build(Backwards)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    again = trainer(tmp_path, Net2Net(every_n_steps=4, num_units=1, depth=True), saver, enable_checkpointing=True)
    again.fit(fresh, loader(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    found = state_of(fresh, again)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_statistics_go_on_in_the_middle_of_their_window(tmp_path):
    """A checkpoint between trigger and event: the sums so far are in it."""
    whole, module = fitted(tmp_path, Taylor(at_steps=[4], num_units=1), cls=Perceptron)
    expected = state_of(module, whole)
    callback = Taylor(at_steps=[4], num_units=1)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, callback, saver, enable_checkpointing=True)
    run.fit(fresh := build(Perceptron), loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [event.step for event in callback.record.events] == [12]
    found = state_of(fresh, run)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Bag(UserDict):
    """A batch as tokenizers return it: a class that loading weights alone does not know."""


class OfBags(Perceptron):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def bags():
    return DataLoader(loader().dataset, batch_size=8, collate_fn=lambda rows: Bag(_stacked(rows)))


def _stacked(rows):
    x, y = zip(*rows, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


@pytest.mark.parametrize(("data", "step"), [(loader, 12), (bags, 15)])
def test_batches_that_were_kept_are_in_the_checkpoint_or_observed_anew(tmp_path, data, step):
    """Six of eight batches had been seen: of plain ones six are there again; of others the window begins anew."""
    method = Measuring(at_steps=[4])
    method.window_batches = 8
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, method, saver, enable_checkpointing=True)
    cls = OfBags if data is bags else Perceptron
    run.fit(build(cls), data())
    resumed = Measuring(at_steps=[4])
    resumed.window_batches = 8
    trainer(tmp_path, resumed).fit(build(cls), data(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [event.step for event in method.record.events][:1] == [12]
    assert [event.step for event in resumed.record.events][:1] == [step]


def test_a_pending_plateau_survives(tmp_path):
    arguments = {"on_plateau": "val_loss", "patience": 2, "num_units": 1, "min_delta": 10.0}
    expected = Net2Net(**arguments)
    fitted(tmp_path, expected, max_epochs=4)
    callback = Net2Net(**arguments)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, callback, saver, max_epochs=4, enable_checkpointing=True)
    run.fit(build(Residual), loader(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert callback.record.to_dict() == expected.record.to_dict()
    assert callback.record.events


def test_a_model_is_loaded_without_a_trainer(tmp_path):
    _, module = fitted(tmp_path, Net2Net(every_n_steps=4, num_units=1, depth=True))
    loaded = lg.load_from_checkpoint(Residual, tmp_path / "epoch=2.ckpt")
    x = torch.randn(4, 4)
    with torch.no_grad():
        assert torch.equal(loaded(x), module(x))
    assert "on_load_checkpoint" not in vars(Residual)
    assert loaded.hparams == build(Residual).hparams


def test_a_user_hook_on_loading_comes_first(tmp_path):
    """What it changes in the checkpoint counts."""
    fitted(tmp_path, Net2Net(every_n_steps=4, num_units=1, depth=True))

    class Zeroing(Residual):
        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"]["head.bias"] = torch.zeros(2)

    module = build(Zeroing)
    trainer(tmp_path, Net2Net()).test(module, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert torch.equal(module.head.bias, torch.zeros(2))
    assert torch.equal(lg.load_from_checkpoint(Zeroing, tmp_path / "epoch=2.ckpt").head.bias, torch.zeros(2))


@pytest.mark.parametrize("loads", ["fit", "test", "load_from_checkpoint"])
def test_a_checkpoint_of_another_model_is_refused_and_nothing_has_changed(tmp_path, loads):
    fitted(tmp_path, Net2Net(every_n_steps=4, num_units=1), cls=Perceptron)
    path = tmp_path / "epoch=0.ckpt"

    class Other(Perceptron):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3)

    module = build(Other)

    def load():
        if loads == "load_from_checkpoint":
            lg.load_from_checkpoint(Other, path)
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        run = trainer(tmp_path, Net2Net(every_n_steps=4, num_units=1), saver, enable_checkpointing=True)
        getattr(run, loads)(module, loader(), ckpt_path=path)

    with pytest.raises(StructureError, match=r"another model: 'head.weight' has shape \(2, 6\).*Other has \(3, 5\)"):
        load()
    assert module.fc1.weight.shape == (6, 4)
    assert module.fc1.out_features == 6


def test_a_checkpoint_that_leaves_weights_out_on_purpose(tmp_path):
    """``strict_loading=False``: a frozen part is not saved; the rest takes its shape all the same."""

    class Partial(Residual):
        def __init__(self):
            super().__init__()
            self.strict_loading = False

        def on_save_checkpoint(self, checkpoint):
            del checkpoint["state_dict"]["head.bias"]

    fitted(tmp_path, Net2Net(every_n_steps=4, num_units=1, depth=True), cls=Partial)
    fresh = build(Partial)
    bias = fresh.head.bias.clone()
    trainer(tmp_path, Net2Net()).test(fresh, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert (fresh.stem.out_features, len(fresh.blocks)) == (10, 6)
    assert torch.equal(fresh.head.bias, bias)


def test_a_refused_checkpoint_leaves_the_depth_as_it_was(tmp_path):
    fitted(tmp_path, Net2Net(every_n_steps=4, num_units=1, depth=True))

    class Other(Residual):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

    module = build(Other)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(StructureError, match=r"another model: 'head.weight'"):
        trainer(tmp_path, Net2Net()).test(module, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_checkpoint_in_the_middle_of_an_epoch(tmp_path):
    """Saved in the very step of an event, after it."""
    callback = Net2Net(every_n_steps=4, num_units=1)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    run = trainer(tmp_path, callback, saver, max_epochs=1, enable_checkpointing=True)
    run.fit(build(Residual), loader())
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert saved["state_dict"]["stem.weight"].shape == (7, 4)
    assert [event["step"] for event in saved["lightning_grow"]["record"]["events"]][-1] == 4


def test_a_checkpoint_without_a_record_says_what_to_do(tmp_path):
    fitted(tmp_path)
    with pytest.raises(MisconfigurationException, match="saved without a structural callback"):
        lg.load_from_checkpoint(Residual, tmp_path / "epoch=0.ckpt")


def test_a_checkpoint_saved_before_growth_was_used_fits(tmp_path):
    fitted(tmp_path, max_epochs=1)
    callback = Net2Net(every_n_steps=4, num_units=1)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, callback, saver, max_epochs=2, enable_checkpointing=True)
    run.fit(build(Residual), loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert sorted({event.step for event in callback.record.events}) == [8, 12]


def test_pruned_checkpoints_fit_the_larger_model(tmp_path):
    _, module = fitted(tmp_path, MagnitudePruning(every_n_steps=4, num_units=2))
    fresh = build(Residual)
    trainer(tmp_path, MagnitudePruning()).test(fresh, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert fresh.blocks[0].up.out_features == module.blocks[0].up.out_features < 4


class Scaled(Perceptron):
    """It has a buffer and a tensor with an entry for each unit that no state dict holds, and whose order matters."""

    def __init__(self, hidden=6, lr=1e-2):
        super().__init__(hidden, lr)
        self.register_buffer("scale", torch.linspace(-1, 2, hidden), persistent=False)
        self.table = torch.linspace(2, -1, hidden)

    def forward(self, x):
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)) * self.scale + self.table)))


@pytest.mark.parametrize("epoch", [0, 2])
def test_buffers_that_no_state_dict_holds_come_back(tmp_path, epoch):
    callback = MagnitudePruning(every_n_steps=4, num_units=1, groups=["fc1"])
    run, module = fitted(tmp_path, callback, cls=Scaled)
    assert module.scale.tolist() != torch.linspace(-1, 2, 6)[: len(module.scale)].tolist(), "others than the last went"
    checkpoint = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
    expected = checkpoint["lightning_grow"]["buffers"]["scale"]
    fresh, loaded = build(Scaled), lg.load_from_checkpoint(Scaled, tmp_path / f"epoch={epoch}.ckpt")
    trainer(tmp_path, MagnitudePruning()).test(
        fresh, loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False
    )
    run.test(module, loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False)
    ((_, _, table),) = checkpoint["lightning_grow"]["states"]
    for taken in (fresh, loaded, module):
        assert torch.equal(taken.scale, expected)
        assert torch.equal(taken.table, table)


def test_a_module_can_be_saved_whole_in_the_middle_of_a_run(tmp_path):
    import pickle

    import lightning.pytorch as pl

    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.copy = pickle.loads(pickle.dumps(pl_module))

    saves = Saves()
    _, module = fitted(tmp_path, Net2Net(every_n_steps=4, num_units=1), saves)
    x = torch.randn(2, 4)
    assert torch.equal(saves.copy(x), module(x))
