"""Rates that adapt themselves, seen through a Trainer: logged under stable keys, kept in checkpoints, drawn."""

import csv

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from lightning_grow.growth import Net2Net
from lightning_grow.optim import SGDHD, AdamHD
from lightning_grow.optim.camhd import CAMHD
from lightning_grow.trainer.learning_rates import HasRates, LearningRateAdaptation
from tests.trainer.models import Perceptron, Residual, build, loader, trainer

MAKE = {
    "camhd": lambda p: CAMHD(p, 0.05, levels=("global", "layer", "unit", "parameter"), hypergrad_lr=1e-2),
    "sgdhd": lambda p: SGDHD(p, 0.05, hypergrad_lr=1e-2),
    "adamhd": lambda p: AdamHD(p, 0.01, hypergrad_lr=1e-4),
}


class Adapting(Perceptron):
    def __init__(self, make="camhd"):
        super().__init__()
        self.make = make

    @override
    def configure_optimizers(self):
        return MAKE[self.make](self.named_parameters())


def rows(folder):
    with next(folder.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("make", MAKE)
def test_rates_are_logged_every_few_steps_and_are_those_of_the_optimizer(make, tmp_path):
    rates, module = LearningRateAdaptation(every_n_steps=4), build(Adapting, make=make)
    run = trainer(tmp_path, rates, logger=CSVLogger(tmp_path), log_every_n_steps=4, max_epochs=2)
    run.fit(module, loader())
    assert next(tmp_path.rglob("learning_rates.png")).parent == next(tmp_path.rglob("metrics.csv")).parent
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, HasRates)
    logged = [row for row in rows(tmp_path) if row["rate/lr"]]
    assert [int(row["step"]) for row in logged] == [3, 7, 11]
    assert rates.history["rate/lr"].steps == [4, 8, 12]
    assert float(logged[-1]["rate/lr"]) == pytest.approx(float(optimizer.param_groups[0]["lr"]))
    assert len(set(rates.history["rate/lr"].values)) == 3
    assert [row["step"] for row in rows(tmp_path) if row["train_loss"]] == [row["step"] for row in logged]
    if make == "camhd":
        found = optimizer.rates()
        assert float(logged[-1]["rate/layer/fc1"]) == pytest.approx(found["layer/fc1"])
        for name, number in (("mean", found["unit/fc1"].mean()), ("min", found["unit/fc1"].min())):
            assert float(logged[-1][f"rate/unit/fc1/{name}"]) == pytest.approx(float(number))
        assert float(logged[-1]["rate/parameter/fc2.weight/max"]) == pytest.approx(
            float(found["parameter/fc2.weight"].max())
        )
        weights = [float(logged[-1][f"rate/weight/{level}"]) for level in ("global", "layer", "unit", "parameter")]
        assert sum(weights) == pytest.approx(1)


def test_a_resumed_run_continues_the_history(tmp_path):
    whole = LearningRateAdaptation(every_n_steps=1)
    trainer(tmp_path, whole, max_epochs=3).fit(build(Adapting), loader())
    first = LearningRateAdaptation(every_n_steps=1)
    run = trainer(tmp_path, first, max_epochs=1)
    run.fit(build(Adapting), loader())
    run.save_checkpoint(tmp_path / "checkpoint.ckpt")
    second = LearningRateAdaptation(every_n_steps=1)
    trainer(tmp_path, second, max_epochs=3).fit(build(Adapting), loader(), ckpt_path=tmp_path / "checkpoint.ckpt")
    assert second.state_dict() == whole.state_dict()


class Growing(Residual):
    @override
    def configure_optimizers(self):
        return MAKE["camhd"](self.named_parameters())


def test_new_layers_get_curves_of_their_own(tmp_path):
    rates = LearningRateAdaptation(every_n_steps=1)
    grow = Net2Net(at_steps=[6], num_units=2, depth=True, verbose=False)
    run = trainer(tmp_path, grow, rates, max_epochs=3)
    run.fit(build(Growing), loader())
    assert rates.history["rate/layer/stem"].steps == list(range(1, 19))
    assert rates.history["rate/layer/blocks.2.up"].steps[0] in (6, 7)
    assert [a.get_ylabel() for a in rates.plot().axes][1] == "rate of each layer"


def test_the_picture_has_a_panel_for_each_level(tmp_path):
    rates = LearningRateAdaptation(every_n_steps=1, dirpath=str(tmp_path / "pictures"))
    trainer(tmp_path, rates).fit(build(Adapting), loader())
    assert (tmp_path / "pictures" / "learning_rates.png").stat().st_size > 10_000
    panels = rates.plot(tmp_path / "rates.svg", title="Rates").axes
    assert (tmp_path / "rates.svg").is_file()
    assert [panel.get_ylabel() for panel in panels] == [
        "learning rate",
        "rate of each layer",
        "rate of each unit",
        "rate of each parameter",
        "weight of level",
    ]
    assert len(panels[1].lines) == 4
    assert panels[0].get_title("left") == "Rates"


class TwoOptimizers(Perceptron):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    @override
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    @override
    def configure_optimizers(self):
        head = list(self.head.named_parameters())
        rest = [(n, p) for n, p in self.named_parameters() if not n.startswith("head")]
        return [torch.optim.SGD(rest, lr=0.1), CAMHD(head, 0.1, levels=("global",))]


def test_several_optimizers_are_told_apart(tmp_path):
    rates = LearningRateAdaptation(every_n_steps=2)
    trainer(tmp_path, rates, max_epochs=1).fit(build(TwoOptimizers), loader())
    assert set(rates.history) == {"rate/lr/optimizer1"}
    assert len(rates.plot().axes) == 1


def test_what_cannot_be_shown_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"by their method `rates\(\)`, found AdamW"):
        trainer(tmp_path, LearningRateAdaptation()).fit(build(Perceptron), loader())
    with pytest.raises(MisconfigurationException, match="`every_n_steps` should be at least 1, found 0"):
        LearningRateAdaptation(every_n_steps=0)
    with pytest.raises(ValueError, match="nothing to draw"):
        LearningRateAdaptation().plot()
