import json

import pytest
import torch

from lightning_grow.structure.axes import Stack, stack_from_dict
from lightning_grow.trainer import Event, Record
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.record import stack_to_dict
from lightning_grow.trainer.scope import Scope


def record():
    stack = stack_to_dict(Stack("blocks", ("blocks.0", "blocks.1"), zeroed=("down.weight",)))
    events = [
        Event(10, 0, "Net2Net", "widen", "fc1", 4, 6, 1234, loss_before=2.0, loss_after=1.5, predicted=0.25),
        Event(20, 1, "Net2Net", "insert", "blocks", 2, 3, 1500, at=2, stack=stack, difference=0.0),
        Event(30, 2, "MagnitudePruning", "prune", "fc1", 6, 5, 1400, loss_before=1.0),
    ]
    return Record({"fc1": 4, "blocks": 2}, 1000, events)


def test_a_record_survives_a_checkpoint(tmp_path):
    torch.save({"record": record().to_dict()}, tmp_path / "r.pt")
    assert Record.from_dict(torch.load(tmp_path / "r.pt", weights_only=True)["record"]) == record()
    assert Record.from_dict(json.loads(json.dumps(record().to_dict()))) == record()


def test_a_record_reads_as_a_table():
    header, first, *_ = str(record()).splitlines()
    assert header.split("  ")[0] == "step"
    assert first.split() == ["10", "Net2Net", "widen", "fc1", "4", "6", "1,234", "2.0000", "1.5000"]


def test_curves_follow_a_group_and_a_stack():
    assert record().curve("fc1") == [(0, 4), (10, 6), (30, 5)]
    assert record().curve("blocks") == [(0, 2), (20, 3)]
    assert record().curve("unknown") == []


def test_an_event_says_what_it_changed_and_measured():
    first, second, third = record().events
    assert first.measured == 0.5
    assert third.measured is None
    assert str(first) == "step 10: Net2Net widen 'fc1' 4 -> 6, 1,234 parameters, loss 2, predicted gain 0.25"
    assert str(second).endswith("outputs moved by 0")
    assert record().depth_events() == [second]


def test_a_stack_survives_as_plain_data():
    stack = Stack("blocks", ("blocks.0", "blocks.1"), zeroed=("a",), identity=("b",), obstacle="no")
    assert stack_from_dict(json.loads(json.dumps(stack_to_dict(stack)))) == stack


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, ["a.0", "a.1", "b"]),
        ([], ["a.0", "a.1", "b"]),
        (["a.*"], ["a.0", "a.1"]),
        (["!b"], ["a.0", "a.1"]),
        (["a.*", "b", "!*.0"], ["a.1", "b"]),
        (["A*"], []),
    ],
)
def test_patterns_choose_names(patterns, expected):
    assert Scope.of(patterns).names(["a.0", "a.1", "b"]) == expected


def test_generators_differ_by_name_step_and_seed_but_not_by_process():
    def draw(name="fc1", step=5, seed=0):
        occasion = Occasion(torch.nn.Linear(1, 1), None, (), (), {}, step, seed)
        return torch.rand(1, generator=occasion.generator(name)).item()

    assert draw() == draw()
    assert len({draw(), draw(name="fc2"), draw(step=6), draw(seed=1)}) == 4
