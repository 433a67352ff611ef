"""Intervals in updates, epochs and examples."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from t5x_ext.contracts import Epoch, UserError
from t5x_ext.train.intervals import check_interval, in_steps, is_due

BATCHES = SimpleNamespace(epoch=lambda: Epoch(batches=40, examples=1000))


@pytest.mark.parametrize(
    ("every", "steps"),
    [(7, 7), (0, 0), ("5 steps", 5), ("2 epochs", 80), ("0.5 epochs", 20), ("1 epoch", 40), ("500 examples", 20)],
)
def test_an_interval_in_updates(every, steps):
    check_interval("every", every)
    assert in_steps(every, BATCHES) == steps


def test_an_interval_is_at_least_an_update():
    assert in_steps("1 example", BATCHES) == 1


@pytest.mark.parametrize("every", [-1, "2", "two epochs", "0 epochs", "1.2.3 epochs", "3 lines"])
def test_what_is_no_interval(every):
    with pytest.raises(UserError, match=r"Config\.every is"):
        check_interval("Config.every", every)


def test_endless_data_has_no_epochs():
    with pytest.raises(UserError, match="needs batches with epochs"):
        in_steps("2 epochs", SimpleNamespace(epoch=lambda: None))


def test_due_at_multiples():
    assert [step for step in range(7) if step and is_due(step, 3)] == [3, 6]
    assert not is_due(3, 0)
