"""What happens between updates: evaluation, early stop, saving."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from t5x_ext.checkpoints import CheckpointStore
from t5x_ext.contracts import UserError
from t5x_ext.train.log import say
from t5x_ext.train.loop import Loop
from t5x_ext.train.preemption import Interrupted
from t5x_ext.train.state import TrainState


def is_due(step: int, every: int) -> bool:
    """True at each multiple of `every` updates; 0 means never."""
    return every > 0 and step % every == 0


class Evaluate:
    """Measures held-out loss and decodes held-out text, at an interval and after the last update.

    The last update is number `steps`, or the one after which a hook before this one has stopped the loop.

    A run that is told to stop may be given seconds only: it does not evaluate, or gives a running evaluation up, and
    leaves a note in the loop's memory, so that what was missed is made up for when it goes on (`is_owed`).
    """

    def __init__(
        self, evaluate: Callable[[TrainState], dict[str, float]], *, every: int, steps: int, show: bool = True
    ):
        """Prepares evaluations.

        Args:
          evaluate: from a state to named values; raises `Interrupted` when it is to be given up.
          every: updates between evaluations; 0 means after update `steps` only.
          steps: total number of updates.
          show: whether this process prints what it measured.
        """
        self._evaluate, self._every, self._steps, self._show = evaluate, every, steps, show

    def after_step(self, loop: Loop) -> None:
        """Evaluates when it is due."""
        is_last = loop.step == self._steps or (loop.stop is not None and not loop.interrupted)
        if not (is_due(loop.step, self._every) or is_last):
            return
        if not loop.interrupted:
            loop.settle()  # an evaluation waits for the running update, whose time is not the evaluation's
            try:
                with loop.clock.section("evaluate"):
                    loop.evaluation = self._evaluate(loop.state)
            except Interrupted as error:
                loop.stop, loop.interrupted = str(error), True
        loop.memory["evaluation_owed"] = loop.step if loop.interrupted else None
        if loop.evaluation and self._show:
            text = " · ".join(f"{k} {v:.4g}" for k, v in loop.evaluation.items() if k.count("/") == 1)
            say(f"evaluation at step {loop.step:,}: {text}")

    def at_end(self, loop: Loop) -> None:
        """Nothing is left to do."""


def is_owed(loop: Loop) -> bool:
    """Whether the run was stopped before the evaluation of the very update that it goes on from."""
    return loop.memory.get("evaluation_owed") == loop.step


def evaluations_without_gain(memory: dict[str, Any]) -> int:
    """What `EarlyStop` has counted in a loop's memory."""
    return memory.get("early_stop", {}).get("evaluations_without_gain", 0)


class EarlyStop:
    """Stops when a metric has not become better for `patience` evaluations in a row."""

    def __init__(self, metric: str, *, higher_is_better: bool, patience: int):
        """`metric` is a key of the evaluation, as `valid/loss` or `valid/bleu`."""
        self._metric, self._sign, self._patience = metric, 1.0 if higher_is_better else -1.0, patience

    def after_step(self, loop: Loop) -> None:
        """Counts evaluations without gain; the count survives restarts."""
        if self._metric not in loop.evaluation:
            return
        score = loop.evaluation[self._metric]
        memory = loop.memory.setdefault("early_stop", {"best": None, "evaluations_without_gain": 0})
        best = memory["best"]
        if math.isfinite(score) and (best is None or self._sign * score > self._sign * best):
            memory.update(best=score, evaluations_without_gain=0)
            return
        memory["evaluations_without_gain"] += 1
        if memory["evaluations_without_gain"] >= self._patience:
            loop.stop = f"{self._metric} has not become better in {self._patience} evaluations"

    def at_end(self, loop: Loop) -> None:
        """Nothing is left to do."""


class Save:
    """Saves at an interval, after each evaluation (so that the best can be kept), and at the end.

    While updates are being left out nothing is saved at the interval: the weights stand still, and checkpoints from
    before the bad stretch, which the run may have to go back to, must not be pushed out.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        every: int,
        data: dict[str, Any],
        metric: str,
        known_rows: Callable[[], list[list[int]]] = list,
    ):
        """Prepares saving.

        Args:
          store: where to.
          every: updates between saves; 0 means after evaluations and at the end only.
          data: what decides the batches, as JSON; a run that goes on is compared with it.
          metric: the value that picks the best checkpoint, which every evaluation must hold.
          known_rows: what spares a run that goes on planning its data from the beginning, see `BatchPlan`.
        """
        self._store, self._every, self._data, self._metric = store, every, data, metric
        self._known_rows = known_rows
        self._last = -1

    def after_step(self, loop: Loop) -> None:
        """Starts a save when one is due; it ends in the background."""
        if is_due(loop.step, self._every) or loop.evaluation:
            # The save waits for the running update anyway; what was learned of it belongs into the checkpoint.
            loop.settle()
            if loop.evaluation or not loop.memory.get("skipped_in_row"):
                self.save(loop)
        if loop.evaluation and self._metric not in loop.evaluation:
            raise UserError(
                f"EvaluationConfig.metric is {self._metric!r}, which is not measured here; measured are "
                f"{', '.join(sorted(loop.evaluation))}"
            )

    def at_end(self, loop: Loop) -> None:
        """Saves the last weights and waits until every save is on disk."""
        if self._last != loop.step:
            self.save(loop)
        with loop.clock.section("save"):
            self._store.wait()

    def save(self, loop: Loop) -> None:
        """Starts a save."""
        self._last = loop.step
        with loop.clock.section("save"):
            extra: dict[str, Any] = {
                "batches_consumed": loop.batches_consumed,
                "skipped": loop.skipped,
                "data": self._data,
                "known_rows": self._known_rows(),
                "memory": loop.memory,
                "clock": loop.clock.split(),
                "evaluation": loop.evaluation,
            }
            self._store.save(loop.step, loop.state, extra, loop.evaluation or None)
