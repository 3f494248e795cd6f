"""What every structural callback does, shown with Net2Net and MagnitudePruning in small real runs."""

import logging
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_grow.criteria import GradientSums, Overgrown, sum_over_units
from lightning_grow.growth import Net2Net
from lightning_grow.pruning import MagnitudePruning
from lightning_grow.structure import StructureError
from lightning_grow.structure.axes import tensor_of
from lightning_grow.surgery import prune, widen
from lightning_grow.trainer import Proposal, StructuralCallback
from tests.trainer.models import Perceptron, Residual, build, loader, trainer


def fit(folder, *callbacks, module=None, data=None, **arguments):
    module = build(Perceptron) if module is None else module
    run = trainer(folder, *callbacks, **arguments)
    run.fit(module, loader() if data is None else data)
    return module


def steps_of(callback):
    return sorted({event.step for event in callback.record.events})


class Watcher(pl.Callback):
    """Notes the width at each batch start."""

    def __init__(self):
        self.sizes = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.append(pl_module.fc1.out_features)


# -- when ----------------------------------------------------------------------------------------------------------


def test_a_network_grows_while_it_trains(tmp_path):
    callback = Net2Net(every_n_steps=4, num_units=2)
    module = fit(tmp_path, callback)
    assert steps_of(callback) == [4, 8, 12, 16]
    assert (module.fc1.out_features, module.norm.num_features, module.fc2.in_features) == (14, 14, 14)
    assert callback.structure["fc1"].size == 14


def test_an_event_never_falls_into_an_accumulation_window(tmp_path):
    """With three batches to a step, six batches are two steps: at the third and the sixth batch."""
    watcher = Watcher()
    callback = Net2Net(every_n_steps=1, num_units=1)
    fit(tmp_path, callback, watcher, accumulate_grad_batches=3, max_epochs=1)
    assert watcher.sizes == [6, 6, 6, 7, 7, 7]
    assert steps_of(callback) == [1, 2]


def test_epochs_grow_at_their_end_but_not_after_the_last(tmp_path):
    callback = Net2Net(every_n_epochs=1, num_units=1)
    fit(tmp_path, callback)
    assert [(event.step, event.epoch) for event in callback.record.events if event.group == "fc1"] == [(6, 0), (12, 1)]


def test_an_unlimited_number_of_epochs_has_no_last_one(tmp_path):
    callback = Net2Net(every_n_epochs=1, num_units=1)
    fit(tmp_path, callback, max_epochs=-1, max_steps=12)
    assert steps_of(callback) == [6, 12]


def test_once_each_epoch_is_the_default():
    assert Net2Net().trigger.every_n_epochs == 1


def test_a_plateau_of_a_logged_metric_begins_an_event(tmp_path):
    """A learning rate of zero keeps the loss where it is: a plateau from the second epoch on."""
    callback = Net2Net(on_plateau="val_loss", patience=1, num_units=1)
    run = trainer(tmp_path, callback, max_epochs=4)
    run.fit(module := build(Perceptron, lr=0.0), loader(), loader())
    assert [event.epoch for event in callback.record.events if event.group == "fc1"] == [2, 3]
    assert module.fc1.out_features == 8


def test_a_plateau_of_a_training_metric(tmp_path):
    class Epochs(Perceptron):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("epoch_loss", 1.0, on_epoch=True, on_step=False, batch_size=8)
            return loss

    callback = Net2Net(on_plateau="epoch_loss", patience=1, num_units=1)
    fit(tmp_path, callback, module=build(Epochs), max_epochs=3)
    assert [event.epoch for event in callback.record.events if event.group == "fc1"] == [2]


def test_a_metric_that_is_not_logged_is_named_with_those_that_are(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"'vall_loss', which was not logged.*train_loss"):
        fit(tmp_path, Net2Net(on_plateau="vall_loss"))


