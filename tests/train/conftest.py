"""A loop without a model: steps that only report, and a clock that tests turn by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from t5x_ext.contracts import Loss
from t5x_ext.train.loop import Clock, Hook, Loop, train
from t5x_ext.train.state import TrainState
from t5x_ext.train.step import StepMetrics


class Seconds:
    """A clock that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def new_loop(seconds: Seconds) -> Callable[..., Loop]:
    """A loop after `step` updates, whose state is the counter alone."""

    def make(step: int = 0, **fields: Any) -> Loop:
        return Loop(TrainState(np.int32(step), {}, (), (), ()), step, step, clock=Clock(seconds), **fields)

    return make


@pytest.fixture
def report() -> Callable[..., StepMetrics]:
    """What a step reports: the summed loss over `labels` labels, of which `hits` were right."""

    def make(loss: float = 1.0, labels: float = 1.0, hits: float = 0.0, norm: float = 1.0, finite: bool = True) -> Any:
        sums = Loss(np.float32(loss), np.float32(labels), {"accuracy": (np.float32(hits), np.float32(labels))})
        return StepMetrics(sums, np.float32(norm), np.bool_(finite))

    return make


@pytest.fixture
def run_loop(seconds: Seconds) -> Callable[..., Loop]:
    """Runs the loop from where it stands to the last of the reports, that of update n being `reports[n - 1]`.

    A batch is its own number and takes half a second to come; a step takes two.
    """

    def run(loop: Loop, reports: Sequence[StepMetrics], *hooks: Hook, steps: int | None = None) -> Loop:
        def batches() -> Any:
            for number in range(loop.batches_consumed, len(reports)):
                seconds.now += 0.5
                yield number

        def step(state: TrainState, batch: int) -> tuple[TrainState, StepMetrics]:
            seconds.now += 2.0
            return state._replace(step=state.step + 1), reports[batch]

        return train(loop, step, batches(), steps=steps or len(reports), hooks=hooks)

    return run
