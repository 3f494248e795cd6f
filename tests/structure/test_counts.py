"""Numbers that count blocks and lists with an entry for each of them follow depth, and nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.stacks import find_stacks, without
from lightning_grow.surgery import swap
from tests.zoo_entry import Model

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass
class Config:
    """Three layers, and numbers and lists that equal their number by accident."""

    num_layers: int = 3
    num_heads: int = 3
    kinds: list[str] = field(default_factory=lambda: ["plain", "double", "plain"])
    sizes: tuple[int, ...] = (2, 2, 2)


class Block(nn.Module):
    """A residual layer that knows its place."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.inner.layer_idx = place
        self.about = SimpleNamespace(layer_idx=place)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return x + factor * self.inner(x)


def model_of(forward: Callable[..., Tensor], count: int = 3, **parts: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = parts.pop("blocks", None) or nn.ModuleList(Block(i) for i in range(count))
        return Model(forward, stem=nn.Linear(5, 4), layers=blocks, head=nn.Linear(4, 2), **parts).double()


def by_slice(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    for layer in self.layers[: self.config.num_layers]:
        x = layer(x).reshape(-1, self.config.num_heads + 1)
    return self.head(x)


def by_range(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    for i in range(self.depths[0]):
        x = self.layers[i](x)
    return self.head(x)


def by_kind(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    for i, layer in enumerate(self.layers):
        x = layer(x, 2.0 if self.config.kinds[i] == "double" else 1.0)
    return self.head(x)


def by_zip(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    for layer, rate in zip(self.layers, self.rates, strict=False):
        x = layer(x, 1 - rate)
    return self.head(x)


CASES = {
    "slice": (by_slice, {"config": Config}, {("", "config.num_layers")}, set()),
    "range": (by_range, {"depths": lambda: (3, 7)}, {("", "depths[0]")}, set()),
    "kinds": (by_kind, {"config": Config}, set(), {("", "config.kinds")}),
    "rates": (by_zip, {"rates": lambda: (0.0, 0.1, 0.2)}, set(), {("", "rates")}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_counts_and_lists_are_found_and_follow(case: str, at: int) -> None:
    forward, kept, counts, lists = CASES[case]
    model = model_of(forward, **{name: make() for name, make in kept.items()})
    stack = find_stacks(model, model, (X,), {})["layers"]
    assert stack.obstacle is None
    assert set(stack.counts) == counts
    assert set(stack.per_block) == lists
    before, settings = model(X).detach(), copy.deepcopy(getattr(model, "config", None))
    lg.insert_(model, stack, at)
    torch.testing.assert_close(model(X).detach(), before, rtol=0, atol=1e-12)
    assert [block.inner.layer_idx for block in model.layers] == [0, 1, 2, 3]
    assert [block.about.layer_idx for block in model.layers] == [0, 1, 2, 3]
    if settings is not None:
        assert (model.config.num_heads, model.config.sizes) == (3, (2, 2, 2))
    longer = find_stacks(model, model, (X,), {})["layers"]
    lg.remove_(model, longer, at)
    assert getattr(model, "config", None) == settings
    torch.testing.assert_close(model(X).detach(), before, rtol=0, atol=1e-12)


def test_a_new_block_takes_the_entry_of_its_neighbour() -> None:
    model = model_of(by_kind, config=Config())
    lg.insert_(model, find_stacks(model, model, (X,), {})["layers"], 2)
    assert model.config.kinds == ["plain", "double", "double", "plain"]


def test_a_number_that_nothing_reads_is_no_count() -> None:
    model = model_of(lambda self, x: self.head(nn.Sequential(*self.layers)(self.stem(x))), config=Config())
    stack = find_stacks(model, model, (X,), {})["layers"]
    assert (stack.obstacle, stack.counts, stack.per_block) == (None, (), ())


def test_a_count_in_a_literal_is_an_obstacle() -> None:
    model = model_of(lambda self, x: self.head(self.layers[2](self.layers[1](self.layers[0](self.stem(x))))))
    stack = find_stacks(model, model, (X,), {})["layers"]
    assert stack.obstacle == "the forward pass does not run a block that is added"


def test_children_with_numbered_names_are_numbered_again() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = 3
            self.stem = nn.Linear(4, 4)
            for i in range(3):
                setattr(self, f"layer{i + 1}", Block(i))

        def forward(self, x: Tensor) -> Tensor:
            for i in range(self.count):
                x = getattr(self, f"layer{i + 1}")(x)
            return x

    model = model_of(lambda self, x: self.head(self.layers(self.stem(x))), blocks=Named())
    (stack,) = find_stacks(model, model, (X,), {}).values()
    assert (stack.obstacle, stack.counts) == (None, (("layers", "count"),))
    before, old = model(X).detach(), model.layers.layer2
    lg.insert_(model, stack, 1)
    assert [n for n, _ in model.layers.named_children()] == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert model.layers.layer3 is old
    torch.testing.assert_close(model(X).detach(), before)
    (longer,) = find_stacks(model, model, (X,), {}).values()
    lg.remove_(model, longer, 1)
    assert model.layers.layer2 is old
    assert model.layers.count == 3


def test_children_that_are_not_numbered_keep_their_names() -> None:
    parts = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1), "c7": nn.Linear(1, 1)})
    assert list(without(parts, "a")) == ["b", "c7"]


def test_blocks_behind_a_run_count_on() -> None:
    class Other(Block):
        """Of another kind, so that it is no block of the run."""

    model = model_of(
        lambda self, x: self.head(nn.Sequential(*self.layers)(self.stem(x))),
        blocks=nn.ModuleList([Block(0), Block(1), Other(2)]),
    )
    stack = next(s for s in find_stacks(model, model, (X,), {}).values() if len(s.blocks) == 2)
    lg.insert_(model, stack, 1)
    assert [block.inner.layer_idx for block in model.layers] == [0, 1, 2, 3]
    stack = next(s for s in find_stacks(model, model, (X,), {}).values() if len(s.blocks) == 3)
    lg.remove_(model, stack, 0)
    assert [block.about.layer_idx for block in model.layers] == [0, 1, 2]


def test_a_failing_insertion_takes_back_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(by_slice, config=Config())
    stack = find_stacks(model, model, (X,), {})["layers"]
    monkeypatch.setattr(swap.Commit, "_renew_caches", lambda self: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        lg.insert_(model, stack, 1)
    assert model.config == Config()
    assert [block.about.layer_idx for block in model.layers] == [0, 1, 2]


def test_a_stack_that_counts_is_plain_data_and_other_models_are_refused() -> None:
    model = model_of(by_slice, config=Config())
    structure = lg.trace(model, X)
    again = lg.Structure.from_dict(structure.to_dict())
    assert again == structure
    assert again.stacks["layers"].counts == (("", "config.num_layers"),)
    del model.config
    with pytest.raises(lg.StructureError, match="how many blocks 'layers' has"):
        lg.insert_(model, again.stacks["layers"], 1)