def test_sanity_checking_begins_no_event(tmp_path):
    callback = Net2Net(on_plateau="val_loss", patience=1)
    run = trainer(tmp_path, callback, max_epochs=1, num_sanity_val_steps=2)
    run.fit(build(Perceptron), loader(), loader())
    assert len(callback.record) == 0
    assert callback.state_dict()["plateau"]["bad_epochs"] == 0


def test_manual_optimization_with_two_optimizers(tmp_path):
    class Manual(Perceptron):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
            second.step()
            self.log("loss", loss)

        def configure_optimizers(self):
            lower = [*self.fc1.parameters(), *self.norm.parameters()]
            upper = [*self.fc2.parameters(), *self.head.parameters()]
            return torch.optim.SGD(lower, 0.1, momentum=0.9), torch.optim.Adam(upper, 0.01)

    callback = Net2Net(every_n_steps=6, num_units=2)
    module = fit(tmp_path, callback, module=build(Manual), max_epochs=1)
    assert steps_of(callback) == [6, 12]  # six batches, two steps each
    assert module.fc1.out_features == 10
    assert callback.record.events[0].loss_before is None


# -- what it leaves alone -------------------------------------------------------------------------------------------


def test_tracing_leaves_no_mark_on_the_module_or_its_logs(tmp_path):
    """Tracing runs ``training_step`` on a copy: no metric is logged, no counter moves, no random number is drawn."""
    plain, traced = build(Perceptron), build(Perceptron)
    torch.manual_seed(11)
    fit(tmp_path, module=plain, max_epochs=1)
    after_plain = torch.rand(3)
    torch.manual_seed(11)
    fit(tmp_path, Net2Net(at_steps=[10**6]), module=traced, max_epochs=1)
    assert traced.steps_run == plain.steps_run == 6
    assert torch.equal(torch.rand(3), after_plain)
    for a, b in zip(plain.state_dict().values(), traced.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_optimizer_scheduler_and_parameters_stay_the_same_objects(tmp_path):
    seen = {}

    class Spy(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen["before"] = self.identities(trainer, pl_module)

        def on_train_end(self, trainer, pl_module):
            seen["after"] = self.identities(trainer, pl_module)

        def identities(self, trainer, pl_module):
            parameters = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
            scheduler = trainer.lr_scheduler_configs[0].scheduler
            return id(trainer.optimizers[0]), id(scheduler), parameters, [id(p) for p in pl_module.parameters()]

    fit(tmp_path, Net2Net(every_n_steps=4), Spy())
    assert seen["before"] == seen["after"]


def test_tuners_try_without_events_and_the_run_grows_afterwards(tmp_path):
    class Sized(Perceptron):
        def __init__(self):
            super().__init__()
            self.batch_size = 4

        def train_dataloader(self):
            return loader(self.batch_size)

        def val_dataloader(self):
            return loader(self.batch_size)

    callback = Net2Net(every_n_steps=2, num_units=1, stop=4)
    tuners = (LearningRateFinder(num_training_steps=5), BatchSizeFinder(max_trials=2, steps_per_trial=2))
    run = trainer(tmp_path, callback, *tuners, max_epochs=1)
    module = build(Sized)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module)
    assert steps_of(callback) == [2, 4]
    assert module.fc1.out_features == 8


@pytest.mark.parametrize(
    "arguments",
    [
        {"fast_dev_run": 3},
        {"barebones": True, "logger": None, "enable_checkpointing": None, "log_every_n_steps": None},
        {"limit_train_batches": 3},
        {"max_time": "00:00:10:00"},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.5},
    ],
    ids=str,
)
def test_unusual_trainers(tmp_path, arguments):
    if "barebones" in arguments:
        run = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=1, default_root_dir=tmp_path)
        run.callbacks.append(callback := Net2Net(every_n_steps=2, num_units=1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.fit(module := build(Perceptron), loader())
    else:
        callback = Net2Net(every_n_steps=2, num_units=1)
        module = fit(tmp_path, callback, max_epochs=1, **arguments)
    assert callback.record.events
    assert module.fc1.out_features == 6 + len(steps_of(callback))


def test_a_second_fit_goes_on_from_where_the_first_ended(tmp_path):
    callback = Net2Net(every_n_steps=4, num_units=1)
    module = fit(tmp_path, callback, max_epochs=1)
    assert module.fc1.out_features == 7
    fit(tmp_path, callback, module=module, max_epochs=1)
    fit(tmp_path, Net2Net(every_n_steps=4, num_units=1), module=module, max_epochs=1)
    assert module.fc1.out_features == 9


def test_teardown_leaves_no_hook_behind(tmp_path):
    module = fit(tmp_path, Net2Net(every_n_steps=4))
    assert not module._load_state_dict_pre_hooks
    assert "on_load_checkpoint" not in vars(module)
    assert all(not p._backward_hooks for p in module.parameters())


def test_an_exception_leaves_no_hook_behind(tmp_path):
    class Fails(pl.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop here")

    module = build(Perceptron)
    with pytest.raises(RuntimeError, match="stop here"):
        fit(tmp_path, Taylor(at_steps=[1], num_units=1), Fails(), module=module)
    assert not module._load_state_dict_pre_hooks
    assert all(not p._backward_hooks for p in module.parameters())


def test_callbacks_pickle_before_and_after_a_run(tmp_path):
    callback = Net2Net(every_n_steps=4)
    assert pickle.loads(pickle.dumps(callback)).trigger == callback.trigger
    fit(tmp_path, callback)
    assert len(pickle.loads(pickle.dumps(callback)).record) == len(callback.record)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_inner_modules_grow(tmp_path):
    module = build(Perceptron)
    module.fc1.compile(backend="eager")
    module.fc2 = torch.compile(module.fc2, backend="eager")
    callback = Net2Net(every_n_steps=4, num_units=1)
    fit(tmp_path, callback, module=module, max_epochs=2)
    assert module.fc1.out_features == 9


# -- which, and how far ---------------------------------------------------------------------------------------------


def test_patterns_include_and_exclude(tmp_path):
    callback = Net2Net(every_n_steps=4, groups=["fc*", "!fc2"])
    fit(tmp_path, callback, max_epochs=1)
    assert {event.group for event in callback.record.events} == {"fc1"}


def test_an_unknown_group_is_named_with_those_there_are(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"'fc9', but no group or stack.*Groups: fc1, fc2"):
        fit(tmp_path, Net2Net(groups=["fc9"]))


def test_a_model_in_which_nothing_may_change_is_refused(tmp_path):
    class OneLayer(Perceptron):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            del self.fc1, self.norm, self.fc2

        def forward(self, x):
            return self.head(x)

    with pytest.raises(MisconfigurationException, match=r"Nothing in this model may change.*head.weight\[0\]"):
        fit(tmp_path, Net2Net(), module=build(OneLayer))


def test_an_event_that_changes_nothing_says_why_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_grow"):
        fit(tmp_path, Net2Net(every_n_steps=2, max_parameters=90), max_epochs=1)
        fit(tmp_path, MagnitudePruning(every_n_steps=2, min_size=10, verbose=False), max_epochs=1)
    lines = [r.getMessage() for r in caplog.records if "nothing to do" in r.getMessage()]
    assert len(lines) == 2
    assert lines[0] == "Net2Net: nothing to do, the budget is reached (max_parameters=90)"
    assert lines[1].startswith("MagnitudePruning: nothing to do, the chosen groups and stacks allow no change")


def test_growth_stops_at_the_budget_and_uses_it_up(tmp_path):
    callback = Net2Net(every_n_steps=2, fraction=1.0, max_parameters=150)
    module = fit(tmp_path, callback)
    count = sum(p.numel() for p in module.parameters())
    assert 140 <= count <= 150
    assert callback.record.events[-1].parameters == count


@pytest.mark.parametrize("limit", [{"max_flops": 600.0}, {"max_latency_ms": 1e-6}])
def test_a_budget_that_is_exceeded_already_is_refused(tmp_path, limit):
    limit = {"max_parameters": 50} if limit.get("max_flops") is None and "max_latency_ms" not in limit else limit
    limit = limit | ({"max_flops": 100.0} if "max_flops" in limit else {})
    with pytest.raises(MisconfigurationException, match="already exceeded before training: max_"):
        fit(tmp_path, Net2Net(**limit), module=build(Perceptron, example=True))


def test_a_parameter_budget_that_is_exceeded_already_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"max_parameters=50 but the model has 89"):
        fit(tmp_path, Net2Net(max_parameters=50))


def test_a_flops_budget_needs_an_example_input(tmp_path):
    with pytest.raises(MisconfigurationException, match="no `example_input_array`"):
        fit(tmp_path, Net2Net(max_flops=1e9))


def test_growth_stops_at_a_flops_budget(tmp_path):
    from lightning_grow.costs import count_flops

    callback = Net2Net(every_n_steps=2, fraction=0.5, max_flops=800.0)
    module = fit(tmp_path, callback, module=build(Perceptron, example=True))
    flops = count_flops(lambda: module(module.example_input_array))
    assert 600 < flops <= 800


def test_pruning_stops_when_the_budget_is_reached(tmp_path):
    callback = MagnitudePruning(every_n_steps=1, num_units=1, max_parameters=60)
    module = fit(tmp_path, callback)
    count = sum(p.numel() for p in module.parameters())
    assert 50 <= count <= 60


def test_two_methods_share_structure_record_and_steps(tmp_path):
    grow, shrink = Net2Net(every_n_steps=4, num_units=4), MagnitudePruning(every_n_steps=4, num_units=2)
    fit(tmp_path, grow, shrink, max_epochs=2)
    assert grow.record is shrink.record
    assert grow.structure is shrink.structure
    methods = {event.step: event.method for event in grow.record.events}
    assert methods == {4: "Net2Net", 5: "MagnitudePruning", 8: "Net2Net", 9: "MagnitudePruning", 12: "Net2Net"}


# -- looking at data ------------------------------------------------------------------------------------------------


class Taylor(StructuralCallback):
    """Removes the units whose weights and mean gradients cancel: a method that looks at data."""

    shrinks = True

    def statistics(self, structure, groups):
        return {"gradients": GradientSums({axis.tensor for g in groups for axis in g.with_role("produced")})}

    def propose(self, occasion):
        gradients = occasion.statistics["gradients"]
        self.seen = {name: total.clone() for name, total in gradients.sums.items()}
        proposals = []
        for group in occasion.groups[:1]:
            score = torch.zeros(group.size, dtype=torch.float64)
            for axis in group.with_role("produced"):
                value = tensor_of(occasion.model, axis.tensor) * gradients.mean(axis.tensor)
                score += sum_over_units(value, group, axis, {group.name: group.size})
            proposals.append(Proposal(prune(group, score.abs().argsort()[: self.num_units].tolist()), predicted=0.5))
        return proposals


def test_losses_given_to_manual_backward_are_outputs_too(tmp_path):
    """A step that returns nothing is verified by them: the score of a critic is no hidden width."""

    class Adversarial(pl.LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.maker = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
            self.critic = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

        def training_step(self, batch, batch_idx):
            fake = self.maker(torch.randn(8, 3))
            for optimizer, loss in zip(
                self.optimizers(),
                (-self.critic(fake).mean(), (self.critic(fake.detach()) - self.critic(batch[0])).mean()),
                strict=True,
            ):
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(loss, retain_graph=True)
                self.untoggle_optimizer(optimizer)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.Adam(self.maker.parameters()), torch.optim.Adam(self.critic.parameters())]

    callback = Net2Net(every_n_steps=4, num_units=2, verify=True)
    module = fit(tmp_path, callback, module=build(Adversarial), max_epochs=1)
    assert {event.group for event in callback.record.events} == {"maker.0", "critic.0"}
    assert all(event.difference < 1e-5 for event in callback.record.events)
    assert module.critic[2].out_features == 1


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_step_that_takes_its_own_batches(tmp_path):
    class Iterates(Perceptron):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return F.cross_entropy(self(batch[0]), batch[1])

    callback = Net2Net(every_n_steps=3, num_units=1, verify=True)
    module = fit(tmp_path, callback, module=build(Iterates, example=True), max_epochs=1)
    assert module.fc1.out_features == 8
    assert callback.record.events[0].difference is None
    with pytest.raises(StructureError, match=r"from `dataloader_iter`|Set `example_input_array`"):
        fit(tmp_path, Net2Net(), module=build(Iterates), max_epochs=1)


def test_statistics_observe_ordinary_batches(tmp_path):
    """The trigger opens a window of eight batches; the event follows it, and no step was run for it."""
    callback = Taylor(at_steps=[3], num_units=2)
    module = fit(tmp_path, callback)
    assert steps_of(callback) == [11]
    assert module.fc1.out_features == 4
    assert module.steps_run == 18
    assert callback.seen["count/fc1.weight"] == 8
    assert callback.record.events[0].predicted == 0.5


def test_statistics_are_sums_of_gradients(tmp_path):
    class Notes(pl.Callback):
        total = 0

        def on_after_backward(self, trainer, pl_module):
            if 3 <= trainer.global_step < 11:
                self.total = self.total + pl_module.fc1.weight.grad.clone()

    callback, notes = Taylor(at_steps=[3], num_units=2), Notes()
    fit(tmp_path, callback, notes)
    torch.testing.assert_close(callback.seen["gradient/fc1.weight"], notes.total)


def test_a_window_closes_at_an_optimizer_step(tmp_path):
    callback = Taylor(at_steps=[1], num_units=1)
    fit(tmp_path, callback, accumulate_grad_batches=3, max_epochs=3)
    assert steps_of(callback) == [4]
    assert callback.seen["count/fc1.weight"] == 9


def test_a_window_begins_again_when_another_method_changes_the_model(tmp_path):
    """Hooks that are registered anew on a resized parameter must be called: torch drops them after a swap."""
    callback, other = Taylor(at_steps=[2], num_units=1), Net2Net(at_steps=[5], num_units=1)
    fit(tmp_path, callback, other)
    assert [(event.step, event.method) for event in callback.record.events][-1] == (14, "Taylor")
    assert callback.seen["count/fc1.weight"] == 8


# -- what is told ---------------------------------------------------------------------------------------------------


def test_the_record_says_what_happened(tmp_path):
    callback = Net2Net(at_steps=[5], num_units=2, groups=["fc1"])
    module = fit(tmp_path, callback, max_epochs=2)
    (event,) = callback.record.events
    assert (event.step, event.epoch, event.method, event.what) == (5, 0, "Net2Net", "widen")
    assert (event.group, event.before, event.after) == ("fc1", 6, 8)
    assert event.parameters == sum(p.numel() for p in module.parameters())
    assert 0 < event.loss_before < 5
    assert 0 < event.loss_after < 5
    assert event.loss_after != event.loss_before
    assert event.measured == event.loss_before - event.loss_after
    assert callback.record.sizes == {"fc1": 6, "fc2": 5}
    assert callback.record.curve("fc1") == [(0, 6), (5, 8)]


def test_one_line_is_logged_for_each_event(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_grow"):
        fit(tmp_path, Net2Net(every_n_steps=5, num_units=1), max_epochs=2)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("lightning_grow.trainer")]
    assert len(lines) == 3
    assert "fc1" in lines[0]  # the structure, once
    assert lines[1].startswith("step 5, Net2Net: widen fc1 6 -> 7, widen fc2 5 -> 6;")


def test_metrics_and_final_sizes_reach_the_loggers(tmp_path):
    """Also where the loggers listen to every third step only."""
    callback = Net2Net(at_steps=[4], num_units=2, groups=["fc1"])
    fit(tmp_path, callback, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=3)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    keys, *rows = (line.split(",") for line in lines)
    values = [(int(row[keys.index("step")]), row[keys.index("grow/fc1/size")]) for row in rows]
    by_step = {step: float(value) for step, value in values if value}
    assert by_step == {2: 6.0, 5: 8.0, 11: 8.0, 17: 8.0}
    parameters = [row[keys.index("grow/parameters")] for row in rows if row[keys.index("grow/parameters")]]
    assert float(parameters[-1]) == callback.record.events[-1].parameters
    written = (tmp_path / "hparams.yaml").read_text()
    assert "fc1: 8" in written


def test_a_logger_that_refuses_the_final_sizes_does_not_end_the_run(tmp_path, caplog):
    """Some services take a parameter only once; by then training is done."""

    class Once(CSVLogger):
        def log_hyperparams(self, params=None):
            if params and "grow" in params:
                raise RuntimeError("already set")

    fit(tmp_path, Net2Net(at_steps=[2]), logger=Once(tmp_path), max_epochs=1)
    assert "Once did not take the final sizes: already set" in caplog.text


@pytest.mark.filterwarnings("ignore")  # the service's own
def test_final_sizes_stand_in_the_configuration_of_a_wandb_run(tmp_path):
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    fit(tmp_path, Net2Net(at_steps=[2], num_units=2, groups=["fc1"]), logger=logger, max_epochs=1)
    config = dict(logger.experiment.config)
    logger.experiment.finish()
    assert config["grow"]["sizes"] == {"fc1": 8}


def test_verify_finds_nothing_where_the_function_is_kept_and_something_where_not(tmp_path):
    exact = Net2Net(at_steps=[3], verify=True)
    fit(tmp_path, exact, max_epochs=1)
    assert 0 <= exact.record.events[0].difference < 1e-5
    lossy = MagnitudePruning(at_steps=[3], num_units=3, verify=True)
    fit(tmp_path, lossy, max_epochs=1)
    assert lossy.record.events[0].difference > 1e-4


def test_noise_moves_the_outputs_a_little(tmp_path):
    callback = Net2Net(at_steps=[3], noise=0.05, verify=True)
    fit(tmp_path, callback, max_epochs=1)
    assert 1e-6 < callback.record.events[0].difference < 0.5


# -- what is refused ------------------------------------------------------------------------------------------------


def test_a_parameter_with_a_hook_is_refused_before_training(tmp_path):
    module = build(Perceptron)
    module.fc1.weight.register_hook(lambda gradient: None)
    with pytest.raises(MisconfigurationException, match=r"'fc1.weight' of shape \(6, 4\) has a hook"):
        fit(tmp_path, Net2Net(), module=module)


def test_a_module_compiled_as_a_whole_is_refused(tmp_path):
    module = torch.compile(build(Perceptron), backend="eager")
    with pytest.raises(MisconfigurationException, match=r"compiled as a whole.*inner modules"):
        fit(tmp_path, Net2Net(), module=module)


def test_a_graph_that_is_kept_between_batches_is_refused_and_nothing_has_changed(tmp_path):
    class Keeps(Perceptron):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            object.__setattr__(self, "kept", [self(batch[0]).sum()])
            return loss

        def __getstate__(self):
            return {k: v for k, v in super().__getstate__().items() if k != "kept"}

    module = build(Keeps)
    with pytest.raises(StructureError, match="graph"):
        fit(tmp_path, Net2Net(at_steps=[2]), module=module)
    assert module.fc1.weight.shape == (6, 4)


def test_depth_is_found_where_step_and_example_input_are_there(tmp_path):
    """Both are traced together, which runs each block twice."""
    module = build(Residual)
    module.example_input_array = torch.zeros(2, 4)
    callback = Net2Net(at_steps=[2], width=False, depth=True)
    fit(tmp_path, callback, module=module, max_epochs=1)
    assert len(module.blocks) == 3


def test_a_model_that_cannot_be_traced_says_how_it_was_tried(tmp_path):
    class Peeks(Perceptron):
        def forward(self, x):
            assert self.fc1.weight.data_ptr()
            return super().forward(x)

    with pytest.raises(StructureError, match=r"Set `example_input_array`.*training_step\(first batch\) in train mode"):
        fit(tmp_path, Net2Net(), module=build(Peeks))


def test_batch_norm_on_a_single_example_is_traced_in_eval_mode(tmp_path):
    module = build(Perceptron)
    module.example_input_array = torch.zeros(1, 4)
    callback = Net2Net(at_steps=[2], num_units=1)
    fit(tmp_path, callback, module=module, max_epochs=1)
    assert module.fc1.out_features == 7
    assert module.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": "fc1"}, r"write a list: groups=\['fc1'\]"),
        ({"num_units": 2, "fraction": 0.5}, "found both"),
        ({"num_units": 0}, "`num_units` should be at least 1"),
        ({"fraction": 0.0}, "`fraction` should be above 0"),
        ({"new_state": "ones"}, "'mean' or 'zeros', found 'ones'"),
        ({"max_parameters": 0}, "`max_parameters` should be above 0"),
        ({"width": False}, "nothing to do"),
        ({"spread": 1.0}, "`spread`"),
        ({"noise": -0.1}, "`noise`"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        Net2Net(**arguments)


def test_two_instances_have_two_state_keys():
    assert Net2Net(every_n_steps=2).state_key != Net2Net(every_n_steps=3).state_key
    assert Net2Net(groups=["a"]).state_key != Net2Net(groups=["b"]).state_key
    assert Net2Net(groups=["a"]).state_dict()


# -- methods that measure ------------------------------------------------------------------------------------------


class Measuring(StructuralCallback):
    """Widens everything by one unit, after it has looked at the loss of a copy."""

    measures = True
    window_batches = 2

    def propose(self, occasion):
        self.loss = occasion.measured.value(Overgrown(occasion.model, []).model)
        return [Proposal(widen(group, 1)) for group in occasion.groups if group.obstacle is None]


class Stubborn(Perceptron):
    """Its steps go wrong on copies, in one way or another, for as long as it is told."""

    how, until = "nan", 8

    def training_step(self, batch, batch_idx):
        if self is not self.trainer.lightning_module and 0 < self.trainer.global_step < self.until:
            if self.how == "raises":
                raise KeyError("no copies, please")
            return None if self.how == "nothing" else super().training_step(batch, batch_idx) * float("nan")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("how", "why"), [("nan", "not finite"), ("raises", "no copies, please"), ("nothing", "returned no loss")]
)
def test_an_event_whose_loss_cannot_be_measured_is_called_off_and_training_goes_on(tmp_path, caplog, how, why):
    callback, module = Measuring(every_n_steps=4), build(Stubborn)
    module.example_input_array = torch.zeros(2, 4)
    module.how = how
    fit(tmp_path, callback, module=module)
    assert steps_of(callback)[0] > 8
    assert "Measuring changes nothing this time: " in caplog.text
    assert why in caplog.text


def test_a_method_that_measures_sees_the_batches_since_the_trigger_and_leaves_no_trace(tmp_path):
    """The copy's loss is that of ordinary steps; the module's own count of steps does not move."""
    callback, module = Measuring(at_steps=[4]), build(Perceptron)
    fit(tmp_path, callback, module=module, max_epochs=1)
    assert steps_of(callback) == [6]
    assert module.steps_run == 6
    assert 0 < callback.loss < 2
