"""The training loop: take a batch, make a step, call the hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jax

from t5x_ext.contracts import Batch, Frozen
from t5x_ext.train.goodput import Clock
from t5x_ext.train.memory import Memory
from t5x_ext.train.state import TrainState
from t5x_ext.train.step import StepMetrics, TrainStep

if TYPE_CHECKING:
    from t5x_ext.checkpoints import CheckpointStore
    from t5x_ext.train.program import Program
    from t5x_ext.train.task import Prepared


@dataclass
class Loop:
    """What hooks see and may change between two steps.

    Attributes:
      state: after update number `step`.
      step: updates done.
      batches_consumed: the data position: index of the next batch.
      frozen: parameters that are only read, by name.
      memory: what is kept across restarts.
      skipped: ranges of batches that are skipped, see `BatchSource.skipping`.
      metrics: of the newest update that the device has finished, on the host.
      in_flight: of update number `step`, on the device; None once they were fetched.
      evaluation: measured after this very step, else empty.
      stop: set to a reason, and the loop ends after the running hooks.
      save: set to a reason, and this step is saved.
      interrupted: whether the stop came from outside, so that the run is to be resumed.
      clock: where the time goes.
      observers: told the metrics of each update.
    """

    state: TrainState
    step: int
    batches_consumed: int
    frozen: Frozen = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    skipped: list[tuple[int, int]] = field(default_factory=list)
    metrics: StepMetrics | None = None
    in_flight: StepMetrics | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    stop: str | None = None
    save: str | None = None
    interrupted: bool = False
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


class Session(NamedTuple):
    """What there is when a run begins or resumes."""

    program: Program
    prepared: Prepared
    store: CheckpointStore
    loop: Loop


class Hook(Protocol):
    """Something that happens between steps: logging, evaluating, saving.

    Any object with these methods is one; what inherits from this class needs only those in which it does something.
    """

    def begin(self, session: Session) -> None:
        """Called once in each process of a run, before its first update; it may change `session.loop.state`."""
        return None

    def after_step(self, loop: Loop) -> None:
        """Called after each update is dispatched; `loop.metrics` are those of the update before.

        A run that was stopped before an evaluation that was due calls it again for that update when it resumes.
        """
        return None

    def at_end(self, loop: Loop) -> None:
        """Called once when the loop has ended; `loop.metrics` are those of the last update."""
        return None


def _traced(step: int) -> jax.profiler.StepTraceAnnotation:
    """Marks an update in a profile, so that its viewer can tell updates apart."""
    return jax.profiler.StepTraceAnnotation("train", step_num=step)


def train(
    loop: Loop,
    train_step: TrainStep,
    batches: Iterator[Batch],
    *,
    steps: int,
    hooks: Sequence[Hook],
) -> Loop:
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
            loop.state, dispatched = train_step(loop.state, loop.frozen, batch)
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
