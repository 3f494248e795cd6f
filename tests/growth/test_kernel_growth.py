"""Network morphism: kernels that grow in a run, with everything that follows; and the widths that fit `widen`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_grow as lg
from lightning_grow.growth import KernelGrowth, Net2Net, larger_kernels
from lightning_grow.structure import StructureError, trace
from lightning_grow.surgery import apply_, enlarge_, insert_, widen
from tests.trainer.models import Convolutional, Perceptron, build, loader, state_of, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Two(Convolutional):
    """Two convolutions that are a stack of residual blocks besides: depth and kernels change in one run."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(4) for _ in range(2)))

    def forward(self, x):
        return self.head(self.blocks(self.conv1(x[:, None])).flatten(1))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Conv1d(width, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


def fitted(folder, *callbacks, cls=Convolutional, max_epochs=3, **arguments):
    """Train with one checkpoint each epoch; return the trainer and the module."""
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    run = trainer(folder, *callbacks, saver, max_epochs=max_epochs, enable_checkpointing=True)
    module = build(cls)
    run.fit(module, loader(), **arguments)
    return run, module


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_kernels_grow_by_the_amount_up_to_the_largest():
    model = nn.Sequential(nn.Conv2d(1, 2, (1, 4)), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 7))
    found = {edit.module: edit.after for edit in larger_kernels(model, ["0", "1", "2"], amount=4, max_kernel_size=6)}
    assert found == {"0": (5, 6), "1": (5, 5)}
    with pytest.raises(ValueError, match="`amount` to be an even number of at least 2, found 3"):
        larger_kernels(model, ["0"], amount=3)


def test_a_kernel_that_two_share_grows_once():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3))
    model[1].weight = model[0].weight
    edits = larger_kernels(model, ["0", "1"])
    assert [edit.module for edit in edits] == ["0"]
    enlarge_(model, edits)
    assert [conv.padding for conv in model] == [(1, 1), (1, 1)]


def test_new_entries_learn_from_the_first_step_on():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv1d(2, 1, 3, padding=1)).double()
    enlarge_(model, larger_kernels(model, ["0", "2"]))
    x = torch.randn(4, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    for conv in (model[0], model[2]):
        assert not conv.weight[..., [0, -1]].any()
        assert conv.weight.grad[..., [0, -1]].abs().min() > 0


def test_events_say_which_kernel_grew_and_how_far(tmp_path):
    callback = KernelGrowth(every_n_steps=4, modules=["conv1"], max_kernel_size=7, verify=True)
    fitted(tmp_path, callback)
    found = [(e.step, e.what, e.group, e.before, e.after, e.parameters) for e in callback.record.events]
    assert found == [(4, "enlarge", "conv1.kernel", 3, 5, 66), (8, "enlarge", "conv1.kernel", 5, 7, 74)]
    assert all(event.difference < 1e-5 for event in callback.record.events)
    assert callback.record.curve("conv1.kernel") == [(0, 3), (4, 5), (8, 7)]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_every_checkpoint_fits_a_fresh_model_and_the_live_one(tmp_path, epoch):
    """Also the one from before the first event, whose kernels are smaller than those of the live model."""
    run, live = fitted(tmp_path, KernelGrowth(at_steps=[8, 14]))
    path = tmp_path / f"epoch={epoch}.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    size = (3, 5, 7)[epoch]
    assert tuple(saved["conv1.weight"].shape) == (4, 1, size)
    fresh = build(Convolutional)
    trainer(tmp_path, KernelGrowth()).validate(fresh, loader(), ckpt_path=path, verbose=False, weights_only=True)
    run.test(live, loader(), ckpt_path=path, verbose=False)
    loaded = lg.load_from_checkpoint(Convolutional, path)
    for module in (fresh, live, loaded):
        assert (module.conv1.kernel_size, module.conv1.padding) == ((size,), (size // 2,))
        assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), live.eval()(x))


def test_a_kernel_that_is_larger_from_block_to_block_is_no_position():
    """Once, the padding 1 of the first block and 2 of the second made 3 of that of a new one."""
    model, x = build(Two), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    stack = trace(model, x).stacks["blocks"]
    enlarge_(model, larger_kernels(model, ["blocks.1.up"]))
    expected = model.eval()(x).detach()
    insert_(model, stack, 2)
    assert model.blocks[2].up.padding == (2,)
    torch.testing.assert_close(model(x), expected)


def test_resume_with_widths_depth_and_kernels_equals_the_uninterrupted_run(tmp_path):
    def callbacks():
        width = Net2Net(every_n_steps=5, num_units=1, depth=True, groups=["conv1", "blocks*"])
        return KernelGrowth(every_n_steps=4, modules=["*conv1", "blocks.1.up"], max_kernel_size=9), width

    first = callbacks()
    run, whole = fitted(tmp_path, *first, cls=Two, max_epochs=4)
    assert {event.what for event in first[0].record.events} == {"widen", "insert", "enlarge"}
    expected = state_of(whole, run)
    for epoch in (0, 2):
        again = callbacks()
        resumed, fresh = fitted(
            tmp_path / "again", *again, cls=Two, max_epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt"
        )
        found = state_of(fresh, resumed)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert again[0].record.to_dict() == first[0].record.to_dict()


def test_a_run_without_larger_kernels_refuses_other_kernels(tmp_path):
    class Other(Convolutional):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv1d(1, 4, 5, padding=2)

    fitted(tmp_path, Net2Net(every_n_steps=4, num_units=1))
    with pytest.raises(StructureError, match=r"another model: 'conv1.weight' has shape \(\d+, 1, 3\)"):
        lg.load_from_checkpoint(Other, tmp_path / "epoch=0.ckpt")


def test_under_a_budget_the_last_kernels_stay_as_they_are(tmp_path):
    module = build(Convolutional)
    before = sum(p.numel() for p in module.parameters())
    callback = KernelGrowth(at_steps=[2], pointwise=True, max_parameters=before + 8)
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert [event.group for event in callback.record.events] == ["conv1.kernel"]
    assert sum(p.numel() for p in module.parameters()) == before + 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amount": 3}, "`amount` should be an even number of at least 2, found 3"),
        ({"max_kernel_size": 1}, "`max_kernel_size` should be at least 3, found 1"),
        ({"num_units": 2}, "KernelGrowth has no `num_units`"),
        ({"groups": ["conv1"]}, "KernelGrowth has no `groups`"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        KernelGrowth(**arguments)


class Mirrored(Convolutional):
    def __init__(self):
        super().__init__()
        self.conv1.padding_mode = "reflect"


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (Convolutional, {"modules": ["conv3"]}, "`modules` names 'conv3'.*Convolutions: conv1, conv2"),
        (Perceptron, {}, "No kernel of this model may grow. Convolutions: none"),
        (Mirrored, {}, "No kernel of this model may grow. 'conv1': its border is 'reflect'"),
    ],
)
def test_a_model_without_kernels_to_grow_is_refused_before_the_first_batch(tmp_path, cls, arguments, message):
    module = build(cls)
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, KernelGrowth(**arguments)).fit(module, loader())
    assert module.steps_run == 0


