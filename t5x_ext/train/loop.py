"""The training loop: take a batch, make a step, call the hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from t5x_ext.contracts import Batch
from t5x_ext.train.state import TrainState
from t5x_ext.train.step import StepMetrics, TrainStep


class Clock:
    """Wall seconds by section; `now` can be replaced in tests."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now = now
        self.seconds: dict[str, float] = {}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Adds the time spent inside the block to a section."""
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start


@dataclass
class Loop:
    """What hooks see and may change between two steps."""

    state: TrainState
    step: int  # updates done
    batches_consumed: int  # the data position: index of the next batch
    memory: dict[str, Any] = field(default_factory=dict)  # JSON that hooks keep across restarts
    metrics: StepMetrics | None = None  # of update number step - 1, on the host
    evaluation: dict[str, float] = field(default_factory=dict)  # measured after this very step, else empty
    stop: str | None = None  # set to a reason, and the loop ends after the running hooks
    interrupted: bool = False  # whether that came from outside, so that the run is to be gone on with
    clock: Clock = field(default_factory=Clock)


class Hook(Protocol):
    """Something that happens between steps: logging, evaluating, saving. Any object with these methods will do."""

    def after_step(self, loop: Loop) -> None:
        """Called after each update is dispatched; `loop.metrics` are those of the update before."""
        ...

    def at_end(self, loop: Loop) -> None:
        """Called once when the loop has ended; `loop.metrics` are those of the last update."""
        ...


def train(loop: Loop, train_step: TrainStep, batches: Iterator[Batch], *, steps: int, hooks: Sequence[Hook]) -> Loop:
    """Trains until `steps` updates are done or a hook stops the loop.

    The metrics of an update are fetched only after the next one is dispatched, so that the device computes while the
    host takes the next batch, and the host is never more than one update ahead.

    Args:
      loop: where to begin; changed in place and returned.
      train_step: compiled update; it is given the state to destroy.
      batches: device batches from position `loop.batches_consumed` on.
      steps: total number of updates, those before a restart included.
      hooks: called in this order after each update.
    """
    in_flight: StepMetrics | None = None
    while loop.step < steps and loop.stop is None:
        with loop.clock.section("data"):
            batch = next(batches)
        with loop.clock.section("step"):
            # What moves between host and device is moved by name elsewhere; anything else here would be a mistake.
            with jax.transfer_guard("disallow"):
                loop.state, dispatched = train_step(loop.state, batch)
            loop.metrics = jax.device_get(in_flight)
        in_flight = dispatched
        loop.step += 1
        loop.batches_consumed += 1
        loop.evaluation = {}
        for hook in hooks:
            hook.after_step(loop)
    with loop.clock.section("step"):
        loop.metrics = jax.device_get(in_flight)
    for hook in hooks:
        hook.at_end(loop)
    return loop
