"""Which rows of its epoch a batch takes, as far as rows have been counted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from t5x_ext.contracts import UserError


class RowCounts:
    """Rows of planned windows, counted window by window and epoch by epoch from the first on.

    An epoch is a sequence of windows. A window's number of rows is known once it is planned. Batches take rows in
    order, across windows, and are full, except at the end of an epoch: the rows of the last window, and those that
    remain from the windows before it, are spread evenly over as few batches as can hold them. So no batch is nearly
    empty, and the rows of the other batches are known before the epoch is planned to its end.
    """

    def __init__(self, windows: int, batch_rows: int):
        """`windows` an epoch; at most `batch_rows` rows a batch."""
        self._windows = windows
        self._batch_rows = batch_rows
        self._first_batches = [0]
        self._starts: list[list[int]] = [[0]]

    @property
    def next_window(self) -> tuple[int, int]:
        """Epoch and number of the first window that is not counted."""
        return len(self._starts) - 1, len(self._starts[-1]) - 1

    def add(self, rows: int) -> None:
        """Counts the rows of `next_window`."""
        starts = self._starts[-1]
        starts.append(starts[-1] + rows)
        if len(starts) > self._windows:
            self._first_batches.append(self._first_batches[-1] + self._batches(starts))
            self._starts.append([0])

    def _even_part(self, starts: Sequence[int]) -> tuple[int, int]:
        """Full batches of a counted epoch, and the rows after them."""
        full = starts[-2] // self._batch_rows
        return full, starts[-1] - full * self._batch_rows

    def _batches(self, starts: Sequence[int]) -> int:
        full, rows = self._even_part(starts)
        return full - (-rows // self._batch_rows)

    def batches(self, epoch: int) -> int | None:
        """Batches of an epoch; None if it is not counted to its end."""
        if epoch + 1 < len(self._first_batches):
            return self._first_batches[epoch + 1] - self._first_batches[epoch]
        return None

    def locate(self, number: int) -> tuple[int, int] | None:
        """The epoch of a batch and its number within it; None if it is not known yet."""
        epoch = bisect_right(self._first_batches, number) - 1
        batch = number - self._first_batches[epoch]
        if epoch == len(self._starts) - 1 and (batch + 1) * self._batch_rows > self._starts[epoch][-1]:
            return None
        return epoch, batch

    def rows_of(self, epoch: int, batch: int) -> tuple[int, int]:
        """First row of a known batch and the row after its last, counted from the start of its epoch."""
        starts = self._starts[epoch]
        if len(starts) > self._windows:
            full, rows = self._even_part(starts)
            if batch >= full:
                batches, index = self._batches(starts) - full, batch - full
                before = full * self._batch_rows
                return before + index * rows // batches, before + (index + 1) * rows // batches
        return batch * self._batch_rows, (batch + 1) * self._batch_rows

    def window_starts(self, epoch: int) -> tuple[int, ...]:
        """First row of every counted window of an epoch, and the row after the last."""
        return tuple(self._starts[epoch])

    def to_json(self) -> list[list[int]]:
        """Rows of every counted window, a list an epoch."""
        return [[stop - start for start, stop in pairwise(starts)] for starts in self._starts]

    def extend(self, rows: Sequence[Sequence[int]]) -> None:
        """Adds the counts that `to_json` gave of the same plan.

        Raises:
          UserError: if they contradict the plan, or what is counted already.
        """
        other = RowCounts(self._windows, self._batch_rows)
        for epoch, counts in enumerate(rows):
            for count in counts:
                other.add(count)
            if other.next_window != ((epoch, len(counts)) if len(counts) < self._windows else (epoch + 1, 0)):
                raise UserError("the stored position in the data is of other data: epochs have other windows")
        known = zip(self.to_json(), other.to_json())
        if any(a != b for mine, others in known for a, b in zip(mine, others)):
            raise UserError("the stored position in the data is of other data: windows have other rows")
        if other.next_window > self.next_window:
            self._first_batches, self._starts = other._first_batches, other._starts
