"""A configuration of which a model can be built follows a resize, or the log says that it cannot."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.axes import Setting
from lightning_grow.surgery import swap


class Part:
    """Nested settings."""

    def __init__(self, **entries: Any) -> None:
        vars(self).update(entries)


class Config(Part):
    """What a decoder is made of. ``factor`` scales with nothing; ``max_length`` equals a width by accident."""

    def __init__(self, **entries: Any) -> None:
        defaults = {"width": 12, "depth": 2, "kinds": ["a", "b"], "max_length": 20, "inner": None, "eos_id": 20}
        super().__init__(**{**defaults, "text": Part(ffn=20), "heads": 4, "kv_heads": 2, "head_dim": 3, **entries})


class Layer(nn.Module):
    """Grouped-query attention without positions, and two perceptrons."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.head_dim, self.scale = config.head_dim, config.head_dim**-0.5
        rows, kv_rows, self.kind = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
            config.kinds[index],
        )
        self.query = nn.Linear(config.width, rows)
        self.key, self.value = nn.Linear(config.width, kv_rows), nn.Linear(config.width, kv_rows)
        self.out = nn.Linear(rows, config.width)
        self.up, self.down = nn.Linear(config.width, config.text.ffn), nn.Linear(config.text.ffn, config.width)
        inner = config.inner or 2 * config.width
        self.more, self.less = nn.Linear(config.width, inner), nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        query, key, value = (
            part(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        repeats = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
        mixed = (query @ key.transpose(-1, -2) * self.scale).softmax(-1) @ value
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(torch.relu(self.up(x))) + self.less(torch.tanh(self.more(x)))


class Decoder(nn.Module):
    """All its sizes come from its configuration, and are read when it is built only."""

    def __init__(self, config: Config, *, flag: bool = False) -> None:
        super().__init__()
        self.config, self.flag = config, flag
        self.stem = nn.Linear(5, config.width)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.depth))
        self.head = nn.Linear(config.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
GROUPS = ("stem", "layers.0.query", "layers.0.up", "layers.0.more", "layers.1.query", "layers.1.up", "layers.1.more")


def decoder(**entries: Any) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Decoder(Config(**entries))


@pytest.fixture(scope="module")
def structure() -> lg.Structure:
    return lg.trace(decoder(), X)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def entries_of(structure: lg.Structure, name: str) -> dict[str, int]:
    return {s.name: times for s in structure[name].settings for _, times in s.counts}


def rebuilt(model: Decoder) -> Decoder:
    return type(model)(copy.deepcopy(model.config))


def test_what_the_entries_mean_is_found(structure: lg.Structure) -> None:
    assert set(structure) == set(GROUPS), structure
    assert entries_of(structure, "layers.1.up") == {"config.text.ffn": 1}
    assert entries_of(structure, "layers.0.more") == {"config.inner": 1}
    assert entries_of(structure, "layers.0.query") == {"config.heads": 2, "config.kv_heads": 1}
    assert [u.group for u, _ in structure["layers.0.up"].settings[0].counts] == ["layers.0.up", "layers.1.up"]
    assert structure["stem"].settings == (Setting("", "config"),), "the perceptron's width would change with it"
    assert structure.stacks["layers"].counts == (("", "config.depth"),)
    assert structure.stacks["layers"].per_block == (("", "config.kinds"),)
    assert lg.Structure.from_dict(structure.to_dict()) == structure


@pytest.mark.parametrize("names", [("up",), ("query",), ("more",), ("up", "query", "more")])
def test_what_all_layers_share_is_written(
    structure: lg.Structure, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    model = decoder()
    lg.apply_(model, [lg.widen(structure[f"layers.{i}.{n}"], 3) for i in range(2) for n in names])
    assert shapes(rebuilt(model)) == shapes(model)
    assert (model.config.max_length, model.config.eos_id, model.config.width) == (20, 20, 12)
    assert not caplog.records


def test_what_layers_do_not_share_is_said_until_they_do(
    structure: lg.Structure, caplog: pytest.LogCaptureFixture
) -> None:
    model = decoder()
    with caplog.at_level(logging.WARNING):
        lg.apply_(model, [lg.widen(structure["layers.0.up"], 3), lg.widen(structure["layers.1.more"], 1)])
    (record,) = caplog.records
    for text in (
        "Decoder",
        "'config.text.ffn' is one number, but stands for 20, 23",
        "config.inner",
        "lg.resize_like_",
    ):
        assert text in record.message
    assert (model.config.text.ffn, model.config.inner) == (20, None)
    caplog.clear()
    lg.apply_(model, [lg.widen(structure["layers.1.up"], 3), lg.widen(structure["layers.0.more"], 1)])
    assert shapes(rebuilt(model)) == shapes(model)
    assert not caplog.records


def test_a_group_without_an_entry_is_said(structure: lg.Structure, caplog: pytest.LogCaptureFixture) -> None:
    model = decoder()
    with caplog.at_level(logging.WARNING):
        lg.apply_(model, [lg.widen(structure["stem"], 3)])
    (record,) = caplog.records
    assert "no entry stands for 'stem'" in record.message
    assert vars(model.config)["width"] == 12


def test_depth_is_written_with_the_entry_of_each_layer(structure: lg.Structure) -> None:
    model = decoder()
    stack = structure.stacks["layers"]
    lg.insert_(model, stack, 2)
    assert (model.config.depth, model.config.kinds) == (3, ["a", "b", "b"])
    assert shapes(rebuilt(model)) == shapes(model)
    lg.remove_(model, lg.trace(model, X).stacks["layers"], 0)
    assert (model.config.depth, model.config.kinds) == (2, ["b", "b"])
    assert shapes(rebuilt(model)) == shapes(model)


def test_the_configuration_comes_back_if_an_edit_fails(
    structure: lg.Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder()
    monkeypatch.setattr(swap.Commit, "_renew_caches", lambda self: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        lg.apply_(model, [lg.widen(structure[f"layers.{i}.up"], 3) for i in range(2)])
    assert model.config.text.ffn == 20


def test_taking_on_a_state_dict_writes_the_configuration(structure: lg.Structure) -> None:
    large, small = decoder(text=Part(ffn=26)), decoder()
    lg.resize_like_(small, large.state_dict(), structure)
    assert small.config.text.ffn == 26
    assert shapes(rebuilt(small)) == shapes(small)


def test_depth_is_written_though_widths_are_not_expressed_any_more() -> None:
    """It was changed after it was built."""
    model = decoder()
    model.layers[0].up, model.layers[0].down = nn.Linear(12, 7), nn.Linear(7, 12)
    structure = lg.trace(model, X)
    assert all(not group.settings for group in structure.groups.values())
    lg.insert_(model, structure.stacks["layers"], 2)
    assert (model.config.depth, model.config.kinds) == (3, ["a", "b", "b"])


def test_a_class_that_is_not_built_from_its_configuration_claims_nothing() -> None:
    model = decoder()
    for layer in model.layers:
        layer.extra = nn.Linear(2, 2)
    structure = lg.trace(model, X)
    assert all(not group.settings for group in structure.groups.values())
    assert (structure.stacks["layers"].counts, structure.stacks["layers"].uncounted) == ((), ())


def test_depth_that_no_entry_counts_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Fixed(Decoder):
        """It always has two layers."""

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.layers = nn.ModuleList(Layer(config, 0) for _ in range(2))

    model = Fixed(Config())
    stack = lg.trace(model, X).stacks["layers"]
    with caplog.at_level(logging.WARNING):
        lg.insert_(model, stack, 2)
        lg.remove_(model, lg.trace(model, X).stacks["layers"], 1)
    assert [record.message for record in caplog.records if "no entry counts the blocks of 'layers'" in record.message]
    assert all(text in caplog.records[0].message for text in ("Fixed", "lg.replay_"))
    assert model.config.depth == 2


def test_tracing_builds_nothing_that_stays_and_draws_no_random_numbers() -> None:
    model = decoder()
    before, state = copy.deepcopy(vars(model.config)), torch.get_rng_state()
    text = model.config.text
    lg.trace(model, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.text is text
    assert vars(text) == {"ffn": 20}
    assert {k: v for k, v in vars(model.config).items() if k != "text"} == {
        k: v for k, v in before.items() if k != "text"
    }
