"""What becomes of losses and gradients that are not finite.

The update is skipped. After several in a row the run is rewound to a checkpoint from before them and continues with
other data, as was done by hand for PaLM (arXiv 2204.02311, section 5.1).

Skipped updates change no weights, so replaying the data up to the bad range would lead to the same weights again: the
skipped data begins at the checkpoint, not at the first bad batch.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from t5x_ext.contracts import BatchSource
from t5x_ext.data.plan import merge_ranges
from t5x_ext.train.log import JsonLines, cut_log
from t5x_ext.train.loop import Loop
from t5x_ext.train.step import StepMetrics

logger = logging.getLogger(__name__)


class Diverged(Exception):
    """Updates `first` to `last` were all skipped."""

    def __init__(self, first: int, last: int):
        super().__init__(f"updates {first} to {last} all had a loss or gradient that is not finite")
        self.first, self.last = first, last


class BadUpdates:
    """Counts the updates that were skipped, and records their examples.

    It observes the loop; its counts are in the loop's memory. A batch is recorded once, also when it comes again after
    a restart.

    Args:
      path: where a JSON line a batch goes: update, number of the batch in the data without skipped ranges, ids of its
        examples; None records nothing, as all processes but one do.
      batch_number: from the position of a batch to its number in the data.
      examples: from the position of a batch to the ids of its examples.
      limit: so many in a row are too many.
    """

    def __init__(
        self,
        path: epath.Path | None,
        batch_number: Callable[[int], int],
        examples: Callable[[int], Sequence[Any]],
        limit: int,
    ):
        self._lines = JsonLines(path) if path else None
        self._batch_number, self._examples, self._limit = batch_number, examples, limit
        self._recorded: set[int] = set()
        if path is not None and path.exists():
            cut_log(path, sys.maxsize)  # half a line, which a crash may have left
            self._recorded = {json.loads(line)["batch"] for line in path.read_text().splitlines()}

    def observe(self, loop: Loop, step: int, metrics: StepMetrics) -> None:
        """Counts an update.

        Raises:
          Diverged: when it is one too many.
        """
        if metrics.finite:
            loop.memory.skipped_in_row = 0
            return
        memory = loop.memory
        memory.skipped_in_row += 1
        memory.skipped_updates += 1
        if self._lines:
            logger.warning("update %d skipped: its loss or gradient is not finite", step)
            self._record(step, position_of(loop, step))
        if memory.skipped_in_row >= self._limit:
            raise Diverged(step - memory.skipped_in_row + 1, step)

    def _record(self, step: int, position: int) -> None:
        batch = self._batch_number(position)
        if self._lines and batch not in self._recorded:
            self._recorded.add(batch)
            self._lines.append({"step": step, "batch": batch, "examples": list(self._examples(position))})


def position_of(loop: Loop, step: int) -> int:
    """The position of the batch that an update took."""
    return loop.batches_consumed - loop.step + step - 1


def skipped_after(
    batches: BatchSource, skipped: Sequence[tuple[int, int]], start: int, last: int
) -> list[tuple[int, int]]:
    """The ranges to skip so that the batches at positions `start` to `last` do not come again.

    Args:
      batches: what is read now, with `skipped` skipped.
      skipped: ranges skipped already.
      start: the first position.
      last: the last one.
    """
    return list(merge_ranges([*skipped, (batches.unskipped(start), batches.unskipped(last) + 1)]))
