"""The log of a run: JSON lines, TensorBoard, one progress line."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from tqdm import tqdm

from t5x_ext.contracts import Loss
from t5x_ext.storage.files import append_text, write_text
from t5x_ext.train.goodput import SECTIONS
from t5x_ext.train.loop import Hook, Loop
from t5x_ext.train.memory import LogSums
from t5x_ext.train.step import StepMetrics
from t5x_ext.train.tensorboard import TensorBoard

logger = logging.getLogger(__name__)


class Log(Hook):
    """Sums up metrics, writes means over the updates since the line before, and shows them.

    It observes the loop, so that each update is in one line and in no other, also where a checkpoint lies between two
    lines: the sums since the last line are in the loop's memory. An update skipped for not being finite is counted,
    and in no mean.

    In a line, `seconds` is the wall time since the line before and `time/NAME` the share of it that went into each of
    `goodput.SECTIONS`; speeds are per second of `data` and `step`, which evaluations and saves do not slow down.
    """

    def __init__(
        self,
        path: epath.Path | None,
        tensorboard_dir: epath.Path | None = None,
        *,
        every: int,
        steps: int,
        start: int,
        batch_flops: Callable[[int], float | None] | None = None,
        peak_flops: float | None = None,
    ):
        """Opens the log.

        Args:
          path: the JSON-lines file; None sums up only, as all processes but one do.
          tensorboard_dir: where TensorBoard files go; None writes none.
          every: updates between lines.
          steps: total number of updates, for the progress line.
          start: updates already done.
          batch_flops: floating point operations that the model needs for an update on batch i; None: unknown.
          peak_flops: operations per second of all devices at their best; None where unknown.
        """
        self._every, self._batch_flops, self._peak_flops = every, batch_flops, peak_flops
        self._lines = JsonLines(path) if path else None
        self._tensorboard = TensorBoard(tensorboard_dir, start) if tensorboard_dir else None
        disable = None if path else True
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=disable, file=sys.stderr)
        self._steps = steps

    def observe(self, loop: Loop, step: int, metrics: StepMetrics) -> None:
        """Sums up a finished update, and writes a line when one is due."""
        memory, sums = loop.memory, loop.memory.log
        sums.updates += 1
        memory.target_tokens += float(metrics.loss.weight)
        flops = self._flops(loop.batches_consumed - loop.step + step - 1)
        sums.model_flops += flops
        memory.model_flops += flops
        if metrics.finite:
            sums.finite += 1
            sums.gradient_norm += float(metrics.gradient_norm)
            for name, value in metrics.extra.items():
                sums.extra[name] = sums.extra.get(name, 0.0) + float(value)
            _add(sums.losses, metrics.loss)
        if step % self._every == 0:
            self._write_training_line(loop, step)

    def after_step(self, loop: Loop) -> None:
        """Writes what was measured after this update."""
        if loop.evaluation:
            self._write(loop.step, loop.evaluation)
        self._bar.update(loop.step - self._bar.n)

    def at_end(self, loop: Loop) -> None:
        """Writes what is left, unless the run is to be resumed: then the next line will have it."""
        if loop.memory.log.updates and not loop.interrupted:
            self._write_training_line(loop, loop.step)
        self.close()

    def close(self) -> None:
        """Ends the progress line and TensorBoard's file."""
        self._bar.close()
        if self._tensorboard:
            self._tensorboard.close()

    def _write_training_line(self, loop: Loop, step: int) -> None:
        sums, now = loop.memory.log, loop.clock.split()
        spent = {name: now.get(name, 0.0) - sums.clock.get(name, 0.0) for name in SECTIONS}
        wall = max(sum(spent.values()), 1e-9)
        training = max(spent["data"] + spent["step"], 1e-9)
        line: dict[str, float] = {}
        if sums.finite:
            weight = sums.losses["loss"][1]
            line |= {name: s / max(w, 1.0) for name, (s, w) in sums.losses.items()}
            line["target_tokens"] = weight
            line["target_tokens_per_second"] = weight / training
            line["gradient_norm"] = sums.gradient_norm / sums.finite
            line |= {name: total / sums.finite for name, total in sums.extra.items()}
        if sums.model_flops:
            line["model_flops_per_second"] = sums.model_flops / training
            if self._peak_flops:
                line["mfu"] = line["model_flops_per_second"] / self._peak_flops
        line["seconds"] = wall
        line |= {f"time/{name}": seconds / wall for name, seconds in spent.items() if seconds > 0}
        if loop.memory.skipped_updates:
            line["skipped_updates"] = loop.memory.skipped_updates
        self._write(step, line)
        self._show(step, line, wall / sums.updates)
        loop.memory.log = LogSums(clock=dict(now))

    def _flops(self, index: int) -> float:
        flops = None if self._batch_flops is None else self._batch_flops(index)
        return flops or 0.0

    def _show(self, step: int, line: Mapping[str, float], seconds_per_update: float) -> None:
        parts = [
            f"loss {line.get('loss', math.nan):.3f}",
            f"{line.get('target_tokens_per_second', 0.0):,.0f} target tokens/s",
            *([f"MFU {line['mfu']:.1%}"] if "mfu" in line else []),
            *(f"{verb} {share:.0%}" for verb, share in _pauses(line)),
        ]
        text = " · ".join(parts)
        self._bar.set_postfix_str(text, refresh=False)
        if self._lines and self._bar.disable:  # not a terminal: plain lines, with the time left that a bar would show
            left = (self._steps - step) * seconds_per_update
            say(f"step {step:,} of {self._steps:,} · {text} · {left / 60:.1f} min left")

    def _write(self, step: int, line: Mapping[str, float]) -> None:
        if self._lines is None:
            return
        # JSON knows no infinity.
        values = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._lines.append({"step": step, **values})
        if self._tensorboard:
            self._tensorboard.add(step, {name: value for name, value in values.items() if value is not None})


