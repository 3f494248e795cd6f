"""Sizes that torch's own modules keep as Python integers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lightning_grow as lg
from lightning_grow.structure.errors import StructureError
from lightning_grow.structure.modules import bookkeeping
from tests.zoo_entry import Model

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    "bilinear": lambda: nn.Bilinear(4, 5, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise conv": lambda: nn.Conv1d(4, 8, 3, groups=4),
    "transposed conv": lambda: nn.ConvTranspose3d(4, 6, 3),
    "grouped transposed conv": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "depthwise transposed conv": lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
    "batch norm": lambda: nn.BatchNorm2d(6),
    "batch norm without weight": lambda: nn.BatchNorm2d(6, affine=False),
    "instance norm without anything": lambda: nn.InstanceNorm1d(6),
    "layer norm": lambda: nn.LayerNorm((4, 6)),
    "layer norm without weight": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "rms norm": lambda: nn.RMSNorm(6),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "embedding": lambda: nn.Embedding(9, 6),
    "bag": lambda: nn.EmbeddingBag(9, 6),
    "prelu": lambda: nn.PReLU(6),
    "attention": lambda: nn.MultiheadAttention(6, 2),
    "attention of three widths": lambda: nn.MultiheadAttention(6, 2, kdim=5, vdim=4),
    "lstm": lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True),
    "lstm with projection": lambda: nn.LSTM(4, 6, proj_size=3),
    "gru": lambda: nn.GRU(4, 6, bias=False),
    "rnn": lambda: nn.RNN(4, 6),
    "lstm cell": lambda: nn.LSTMCell(4, 6),
    "gru cell": lambda: nn.GRUCell(4, 6),
    "rnn cell": lambda: nn.RNNCell(4, 6),
}
NOT_SIZES = {"num_heads", "num_groups", "num_layers", "padding_idx"}


SIZED = {name: make for name, make in MODULES.items() if [*make().parameters(), *make().buffers()]}


@pytest.mark.parametrize("make", MODULES.values(), ids=list(MODULES))
def test_every_kept_size_equals_its_axis(make: Callable[[], nn.Module]) -> None:
    module = make()
    for kept in bookkeeping(module):
        owner, _, leaf = kept.parameter.rpartition(".")
        length = getattr(module.get_submodule(owner), leaf).shape[kept.dim]
        value = getattr(module, kept.name)
        value = value if kept.index is None else value[kept.index]
        assert value * kept.divisor == length * kept.times, kept


@pytest.mark.parametrize("make", SIZED.values(), ids=list(SIZED))
def test_no_size_is_forgotten(make: Callable[[], nn.Module]) -> None:
    """Any integer above 3 that a module with parameters keeps is a size (kernel extents are at most 3 here)."""
    module = make()
    known = {kept.name for kept in bookkeeping(module)}
    found = set()
    for name, value in vars(module).items():
        values = value if isinstance(value, tuple) else (value,)
        if any(type(v) is int and v > 3 for v in values):
            found.add(name)
    assert found - NOT_SIZES <= known


def test_a_module_of_somebody_else_has_no_entry() -> None:
    assert bookkeeping(nn.ReLU()) == []
    assert bookkeeping(nn.Sequential(nn.Linear(2, 3))) == []


def test_sizes_of_norms_without_parameters_follow() -> None:
    norms = (nn.GroupNorm(2, 4, affine=False), nn.BatchNorm2d(6, affine=False, track_running_stats=False))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norms[0], nn.Conv2d(4, 6, 1), norms[1], nn.Conv2d(6, 2, 1))
    structure = lg.trace(model, torch.randn(2, 3, 4, 4))
    lg.apply_(model, [lg.widen(structure["0"], 2), lg.widen(structure["2"], 1)])
    assert (model[1].num_channels, model[3].num_features) == (8, 7)  # a unit of the first is a group of two channels


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_an_lstm_is_not_given_as_many_projected_as_hidden_units() -> None:
    """Torch could not tell whether there is a projection; groups are found nevertheless."""
    lstm = nn.LSTM(5, 8, proj_size=6, batch_first=True)
    model = Model(lambda self, x: self.head(self.lstm(x)[0]), lstm=lstm, head=nn.Linear(6, 3))
    structure = lg.trace(model, torch.randn(2, 7, 5))
    group = structure["lstm"]
    assert sorted((g.size, g.step, g.obstacle) for g in structure.groups.values()) == [(6, 1, None), (8, 1, None)]
    with pytest.raises(StructureError, match="fewer projected than hidden units, not 6 of 6"):
        lg.apply_(model, [lg.prune(group, [0, 1])])
    assert lstm.hidden_size == 8
    lg.apply_(model, [lg.prune(group, [0])])
    assert model(torch.randn(2, 7, 5)).shape == (2, 7, 3)
