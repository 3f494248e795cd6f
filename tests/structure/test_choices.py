"""Where equations leave a choice, the one is taken that changes a model least."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_grow as lg
from lightning_grow.structure.proposal import propose
from lightning_grow.structure.stacks import find_stacks
from lightning_grow.structure.trace import _Tracer
from tests.zoo_entry import Model


class Attention(nn.Module):
    """Fused projections, split by a width kept in Python; heads divide what they are given."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.inner, self.heads = inner, heads
        self.fused, self.out = nn.Linear(width, 3 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.fused(x).split(self.inner, dim=2)
        query, key, value = (p.view(*p.shape[:2], self.heads, p.shape[-1] // self.heads).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_the_number_of_heads_varies_rather_than_their_size() -> None:
    """More heads need no other scale, larger ones do."""
    model = Attention(10, 12, 3)
    structure = lg.trace(model, torch.randn(2, 5, 10))
    (group,) = structure.groups.values()
    assert (group.size, group.obstacle) == (3, None)
    assert {str(axis) for axis in group.axes} >= {"fused.weight[0] = 3*fused*4", "out.weight[1] = fused*4"}
    assert {(a.name, str(a.layout[0].length({"fused": 5}))) for a in group.attributes} >= {
        ("inner", "20"),
        ("heads", "5"),
    }


def test_a_norm_of_a_long_concatenation_is_carried_along() -> None:
    """The engine does not put sums of many terms in the place of a symbol; the norm is seen to read no units."""

    def forward(self: Any, x: Tensor) -> Tensor:
        parts = [torch.tanh(layer(x)) for layer in self.layers]
        return self.head(torch.relu(self.norm(torch.cat(parts, 1))))

    layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(7))
    model = Model(forward, layers=layers, norm=nn.BatchNorm1d(21), head=nn.Linear(21, 2)).eval()
    x = torch.randn(5, 4)
    structure = lg.trace(model, x)
    assert {group.obstacle for group in structure.groups.values()} == {None}
    before = model(x).detach()
    lg.apply_(model, [lg.split(group, [1]) for group in structure.groups.values()])
    torch.testing.assert_close(model(x), before)


class Norm(nn.Module):
    """A norm of one's own without parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = (width,)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape)


def test_a_size_that_is_met_in_one_module_is_freed_in_all_of_its_class() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(self.last(x))

    norms, layers = nn.ModuleList(Norm(8) for _ in range(3)), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    model = Model(forward, stem=nn.Linear(5, 8), norms=norms, layers=layers, last=Norm(8), head=nn.Linear(8, 2))
    structure = lg.trace(model, torch.randn(2, 5))
    assert structure["stem"].size == 8
    assert {a.module for a in structure["stem"].attributes if a.name == "shape"} == {
        "norms.0", "norms.1", "norms.2", "last"
    }  # fmt: skip


class Scaled(nn.Module):
    """Blocks whose number matters only further up."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(Residual() for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Residual(nn.Module):
    """The identity if its layer is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("counts", [False, True])
def test_what_looks_right_nearby_is_tried_in_the_whole_model(counts: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        scale = len(self.body.inner) if counts else 2
        return self.head(self.body(self.stem(x)) / scale)

    model = Model(forward, stem=nn.Linear(3, 4), body=Scaled(), head=nn.Linear(4, 2))
    x = torch.randn(2, 3)
    stack = find_stacks(model, model, (x,), {})["body.inner"]
    assert stack.zeroed == ("down.weight", "down.bias")
    assert stack.obstacle == ("a new block changes the output, although it returns its input" if counts else None)


def test_what_works_entry_by_entry_mixes_nothing() -> None:
    """Queries, keys and values have sizes of their own until they meet: views and products add nothing up."""

    def forward(self: Any, x: Tensor) -> Tensor:
        heads = (part(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for part in self.parts)
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    parts = nn.ModuleList(nn.Linear(6, 12) for _ in range(3))
    model, x = Model(forward, parts=parts, out=nn.Linear(12, 2)), torch.randn(2, 5, 6)
    tracer = _Tracer(model, model, (x,), {})
    proposal = propose(tracer.subject, tracer._run(tracer.bound, {}))
    assert [group.size for group in proposal.groups] == [3]
    assert proposal.mixing == {}