# -- width: zero fan-out is safe, zero fan-in is not -------------------------------------------------------------------

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "sigmoid": nn.Sigmoid, "softplus": nn.Softplus}
X = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def widened(activation, zero):
    """Return a perceptron before and after 3 more units, of which the fan-in or the fan-out is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), ACTIVATIONS[activation](), nn.Linear(5, 2)).double()
        drawn = {"0.weight[0]": torch.randn(3, 4), "0.bias[0]": torch.randn(3), "2.weight[1]": torch.randn(2, 3)}
    wide = copy.deepcopy(model)
    zeroed = ("0.weight[0]", "0.bias[0]") if zero == "fan_in" else ("2.weight[1]",)
    values = {label: torch.zeros_like(v) if label in zeroed else v for label, v in drawn.items()}
    apply_(wide, [widen(trace(model, X)["0"], 3, values={k: v.double() for k, v in values.items()})])
    return model, wide


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("zero", ["fan_in", "fan_out"])
@torch.no_grad()
def test_zero_fan_out_is_exact_for_every_activation_zero_fan_in_where_it_maps_zero_to_zero(activation, zero):
    """T2.4."""
    model, wide = widened(activation, zero)
    moved = float((wide(X) - model(X)).abs().max())
    assert (moved < 1e-12) == (zero == "fan_out" or activation in ("relu", "tanh", "gelu"))


@pytest.mark.parametrize(
    ("activation", "zero", "learns"),
    [
        ("relu", "fan_out", True),
        ("sigmoid", "fan_out", True),
        ("tanh", "fan_in", True),
        ("gelu", "fan_in", True),
        ("relu", "fan_in", False),
    ],
)
def test_the_zeroed_side_moves_first_and_zero_fan_in_before_relu_never(activation, zero, learns):
    """T2.7: at the first step only the zeroed side has a gradient; from the second on, both have."""
    _, wide = widened(activation, zero)
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        F.mse_loss(wide(X), Y).backward()
        fan_in, fan_out = float(wide[0].weight.grad[5:].abs().max()), float(wide[2].weight.grad[:, 5:].abs().max())
        zeroed, drawn = (fan_in, fan_out) if zero == "fan_in" else (fan_out, fan_in)
        assert (zeroed > 0) == learns
        assert (drawn > 0) == (learns and step > 0)
        optimizer.step()
