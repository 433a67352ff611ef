"""The loop by itself: what hooks see and when, what it consumes, and where its time goes."""

from __future__ import annotations

from contextlib import suppress
from itertools import count

import jax
import numpy as np
import pytest

from t5x_ext.train.loop import train


class Record:
    """What a hook saw: (update, loss of the metrics it was shown) after each step, and at the end."""

    def __init__(self, stop_at: int | None = None):
        self.seen: list[tuple[int, float | None]] = []
        self.end: tuple[int, float] | None = None
        self._stop_at = stop_at

    def after_step(self, loop):
        assert int(loop.state.step) == loop.step == loop.batches_consumed
        self.seen.append((loop.step, None if loop.metrics is None else float(loop.metrics.loss.sum)))
        assert loop.evaluation == {}
        loop.evaluation = {"mine": 1.0}
        if loop.step == self._stop_at:
            loop.stop = "seen enough"

    def at_end(self, loop):
        self.end = loop.step, float(loop.metrics.loss.sum)


def test_hooks_see_the_metrics_of_the_update_before_and_at_the_end_the_last(new_loop, run_loop, report):
    hook = Record()
    loop = run_loop(new_loop(), [report(loss) for loss in (10, 20, 30)], hook)
    assert hook.seen == [(1, None), (2, 10), (3, 20)]
    assert hook.end == (3, 30)
    assert (loop.step, loop.batches_consumed, loop.stop) == (3, 3, None)


def test_a_loop_goes_on_at_its_step_and_takes_as_many_batches_as_updates(new_loop, report):
    def step(state, frozen, batch):
        return state._replace(step=state.step + 1), report(batch)

    batches = count(5)
    hook = Record()
    train(new_loop(step=5), step, batches, steps=8, hooks=[hook])
    assert hook.seen == [(6, None), (7, 5), (8, 6)]
    assert next(batches) == 8


def test_a_hook_stops_the_loop_after_all_hooks_have_run(new_loop, run_loop, report):
    first, second = Record(stop_at=2), Record()
    second.after_step = lambda loop: second.seen.append((loop.step, None))
    loop = run_loop(new_loop(), [report(loss) for loss in (10, 20, 30)], first, second)
    assert (loop.step, loop.stop, loop.interrupted) == (2, "seen enough", False)
    assert first.seen == [(1, None), (2, 10)]
    assert [step for step, _ in second.seen] == [1, 2]
    assert first.end == (2, 20)


def test_a_finished_loop_does_nothing(new_loop):
    batches = iter(())
    loop = train(new_loop(step=4), lambda state, frozen, batch: pytest.fail("a step"), batches, steps=4, hooks=[])
    assert (loop.step, loop.metrics) == (4, None)


def test_the_clock_tells_waiting_for_data_from_computing(new_loop, run_loop, report, seconds):
    class Slow(Record):
        def after_step(self, loop):
            with loop.clock.section("evaluate"):
                seconds.now += 7.0

    loop = run_loop(new_loop(), [report()] * 4, Slow())
    assert loop.clock.seconds == {"data": 4 * 0.5, "step": 4 * 2.0, "evaluate": 4 * 7.0}


def test_a_section_counts_although_it_fails(new_loop, seconds):
    clock = new_loop().clock
    with suppress(KeyError), clock.section("save"):
        seconds.now += 3.0
        raise KeyError
    assert clock.seconds == {"save": 3.0}


def test_silent_transfers_in_a_step_are_refused(new_loop, report):
    """A step that is fed from the host by accident would wait for it at every update."""
    add = jax.jit(lambda x, y: x + y)
    add(np.float32(0), np.float32(0))

    def step(state, frozen, batch):
        add(np.float32(1), np.float32(2))
        return state, report()

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(new_loop(), step, count(), steps=1, hooks=[])
