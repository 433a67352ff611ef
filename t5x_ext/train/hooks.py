"""What happens between updates: logging, evaluation, early stop, saving, stopping on a signal."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from t5x_ext.checkpoints import CheckpointStore
from t5x_ext.contracts import Loss, UserError
from t5x_ext.train.loop import Loop
from t5x_ext.train.state import TrainState

logger = logging.getLogger(__name__)


def is_due(step: int, every: int) -> bool:
    """True at each multiple of `every` updates; 0 means never."""
    return every > 0 and step % every == 0


class Log:
    """Writes metrics as JSON lines and for TensorBoard, and shows one progress line.

    It comes last among the hooks, to see what the others measured. A line gives means over the updates since the line
    before; updates left out for not being finite are counted, and in no mean. On restart, lines of updates that will be
    made again are cut off, so that no update is in the file twice.
    """

    def __init__(
        self, path: Path, tensorboard_dir: Path | None, *, every: int, steps: int, start: int, max_skipped: int
    ):
        """Opens the log.

        Args:
          path: the JSON-lines file.
          tensorboard_dir: where TensorBoard files go; None writes none.
          every: updates between lines.
          steps: total number of updates, for the progress line.
          start: updates already done.
          max_skipped: so many updates in a row left out for not being finite end the run.
        """
        self._every, self._max_skipped = every, max_skipped
        self._path = path
        _cut_log(path, start)
        # What TensorBoard knows of the updates after `start` is replaced, as in the file.
        self._tensorboard = SummaryWriter(str(tensorboard_dir), purge_step=start + 1) if tensorboard_dir else None
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=None, file=sys.stderr)
        self._steps, self._start = steps, start
        self._seen = start  # the newest update whose metrics are summed up
        self._updates = 0  # since the last line
        self._sums: Loss | None = None
        self._gradient_norms: list[float] = []
        self._skipped = self._skipped_in_row = 0
        self._seconds_before: dict[str, float] = {}

    def after_step(self, loop: Loop) -> None:
        """Sums up the finished update, and writes a line when one is due."""
        self._add(loop, loop.step - 1)
        if loop.evaluation:
            self._write(loop.step, loop.evaluation)
        self._bar.update()

    def at_end(self, loop: Loop) -> None:
        """Writes what is left."""
        self._add(loop, loop.step)
        if self._updates:
            self._write_training_line(loop, loop.step)
        self._bar.close()
        if self._tensorboard:
            self._tensorboard.close()

    def _add(self, loop: Loop, step: int) -> None:
        if loop.metrics is None or step <= self._seen:
            return
        self._seen = step
        self._updates += 1
        metrics = loop.metrics
        tokens = float(metrics.loss.weight)
        loop.memory["target_tokens"] = loop.memory.get("target_tokens", 0.0) + tokens
        if metrics.finite:
            self._gradient_norms.append(float(metrics.gradient_norm))
            self._sums = metrics.loss if self._sums is None else jax.tree.map(np.add, self._sums, metrics.loss)
            self._skipped_in_row = 0
        else:
            self._skipped += 1
            self._skipped_in_row += 1
            logger.warning("update %d left out: its loss or gradient is not finite", step)
            if self._skipped_in_row >= self._max_skipped:
                self._bar.close()
                raise UserError(
                    f"updates {step - self._skipped_in_row + 1} to {step} all had a loss or gradient that is not "
                    "finite; lower the learning rate, or clip gradients"
                )
        if is_due(step, self._every):
            self._write_training_line(loop, step)

    def _write_training_line(self, loop: Loop, step: int) -> None:
        seconds = dict(loop.clock.seconds)
        spent = {name: seconds[name] - self._seconds_before.get(name, 0.0) for name in ("data", "step")}
        self._seconds_before = seconds
        wall = max(sum(spent.values()), 1e-9)
        line: dict[str, float] = {}
        if self._sums is not None:
            line["loss"] = float(self._sums.sum) / max(float(self._sums.weight), 1.0)
            for name, (total, weight) in self._sums.metrics.items():
                line[name] = float(total) / max(float(weight), 1.0)
            line["target_tokens"] = float(self._sums.weight)
            line["target_tokens_per_second"] = float(self._sums.weight) / wall
            line["gradient_norm"] = float(np.mean(self._gradient_norms))
        line["data_wait"] = spent["data"] / wall
        if self._skipped:
            line["skipped_updates"] = self._skipped
        self._write(step, line)
        self._show(step, line, wall)
        self._updates, self._sums, self._gradient_norms = 0, None, []

    def _show(self, step: int, line: dict[str, float], wall: float) -> None:
        text = (
            f"loss {line.get('loss', math.nan):.3f} · {line.get('target_tokens_per_second', 0.0):,.0f} target tokens/s"
            f" · waiting for data {line['data_wait']:.0%}"
        )
        self._bar.set_postfix_str(text, refresh=False)
        if self._bar.disable:  # not a terminal: plain lines, with the time left that a bar would show
            left = (self._steps - step) * wall / self._updates
            print(f"step {step:,} of {self._steps:,} · {text} · {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def _write(self, step: int, line: dict[str, float]) -> None:
        # JSON knows no infinity.
        values = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        if self._tensorboard:
            for name, value in values.items():
                if value is not None:
                    self._tensorboard.add_scalar(name, value, step)


def _cut_log(path: Path, start: int) -> None:
    """Drops lines of updates after `start`, and a line that a crash cut in half."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(f"{line}\n")
        except ValueError:
            continue
    path.write_text("".join(kept), encoding="utf-8")


