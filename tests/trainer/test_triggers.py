import math

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_grow.trainer.plateau import Plateau
from lightning_grow.trainer.triggers import Trigger


def fired(trigger, steps, epoch_length=10**9):
    """Return the steps at which a trigger begins an event, when one step is done at a time."""
    found = []
    for now in range(1, steps + 1):
        finished = now // epoch_length if now % epoch_length == 0 else None
        if trigger.after_step(now - 1, now, finished):
            found.append(now)
    return found


def test_every_n_steps_counts_optimizer_steps():
    assert fired(Trigger(every_n_steps=4), 13) == [4, 8, 12]


def test_start_and_stop_bound_the_steps_inclusively():
    assert fired(Trigger(every_n_steps=4, start=8, stop=16), 30) == [8, 12, 16]


def test_given_steps_happen_once_each():
    assert fired(Trigger(at_steps=[3, 7]), 12) == [3, 7]


def test_epochs_count_when_they_are_done():
    assert fired(Trigger(every_n_epochs=2), 60, epoch_length=10) == [20, 40, 60]
    assert fired(Trigger(every_n_epochs=1, start=2, stop=3), 60, epoch_length=10) == [20, 30]


def test_no_step_is_missed_when_several_are_done_in_one_batch():
    """Two optimizers advance the global step by two at a time."""
    trigger = Trigger(every_n_steps=5)
    assert [now for now in range(2, 21, 2) if trigger.after_step(now - 2, now, None)] == [6, 10, 16, 20]
    assert Trigger(at_steps=[3]).after_step(2, 4, None)


def test_plateau_needs_patience():
    plateau = Plateau(trigger := Trigger(on_plateau="val_loss", patience=2))
    due = []
    for epoch, value in enumerate([3.0, 2.0, 2.0, 2.5, 1.0, 1.1, 1.2, 1.3]):
        plateau.observe(value)
        due.append(trigger.after_epoch(plateau.bad_epochs, epoch + 1))
        if due[-1]:
            plateau.bad_epochs = 0
    assert due == [False, False, False, True, False, False, True, False]


def test_plateau_of_a_rising_metric_and_min_delta():
    plateau = Plateau(trigger := Trigger(on_plateau="acc", patience=1, mode="max", min_delta=0.1))
    plateau.observe(0.5)
    plateau.observe(0.55)
    assert trigger.after_epoch(plateau.bad_epochs, 2)
    plateau.observe(0.65)
    assert plateau.best == 0.65
    assert plateau.bad_epochs == 0


def test_a_value_that_is_not_a_number_is_no_improvement():
    plateau = Plateau(Trigger(on_plateau="val_loss"))
    plateau.observe(math.nan)
    assert (plateau.best, plateau.bad_epochs) == (None, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of .* found none"),
        ({"every_n_steps": 2, "at_steps": [3]}, "`every_n_steps=2` and `at_steps="),
        ({"every_n_steps": 0}, "`every_n_steps` should be an integer of at least 1, found 0"),
        ({"every_n_epochs": 1.5}, "`every_n_epochs` should be an integer"),
        ({"every_n_steps": True}, "`every_n_steps` should be an integer"),
        ({"at_steps": []}, "`at_steps` should list"),
        ({"at_steps": [0]}, "`at_steps` should list"),
        ({"every_n_steps": 1, "start": -1}, "0 <= `start`"),
        ({"every_n_steps": 1, "start": 5, "stop": 3}, "start=5 and stop=3"),
        ({"on_plateau": "x", "patience": 0}, "`patience`"),
        ({"on_plateau": "x", "mode": "best"}, "'min' or 'max', found 'best'"),
        ({"on_plateau": "x", "min_delta": -1.0}, "`min_delta`"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        Trigger(**arguments)
