"""Residual streams grow exactly under the norms that average over them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.axes import AxisGroup

VOCABULARY, WIDTH = 20, 12
EXACT = {"rtol": 0.0, "atol": 1e-10}


class HandWritten(nn.Module):
    """A root mean square as many projects write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Transformer(nn.Module):
    """Embeddings, positions, two residual blocks and a head, which may be tied to the embedding."""

    def __init__(self, norm: Callable[[int], nn.Module], tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(7, WIDTH))
        self.blocks = nn.Sequential(Block(norm), Block(norm))
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.position)))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer norm": nn.LayerNorm,
    "layer norm without bias": lambda width: nn.LayerNorm(width, bias=False),
    "layer norm, large eps": lambda width: nn.LayerNorm(width, eps=5e-3),
    "rms norm": nn.RMSNorm,
    "rms norm, large eps": lambda width: nn.RMSNorm(width, eps=5e-3),
    "hand-written rms norm": HandWritten,
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=list(NORMS))
is_tied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def stream(norm: Callable[[int], nn.Module], tied: bool = False) -> tuple[nn.Module, Tensor, AxisGroup]:
    """A model with small embeddings, so that eps counts, its input, and its residual stream."""
    torch.manual_seed(0)
    model, tokens = Transformer(norm, tied).double(), torch.randint(VOCABULARY, (3, 7))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.1) if "embedding" in name or "position" in name else parameter.add_(
                torch.randn_like(parameter), alpha=0.1
            )
    groups = lg.trace(model, tokens).groups.values()
    return model, tokens, next(group for group in groups if group.size == WIDTH)


@is_tied
@every_norm
def test_any_number_of_units_is_added_exactly(norm: Callable[[int], nn.Module], tied: bool) -> None:
    model, tokens, group = stream(norm, tied)
    assert "over this axis" in (group.obstacle or "")
    before = model(tokens).detach()
    for edit in (lg.widen(group, 1, preserve=True), lg.widen(group, 5, preserve=True)):
        grown = copy.deepcopy(model)
        lg.apply_(grown, [edit])
        assert grown.norm.weight.numel() == edit.new_size
        torch.testing.assert_close(grown(tokens), before, **EXACT)


@every_norm
def test_twice_is_as_exact_as_once(norm: Callable[[int], nn.Module]) -> None:
    model, tokens, group = stream(norm)
    before = model(tokens).detach()
    for _ in range(2):
        structure = lg.trace(model, tokens)
        lg.apply_(model, [lg.widen(structure[group.name], 3, preserve=True)])
    assert model.norm.weight.numel() == WIDTH + 6
    torch.testing.assert_close(model(tokens), before, **EXACT)


@every_norm
def test_without_the_recipe_the_function_changes(norm: Callable[[int], nn.Module]) -> None:
    model, tokens, group = stream(norm)
    before = model(tokens).detach()
    lg.apply_(model, [lg.widen(group, 5)])
    assert (model(tokens) - before).abs().max() > 1e-3


@every_norm
def test_whole_multiples_are_copies_and_pruning_them_is_the_inverse(norm: Callable[[int], nn.Module]) -> None:
    model, tokens, group = stream(norm)
    assert group.copies
    before, values = model(tokens).detach(), {n: t.clone() for n, t in model.state_dict().items()}
    lg.apply_(model, [lg.widen(group, 2 * WIDTH)])
    torch.testing.assert_close(model(tokens), before, **EXACT)
    lg.apply_(model, [lg.prune(lg.trace(model, tokens)[group.name], range(WIDTH, 3 * WIDTH))])
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())


def test_copies_would_count_twice_in_a_tied_head() -> None:
    _, _, group = stream(nn.LayerNorm, tied=True)
    assert not group.copies
    assert group.padding is not None


@is_tied
@every_norm
def test_new_units_learn_and_part(norm: Callable[[int], nn.Module], tied: bool) -> None:
    model, tokens, group = stream(norm, tied)
    lg.apply_(model, [lg.widen(group, 2, preserve=True)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    rows = model.blocks[0].down.weight.grad[WIDTH:]
    assert (rows.abs().amax(1) > 0).all()
    optimizer.step()
    first, second = model.embedding.weight[:, WIDTH], model.embedding.weight[:, WIDTH + 1]
    assert not torch.allclose(first, second)


def test_optimizer_state_follows_the_gain() -> None:
    """The gain is multiplied by sqrt(n/m): its gradient, and what the optimizer remembers of it, is divided by that."""
    model, tokens, group = stream(nn.RMSNorm)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(tokens).square().sum().backward()
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state[model.norm.weight].items()}
    optimizer.zero_grad()
    lg.apply_(model, [lg.widen(group, 4, preserve=True)], optimizers=[optimizer])
    factor = (WIDTH / (WIDTH + 4)) ** 0.5
    after = optimizer.state[model.norm.weight]
    torch.testing.assert_close(after["exp_avg"][:WIDTH], state["exp_avg"] / factor)
    torch.testing.assert_close(after["exp_avg_sq"][:WIDTH], state["exp_avg_sq"] / factor**2)


class WithoutGain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])


def test_norms_without_gains_cannot_make_up_for_it() -> None:
    _, _, group = stream(lambda width: nn.Sequential(WithoutGain(width), nn.Linear(width, width)))
    assert group.padding is None
    assert group.copies
    with pytest.raises(lg.StructureError, match=r"LayerNorm averages .* Whole multiples of 12 units do"):
        lg.widen(group, 5, preserve=True)


def test_a_failing_edit_leaves_gains_and_eps_alone() -> None:
    model, _, group = stream(nn.LayerNorm)
    values = {n: t.clone() for n, t in model.state_dict().items()}
    handle = model.head.weight.register_hook(lambda grad: grad)
    with pytest.raises(lg.StructureError, match="has hooks"):
        lg.apply_(model, [lg.widen(group, 3, preserve=True)])
    handle.remove()
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    assert model.norm.eps == nn.LayerNorm(3).eps


def test_the_recipe_is_plain_data() -> None:
    model, tokens, group = stream(nn.LayerNorm)
    structure = lg.trace(model, tokens)
    assert lg.Structure.from_dict(structure.to_dict()) == structure
    assert group.padding is not None
    assert group.padding.fill == "mean"


def test_two_widths_of_one_axis_are_padded_one_after_the_other() -> None:
    class TwoStreams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)) for _ in range(2))
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Any:
            return self.head(torch.cat([self.left(x), self.right(x)], -1))

    model, x = TwoStreams().double(), torch.randn(4, 5).double()
    edits = [lg.widen(group, 2, preserve=True) for group in lg.trace(model, x).groups.values()]
    with pytest.raises(ValueError, match="one call after the other"):
        lg.apply_(model, edits)
    before = model(x).detach()
    for name in list(lg.trace(model, x).groups):
        lg.apply_(model, [lg.widen(lg.trace(model, x)[name], 2, preserve=True)])
    torch.testing.assert_close(model(x), before, **EXACT)
