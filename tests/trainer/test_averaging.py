"""Callbacks that keep an average of the weights: their copies change as the model does."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from torch import nn

from lightning_grow.growth import Net2Net
from lightning_grow.pruning import MagnitudePruning
from lightning_grow.trainer.resume import copies_of
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


def test_copies_are_found_by_what_they_are(tmp_path):
    """Whatever the callback calls them, and however deep they are wrapped."""

    class Keeps(EMAWeightAveraging):
        def __init__(self, module):
            super().__init__()
            self.mine = nn.ModuleDict({"teacher": module})

    module, other = build(Perceptron), build(Perceptron)
    run = trainer(tmp_path, Keeps(other))
    assert copies_of(module, run) == [other]
    assert copies_of(other, run) == []
