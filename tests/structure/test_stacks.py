"""Runs of blocks, and what makes a new block the identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.identity import make_identity_
from lightning_grow.structure.stacks import inserted
from tests.zoo_convolutions import Residual
from tests.zoo_entry import Model
from tests.zoo_sequences import Block, FusedAttention


class Ffn(nn.Module):
    """A residual perceptron."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def run_all(self: Any, x: Tensor) -> Tensor:
    x = self.embed(x)
    for block in self.blocks:
        x = block(x)
    return self.head(x)


def tower(blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Model(run_all, embed=nn.Linear(5, 8), blocks=blocks, head=nn.Linear(8, 3))


def test_residual_blocks_in_a_list_are_a_stack() -> None:
    model = tower(nn.ModuleList(Ffn(8, 6) for _ in range(3)))
    structure = lg.trace(model, torch.randn(4, 5))
    assert list(structure.stacks) == ["blocks"]
    stack = structure.stacks["blocks"]
    assert stack.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert stack.obstacle is None
    assert stack.zeroed == ("down.weight", "down.bias")
    assert stack.identity == ()


def test_blocks_of_different_kinds_break_a_run() -> None:
    blocks = nn.Sequential(Ffn(8, 6), Ffn(8, 7), Block(8, 6, nn.Identity()), Ffn(8, 6))
    model = nn.Sequential(nn.Linear(5, 8), blocks, nn.Linear(8, 3))
    structure = lg.trace(model, torch.randn(4, 5))
    runs = [stack.blocks for stack in structure.stacks.values()]
    assert ("1.0", "1.1") in runs
    assert all(not {"1.1", "1.2"} <= set(run) for run in runs)


def test_blocks_that_do_not_follow_each_other_are_no_stack() -> None:
    """Experts read the same input: another one behind the last would not be deeper."""
    model = tower(nn.ModuleList(Ffn(8, 6) for _ in range(3)))
    model.function = lambda self, x: self.head(sum(block(self.embed(x)) for block in self.blocks))
    structure = lg.trace(model, torch.randn(4, 5))
    assert all(len(stack.blocks) < 2 or stack.obstacle for stack in structure.stacks.values())


def test_a_post_norm_block_has_an_obstacle() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    stack = lg.trace(model, torch.randn(2, 3, 8)).stacks["layers"]
    assert len(stack.blocks) == 2
    assert stack.obstacle is not None


def test_a_stack_with_an_unused_spare_block_is_understood() -> None:
    model = tower(nn.ModuleList(Ffn(8, 6) for _ in range(3)))
    model.function = lambda self, x: self.head(self.blocks[1](self.blocks[0](self.embed(x))))
    structure = lg.trace(model, torch.randn(4, 5))
    stack = structure.stacks["blocks"]
    assert stack.blocks == ("blocks.0", "blocks.1")
    assert stack.obstacle is not None


def test_rebuilding_a_stack_from_the_same_block_keeps_the_output() -> None:
    """The promise behind a stack without obstacle, checked without `insert_`."""
    model = tower(nn.Sequential(*(Block(8, 6, FusedAttention(8, 2)) for _ in range(2)))).double().eval()
    x = torch.randn(2, 3, 5).double()
    stack = lg.trace(model, x).stacks["blocks"]
    assert stack.obstacle is None
    before = model(x)
    new = Block(8, 6, FusedAttention(8, 2)).double().eval()
    make_identity_(new, stack.zeroed, stack.identity)
    model.blocks.append(new)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_plain_layers_become_the_identity_behind_a_relu() -> None:
    """Net2DeeperNet: a new layer with an identity weight behind a ReLU returns its input."""
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Sequential(*layers), nn.Linear(8, 3))
    stack = lg.trace(model, torch.randn(4, 5)).stacks["2"]
    assert stack.obstacle is None
    assert stack.identity == ("0.weight",)
    assert stack.zeroed == ("0.bias",)


def test_convolution_with_batch_norm_becomes_the_identity() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).double()
    block[1].running_mean.normal_()
    block[1].running_var.uniform_(0.5, 2)
    make_identity_(block, (), ("0.weight",))
    x = torch.randn(2, 4, 5, 5).double()
    torch.testing.assert_close(block.eval()(x), x, rtol=0, atol=1e-12)


def test_blocks_that_change_the_shape_are_not_repeated() -> None:
    model = nn.Sequential(Residual(3, 5, 6, 2), Residual(6, 5, 8, 2), nn.Flatten(), nn.Linear(8, 3))
    structure = lg.trace(model, torch.randn(2, 3, 4, 4))
    assert all(not {"0", "1"} <= set(stack.blocks) for stack in structure.stacks.values())


def test_finding_stacks_leaves_the_model_as_it_is() -> None:
    model = tower(nn.ModuleList(Ffn(8, 6) for _ in range(2)))
    children, state = list(model.blocks), {n: t.clone() for n, t in model.state_dict().items()}
    lg.trace(model, torch.randn(4, 5))
    assert all(a is b for a, b in zip(model.blocks, children, strict=True))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("names", "at", "expected"),
    [
        (["0", "1"], "1", ["0", "new", "1"]),
        (["0", "1"], "", ["0", "1", "new"]),
        (["layer1", "layer2"], "layer2", ["layer1", "new", "layer2"]),
    ],
)
def test_a_block_is_put_in_front_of_another(names: list[str], at: str, expected: list[str]) -> None:
    container, new = nn.ModuleDict(), nn.Linear(1, 1)
    for name in names:
        container.add_module(name, nn.Linear(1, 1))
    old = dict(container.named_children())
    children = inserted(container, at, new)
    order = [next((n for n, child in old.items() if child is block), "new") for block in children.values()]
    assert order == expected
    if names[0].isdigit():
        assert list(children) == [str(i) for i in range(len(children))]
