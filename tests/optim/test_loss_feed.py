"""The loss reaches optimizers that need it, whatever a Trainer does between loss and step; or it is refused by name."""

import logging
import math
from importlib.metadata import entry_points

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from lightning_grow.data import Indexed
from lightning_grow.optim.alig import ALIG
from lightning_grow.optim.alig_plus import ALIGPlus
from lightning_grow.optim.borat import BORAT
from lightning_grow.trainer import LossFeed
from tests.trainer.models import Perceptron, trainer
from tests.trainer.processes import run_ranks

OPTIMIZERS = {
    "alig": lambda params: ALIG(params, 0.5, 0.9, max_norm=4.0),
    "alig_plus": lambda params: ALIGPlus(params, 0.5, num_updates=2),
    "borat": lambda params: BORAT(params, 0.5, 4, max_norm=4.0),
}


class Module(pl.LightningModule):
    """A small network whose batches come with indices, and that tells them to an optimizer which wants them."""

    def __init__(self, make, dtype=torch.float64):
        super().__init__()
        self.make = make
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)

    def losses(self, batch):
        indices, (x, y) = batch
        losses = F.cross_entropy(self.net(x.to(self.net[0].weight.dtype)), y, reduction="none")
        return indices, losses

    def training_step(self, batch, batch_idx):
        indices, losses = self.losses(batch)
        if isinstance(self.optimizers(), ALIGPlus) or hasattr(self.optimizers(), "feed"):
            self.optimizers().feed(indices, losses)
        return losses.mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.losses(batch)[1].mean())

    def configure_optimizers(self):
        return self.make(self.parameters())


class Manual(Module):
    """The same by hand, in two halves of a batch."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        indices, losses = self.losses(batch)
        if hasattr(optimizer, "feed"):
            optimizer.feed(indices, losses)
        for half in losses.chunk(2):
            self.manual_backward(half.sum() / len(losses), retain_graph=True)
        optimizer.step()


def data(samples=48):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return Indexed(TensorDataset(x, (x.sum(dim=1) > 0).long()))


def indexed_loader(rank=0, ranks=1, batch_size=8, repeat=False):
    sampler = [*range(8)] * 6 if repeat else DistributedSampler(data(), ranks, rank, shuffle=False)
    return DataLoader(data(), batch_size=batch_size // ranks, sampler=sampler)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def module_of(name, cls=Module, dtype=torch.float64):
    return cls(OPTIMIZERS[name], dtype)


def by_hand(name, epochs=2, batch_size=8, dtype=torch.float64):
    """Return the module after the same training in a loop of torch alone."""
    module = module_of(name, dtype=dtype)
    optimizer = module.configure_optimizers()
    if isinstance(optimizer, ALIGPlus):
        optimizer.max_epochs = epochs
    for _ in range(epochs):
        for batch in indexed_loader(batch_size=batch_size):
            optimizer.zero_grad()
            indices, losses = module.losses(batch)
            losses.mean().backward()
            if isinstance(optimizer, ALIGPlus):
                optimizer.feed(indices, losses)
            loss = losses.mean().detach()
            optimizer.step(lambda loss=loss: loss)
        if isinstance(optimizer, ALIGPlus):
            optimizer.end_epoch()
    return module


class Losses(pl.Callback):
    """Notes every loss that an optimizer used."""

    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            evaluate = optimizer._evaluate

            def noted(closure, evaluate=evaluate, optimizer=optimizer):
                returned, loss = evaluate(closure)
                self.seen.append((optimizer, None if loss is None else loss.item()))
                return returned, loss

            optimizer._evaluate = noted


@pytest.fixture
def without_entry_point(monkeypatch):
    """As where the package is on the path only."""
    path = "lightning.pytorch.trainer.connectors.callback_connector._load_external_callbacks"
    monkeypatch.setattr(path, lambda group: [])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("cls", [Module, Manual])
def test_a_trainer_trains_as_a_loop_of_torch_does(name, cls, tmp_path):
    """Without a callback in sight: it comes by itself."""
    module = module_of(name, cls)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, indexed_loader())
    assert sum(isinstance(c, LossFeed) for c in run.callbacks) == 1
    torch.testing.assert_close(weights(module), weights(by_hand(name)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulated_gradients_come_with_the_sum_of_their_losses(name, tmp_path):
    module = module_of(name)
    trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2).fit(module, indexed_loader(batch_size=4))
    torch.testing.assert_close(weights(module), weights(by_hand(name)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "make", [lambda p: ALIG(p, eps=0.0), lambda p: ALIGPlus(p, 1e9, momentum=0.0, num_updates=0, eps=0.0)]
)
def test_the_last_window_of_an_epoch_may_be_short(make, tmp_path):
    """Lightning divides by the length of a whole window; loss and gradient scale alike, and Polyak's step does not."""
    module = Module(make)
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=4).fit(module, indexed_loader())
    other = Module(None)
    optimizer = make(other.parameters())
    batches = list(indexed_loader())
    for window in (batches[:4], batches[4:]):
        optimizer.zero_grad()
        found = [other.losses(batch) for batch in window]
        loss = sum(losses.mean() for _, losses in found) / len(window)
        loss.backward()
        if isinstance(optimizer, ALIGPlus):
            optimizer.feed(*(torch.cat(each) for each in zip(*found, strict=True)))
        optimizer.step(lambda loss=loss: loss)
    torch.testing.assert_close(weights(module), weights(other), rtol=1e-10, atol=1e-12)


