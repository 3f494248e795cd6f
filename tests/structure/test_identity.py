"""Which parameters of a block are zero so that it starts as the identity, and why there are none elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.stacks import find_stacks
from tests.zoo_entry import Model, weight

WIDTH = 8


def pre_norm() -> nn.Module:
    return Model(
        lambda self, x: x + self.down(torch.relu(self.up(self.norm(x)))),
        norm=nn.LayerNorm(WIDTH),
        up=nn.Linear(WIDTH, 12),
        down=nn.Linear(12, WIDTH),
    )


def parallel_residual() -> nn.Module:
    """Attention and perceptron read the same input, as in GPT-J."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        mixed = (self.q(h) @ self.k(h).transpose(-1, -2)).softmax(-1) @ self.v(h)
        return x + self.out(mixed) + self.down(torch.relu(self.up(h)))

    linears = {n: nn.Linear(WIDTH, WIDTH) for n in ("q", "k", "v", "out", "up", "down")}
    return Model(forward, norm=nn.LayerNorm(WIDTH), **linears)


def gated() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(torch.sigmoid(self.gate(h)) * self.up(h))

    parts = {n: nn.Linear(WIDTH, WIDTH, bias=False) for n in ("gate", "up", "down")}
    return Model(forward, norm=nn.RMSNorm(WIDTH), **parts)


def layer_scale() -> nn.Module:
    return Model(
        lambda self, x: x + self.scale * self.down(torch.relu(self.up(x))),
        up=nn.Linear(WIDTH, 12),
        down=nn.Linear(12, WIDTH),
        scale=weight(WIDTH),
    )


def mixture() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2, -1)
        gates = torch.zeros(*x.shape[:-1], 3).to(x).scatter(-1, chosen, gates)
        hidden = torch.relu(torch.einsum("bti,eih->bteh", self.norm(x), self.up))
        return x + torch.einsum("bteh,eho,bte->bto", hidden, self.down, gates)

    experts = {"up": weight(3, WIDTH, 5), "down": weight(3, 5, WIDTH)}
    return Model(forward, norm=nn.RMSNorm(WIDTH), router=nn.Linear(WIDTH, 3), **experts)


def state_space() -> nn.Module:
    """A selective scan with a gate and a skip inside the branch."""

    def forward(self: Any, x: Tensor) -> Tensor:
        u, gate = self.enter(self.norm(x)).chunk(2, -1)
        decay = torch.exp(-torch.nn.functional.softplus(self.step(u)) * self.log_decay.exp())
        state, outputs = torch.zeros_like(u[:, 0]), []
        for t in range(u.shape[1]):
            state = decay[:, t] * state + u[:, t]
            outputs.append(state + self.skip * u[:, t])
        return x + self.leave(torch.stack(outputs, 1) * torch.sigmoid(gate))

    parts = {"enter": nn.Linear(WIDTH, 12), "step": nn.Linear(6, 6), "leave": nn.Linear(6, WIDTH, bias=False)}
    return Model(forward, norm=nn.RMSNorm(WIDTH), log_decay=weight(6), skip=weight(6), **parts)


def post_norm() -> nn.Module:
    return Model(lambda self, x: self.norm(x + self.body(x)), norm=nn.LayerNorm(WIDTH), body=nn.Linear(WIDTH, WIDTH))


def no_residual() -> nn.Module:
    return Model(lambda self, x: self.down(torch.relu(self.up(x))), up=nn.Linear(WIDTH, 12), down=nn.Linear(12, WIDTH))


def highway() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        share = torch.sigmoid(self.gate(x))
        return share * torch.tanh(self.body(x)) + (1 - share) * x

    return Model(forward, gate=nn.Linear(WIDTH, WIDTH), body=nn.Linear(WIDTH, WIDTH))


