"""Tensors that modules keep beside parameters and buffers follow the widths that they are made of."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import lightning_grow as lg
from lightning_grow.structure.states import cut_state, states
from tests.zoo_entry import Model

X = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def recurrent() -> nn.Module:
    """A recurrent state that is kept until the next batch, and a memory that does not exist before the first."""

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden, memory = self.kept.states[0], self.kept.memory
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
        self.kept.states = (hidden.detach(), x.detach().mean())
        self.kept.memory = {"last": hidden.detach()}
        return self.head(hidden + (0 if memory is None else memory["last"]))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kept = SimpleNamespace(states=(torch.zeros(2, 8, dtype=torch.float64), 0.0), memory=None)
        return Model(forward, kept=kept, cell=nn.GRUCell(5, 8), head=nn.Linear(8, 3)).double()


def test_a_state_follows_also_one_that_came_later() -> None:
    model = recurrent()
    kept, state = model.kept, model.kept.states
    group = lg.trace(model, X)["cell"]
    assert model.kept is kept
    assert kept.states is state
    assert kept.memory is None
    assert group.obstacle is None
    assert {a.name for a in group.attributes} >= {"kept.states[0].shape", "kept.memory['last'].shape"}
    model(X)
    last, twin = model.kept.states[0], copy.deepcopy(model)
    lg.apply_(model, [lg.prune(group, [0, 3])])
    assert torch.equal(model.kept.states[0], last[:, [1, 2, 4, 5, 6, 7]])
    assert torch.equal(model.kept.memory["last"], last[:, [1, 2, 4, 5, 6, 7]])
    assert model(X).shape == (2, 3)
    wide, expected = copy.deepcopy(twin), twin(X).detach()
    lg.apply_(wide, [lg.widen(group, 2)])
    assert not wide.kept.states[0][:, 8:].any()
    assert torch.equal(wide.kept.states[0][:, :8], last)
    torch.testing.assert_close(wide(X).detach(), expected, rtol=0, atol=1e-10)
    small = recurrent()
    small(X)
    lg.resize_like_(small, wide.state_dict(), lg.Structure({"cell": group}))
    assert small.kept.states[0].shape == (2, 10)
    assert small(X).shape == (2, 3)


def test_parameters_and_what_hooks_compute_of_them_are_no_states() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.LSTM(4, 5))
    assert states(dict(model.named_modules())) == {}
    model[0].table = {"a": [torch.ones(2, 3)], "ids": torch.ones(3, dtype=torch.int64)}
    assert list(states(dict(model.named_modules()))) == [("0", "table['a'][0].shape")]


def test_a_state_is_cut_off_or_filled_up_with_zeros() -> None:
    state = torch.tensor([[1.0, 2.0, 3.0]])
    assert cut_state(state, 1, 2).tolist() == [[1, 2]]
    assert cut_state(state, 1, 4).tolist() == [[1, 2, 3, 0]]