def test_the_closure_is_enough_for_plain_training(without_entry_point, tmp_path):
    module = module_of("alig")
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, indexed_loader())
    assert not any(isinstance(c, LossFeed) for c in run.callbacks)
    torch.testing.assert_close(weights(module), weights(by_hand("alig")), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "cls", "options", "reason"),
    [
        ("alig", Manual, {}, "with automatic_optimization=False"),
        ("borat", Module, {"accumulate_grad_batches": 2}, "with accumulate_grad_batches"),
        ("alig", Module, {"gradient_clip_val": 1.0}, "with gradient_clip_val"),
        ("alig_plus", Module, {}, "unless"),
    ],
)
def test_what_the_closure_is_not_enough_for_is_told(without_entry_point, name, cls, options, reason, tmp_path):
    with pytest.raises(RuntimeError, match=rf"in a Trainer {reason}.*LossFeed"):
        trainer(tmp_path, **options).fit(module_of(name, cls), indexed_loader())
    if not options.get("gradient_clip_val"):
        module = module_of(name, cls)
        run = trainer(tmp_path, LossFeed(), max_epochs=2, **options)
        run.fit(module, indexed_loader(batch_size=8 // options.get("accumulate_grad_batches", 1)))
        torch.testing.assert_close(weights(module), weights(by_hand(name)), rtol=1e-10, atol=1e-12)


class Scaler:
    """A gradient scaler for the CPU: it overflows once, and then scales by half."""

    def __init__(self, overflow_at):
        self.scale_now, self.step_number, self.overflow_at, self.overflowed = 1024.0, 0, overflow_at, False

    def scale(self, tensor):
        return tensor * self.scale_now

    def get_scale(self):
        return self.scale_now

    def unscale_(self, optimizer):
        self.overflowed = self.step_number == self.overflow_at
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad /= math.inf if self.overflowed else self.scale_now
        self.step_number += 1

    def step(self, optimizer, **options):
        return None if self.overflowed else optimizer.step(**options)

    def update(self):
        if self.overflowed:
            self.scale_now /= 2

    def state_dict(self):
        return {}


class Scaled(MixedPrecision):
    """16-mixed with the scaler above, in full precision."""

    def __init__(self, overflow_at):
        super().__init__("16-mixed", "cpu", Scaler(overflow_at))

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize(("cls", "accumulate"), [(Module, 1), (Module, 2), (Manual, 1)])
def test_a_scaled_loss_is_scaled_back_and_an_overflow_forgets_it(cls, accumulate, tmp_path):
    module, losses = module_of("alig", cls), Losses()
    plugins = [Scaled(overflow_at=2)]
    options = {"accumulate_grad_batches": accumulate} if accumulate > 1 else {}
    trainer(tmp_path, losses, max_epochs=1, plugins=plugins, **options).fit(
        module, indexed_loader(batch_size=8 // accumulate)
    )
    other = module_of("alig")
    optimizer, expected = other.configure_optimizers(), []
    for number, batch in enumerate(indexed_loader()):
        if number == 2:
            continue
        optimizer.zero_grad()
        loss = other.losses(batch)[1].mean()
        loss.backward()
        optimizer.step(lambda loss=loss: loss)
        expected.append(loss.item())
    assert [value for _, value in losses.seen] == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(weights(module), weights(other), rtol=1e-9, atol=1e-11)


def test_torchs_own_scaler_does_the_same(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    module = module_of("alig", dtype=torch.float32)
    trainer(tmp_path, max_epochs=2, plugins=[plugin]).fit(module, indexed_loader())
    other = by_hand("alig", dtype=torch.float32)
    torch.testing.assert_close(weights(module), weights(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_precisions_train(name, precision, tmp_path):
    module = module_of(name, dtype=torch.float32)
    before = weights(module)
    trainer(tmp_path, max_epochs=2, precision=precision).fit(module, indexed_loader())
    after = weights(module)
    assert torch.isfinite(after).all()
    assert not torch.equal(after.to(before), before)
    assert module.trainer.optimizers[0].skipped == 0


class Two(pl.LightningModule):
    """Two networks, two losses, two optimizers; the second loss sees both networks. The third step shares a loss."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(4, 1).double(), nn.Linear(1, 1).double()
        self.expected = []

    def training_step(self, batch, batch_idx):
        first, second, third = self.optimizers()
        x = batch[1][0]
        loss = self.a(x).square().mean()
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        self.toggle_optimizer(second)
        other = (self.b(self.a(x)) - 1).square().mean()
        self.manual_backward(other)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)
        self.expected += [loss.item(), other.item()]
        assert third is not None

    def configure_optimizers(self):
        third = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        return [ALIG(self.a.parameters(), 0.1), BORAT(self.b.parameters(), 0.1), third]


def test_of_several_optimizers_each_gets_its_own_loss(tmp_path):
    class Noted(Losses):
        def on_fit_start(self, trainer, pl_module):
            optimizers, trainer.strategy.optimizers = trainer.optimizers, trainer.optimizers[:2]
            super().on_fit_start(trainer, pl_module)
            trainer.strategy.optimizers = optimizers

    module, losses = Two(), Noted()
    trainer(tmp_path, losses, max_epochs=1).fit(module, indexed_loader())
    assert [value for _, value in losses.seen] == pytest.approx(module.expected)
    assert len(module.expected) == 12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_is_refused_by_name(name, tmp_path):
    module = module_of(name)
    with pytest.raises(MisconfigurationException, match=r"does not go together with gradient_clip_val=0.5"):
        trainer(tmp_path, gradient_clip_val=0.5).fit(module, indexed_loader())


def test_clipping_by_hand_is_warned_of(tmp_path, caplog):
    class Clips(Module):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            pass

    trainer(tmp_path, max_epochs=1).fit(module_of("alig", Clips), indexed_loader())
    assert "Clips overrides configure_gradient_clipping" in caplog.text


def test_sharded_strategies_are_refused_by_name(tmp_path):
    run, feed = trainer(tmp_path), LossFeed()
    run.callbacks = [feed]
    run.strategy.__class__ = type("SomeFSDPStrategy", (type(run.strategy),), {})
    module = module_of("alig")
    run.strategy.optimizers = [module.configure_optimizers()]
    with pytest.raises(MisconfigurationException, match=r"ALIG cannot know .* under SomeFSDPStrategy.*strategy='ddp'"):
        feed.on_fit_start(run, module)
    assert FSDPStrategy.__name__ == "FSDPStrategy"


def test_a_run_without_epochs_is_refused_for_estimates(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"max_epochs=-1 .*ALIGPlus\(max_epochs=...\)"):
        trainer(tmp_path, max_epochs=-1, max_steps=3).fit(module_of("alig_plus"), indexed_loader())


def test_missing_indices_are_told(tmp_path):
    class Forgets(Module):
        def training_step(self, batch, batch_idx):
            return self.losses(batch)[1].mean()

    with pytest.raises(RuntimeError, match=r"needs to know the examples.*self.optimizers\(\).feed"):
        trainer(tmp_path).fit(module_of("alig_plus", Forgets), indexed_loader())


@pytest.mark.parametrize("name", ["alig", "borat"])
@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_a_batch_without_a_loss_is_skipped_and_counted(name, tmp_path):
    class Sometimes(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss * math.inf if batch_idx == 2 else loss

    module = module_of(name, Sometimes)
    trainer(tmp_path, max_epochs=1).fit(module, indexed_loader())
    assert module.trainer.optimizers[0].skipped == 2
    assert torch.isfinite(weights(module)).all()


def test_a_bundle_is_given_up_before_validation_and_at_the_end(tmp_path):
    """Six batches an epoch are no whole number of bundles of four batches."""

    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(trainer.optimizers[0].at_bundle_boundary)

        def on_validation_epoch_start(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append("validation")
                assert trainer.optimizers[0].at_bundle_boundary

    module = Module(lambda params: BORAT(params, 0.5, 5))
    run = trainer(tmp_path, Watch(), max_epochs=2)
    run.fit(module, indexed_loader(), indexed_loader())
    bundle = [False, False, False, True]
    assert seen == [*bundle, False, False, "validation"] * 2
    assert run.optimizers[0].at_bundle_boundary
    module = Module(lambda params: BORAT(params, 0.5, 5))
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, indexed_loader())
    assert run.optimizers[0].at_bundle_boundary


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended.*")
def test_resumed_is_uninterrupted_also_in_mid_bundle(name, tmp_path):
    """All batches are one, since a loader begins again in the middle of an epoch."""
    ends = []
    for stop in (False, True):
        module = module_of(name)
        keep = {"dirpath": tmp_path / str(stop), "every_n_train_steps": 2, "save_top_k": -1}
        options = {"max_epochs": 2, "enable_checkpointing": True}
        run = trainer(tmp_path, ModelCheckpoint(**keep), max_steps=8 if stop else -1, **options)
        run.fit(module, indexed_loader(repeat=True))
        if stop:
            module = module_of(name)
            run = trainer(tmp_path, ModelCheckpoint(**keep), **options)
            run.fit(
                module,
                indexed_loader(repeat=True),
                ckpt_path=tmp_path / "True" / "epoch=1-step=8.ckpt",
                weights_only=False,
            )
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_it_is_no_part_of_checkpoints_and_says_nothing_where_it_is_idle(tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Perceptron(), DataLoader(data().dataset, batch_size=8, collate_fn=single_precision))
    assert any(isinstance(c, LossFeed) for c in run.callbacks)
    assert "LossFeed" not in caplog.text
    assert "entry point" not in caplog.text
    run.save_checkpoint(tmp_path / "some.ckpt")
    assert torch.load(tmp_path / "some.ckpt", weights_only=False)["callbacks"] == {}
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module_of("alig"), indexed_loader())
    assert caplog.text.count("The loss of each batch is handed to ALIG") == 1


def single_precision(items):
    x, y = zip(*items, strict=True)
    return torch.stack(x).float(), torch.stack(y)


def test_one_that_was_added_by_hand_takes_its_place(tmp_path):
    mine, losses, module = LossFeed(), Losses(), module_of("alig")
    trainer(tmp_path, mine, losses, max_epochs=2).fit(module, indexed_loader())
    torch.testing.assert_close(weights(module), weights(by_hand("alig")), rtol=1e-10, atol=1e-12)


def test_the_entry_point_is_that_of_this_package():
    (point,) = entry_points(group="lightning.pytorch.callbacks_factory", name="lightning-grow")
    (callback,) = list(point.load()())
    assert isinstance(callback, LossFeed)


def test_the_feed_ends_with_the_fit(tmp_path):
    module = module_of("alig")
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, indexed_loader())
    optimizer = run.optimizers[0]
    assert not optimizer.has_feed
    with pytest.raises(RuntimeError, match="needs the loss"):
        optimizer.step()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.optim.loss_feed_worker", 2, folder)
    return folder


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_are_one(name, ranks):
    """On the joined batches; and the ranks end bit by bit alike."""
    first, second = (torch.load(ranks / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["optimal"], second["optimal"])
    torch.testing.assert_close(first["weights"], weights(by_hand(name)), rtol=1e-9, atol=1e-11)
    if name == "alig_plus":
        assert (first["optimal"] > 0).all()
        assert len(first["optimal"]) == 48


def test_datasets_of_streams_have_no_indices():
    with pytest.raises(TypeError, match="has no indices"):
        Indexed(Dataset.__new__(Dataset))


@pytest.mark.parametrize("callbacks", [[], [LossFeed()]])
def test_a_loss_that_the_module_sets_counts_more(callbacks, without_entry_point, tmp_path):
    """Through the wrapper that `self.optimizers()` returns, also where nobody feeds losses."""

    class Sets(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.losses(batch)[1].mean())
            optimizer.set_loss(0.0)
            optimizer.step()

    module = Sets(lambda params: ALIG(params, 0.5))
    before = weights(module)
    trainer(tmp_path, *callbacks, max_epochs=1).fit(module, indexed_loader())
    assert torch.equal(weights(module), before)
