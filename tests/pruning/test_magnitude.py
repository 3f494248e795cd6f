import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.pruning import MagnitudePruning, prune_lowest
from lightning_grow.structure import trace
from lightning_grow.structure.axes import AxisGroup
from lightning_grow.surgery import apply_
from lightning_grow.trainer import Occasion


def group(name, size, step=1):
    return AxisGroup(name, size, step, ())


def scored(**scores):
    return {name: (group(name, len(values)), torch.tensor(values)) for name, values in scores.items()}


def removed(edits):
    return {e.group.name: sorted(set(range(e.group.size)) - set(e.index)) for e in edits}


def test_the_lowest_units_go_wherever_they_are():
    edits = prune_lowest(scored(a=[0.5, 3.0, 0.1, 2.0], b=[1.0, 0.2, 5.0]), 3)
    assert removed(edits) == {"a": [0, 2], "b": [1]}


def test_each_group_keeps_its_least_size():
    edits = prune_lowest(scored(a=[0.1, 0.2, 0.3, 0.4], b=[9.0, 8.0]), 5, min_size=2)
    assert removed(edits) == {"a": [0, 1]}


def test_units_go_in_whole_steps():
    scores = {"heads": (group("heads", 6, step=2), torch.tensor([3.0, 0.1, 2.0, 0.2, 1.0, 4.0]))}
    assert removed(prune_lowest(scores, 3)) == {"heads": [1, 3]}
    assert prune_lowest(scores, 1) == []


def test_ties_go_by_order():
    assert removed(prune_lowest(scored(a=[1.0, 1.0], b=[1.0, 1.0]), 1)) == {"a": [0]}


@pytest.mark.parametrize(
    ("scores", "arguments", "message"),
    [
        (scored(a=[1.0]), {"num_units": 0}, "at least 1, found 0"),
        (scored(a=[1.0]), {"num_units": 1, "min_size": 0}, "`min_size` of at least 1"),
        ({"a": (group("a", 3), torch.ones(2))}, {"num_units": 1}, r"3 scores for 'a', found shape \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(scores, arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_lowest(scores, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_size": 0}, "`min_size`"),
        ({"fraction": 1.0}, "below 1 for pruning"),
        ({"roles": ["made"]}, "'produced', 'carried' and 'consumed'"),
        ({"roles": []}, "`roles`"),
        ({"p": 0.0}, "`p`"),
    ],
)
def test_wrong_callback_arguments_are_named(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        MagnitudePruning(**arguments)


@torch.no_grad()
def test_silent_units_go_first_and_the_function_stays():
    """T9.1: units with nothing but zeros are the smallest there are."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    for tensor in (model[0].weight[[2, 5]], model[0].bias[[2, 5]]):
        tensor.zero_()
    model[0].weight[[2, 5]] = 0
    model[0].bias[[2, 5]] = 0
    model[2].weight[:, [2, 5]] = 0
    x = torch.randn(5, 4, dtype=torch.float64)
    structure, expected = trace(model, x), model(x)
    occasion = Occasion(model, structure, tuple(structure.groups.values()), (), {}, 0, 0)
    edits = [p.change for p in MagnitudePruning(num_units=2).propose(occasion)]
    assert removed(edits) == {"0": [2, 5]}
    apply_(model, edits)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_a_tenth_goes_by_default():
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 2))
    structure = trace(model, torch.zeros(1, 4))
    occasion = Occasion(model, structure, tuple(structure.groups.values()), (), {}, 0, 0)
    edits = [p.change for p in MagnitudePruning().propose(occasion)]
    assert sum(e.group.size - len(e.index) for e in edits) == 4
