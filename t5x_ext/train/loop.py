"""The training loop: take a batch, make a step, call the hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from t5x_ext.contracts import Batch
from t5x_ext.train.goodput import Clock
from t5x_ext.train.state import TrainState
from t5x_ext.train.step import StepMetrics, TrainStep


@dataclass
class Loop:
    """What hooks see and may change between two steps."""

    state: TrainState
    step: int  # updates done
    batches_consumed: int  # the data position: index of the next batch
    memory: dict[str, Any] = field(default_factory=dict)  # JSON that hooks keep across restarts
    skipped: list[tuple[int, int]] = field(default_factory=list)  # ranges of batches left out, see BatchPlan.skipped
    metrics: StepMetrics | None = None  # of the newest update that the device has finished, on the host
    in_flight: StepMetrics | None = None  # of update number `step`, on the device; None once they were fetched
    evaluation: dict[str, float] = field(default_factory=dict)  # measured after this very step, else empty
    stop: str | None = None  # set to a reason, and the loop ends after the running hooks
    interrupted: bool = False  # whether that came from outside, so that the run is to be gone on with
    clock: Clock = field(default_factory=Clock)
    observers: tuple[Observer, ...] = ()

    def settle(self) -> None:
        """Waits for the update under way, if there is one, and shows its metrics to the observers."""
        if self.in_flight is None:
            return
        with self.clock.section("step"):
            self.metrics, self.in_flight = jax.device_get(self.in_flight), None
        for observe in self.observers:
            observe(self, self.step, self.metrics)


Observer = Callable[[Loop, int, StepMetrics], None]
"""Told the metrics of each update, once, in order: (loop, number of the update from 1, metrics on the host)."""


class Hook(Protocol):
    """Something that happens between steps: logging, evaluating, saving. Any object with these methods will do."""

    def after_step(self, loop: Loop) -> None:
        """Called after each update is dispatched; `loop.metrics` are those of the update before.

        A run that was stopped before an evaluation that was due calls it again for that update when it goes on.
        """
        ...

    def at_end(self, loop: Loop) -> None:
        """Called once when the loop has ended; `loop.metrics` are those of the last update."""
        ...


def _traced(step: int) -> jax.profiler.StepTraceAnnotation:
    """Marks an update in a profile, so that its viewer can tell updates apart."""
    return jax.profiler.StepTraceAnnotation("train", step_num=step)


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
    while loop.step < steps and loop.stop is None:
        with loop.clock.section("data"):
            batch = next(batches)
        # What moves between host and device is moved by name elsewhere; anything else here would be a mistake.
        with loop.clock.section("step"), _traced(loop.step), jax.transfer_guard("disallow"):
            loop.state, dispatched = train_step(loop.state, batch)
        loop.settle()
        loop.in_flight = dispatched
        loop.step += 1
        loop.batches_consumed += 1
        loop.evaluation = {}
        for hook in hooks:
            hook.after_step(loop)
    loop.settle()
    for hook in hooks:
        hook.at_end(loop)
    return loop
