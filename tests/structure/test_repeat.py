"""What is traced once for many blocks is what tracing each of them finds."""

import pytest

import lightning_grow as lg
from lightning_grow.structure.repeat import Repeats
from tests.zoo import ZOO

MODELS = [name for name in ZOO if name.startswith(("transformer", "residual", "gru", "blocks", "unet"))]


@pytest.mark.parametrize("name", MODELS)
def test_repeated_blocks_are_found_as_if_each_were_traced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, kwargs = ZOO[name].inputs()
    once = lg.trace(ZOO[name].build(), *args, **kwargs)
    monkeypatch.setattr(Repeats, "install", lambda *_: None)
    each = lg.trace(ZOO[name].build(), *args, **kwargs)
    assert once.groups == each.groups
    assert list(once.pinned) == list(each.pinned)
