"""What one more unit costs, and what may be spent."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_grow.criteria import MeasurementError, Objective
from lightning_grow.structure import trace
from lightning_grow.surgery import apply_, widen
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.unit_costs import allowance, check_cost, unit_costs

X, Y = torch.ones(3, 2, 8, 8), torch.zeros(3, 2)


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 2),
    )


def occasion(batches=((X, Y),), reduce=None):
    model = model_of()
    structure = trace(model, X)
    arguments = [] if reduce is None else [reduce]
    objective = Objective(lambda m, batch: F.mse_loss(m(batch[0]), batch[1]), list(batches), *arguments)
    return Occasion(model, structure, tuple(structure.groups.values()), (), {}, 0, 0, objective=objective)


def test_units_cost_one():
    assert unit_costs(occasion(), "units") == {"0": 1.0, "2": 1.0}


def test_parameters_are_those_of_a_wider_model():
    found = unit_costs(occasion(), "parameters")
    for name, group in trace(model_of(), X).groups.items():
        model = model_of()
        before = sum(p.numel() for p in model.parameters())
        apply_(model, [widen(group, 1)])
        assert sum(p.numel() for p in model.parameters()) - before == found[name]


def test_operations_by_hand():
    """Two for each multiplication and addition, of three images: rows that make a unit, and columns that use it."""
    found = unit_costs(occasion(), "flops")
    assert found == {"0": 3 * 2 * (64 * 2 * 9 + 9 * 6 * 9), "2": 3 * 2 * (9 * 4 * 9 + 9 * 2)}


def test_latency_is_above_zero():
    assert min(unit_costs(occasion(), "latency").values()) > 0


def test_energy_from_a_table_of_ones_own():
    table = {"0": 7.0, "2": 0.5}
    assert unit_costs(occasion(), lambda model, group: table[group.name]) == table


def test_processes_agree_on_the_mean():
    """Another process measured three times as much."""

    def reduce(own):  # a pair of sum and count, or a flag alone
        return own + torch.stack([3 * own[0], own[1]]) if own.ndim else own

    found = unit_costs(occasion(reduce=reduce), "flops")
    assert found["2"] == 2 * 3 * 2 * (9 * 4 * 9 + 9 * 2)


def test_refusals():
    with pytest.raises(MeasurementError, match="A unit of 0, 2 should cost more than 0"):
        unit_costs(occasion(), lambda model, group: 0.0)
    with pytest.raises(MeasurementError, match="no batch to measure costs on"):
        unit_costs(occasion(batches=()), "flops")
    with pytest.raises(MeasurementError, match="should set `measures`"):
        unit_costs(dataclasses.replace(occasion(), objective=None), "flops")
    with pytest.raises(MisconfigurationException, match="`cost` should be 'units', 'parameters'"):
        check_cost("watts")
    for cost in ("units", "parameters", "flops", "latency", lambda model, group: 1.0):
        check_cost(cost)


def test_a_number_is_a_number_and_a_fraction_is_one_of_what_all_cost():
    groups = list(trace(model_of(), X).groups.values())  # 4 and 6 units
    even, uneven = {"0": 2.0, "2": 2.0}, {"0": 1.0, "2": 5.0}
    assert allowance(groups, even, 3, None, 0.5) == (3, None)
    assert allowance(groups, even, None, 0.2, 0.5) == (2, None)
    assert allowance(groups, even, None, None, 0.5) == (5, None)
    assert allowance(groups, even, None, 0.001, 0.5) == (1, None)
    assert allowance(groups, uneven, None, 0.5, 0.1) == (17, 17.0)  # half of 4 * 1 + 6 * 5
    assert allowance(groups, uneven, None, 0.001, 0.1) == (1, 5.0)  # one of any kind
