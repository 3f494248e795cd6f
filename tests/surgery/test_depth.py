"""Blocks come as the identity, go without a trace, and optimizers know both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_grow.structure import trace
from lightning_grow.structure.axes import Stack
from lightning_grow.structure.errors import StructureError
from lightning_grow.surgery import apply_, depth, insert_, prune, remove_
from tests.surgery.models import assert_same, snapshot


@dataclass
class Settings:
    """A configuration that all blocks share."""

    width: int = 4


class Residual(nn.Module):
    """A residual block that knows its place, a shared configuration, a shared scale and a tied weight."""

    def __init__(self, position: int, settings: Settings, scale: nn.Module, tied: nn.Parameter) -> None:
        super().__init__()
        self.layer_idx, self.heads, self.settings = position, 1, settings
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.out = nn.Linear(4, 4)
        self.out.weight.no_decay = True
        self.scale, self.tied = scale, tied

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.scale(self.inner(x) @ self.tied))


class Deep(nn.Module):
    """A stem, residual blocks, and a head; ``kind`` is the class of the container."""

    def __init__(self, blocks: int = 2, kind: str = "ModuleList") -> None:
        super().__init__()
        settings, scale, tied = Settings(), nn.Linear(4, 4), nn.Parameter(torch.eye(4))
        self.stem, self.scale, self.tied = nn.Linear(3, 4), scale, tied
        layers = [Residual(i, settings, scale, tied) for i in range(blocks)]
        self.blocks = {
            "ModuleList": lambda: nn.ModuleList(layers),
            "Sequential": lambda: nn.Sequential(*layers),
            "ModuleDict": lambda: nn.ModuleDict({f"block{i}": b for i, b in enumerate(layers)}),
        }[kind]()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks:
            x = block(x)
        return self.head(x)


INPUTS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ZEROED = ("out.weight", "out.bias")


def deep(blocks: int = 2, kind: str = "ModuleList") -> Deep:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Deep(blocks, kind).double()


def stack(model: Deep) -> Stack:
    return Stack("blocks", tuple(f"blocks.{n}" for n, _ in model.blocks.named_children()), zeroed=ZEROED)


def train(model: nn.Module, *optimizers: Any, steps: int = 3) -> None:
    for _ in range(steps):
        model.zero_grad()
        model(INPUTS).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    model.zero_grad()


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(INPUTS)


@pytest.mark.parametrize("kind", ["ModuleList", "Sequential", "ModuleDict"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_new_block_is_the_identity_and_removing_it_is_the_inverse(kind: str, at: int) -> None:
    model = deep(kind=kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    before, output = snapshot(model, optimizer), answer(model)
    insert_(model, stack(model), at, [optimizer])
    assert len(model.blocks) == 3
    assert torch.equal(answer(model), output)
    remove_(model, stack(model), at, [optimizer])
    after = snapshot(model, optimizer)
    assert_same(after, before)


def test_a_new_block_learns_and_shares_what_its_neighbour_shares() -> None:
    model = deep()
    model.blocks[1].inner[0].weight.requires_grad_(False)
    model.blocks[1].inner.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    train(model, optimizer)
    insert_(model, stack(model), 2, [optimizer])
    new, neighbour = model.blocks[2], model.blocks[1]
    assert new is not neighbour
    assert new.settings is neighbour.settings
    assert new.scale is neighbour.scale is model.scale
    assert new.tied is model.tied
    assert new.out.weight.no_decay
    assert not new.inner[0].weight.requires_grad
    assert not new.inner.training
    assert new.training
    assert new.out.weight.dtype == torch.float64
    start = new.out.weight.detach().clone()
    train(model, optimizer)
    assert not torch.equal(new.out.weight, start)


def test_positions_are_counted_anew_and_other_integers_stay() -> None:
    model = deep(3)
    insert_(model, stack(model), 1)
    assert [b.layer_idx for b in model.blocks] == [0, 1, 2, 3]
    assert [b.heads for b in model.blocks] == [1, 1, 1, 1]
    remove_(model, stack(model), 0)
    assert [b.layer_idx for b in model.blocks] == [0, 1, 2]
    single = deep(1)
    insert_(single, stack(single), 1)
    assert [b.layer_idx for b in single.blocks] == [0, 1]
    assert [b.heads for b in single.blocks] == [1, 1]


def test_widths_that_count_up_by_chance_are_no_positions() -> None:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width
            self.up, self.down = nn.Linear(3, width), nn.Linear(width, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    model = nn.Sequential(*(Block(width) for width in (5, 6, 7)))
    insert_(model, Stack("", ("0", "1", "2"), zeroed=("down.weight", "down.bias")), 1)
    assert [block.width for block in model] == [5, 5, 6, 7]
    assert [block.up.out_features for block in model] == [5, 5, 6, 7]
    remove_(model, Stack("", ("0", "1", "2", "3")), 0)
    assert [block.up.out_features for block in model] == [5, 6, 7]


def names_of(model: nn.Module, optimizer: Any) -> list[list[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def test_new_parameters_join_the_groups_of_their_neighbours_where_a_new_optimizer_would_have_them() -> None:
    model = deep()
    optimizer = torch.optim.AdamW(groups_of(model))
    train(model, optimizer)
    insert_(model, stack(model), 1, [optimizer])
    assert names_of(model, optimizer) == names_of(model, torch.optim.AdamW(groups_of(model)))
    train(model, optimizer)
    fresh = torch.optim.AdamW(groups_of(model))
    fresh.load_state_dict(optimizer.state_dict())
    for p, state in optimizer.state.items():
        assert_same(dict(fresh.state[p]), dict(state))
    remove_(model, stack(model), 0, [optimizer])
    assert names_of(model, optimizer) == names_of(model, torch.optim.AdamW(groups_of(model)))
    assert set(optimizer.state) == set(model.parameters())
    train(model, optimizer)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_names_that_an_optimizer_keeps_follow(prefix: str) -> None:
    model = deep()
    optimizer = torch.optim.AdamW([(prefix + name, p) for name, p in model.named_parameters()])
    for change in (
        lambda: insert_(model, stack(model), 1, [optimizer]),
        lambda: remove_(model, stack(model), 0, [optimizer]),
    ):
        change()
        assert optimizer.param_groups[0]["param_names"] == [prefix + name for name, _ in model.named_parameters()]


def test_two_optimizers_each_take_their_own() -> None:
    model = deep()
    biases = torch.optim.SGD([p for n, p in model.named_parameters() if n.endswith("bias")], lr=0.1)
    weights = torch.optim.Adam([p for n, p in reversed(list(model.named_parameters())) if not n.endswith("bias")])
    insert_(model, stack(model), 2, [biases, weights])
    assert all(n.endswith("bias") for n in names_of(model, biases)[0])
    assert sorted(names_of(model, biases)[0] + names_of(model, weights)[0]) == sorted(
        n for n, _ in model.named_parameters()
    )
    train(model, biases, weights)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.LBFGS(p, max_iter=2),
        torch.optim.Adafactor,
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.AdamW(p, fused=True),
    ],
)
def test_training_goes_on_under_any_optimizer(make: Callable[[Any], Any]) -> None:
    model = deep()
    optimizer = make(list(model.parameters()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(INPUTS).square().mean()
        loss.backward()
        return loss

    for change in (lambda: None, insert, remove):
        if change is not None:
            change(model, optimizer) if change in (insert, remove) else change()
        optimizer.step(closure)
        optimizer.step(closure)
    assert all(p.isfinite().all() for p in model.parameters())


def test_new_parameters_have_the_state_that_the_constructor_gives() -> None:
    class Counted(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, lr=lr)
            for p in self.param_groups[0]["params"]:
                self.state[p]["squares"] = torch.zeros_like(p)

    model = deep()
    optimizer = Counted(model.parameters())
    insert(model, optimizer)
    assert all(optimizer.state[p]["squares"].shape == p.shape for p in model.parameters())


def insert(model: Deep, optimizer: Any) -> None:
    insert_(model, stack(model), 1, [optimizer])


def remove(model: Deep, optimizer: Any) -> None:
    remove_(model, stack(model), 2, [optimizer])


@pytest.mark.parametrize("change", [insert, remove])
def test_a_change_that_fails_leaves_everything_as_it_was(
    change: Callable[[Any, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep(3)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    before = snapshot(model, optimizer)
    blocks = list(model.blocks)

    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("injected")

    for name in ("add_", "remove_"):
        original = getattr(depth.Membership, name)

        def late(self: Any, *args: Any, original: Any = original) -> None:
            original(self, *args)
            failing()

        monkeypatch.setattr(depth.Membership, name, late)
    with pytest.raises(RuntimeError, match="injected"):
        change(model, optimizer)
    assert_same(snapshot(model, optimizer), before)
    assert all(a is b for a, b in zip(model.blocks, blocks, strict=True))


def test_hooks_and_computed_weights_do_not_hinder_a_copy() -> None:
    calls: list[int] = []

    class Observer:
        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError("an observer was copied")

        def seen(self, *_: Any) -> None:
            calls.append(1)

    model = deep()
    model.blocks[1].register_forward_hook(Observer().seen)
    model.blocks[1].last_output = model(INPUTS)
    calls.clear()
    insert_(model, stack(model), 2)
    model(INPUTS)
    assert len(calls) == 2


def test_convolutions_that_start_as_the_identity() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        model = nn.Sequential(layer).double()
        images = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        model(images)
        model.eval()
    found = Stack("0", ("0",), zeroed=("0.bias",), identity=("0.weight",), first=1)
    before = model(images)
    with pytest.raises(StructureError, match="only from position 1 on"):
        insert_(model, found, 0)
    insert_(model, found, 1)
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-12)


def test_bad_arguments_are_refused_and_nothing_changes() -> None:
    model = deep()
    found = stack(model)
    before = snapshot(model)
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    obstacle = replace(found, obstacle="the norm comes last")
    cases: list[tuple[type[Exception], str, Callable[[], None]]] = [
        (ValueError, "at must be 0 to that, but is 3", lambda: insert_(model, found, 3)),
        (ValueError, "blocks 0 to 1, but at is -1", lambda: remove_(model, found, -1)),
        (ValueError, "only block", lambda: remove_(model, replace(found, blocks=found.blocks[:1]), 0)),
        (StructureError, "the norm comes last. Pass preserve=False", lambda: insert_(model, obstacle, 1)),
        (StructureError, "Trace it again", lambda: insert_(model, replace(found, blocks=("blocks.7",)), 1)),
        (StructureError, "children of one module", lambda: remove_(model, replace(found, blocks=("a.0", "b.0")), 1)),
        (StructureError, "no parameter 'gone'", lambda: insert_(model, replace(found, zeroed=("gone",)), 1)),
        (StructureError, "'tied' of shape .* is shared", lambda: insert_(model, replace(found, zeroed=("tied",)), 1)),
        (ValueError, "none of the model's parameters", lambda: insert_(model, found, 1, [stranger])),
        (TypeError, r"pass \[optimizer\]", lambda: insert_(model, found, 1, stranger)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
        assert_same(snapshot(model), before)
    forced = copy.deepcopy(model)
    insert_(forced, obstacle, 1, preserve=False)
    assert len(forced.blocks) == 3


def test_a_block_whose_ends_have_been_edited_apart_is_refused() -> None:
    """Plain layers of equal width are a stack; after one of the widths has changed, no identity fits between them."""
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Sequential(*layers), nn.Linear(8, 3))
    structure = trace(model, torch.randn(4, 5))
    stack = structure.stacks["2"]
    apply_(model, [prune(structure["2.1.0"], [0])])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StructureError, match="no longer as wide"):
        insert_(model, stack, len(stack.blocks))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