def _add(sums: dict[str, list[float]], loss: Loss) -> None:
    for name, (value, weight) in {"loss": (loss.sum, loss.weight), **loss.metrics}.items():
        before = sums.get(name, [0.0, 0.0])
        sums[name] = [before[0] + float(value), before[1] + float(weight)]


def _pauses(line: Mapping[str, float]) -> list[tuple[str, float]]:
    """What the loop spent its time on other than computing, where it is worth a word."""
    verbs = {"data": "waiting for data", "save": "saving", "evaluate": "evaluating", "lost": "lost"}
    shares = [(verb, line.get(f"time/{name}", 0.0)) for name, verb in verbs.items()]
    return [(verb, share) for verb, share in shares if share >= 0.01]


def say(line: str) -> None:
    """Shows a line above the progress bar; where standard error goes to a full disk, nobody reads it."""
    with contextlib.suppress(OSError):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


class JsonLines:
    """A file of JSON lines that never holds half a line, also where the disk is full.

    What cannot be written is kept and written later, with one warning: a run does not end for its log. In a bucket,
    where nothing can be appended, the file is written again.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._unwritten: list[str] = []

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one record as a line."""
        self._unwritten.append(json.dumps(record, allow_nan=False) + "\n")
        try:
            append_text(self._path, "".join(self._unwritten))
        except OSError as error:
            if len(self._unwritten) == 1:
                logger.warning("%s cannot be written (%s); its lines are kept until it can", self._path, error.strerror)
        else:
            self._unwritten = []


def cut_log(path: epath.PathLike, step: int) -> float:
    """Drops the lines of updates after `step`, and a line that a crash cut in half.

    Returns:
      The wall seconds that the dropped lines tell of.
    """
    path = epath.Path(path)
    if not path.exists():
        return 0.0
    kept, lost = [], 0.0
    text = path.read_text()
    for line in text.splitlines():
        try:
            record = json.loads(line)
            after = record["step"] > step
        except (ValueError, LookupError, TypeError):
            continue
        if after:
            lost += record.get("seconds") or 0.0
        else:
            kept.append(f"{line}\n")
    if "".join(kept) != text:
        write_text(path, "".join(kept))
    return lost