class Evaluate:
    """Measures held-out loss and decodes held-out text, at an interval and after the last update."""

    def __init__(self, evaluate: Callable[[TrainState], dict[str, float]], *, every: int, steps: int):
        """`evaluate` turns a state into named values; `every` counts updates, 0 means after update `steps` only."""
        self._evaluate, self._every, self._steps = evaluate, every, steps

    def after_step(self, loop: Loop) -> None:
        """Evaluates when it is due, unless the run was told to stop: it may be given seconds only."""
        if loop.interrupted or not (is_due(loop.step, self._every) or loop.step == self._steps):
            return
        with loop.clock.section("evaluate"):
            loop.evaluation = self._evaluate(loop.state)
        if loop.evaluation:
            text = " · ".join(f"{k} {v:.4g}" for k, v in loop.evaluation.items() if k.count("/") == 1)
            tqdm.write(f"evaluation at step {loop.step:,}: {text}", file=sys.stderr)

    def at_end(self, loop: Loop) -> None:
        """Nothing is left to do."""


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
    """Saves at an interval, after each evaluation (so that the best can be kept), and at the end."""

    def __init__(self, store: CheckpointStore, *, every: int, data: dict[str, Any], metric: str):
        """Prepares saving.

        Args:
          store: where to.
          every: updates between saves; 0 means after evaluations and at the end only.
          data: what decides the batches, as JSON; a run that goes on is compared with it.
          metric: the value that picks the best checkpoint, which every evaluation must hold.
        """
        self._store, self._every, self._data, self._metric = store, every, data, metric
        self._last = -1

    def after_step(self, loop: Loop) -> None:
        """Starts a save when one is due; it ends in the background."""
        if is_due(loop.step, self._every) or loop.evaluation:
            self._save(loop)
        if loop.evaluation and self._metric not in loop.evaluation:
            raise UserError(
                f"EvaluationConfig.metric is {self._metric!r}, which is not measured here; measured are "
                f"{', '.join(sorted(loop.evaluation))}"
            )

    def at_end(self, loop: Loop) -> None:
        """Saves the last weights and waits until every save is on disk."""
        if self._last != loop.step:
            self._save(loop)
        with loop.clock.section("save"):
            self._store.wait()

    def _save(self, loop: Loop) -> None:
        self._last = loop.step
        with loop.clock.section("save"):
            seconds = loop.memory.get("seconds_before", 0.0) + sum(loop.clock.seconds.values())
            extra: dict[str, Any] = {
                "batches_consumed": loop.batches_consumed,
                "data": self._data,
                "memory": {**loop.memory, "seconds": seconds},
            }
            self._store.save(loop.step, loop.state, extra, loop.evaluation or None)


class StopOnSignal:
    """Ends the loop on SIGTERM or SIGINT after the running update, so that the weights are saved.

    It listens inside a `with` block only, and to the first signal only: a second one ends the process at once. Outside
    the main thread Python takes no signals, and it does nothing.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def after_step(self, loop: Loop) -> None:
        """Asks the loop to stop once a signal has come."""
        if self._received:
            loop.stop, loop.interrupted = f"{self._received} received", True

    def at_end(self, loop: Loop) -> None:
        """Nothing is left to do."""
