"""What happens between updates: evaluation, early stop, saving."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5x_ext.checkpoints import CheckpointStore
from t5x_ext.contracts import Frozen, Params, UserError
from t5x_ext.train.intervals import is_due
from t5x_ext.train.log import say
from t5x_ext.train.loop import Hook, Loop
from t5x_ext.train.memory import Memory
from t5x_ext.train.preemption import Interrupted
from t5x_ext.train.task import Evaluator


class Evaluate(Hook):
    """Calls evaluators, each at its interval and all after the last update.

    The last update is number `steps`, or the one after which a hook before this one has stopped the loop.

    A run that is told to stop may be given seconds only: it does not evaluate, or gives a running evaluation up, and
    leaves a note in the loop's memory, so that what was missed is made up for when it resumes (`is_owed`).
    """

    def __init__(
        self,
        evaluators: Sequence[tuple[Evaluator, int]],
        *,
        steps: int,
        whole: Callable[[Params, Frozen], Params] = lambda params, frozen: params,
        show: bool = True,
    ):
        """Prepares evaluations.

        Args:
          evaluators: each with the updates between its measurements; 0 means after update `steps` only.
          steps: total number of updates.
          whole: from the trained parameters and the frozen ones to all of the model's.
          show: whether this process prints what it measured.
        """
        self._evaluators, self._steps, self._whole, self._show = list(evaluators), steps, whole, show
        self._owners: dict[str, str] = {}
        self._pending = {evaluator.name for evaluator, _ in evaluators}

    @property
    def all_have_measured(self) -> bool:
        """Whether every evaluator has measured once in this process."""
        return not self._pending

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of all values measured in this process."""
        return tuple(sorted(self._owners))

    def after_step(self, loop: Loop) -> None:
        """Evaluates what is due."""
        last = loop.step == self._steps or (loop.stop is not None and not loop.interrupted)
        due = [evaluator for evaluator, every in self._evaluators if last or is_due(loop.step, every)]
        if not due:
            return
        if not loop.interrupted:
            loop.settle()  # an evaluation waits for the running update, whose time is not the evaluation's
            try:
                with loop.clock.section("evaluate"):
                    loop.evaluation = self._measure(due, loop)
            except Interrupted as error:
                loop.stop, loop.interrupted = str(error), True
        loop.memory.evaluation_owed = loop.step if loop.interrupted else None
        if loop.evaluation and self._show:
            text = " · ".join(f"{k} {v:.4g}" for k, v in loop.evaluation.items() if k.count("/") == 1)
            say(f"evaluation at step {loop.step:,}: {text}")

    def _measure(self, due: Sequence[Evaluator], loop: Loop) -> dict[str, float]:
        state, found = loop.state, dict[str, float]()
        params = self._whole(state.evaluation_params, loop.frozen)
        for evaluator in due:
            values = evaluator(params, loop.frozen, state.mutable, loop.step)
            for name in values:
                owner = self._owners.setdefault(name, evaluator.name)
                if owner != evaluator.name:
                    raise UserError(f"the evaluators {owner!r} and {evaluator.name!r} both measure {name!r}")
            found |= values
        self._pending -= {evaluator.name for evaluator in due}
        return found


def is_owed(loop: Loop) -> bool:
    """Whether the run was stopped before the evaluation of the very update that it resumes from."""
    return loop.memory.evaluation_owed == loop.step


class EarlyStop(Hook):
    """Stops when a metric has not become better for `patience` measurements in a row."""

    def __init__(self, metric: str, *, higher_is_better: bool, patience: int, select_from: int = 0):
        """`metric` is a key of the evaluation, as `valid/loss`; measurements before `select_from` do not count."""
        self._metric, self._sign, self._patience = metric, 1.0 if higher_is_better else -1.0, patience
        self._select_from = select_from

    def after_step(self, loop: Loop) -> None:
        """Counts measurements without gain; the count survives restarts."""
        if self._metric not in loop.evaluation or loop.step < self._select_from:
            return
        score, count = loop.evaluation[self._metric], loop.memory.early_stop
        if math.isfinite(score) and (count.best is None or self._sign * score > self._sign * count.best):
            count.best, count.evaluations_without_gain = score, 0
            return
        count.evaluations_without_gain += 1
        if count.evaluations_without_gain >= self._patience:
            loop.stop = f"{self._metric} has not become better in {self._patience} evaluations"


class Save(Hook):
    """Saves at an interval, after each measurement of the metric, when a hook asks for it, and at the end.

    Interval saves are suspended while updates are being skipped (non-finite loss): the weights do not change, and
    saving would evict the good checkpoints that a rewind needs.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        every: int,
        data: Mapping[str, Any],
        metric: str,
        data_memory: Callable[[], Any] = list,
        evaluate: Evaluate | None = None,
        select_from: int = 0,
    ):
        """Prepares saving.

        Args:
          store: where to.
          every: updates between saves; 0 means after measurements and at the end only.
          data: what decides the batches, as JSON; a run that resumes is compared with it.
          metric: the value that picks the best checkpoint.
          data_memory: what spares a resumed run planning its data from the beginning, see `BatchSource.memory`.
          evaluate: knows which values have been measured; the metric must be among them once all evaluators have
            measured. None: among those of each evaluation.
          select_from: measurements of the metric before this update pick no checkpoint.
        """
        self._store, self._every, self._data, self._metric = store, every, dict(data), metric
        self._data_memory, self._evaluate, self._select_from = data_memory, evaluate, select_from
        self._last = -1

    def after_step(self, loop: Loop) -> None:
        """Starts a save when one is due; it ends in the background."""
        wanted = loop.save is not None or self._metric in loop.evaluation
        if wanted or loop.evaluation or is_due(loop.step, self._every):
            # The save waits for the running update anyway; what was learned of it belongs into the checkpoint.
            loop.settle()
            if wanted or loop.evaluation or not loop.memory.skipped_in_row:
                self.save(loop)
        if loop.evaluation:
            self._check_metric(loop)

    def at_end(self, loop: Loop) -> None:
        """Saves the last weights and waits until every save is on disk."""
        if self._last != loop.step:
            self.save(loop)
        with loop.clock.section("save"):
            self._store.wait()

    def save(self, loop: Loop) -> None:
        """Starts a save."""
        self._last, loop.save = loop.step, None
        with loop.clock.section("save"):
            extra: dict[str, Any] = {
                "batches_consumed": loop.batches_consumed,
                "skipped": loop.skipped,
                "data": self._data,
                "known_rows": self._data_memory(),
                "memory": loop.memory.to_json(),
                "clock": loop.clock.split(),
                "evaluation": loop.evaluation,
            }
            counts = lambda name: name != self._metric or loop.step >= self._select_from
            metrics = {name: value for name, value in loop.evaluation.items() if counts(name)}
            self._store.save(loop.step, loop.state, extra, metrics or None)

    def _check_metric(self, loop: Loop) -> None:
        names = {*loop.evaluation, *(self._evaluate.measured if self._evaluate else ())}
        complete = self._evaluate is None or self._evaluate.all_have_measured
        if complete and self._metric not in names:
            raise UserError(
                f"EvaluationConfig.metric is {self._metric!r}, which is not measured here; measured are "
                f"{', '.join(sorted(names))}"
            )


def evaluations_without_gain(memory: Memory) -> int:
    """What `EarlyStop` has counted in a loop's memory."""
    return memory.early_stop.evaluations_without_gain
