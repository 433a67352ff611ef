"""Budgets: which update is the last, that it is evaluated, and that a restart changes neither."""

from __future__ import annotations

import json

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.train import Budget, CheckpointConfig, EvaluationConfig, hooks
from t5x_ext.train.budget import Spent, StopAtBudget, spent_by
from t5x_ext.train.log import Log
from t5x_ext.train.memory import Memory

EVALUATION = EvaluationConfig(every=0)


@pytest.fixture
def log():
    """Counts tokens, and 100 operations an update; writes nothing."""
    return Log(None, every=100, steps=100, start=0, batch_flops=lambda index: 100.0)


@pytest.mark.parametrize(
    ("budget", "last"),
    [
        (Budget(target_tokens=14), 3),  # of 4, 6, 5, 7 and 5 labels
        (Budget(target_tokens=15), 3),
        (Budget(target_tokens=15.5), 4),
        (Budget(model_flops=200), 2),
        (Budget(model_flops=1, target_tokens=1e9), 1),
        (Budget(seconds=5.0), 2),  # an update takes 2.5 with its data
        (Budget(seconds=5.1), 3),
        (Budget(target_tokens=1e9), 5),
    ],
)
def test_the_last_update_is_the_one_that_reaches_the_budget(new_loop, run_loop, report, log, budget, last):
    reports = [report(labels=labels) for labels in (4.0, 6.0, 5.0, 7.0, 5.0)]
    loop = run_loop(new_loop(), reports, StopAtBudget(budget), log)
    assert loop.step == last
    assert (loop.stop is None) == (budget.reached(spent_by(loop)) is None)
    assert not loop.interrupted


def test_what_was_spent_before_a_restart_counts(new_loop, run_loop, report, log):
    loop = new_loop(2, memory=Memory(target_tokens=10.0))
    loop.clock.add({"data": 1.0, "step": 4.0, "compile": 100.0, "lost": 50.0})
    assert spent_by(loop) == Spent(10.0, 0.0, 5.0)
    run_loop(loop, [report(labels=5.0)] * 9, StopAtBudget(Budget(target_tokens=20)), log)
    assert loop.step == 4
    assert loop.stop == "20 of 20 target_tokens are used"


def test_the_last_update_is_evaluated_also_when_a_signal_came_with_it(new_loop, run_loop, report, log):
    class Signal:
        def after_step(self, loop):
            if loop.step == 2:
                loop.stop, loop.interrupted = "SIGTERM received", True

        def at_end(self, loop):
            pass

    measured = []

    class Scores:
        name, every = "scores", None

        def __call__(self, params, frozen, mutable, step):
            measured.append(step)
            return {"x": 1.0}

    chain = lambda: (
        StopAtBudget(Budget(model_flops=200)),
        hooks.Evaluate([(Scores(), 0)], steps=9, show=False),
        log,
    )
    loop = run_loop(new_loop(), [report()] * 9, *chain())
    assert (loop.step, measured, loop.evaluation) == (2, [2], {"x": 1.0})
    loop = run_loop(new_loop(), [report()] * 9, Signal(), *chain())
    assert (loop.step, measured, loop.stop) == (2, [2], "SIGTERM received")
    resumed = new_loop(2, memory=loop.memory)
    assert hooks.is_owed(resumed)
    for hook in chain():  # as `execute` does with what is owed
        hook.after_step(resumed)
    assert (measured, resumed.interrupted) == ([2, 2], False)
    assert resumed.stop is not None


@pytest.mark.parametrize("limits", [{}, {"seconds": 0.0}, {"model_flops": -1.0, "target_tokens": 5}])
def test_a_budget_has_a_limit_above_zero(limits):
    with pytest.raises(UserError, match="Budget: "):
        Budget(**limits)


@pytest.mark.usefixtures("compile_once")
def test_a_run_ends_at_its_budget_and_stays_there(place, tmp_path):
    """Interrupted by another limit of updates and resumed, it ends with the update of one that was not."""
    changes = {"data": place.data(valid=True), "evaluation": EVALUATION, "checkpoints": CheckpointConfig(every=1)}
    budget = Budget(target_tokens=400)
    whole = place.run(tmp_path / "whole", steps=50, budget=budget, **changes)
    assert 2 < whole["steps"] < 50
    assert 400 <= whole["spent"]["target_tokens"] < 400 + 8 * 16
    assert whole["spent"]["model_flops"] > 0
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid/loss" in line] == [whole["steps"]]

    place.run(tmp_path / "parts", steps=2, budget=budget, **changes)
    parts = place.run(tmp_path / "parts", steps=50, budget=budget, **changes)
    assert (parts["steps"], parts["spent"]["target_tokens"]) == (whole["steps"], whole["spent"]["target_tokens"])
    again = place.run(tmp_path / "parts", steps=50, budget=budget, **changes)
    assert again == parts
    (tmp_path / "parts/results.json").unlink()  # killed before the test has ended
    assert place.run(tmp_path / "parts", steps=50, budget=budget, **changes)["steps"] == whole["steps"]
    longer = place.run(tmp_path / "parts", steps=50, budget=Budget(target_tokens=600), **changes)
    assert longer["steps"] > whole["steps"]
