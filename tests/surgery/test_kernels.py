"""Larger kernels: exact for every ordinary convolution, the optimizer follows, what cannot be is refused by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_grow.structure import StructureError
from lightning_grow.surgery import KernelEdit, enlarge, enlarge_, resize_like_

LAYERS = {
    "conv1d": (nn.Conv1d(2, 4, 3, padding=1), 5),
    "conv2d": (nn.Conv2d(2, 4, 3, padding=1), 7),
    "conv3d": (nn.Conv3d(2, 4, 3, padding=1), 5),
    "no padding": (nn.Conv2d(2, 4, 3), 5),
    "pointwise": (nn.Conv2d(2, 4, 1), 3),
    "even kernel": (nn.Conv2d(2, 4, 2, padding=1), 4),
    "one side only": (nn.Conv2d(2, 4, (1, 3), padding=(0, 1)), (3, 3)),
    "stride": (nn.Conv2d(2, 4, 3, stride=2, padding=1), 5),
    "dilation": (nn.Conv2d(2, 4, 3, dilation=2, padding=2), 5),
    "groups": (nn.Conv2d(2, 4, 3, groups=2, padding=1), 5),
    "depthwise": (nn.Conv2d(2, 2, 3, groups=2, padding=1, bias=False), 5),
    "same": (nn.Conv2d(2, 4, 3, padding="same"), 5),
    "same, even and dilated": (nn.Conv2d(2, 4, 2, padding="same", dilation=3), 4),
    "valid": (nn.Conv2d(2, 4, 3, padding="valid"), 5),
    "replicate": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate"), 7),
    "replicate, same": (nn.Conv2d(2, 4, 2, padding="same", padding_mode="replicate"), 4),
    "transposed": (nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1), 5),
    "transposed, groups": (nn.ConvTranspose2d(2, 4, 3, groups=2, dilation=2), 5),
}


def image(layer, size=9):
    ndim = layer.weight.ndim - 2
    return torch.randn(2, 2, *(size,) * ndim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_larger_kernel_computes_the_same(name):
    """T2.5: what a torch layer built with the larger size and padding computes with these weights, too."""
    layer, size = LAYERS[name]
    model = nn.Sequential(copy.deepcopy(layer)).double()
    x = image(layer)
    expected = model(x)
    enlarge_(model, [enlarge(model, "0", size)])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    after = (size,) * (layer.weight.ndim - 2) if isinstance(size, int) else size
    assert model[0].kernel_size == tuple(model[0].weight.shape[2:]) == after
    options = {n: getattr(model[0], n) for n in ("stride", "padding", "dilation", "groups", "padding_mode")}
    if layer.transposed:
        options["output_padding"] = layer.output_padding
    twin = type(layer)(2, layer.out_channels, after, bias=layer.bias is not None, **options).double()
    twin.load_state_dict(model[0].state_dict())
    assert torch.equal(twin(x), model(x))
    assert twin._reversed_padding_repeated_twice == model[0]._reversed_padding_repeated_twice
    enlarge_(model, [enlarge(model, "0", [n + 2 for n in after])])  # and again
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)).double()


def stepped(model, optimizer):
    x = image(model[0])
    F.mse_loss(model(x), torch.ones_like(model(x))).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("new_state", ["mean", "zeros"])
def test_the_parameter_stays_the_same_object_and_its_state_is_padded(new_state):
    model = net()
    weight, optimizer = model[0].weight, torch.optim.AdamW(model.parameters(), lr=1e-2)
    stepped(model, optimizer)
    before = {k: v.clone() for k, v in optimizer.state[weight].items()}
    untouched = {k: v.clone() for k, v in optimizer.state[model[2].weight].items()}
    enlarge_(model, [enlarge(model, "0", 5)], [optimizer], new_state=new_state)
    assert model[0].weight is weight
    assert weight in optimizer.state
    after = optimizer.state[weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[key][:, :, 1:-1, 1:-1], before[key])
    rim = torch.ones(5, 5, dtype=torch.bool)
    rim[1:-1, 1:-1] = False
    assert not after["exp_avg"][:, :, rim].any()
    assert (after["exp_avg_sq"][:, :, rim] > 0).all() == (new_state == "mean")
    assert all(torch.equal(optimizer.state[model[2].weight][k], v) for k, v in untouched.items())
    stepped(model, optimizer)
    assert weight[:, :, rim].detach().abs().min() > 0


@torch.no_grad()
def test_convolutions_that_share_a_weight_grow_together():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, dilation=2, padding=2)).double()
    model[2].weight = model[0].weight
    x = image(model[0])
    expected = model(x)
    enlarge_(model, [enlarge(model, "2", 5)])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    assert (model[0].padding, model[2].padding) == ((2, 2), (4, 4))
    assert model[0].weight is model[2].weight
    with pytest.raises(ValueError, match=r"weight of '2' is enlarged twice"):
        enlarge_(model, [enlarge(model, "0", 7), enlarge(model, "2", 7)])


class Own(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, padding=1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mask = nn.Conv2d(2, 2, 3), nn.Module()
        self.mask.kernel = self.conv.weight


REFUSED = {
    "reflect": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "its border is 'reflect'"),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "its border is 'circular'"),
    "linear": (lambda: nn.Linear(2, 2), "a Linear is no convolution"),
    "own": (lambda: Own(2, 2, 3), "Own has a forward of its own"),
    "lazy": (lambda: nn.LazyConv2d(2, 3), "its weight has no shape yet"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), "computed from other tensors"),
    "pruned": (
        lambda: nn.utils.prune.random_unstructured(nn.Conv2d(2, 2, 3), "weight", 0.5),
        "computed from other tensors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_grow_is_refused_by_name(name):
    make, reason = REFUSED[name]
    model = nn.ModuleDict({"layer": make()})
    with pytest.raises(StructureError, match=rf"The kernel of 'layer' cannot grow.*{reason}"):
        enlarge(model, "layer", 5)


def test_a_weight_shared_with_something_else_is_refused():
    with pytest.raises(StructureError, match="'mask', which is no ordinary convolution, shares its weight"):
        enlarge(Tied(), "conv", 5)


@pytest.mark.parametrize("size", [4, 1, (5,), (5, 4)])
def test_sizes_that_do_not_go_together_are_refused(size):
    with pytest.raises(ValueError, match="grows by an even number along each of its dimensions"):
        enlarge(net(), "0", size)


def test_all_or_nothing():
    """The second edit was planned for another size: the first is not done either."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    stepped(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    good = enlarge(model, "0", 5)
    with pytest.raises(StructureError, match=r"'2' was planned for a kernel of \(5, 5\), but it has \(3, 3\)"):
        enlarge_(model, [good, KernelEdit("2", (5, 5), (7, 7))], [optimizer])
    model[2].weight.register_hook(lambda gradient: gradient)
    with pytest.raises(StructureError, match=r"'2.weight' of shape \(3, 4, 3, 3\) has hooks"):
        enlarge_(model, [good, enlarge(model, "2", 5)], [optimizer])
    assert (model[0].kernel_size, model[0].padding) == ((3, 3), (1, 1))
    after = model.state_dict(), optimizer.state_dict()["state"]
    for was, now in ((before[0], after[0]), (before[1][0], after[1][0]), (before[1][2], after[1][2])):
        assert all(torch.equal(was[key], now[key]) for key in was)


@torch.no_grad()
def test_a_model_takes_on_larger_kernels_and_smaller_ones_from_a_state_dict():
    small, large = net(), net()
    enlarge_(large, [enlarge(large, "0", 7), enlarge(large, "2", (3, 5))])
    nn.init.normal_(large[0].weight)
    grown, fresh = large.state_dict(), net()
    resize_like_(fresh, grown)
    x = image(small[0])
    assert torch.equal(fresh(x), large(x))
    assert (fresh[0].padding, fresh[2].padding, fresh[2].kernel_size) == ((3, 3), (1, 2), (3, 5))
    resize_like_(fresh, small.state_dict())
    assert torch.equal(fresh(x), small(x))


def test_a_state_dict_whose_kernels_are_of_another_model_is_refused():
    other = nn.Sequential(nn.Conv2d(2, 4, 4, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)).double()
    model = net()
    with pytest.raises(StructureError, match=r"'0' has a kernel of \(3, 3\).*one of \(4, 4\)"):
        resize_like_(model, other.state_dict())
    assert model[0].weight.shape == (4, 2, 3, 3)
