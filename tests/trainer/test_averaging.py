"""Callbacks that keep an average of the weights: their copies change as the model does."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from torch import nn

from lightning_grow.growth import Net2Net
from lightning_grow.pruning import MagnitudePruning
from lightning_grow.trainer.twins import twins_of
from tests.trainer.models import Perceptron, Residual, build, loader, state_of, trainer

METHODS = pytest.mark.parametrize(
    "make",
    [lambda: Net2Net(every_n_steps=4, num_units=1, depth=True), lambda: MagnitudePruning(every_n_steps=4, num_units=1)],
    ids=["grow", "prune"],
)
ORDERS = pytest.mark.parametrize("average_first", [False, True])


def fitted(folder, callbacks, cls=Residual, **arguments):
    run = trainer(folder, *callbacks, **arguments)
    module = build(cls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about swapping schedulers
        run.fit(module, loader(), loader())
    return run, module


@METHODS
@ORDERS
def test_an_exponential_average_follows(tmp_path, make, average_first):
    callbacks = [make(), EMAWeightAveraging(decay=0.5)]
    _, module = fitted(tmp_path, callbacks[::-1] if average_first else callbacks)
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_the_average_of_a_grown_network_is_that_of_its_small_twin(tmp_path):
    """With a learning rate of zero the average computes the same function all along."""

    class Still(Perceptron):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    average = EMAWeightAveraging(decay=0.9, use_buffers=False)
    _, module = fitted(tmp_path, [Net2Net(every_n_steps=4, num_units=2), average], cls=Still)
    twin = build(Still)
    assert module.fc1.out_features > twin.fc1.out_features
    module.eval()
    twin.eval()
    twin.norm.load_state_dict({k: v[:6] if v.ndim else v for k, v in module.norm.state_dict().items()})
    x = torch.randn(4, 4)
    torch.testing.assert_close(module(x), twin(x), atol=1e-5, rtol=1e-4)


@ORDERS
def test_a_run_with_an_average_resumes_bit_equal(tmp_path, average_first):
    def callbacks(folder):
        both = [Net2Net(every_n_steps=4, num_units=1, depth=True), EMAWeightAveraging(decay=0.5)]
        return [*(both[::-1] if average_first else both), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)]

    whole, module = fitted(tmp_path, callbacks(tmp_path), enable_checkpointing=True)
    run = trainer(tmp_path, *callbacks(tmp_path), enable_checkpointing=True)
    fresh = build(Residual)
    run.fit(fresh, loader(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    expected, found = state_of(module, whole), state_of(fresh, run)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@METHODS
def test_stochastic_weight_averaging_follows(tmp_path, make):
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    _, module = fitted(tmp_path, [make(), swa], max_epochs=4)
    assert all(torch.isfinite(p).all() for p in module.parameters())


class PartAverage(pl.Callback):
    """As people write it: an average of a part of the module, parameter by parameter."""

    def __init__(self, part):
        self.part = part

    def setup(self, trainer, pl_module, stage):
        self.average = copy.deepcopy(pl_module.get_submodule(self.part))

    def on_train_batch_end(self, trainer, pl_module, *_):
        part = pl_module.get_submodule(self.part)
        for mine, theirs in zip(self.average.parameters(), part.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.5)


@METHODS
def test_an_average_of_a_part_follows_and_resumes(tmp_path, make):
    def callbacks(folder):
        return [PartAverage("blocks"), make(), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)]

    first = callbacks(tmp_path)
    _, module = fitted(tmp_path, first, enable_checkpointing=True)
    shapes = [p.shape for p in module.blocks.parameters()]
    assert [p.shape for p in first[0].average.parameters()] == shapes
    again = callbacks(tmp_path)
    run = trainer(tmp_path, *again, enable_checkpointing=True)
    run.fit(build(Residual), loader(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [p.shape for p in again[0].average.parameters()] == shapes


def test_a_part_that_resembles_several_is_left_alone_and_named(tmp_path, caplog):
    module = build(Residual)
    keeps = PartAverage("blocks.0")
    keeps.average = copy.deepcopy(module.blocks[0])
    assert twins_of(module, trainer(tmp_path, keeps)) == []
    assert "a Block that could be a copy of any of blocks.0, blocks.1" in caplog.text


def test_copies_are_found_by_what_they_are(tmp_path):
    """Whatever the callback calls them, and however deep they are wrapped; the module itself is no copy."""

    class Keeps(pl.Callback):
        def __init__(self, copied, itself):
            self.mine = nn.ModuleDict({"teacher": copied})
            self.model, self.part = itself, itself.fc1

    module, other = build(Perceptron), build(Perceptron)
    (twin,) = twins_of(module, trainer(tmp_path, Keeps(other, module)))
    assert (twin.copy, twin.path) == (other, "")
    assert twin.within(module) is other
