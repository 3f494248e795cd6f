"""Places of sizes: inside configurations, dictionaries and lists that modules hold."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.holders import Holders, read, steps, write
from lightning_grow.structure.sandbox import unchanged
from lightning_grow.surgery import swap
from tests.zoo import ZOO
from tests.zoo_entry import Model
from tests.zoo_settings import WIDTHS, Config


@dataclass(frozen=True, slots=True)
class Slotted:
    """Settings without a dict, that refuse to be written."""

    width: int = 8


class Guarded(OrderedDict[str, int]):
    """A mapping that refuses to be written."""

    def __setitem__(self, key: str, value: int) -> None:
        if hasattr(self, "closed"):
            raise TypeError("frozen")
        super().__setitem__(key, value)

    def clear(self) -> None:
        raise TypeError("frozen")


class Trainer:
    """No settings: it holds what is no data."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.width = module, 8


def holder(**attributes: Any) -> nn.Module:
    module = nn.Linear(5, 8)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("value", "name", "index"),
    [
        (8, "kept", None),
        ((3, 8), "kept", 1),
        ([3, 8], "kept", 1),
        (Config(hidden=8), "kept.hidden", None),
        (SimpleNamespace(inner=SimpleNamespace(a=8)), "kept.inner.a", None),
        (SimpleNamespace(pairs=[(3, 8)]), "kept.pairs[0]", 1),
        ({"a b": 8}, "kept['a b']", None),
        ({"a.b": {2: [8]}}, "kept['a.b'][2]", 0),
        (Slotted(), "kept.width", None),
        (Guarded(a=8), "kept['a']", None),
        (SimpleNamespace(a=Slotted()), "kept.a.width", None),
    ],
)
def test_a_size_is_found_read_written_and_put_back(value: Any, name: str, index: int | None) -> None:
    module, before = holder(kept=value), copy.deepcopy(value)
    if isinstance(value, Guarded):
        value.closed = True  # type: ignore[attr-defined]
    assert (("", name, index), 8) in Holders({"": module}).integers("")
    with unchanged(module):
        write(module, name, index, 9)
        assert read(module, name, index) == 9
        assert type(module.kept) is type(value)
    assert module.kept is value
    assert value == before
    assert read(module, name, index) == 8


def test_lists_and_tuples_are_values_and_objects_are_places() -> None:
    """A list may be a default argument, which the next model would be built with; a configuration is shared."""
    sizes, config = [3, 8], SimpleNamespace(width=8)
    model = nn.Sequential(holder(kept=sizes, config=config), holder(kept=sizes, config=config))
    found = Holders(dict(model.named_modules()))
    assert {p[:2] for p, v in found.integers("1") if v == 8} >= {("1", "kept"), ("0", "config.width")}
    write(model[0], "kept", 1, 9)
    write(model[0], "config.width", None, 9)
    assert (sizes, model[0].kept, model[1].kept) == ([3, 8], [3, 9], [3, 8])
    assert model[1].config.width == 9


def test_what_holds_more_than_data_is_not_looked_into() -> None:
    model = nn.Sequential(nn.Linear(5, 8))
    module = holder(trainer=Trainer(model), parts=[nn.Linear(8, 8)], call=SimpleNamespace(a=nn.ReLU()))
    assert {name for (_, name, _), _ in Holders({"": module}).integers("")} == {"in_features", "out_features"}


def test_objects_that_refer_to_each_other_come_to_an_end() -> None:
    parent, child = SimpleNamespace(width=8), SimpleNamespace(width=9)
    parent.child, child.parent = child, parent
    places = [place for place, _ in Holders({"": holder(config=parent)}).integers("")]
    assert ("", "config.child.width", None) in places
    assert len(places) == len(set(places))


def test_what_nobody_reads_is_not_a_size() -> None:
    """A number that equals a width by accident."""
    module = holder(config=Config(hidden=8))
    found = Holders({"": module})
    with found.noting():
        _ = module.config.steps
    assert Config.__getattribute__ is object.__getattribute__
    names = {name for (_, name, _), _ in found.integers("")}
    assert "config.steps" in names
    assert "config.hidden" not in names


def test_a_copy_reads_everything() -> None:
    module = holder(config=Config(hidden=8))
    found = Holders({"": module})
    with found.noting():
        copy.deepcopy(module.config)
    assert "config.hidden" in {name for (_, name, _), _ in found.integers("")}


def test_steps_of_a_path_are_its_text() -> None:
    for text in ("a", "a.b", "a[3]", "a['b.c'].d", 'a["it\'s"]'):
        assert "".join(map(str, steps(text))).removeprefix(".") == text


def test_numbers_that_equal_a_width_by_accident_stay_when_it_changes() -> None:
    entry = ZOO["settings_shared_by_blocks"]
    model = entry.build()
    args, kwargs = entry.inputs()
    structure = lg.trace(model, *args, **kwargs)
    before = model(*args).detach()
    lg.apply_(model, [lg.widen(group, 2) for group in structure.groups.values() if group.obstacle is None])
    config = model.config
    assert (config.hidden, config.table) == (14, {"hidden": 14, "vocabulary": 12})
    assert (config.vocabulary, config.steps, config.attention.other) == (12, 8, 12)
    assert config is model.blocks[1].config
    torch.testing.assert_close(model(*args).detach(), before, rtol=0, atol=1e-10)


def test_constants_of_the_program_stay() -> None:
    entry = ZOO["settings_of_each_layer"]
    model = entry.build()
    args, _ = entry.inputs()
    group = lg.trace(model, *args)["0"]
    lg.apply_(model, [lg.widen(group, 2)])
    assert model[1].options.more.inputs == 12
    assert model[1].widths == [12, 6]
    assert WIDTHS == [8, 6]


def test_settings_come_back_if_an_edit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ZOO["settings_shared_by_blocks"]
    model = entry.build()
    args, _ = entry.inputs()
    group = next(g for g in lg.trace(model, *args).groups.values() if g.size == 12)
    before = copy.deepcopy(model.config)
    monkeypatch.setattr(swap.Commit, "_renew_caches", lambda self: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        lg.apply_(model, [lg.widen(group, 1)])
    assert model.config == before


def test_a_structure_with_settings_is_plain_data() -> None:
    entry = ZOO["hyperparameters_in_a_dictionary"]
    model = entry.build()
    args, _ = entry.inputs()
    structure = lg.trace(model, *args)
    again = lg.Structure.from_dict(structure.to_dict())
    assert again == structure
    assert ("", "_hparams['model']['width']") in {(a.module, a.name) for a in again["hidden"].attributes}
    lg.apply_(model, [lg.widen(again["hidden"], 2)])
    assert model._hparams == {"model": {"width": 10}, "epochs": 8, "lr": 0.1}
    small = entry.build()
    lg.resize_like_(small, model.state_dict(), again)
    assert small._hparams["model"]["width"] == 10
    torch.testing.assert_close(small(*args), model(*args))


def test_reading_is_noted_under_the_name_by_which_it_is_kept() -> None:
    class Renamed:
        def __init__(self) -> None:
            self.n_embd = 8

        def __getattribute__(self, name: str) -> Any:
            return super().__getattribute__("n_embd" if name == "hidden_size" else name)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).view(-1, self.config.hidden_size).relu())

    model = Model(forward, config=Renamed(), hidden=nn.Linear(5, 8), head=nn.Linear(8, 3))
    group = lg.trace(model, torch.randn(6, 5))["hidden"]
    lg.apply_(model, [lg.widen(group, 3)])
    assert model.config.hidden_size == 11