def conv_residual() -> nn.Module:
    layers = [nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    body = nn.Sequential(*layers, nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    return Model(lambda self, x: torch.relu(x + self.body(x)), body=body)


def tower(make: Callable[[], nn.Module], images: bool = False) -> tuple[nn.Module, Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = nn.ModuleList(make() for _ in range(2))
        stem: nn.Module = nn.Conv2d(3, 4, 3, padding=1) if images else nn.Linear(5, WIDTH)
        head = nn.Linear(4 * 16 if images else 3 * WIDTH, 2)
        model = Model(forward, stem=stem, blocks=blocks, head=head).double()
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
        x = torch.randn(2, 3, 4, 4) if images else torch.randn(2, 3, 5)
    return model, x.double()


EXACT = {
    pre_norm: ("down.weight", "down.bias"),
    parallel_residual: ("out.weight", "out.bias", "down.weight", "down.bias"),
    gated: ("down.weight",),
    layer_scale: ("down.weight", "down.bias"),
    mixture: ("down",),
    state_space: ("leave.weight",),
    conv_residual: ("body.4.weight", "body.4.bias"),
}


@pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)
@pytest.mark.parametrize("at", [0, 2])
def test_a_residual_block_starts_as_the_identity_and_its_fan_out_learns(make: Callable[[], nn.Module], at: int) -> None:
    model, x = tower(make, images=make is conv_residual)
    stack = find_stacks(model, model, (x,), {})["blocks"]
    assert stack.obstacle is None
    assert stack.zeroed == EXACT[make]
    model.eval()
    before = model(x).detach()
    lg.insert_(model, stack, at)
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-10)
    model(x).square().sum().backward()
    zeroed = dict(model.blocks[at].named_parameters())
    assert all(bool(zeroed[name].grad.any()) for name in stack.zeroed)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (post_norm, r"each block ends in a LayerNorm \(post-norm, 'norm'\)"),
        (no_residual, r"each block ends in a Linear \('down'\): no sum carries its input past it"),
        (highway, "nothing carries the input to the output unchanged"),
    ],
)
def test_what_cannot_start_as_the_identity_says_why(make: Callable[[], nn.Module], reason: str) -> None:
    model, x = tower(make)
    stack = find_stacks(model, model, (x,), {})["blocks"]
    with pytest.raises(lg.StructureError, match=reason):
        lg.insert_(model, stack, 1)
    lg.insert_(model, stack, 1, preserve=False)
    assert model(x).shape == (2, 2)


def test_a_block_that_writes_to_a_cache_is_tried_on_the_cache_as_it_was() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys: dict[int, Tensor] = {}

    class Cached(nn.Module):
        def __init__(self, layer_idx: int) -> None:
            super().__init__()
            self.layer_idx, self.key, self.out = layer_idx, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, mask: Tensor, cache: Cache) -> Tensor:
            keys = [cache.keys[self.layer_idx]] if self.layer_idx in cache.keys else []
            cache.keys[self.layer_idx] = torch.cat([*keys, self.key(x)], 1)
            keys_and_values = cache.keys[self.layer_idx]
            return x + self.out((x @ keys_and_values.transpose(1, 2) + mask).softmax(-1) @ keys_and_values)

    def forward(self: Any, x: Tensor) -> Tensor:
        x, cache = self.stem(x), Cache()
        for block in self.blocks:
            x = block(x, torch.zeros(3, 3).to(x), cache=cache)
        return self.head(x)

    blocks = nn.ModuleList(Cached(i) for i in range(2))
    model = Model(forward, stem=nn.Linear(5, WIDTH), blocks=blocks, head=nn.Linear(WIDTH, 2))
    x = torch.randn(2, 3, 5)
    stack = find_stacks(model, model, (x,), {})["blocks"]
    assert stack.obstacle is None
    before = model(x).detach()
    lg.insert_(model, stack, 1)
    assert [block.layer_idx for block in model.blocks] == [0, 1, 2]
    torch.testing.assert_close(model(x).detach(), before)


def test_searching_leaves_blocks_as_they_are() -> None:
    model, x = tower(pre_norm)
    before = copy.deepcopy(model.state_dict())
    find_stacks(model, model, (x,), {})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_of_a_batch_norm_that_has_not_been_trained_prove_nothing() -> None:
    """With running means of zero, zeros in front of the last norm would do; after some steps they no longer would."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.conv(x))

    layers = nn.Sequential(Residual(), Residual())
    model = nn.Sequential(nn.Conv2d(1, 4, 3), layers, nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(4, 1, 6, 6)
    model(x)
    stack = lg.trace(model, x).stacks["1"]
    for _ in range(3):
        model.train()(x + 1)
    before = model.eval()(x).detach()
    lg.insert_(model, stack, 2)
    torch.testing.assert_close(model.eval()(x), before)
