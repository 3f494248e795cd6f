"""Tasks one after another: what an earlier task answers stays the same bit by bit, whatever is learned later."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_grow.growth import FireflyContinual
from lightning_grow.growth.firefly_continual import locked_entries, task_network
from lightning_grow.structure import StructureError, trace
from lightning_grow.surgery import apply_, widen
from tests.trainer.models import trainer


class TwoHeads(pl.LightningModule):
    """A network with batch norm, dropout-free, and a head for each task."""

    def __init__(self, optimizer="AdamW"):
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.fc2 = nn.Linear(6, 5)
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 2), "b": nn.Linear(5, 2)})
        self.task = "a"
        self.optimizer = optimizer

    def hidden(self, x):
        return F.relu(self.fc2(F.relu(self.norm(self.fc1(x)))))

    def forward(self, x):
        return {name: head(self.hidden(x)) for name, head in self.heads.items()}

    def training_step(self, batch, batch_idx):
        outputs = self(batch[0])
        return F.cross_entropy(outputs[self.task], batch[1]) + 0 * sum(o.sum() for o in outputs.values())

    def configure_optimizers(self):
        if self.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True)
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(48, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, seed] > 0).long()), batch_size=8)


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(9))
OWN = {"a": ["heads.a.*"], "b": ["heads.b.*"]}


def build(optimizer="AdamW"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TwoHeads(optimizer)


def grow(**arguments):
    usual = {"task": "a", "own": OWN, "every_n_steps": 4, "num_units": 2, "search_steps": 4, "window_batches": 2}
    return FireflyContinual(**usual | {"verbose": False} | arguments)


@torch.no_grad()
def answers(network, task):
    return network.eval()(X)[task]


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_earlier_tasks_answer_the_same_bit_by_bit(optimizer, tmp_path):
    """Dossier test 6: after growth and training for two more tasks, with momentum, weight decay and batch norm."""
    module, callback = build(optimizer), grow()
    trainer(tmp_path, callback, max_epochs=2).fit(module, data(0))
    before = answers(copy.deepcopy(module), "a")
    sizes = [module.fc1.out_features, module.fc2.out_features]
    assert sum(sizes) > 11
    callback.begin("b", module)
    module.task = "b"
    head = module.heads["b"].bias.detach().clone()
    trainer(tmp_path, callback, max_epochs=2, gradient_clip_val=0.5).fit(module, data(1))
    assert module.fc1.out_features + module.fc2.out_features > sum(sizes)
    assert not torch.equal(module.heads["b"].bias, head)
    assert torch.equal(answers(callback.network(module, "a"), "a"), before)
    assert not torch.equal(answers(copy.deepcopy(module), "a"), before)
    second = answers(callback.network(module, "b"), "b")
    assert torch.equal(second, answers(copy.deepcopy(module), "b"))

    callback.begin("c", module)
    trainer(tmp_path, callback, max_epochs=1).fit(module, data(2))
    assert torch.equal(answers(callback.network(module, "a"), "a"), before)
    assert torch.equal(answers(callback.network(module, "b"), "b"), second)
    assert list(callback.tasks) == ["a", "b"]


def test_without_locks_earlier_tasks_change(tmp_path):
    """The test above has something to see."""
    module, callback = build(), grow()
    trainer(tmp_path, callback, max_epochs=1).fit(module, data(0))
    before, sizes = answers(copy.deepcopy(module), "a"), callback.structure.sizes_in(module)
    module.task = "b"
    trainer(tmp_path, callback, max_epochs=1).fit(module, data(1))
    structure = callback.structure.resized(callback.structure.sizes_in(module))
    assert not torch.equal(answers(task_network(module, structure, sizes), "a"), before)


def test_the_optimizer_never_sees_a_gradient_of_what_is_locked(tmp_path):
    module, callback = build(), grow()
    trainer(tmp_path, callback, max_epochs=1).fit(module, data(0))
    callback.begin("b", module)
    module.task = "b"
    seen = []

    class Look(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if pl_module.fc2.weight.grad is not None:
                rows, columns = callback.tasks["a"]["fc2"], callback.tasks["a"]["fc1"]
                seen.append(pl_module.fc2.weight.grad[:rows, :columns].abs().max())

    run = trainer(tmp_path, callback, Look(), max_epochs=2)
    run.fit(module, data(1))
    assert seen
    assert max(seen) == 0
    momentum = run.optimizers[0].state[module.fc2.weight]["exp_avg"]
    rows, columns = callback.tasks["a"]["fc2"], callback.tasks["a"]["fc1"]
    assert momentum[:rows, :columns].abs().max() == 0
    assert momentum[rows:].abs().max() > 0


def test_a_resumed_task_keeps_its_locks(tmp_path):
    module, callback = build(), grow()
    trainer(tmp_path, callback, max_epochs=1).fit(module, data(0))
    before = answers(copy.deepcopy(module), "a")
    callback.begin("b", module)
    module.task = "b"
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, data(1))
    run.save_checkpoint(tmp_path / "b.ckpt")
    fresh, again = build(), grow()
    fresh.task = "b"
    trainer(tmp_path, again, max_epochs=2).fit(fresh, data(1), ckpt_path=tmp_path / "b.ckpt", weights_only=True)
    assert (again.task, again.tasks) == ("b", callback.tasks)
    assert torch.equal(answers(again.network(fresh, "a"), "a"), before)


def test_entries_are_locked_where_all_their_units_are_old():
    module = build()
    structure = trace(module, X)
    apply_(module, [widen(structure["fc1"], 2), widen(structure["fc2"], 1)])
    structure = structure.resized(structure.sizes_in(module))
    locked = locked_entries(module, structure, {"fc1": 6, "fc2": 5}, ["heads.b.*"])
    assert set(locked) == {name for name in module.state_dict() if not name.startswith("heads.b.")}
    assert locked["fc2.weight"].sum() == 30
    assert locked["fc2.weight"][:5, :6].all()
    assert locked["norm.running_mean"].tolist() == [True] * 6 + [False] * 2
    assert locked["heads.a.weight"].tolist() == [[True] * 5 + [False]] * 2
    assert locked["heads.a.bias"].all()
    with pytest.raises(StructureError, match="'fc1' has 8 units, but an earlier task uses 9"):
        locked_entries(module, structure, {"fc1": 9})
    with pytest.raises(StructureError, match="'fc1' has 8 units, but an earlier task uses 9"):
        task_network(module, structure, {"fc1": 9})


def test_tasks_are_begun_once():
    callback = grow(tasks={"z": {"fc1": 6}})
    with pytest.raises(MisconfigurationException, match="structure of the model is known once"):
        callback.begin("b", build())
    for task in ("a", "z"):
        with pytest.raises(MisconfigurationException, match="was begun before"):
            callback.begin(task, build())
    with pytest.raises(MisconfigurationException, match="There is no task 'x', but z, a"):
        callback.network(build(), "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": {"a": {}}}, "`task` should be new"),
        ({"num_candidates": 0}, "`num_candidates` should be at least 1"),
        ({"search_steps": -1}, "`search_steps` should be at least 0"),
        ({"radius": 0.0}, "`radius` should be above 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        grow(**arguments)
