"""Net2Net where outputs are laid side by side: one map for each operand, at its own offset. Whole trajectories, too."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_grow.growth import net2wider, with_noise
from lightning_grow.structure import trace
from lightning_grow.structure.axes import tensor_of
from lightning_grow.structure.layout import entry_share
from lightning_grow.surgery import apply_


class DenseLayer(nn.Module):
    """Norm, activation, bottleneck, norm, activation, convolution: what it makes is put behind what came in."""

    def __init__(self, width, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 2 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.tanh(self.norm2(y)))], dim=1)


class DenseNet(nn.Module):
    """Dense blocks with transitions between them; the head sees each place of each channel (``flat``), or means."""

    def __init__(self, growth, layers, blocks, flat):
        super().__init__()
        width = 3
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(nn.Sequential(*(DenseLayer(width + i * growth, growth) for i in range(layers))))
            wide, width = width + layers * growth, width + 1
            self.transitions.append(nn.Sequential(nn.BatchNorm2d(wide), nn.GELU(), nn.Conv2d(wide, width, 1)))
        self.norm, self.flat = nn.BatchNorm2d(width), flat
        self.head = nn.Linear(width * (4 if flat else 1), 2)

    def forward(self, x):
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            x = transition(block(x))
        x = torch.relu(self.norm(x))
        return self.head(x.flatten(1) if self.flat else x.mean(dim=(2, 3)))


class Wide(nn.Module):
    """Three towers of one input, concatenated twice in another order, one of them twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(4, 2)
        self.mixed, self.head = nn.Linear(10, 4), nn.Linear(11, 2)

    def forward(self, x):
        one, two, three = torch.tanh(self.one(x)), torch.sigmoid(self.two(x)), self.three(x)
        mixed = F.gelu(self.mixed(torch.cat([one, two, three], dim=1)))
        return self.head(torch.cat([three, mixed, three, one], dim=1))


def fresh(cls, *args):
    """Return a model with weights of one seed and norms whose statistics and gains are no longer what they began as."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(*args).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    nn.init.normal_(tensor)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        return model


def images():
    return torch.randn(5, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@functools.cache
def traced(flat):
    """Return a dense net, and its structure: found once."""
    model = fresh(DenseNet, 2, 2, 1, flat)
    return model, trace(model, images())


@given(
    flat=st.booleans(),
    train=st.booleans(),
    spread=st.sampled_from([0.0, 0.4]),
    noise=st.sampled_from([0.0, 1e-7]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@torch.no_grad()
def test_a_dense_net_computes_the_same_after_any_widening(flat, train, spread, noise, seed):
    """T1.1 with concatenations: each operand keeps a map of its own, and noise moves the function by its own size."""
    model, structure = traced(flat)
    model = copy.deepcopy(model)
    groups = list(structure.groups.values())
    assert len(groups) == 6  # the stem, two layers of a bottleneck and an output, and the transition
    assert all(group.obstacle is None for group in groups)
    expected = copy.deepcopy(model).train(train)(images())
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for group in groups:
        more = int(torch.randint(0, 5, (1,), generator=generator))
        if more:
            edit = net2wider(group, more * group.step, generator, spread=spread)
            edits.append(with_noise(edit, model, noise, generator))
    apply_(model, edits)
    moved = float((model.train(train)(images()) - expected).abs().max())
    assert moved < (1e-4 if noise else 1e-10)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-4])
@torch.no_grad()
def test_operands_that_are_concatenated_twice_keep_their_places(noise):
    model, x = fresh(Wide), torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, generator = model(x), torch.Generator().manual_seed(2)
    structure = trace(model, x)
    assert {g.name: g.size for g in structure.groups.values()} == {"one": 3, "two": 5, "three": 2, "mixed": 4}
    for _ in range(2):  # twice in a row
        edits = [net2wider(g, 3, generator, spread=0.3) for g in trace(model, x).groups.values()]
        apply_(model, [with_noise(edit, model, noise, generator) for edit in edits])
    moved = float((model(x) - expected).abs().max())
    assert model.head.in_features == 8 + 10 + 8 + 9
    assert (moved < 1e-12) if noise == 0 else (0.01 * noise < moved < 100 * noise)


def factors(model, edits, structure):
    """Return, for each parameter, what its rate is multiplied by: fan-out by its share, fan-in by one over it."""
    found = {}
    share = {edit.group.name: torch.tensor(edit.share, dtype=torch.float64) for edit in edits}
    sizes = {edit.group.name: edit.new_size for edit in edits}
    for group in structure.groups.values():
        for axis in group.axes:
            tensor = tensor_of(model, axis.tensor)
            if not isinstance(tensor, nn.Parameter):
                continue
            along = entry_share(axis.layout, sizes, {group.name: share[group.name]})
            along = along if axis.role == "consumed" else 1 / along
            shape = [-1 if dim == axis.dim else 1 for dim in range(tensor.ndim)]
            found[axis.tensor] = found.get(axis.tensor, 1.0) * along.reshape(shape)
    return found


def descend(model, x, y, rates, decay, steps=200, momentum=0.9, lr=0.05):
    """Do stochastic gradient descent by hand: `rates` scale the step, and their inverse the coupled weight decay."""
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(steps):
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                rate = rates.get(name, 1.0)
                velocity[name].mul_(momentum).add_(p.grad + decay * p / rate)
                p.sub_(lr * rate * velocity[name])


@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_with_rates_by_share_the_wide_net_repeats_the_trajectory_of_the_narrow_one(spread, decay):
    """Steps of fan-out times its share, of fan-in by it; hidden matrices are both. Without these, it does not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        narrow = nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 2)
        ).double()
        x, y = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    structure = trace(narrow, x)
    edits = [net2wider(group, 7, spread=spread) for group in structure.groups.values()]
    wide, plain = copy.deepcopy(narrow), copy.deepcopy(narrow)
    apply_(wide, edits)
    apply_(plain, edits)
    rates = factors(wide, edits, structure)
    assert rates.keys() >= {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "5.weight"}
    begin = narrow(x).detach()
    descend(narrow, x, y, {}, decay)
    descend(wide, x, y, rates, decay)
    descend(plain, x, y, {}, decay)
    with torch.no_grad():
        assert float((narrow(x) - begin).abs().max()) > 0.1
        torch.testing.assert_close(wide(x), narrow(x), rtol=0, atol=1e-10)
        assert float((plain(x) - narrow(x)).abs().max()) > 1e-3


def test_no_units_more_is_refused_and_as_many_more_doubles_every_unit():
    """T1.5: q = n is no edit; drawing every unit once more shares all of it by halves."""
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    group = trace(fresh(Wide), x)["two"]
    with pytest.raises(ValueError, match="positive multiple of 1"):
        net2wider(group, 0)
    edit = net2wider(group, 5)
    counts = [edit.index.count(unit) for unit in range(5)]
    assert sum(counts) == 10
    assert all(edit.share[place] == 1 / counts[unit] for place, unit in enumerate(edit.index))
