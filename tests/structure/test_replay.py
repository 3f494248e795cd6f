"""Models that look at values, and modules that cannot be traced at all."""

from typing import Any

import torch
from torch import Tensor, nn

import lightning_grow as lg
from tests.zoo_entry import Model


class Opaque(nn.Module):
    """Leaves torch on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.layer(x).detach().numpy())


class Reading(nn.Module):
    """Goes by the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 0).any()):
            x = x[x.sum(1) > float(x.min())]
        return self.head(torch.relu(self.hidden(x)))


def test_a_module_that_cannot_be_traced_is_closed_and_the_rest_varies() -> None:
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 8), Opaque(), nn.Linear(8, 6), nn.Linear(6, 2))
    structure = lg.trace(model, torch.randn(3, 4))
    assert {name: group.size for name, group in structure.groups.items()} == {"0": 7, "4": 6}
    assert structure.pinned["2.weight[0]"] == "goes into '3', which cannot be traced"
    assert structure.pinned["3.layer.weight[0]"].startswith("Opaque cannot be traced")


def test_values_that_forward_reads_are_replayed() -> None:
    structure = lg.trace(Reading(), torch.arange(20.0).reshape(4, 5))
    assert structure["hidden"].size == 8
    assert structure["hidden"].obstacle is None


def test_sizes_that_are_read_as_a_list_have_no_present_value_at_first() -> None:
    """The engine asks for it while a view is worked out: the model runs once on data, and what it read is replayed."""

    def forward(self: Any, x: Tensor) -> Tensor:
        chosen = (x.sum(1) > 0).long()
        counts = torch.stack([(chosen == 0).sum(), (chosen == 1).sum()]).tolist()
        parts = x[chosen.sort(stable=True).indices].split(counts)
        hidden = [layer(part.view(-1, 2, 2).flatten(1)) for layer, part in zip(self.layers, parts, strict=True)]
        return self.head(torch.relu(torch.cat(hidden)))

    layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 6)])
    structure = lg.trace(Model(forward, layers=layers, head=nn.Linear(6, 3)), torch.randn(8, 4))
    (group,) = structure.groups.values()
    assert group.size == 6
    assert {axis.label for axis in group.with_role("consumed")} == {"head.weight[1]"}
