"""Which examples are in which row of which batch, as a function of their lengths.

The plan is global: every host computes the same one from (streams, configuration, seed) and reads only its rows. A
batch is a pure function of those, its number and the skipped ranges. So the position in the data is one integer.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Self

import numpy as np
from jaxtyping import Int

from t5x_ext.contracts import UserError
from t5x_ext.data.packing import pack
from t5x_ext.data.row_counts import RowCounts
from t5x_ext.data.shuffling import Shuffle
from t5x_ext.data.streams import Stream
from t5x_ext.data.tags import TagPolicy
from t5x_ext.data.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# Examples that are shuffled and packed together: enough for dense packing, few enough for memory.
_WINDOW_EXAMPLES = 1 << 20
# The window that is read, the next one, which prefetching may read already, and the one that is planned ahead.
_WINDOWS_IN_MEMORY = 3


@dataclass(frozen=True)
class BatchConfig:
    """Shape and mixture of batches; shapes are fixed, so that the step compiles once.

    Attributes:
      rows: rows of a batch over all hosts.
      source_length: tokens a row on the encoder's side, tags and end of sentence included.
      target_length: tokens a row on the decoder's side, tags and end of sentence included.
      temperature: a direction with n examples is sampled in proportion to n^(1/temperature) (arXiv 1907.05019): 1 gives
        every example once an epoch, infinity every direction equally often. Examples of a direction have equal weight.
      packing: several examples a row; False: one a row.
      overlong: examples that do not fit into a row are dropped, or truncated to it.
    """

    rows: int = 32
    source_length: int = 128
    target_length: int = 128
    temperature: float = 1.0
    packing: bool = True
    overlong: Literal["drop", "truncate"] = "drop"

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(f"BatchConfig.rows={self.rows}: must be positive")
        for side in ("source_length", "target_length"):
            if getattr(self, side) < 4:
                raise UserError(f"BatchConfig.{side}={getattr(self, side)}: must be at least 4 tokens")
        if not self.temperature >= 1:
            raise UserError(f"BatchConfig.temperature={self.temperature}: must be at least 1")
        if self.overlong not in ("drop", "truncate"):
            raise UserError(f"BatchConfig.overlong={self.overlong!r}: allowed are 'drop', 'truncate'")


class RowExamples(NamedTuple):
    """The examples of some rows, in order; one entry an example, int64.

    Lengths are those in the row: prefix, tokens and end of sentence.
    """

    rows: Int[np.ndarray, " examples"]
    streams: Int[np.ndarray, " examples"]
    records: Int[np.ndarray, " examples"]
    source_lengths: Int[np.ndarray, " examples"]
    target_lengths: Int[np.ndarray, " examples"]


class _Window(NamedTuple):
    """Examples sorted by row; row r holds examples `row_starts[r]` to `row_starts[r + 1]`."""

    streams: Int[np.ndarray, " examples"]
    records: Int[np.ndarray, " examples"]
    row_starts: Int[np.ndarray, " rows_plus_1"]

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1


class _Usable(NamedTuple):
    """The pairs of a stream without the dropped ones."""

    size: int
    dropped: Int[np.ndarray, " dropped"]  # for each dropped pair, ascending, the number of usable ones before it

    def pairs(self, indices: Int[np.ndarray, " indices"]) -> Int[np.ndarray, " indices"]:
        return indices + np.searchsorted(self.dropped, indices, side="right") if len(self.dropped) else indices


class SkippingPlan:
    """An infinite sequence of batches, some of which are skipped.

    Attributes:
      skipped: ranges [start, stop) of skipped batch numbers, which count all batches.
    """

    def __init__(self, skipped: Sequence[tuple[int, int]] = ()):
        """Skips these ranges.

        Args:
          skipped: see the attribute.
        """
        self.skipped = merge_ranges(skipped)

    def skipping(self, ranges: Sequence[tuple[int, int]]) -> Self:
        """The same plan that also skips these ranges [start, stop), in the numbers that `unskipped` gives.

        Positions before the first new range do not change, so that a run which rewinds to a checkpoint before the range
        resumes from the checkpoint's position.
        """
        plan = copy.copy(self)
        plan.skipped = merge_ranges([*self.skipped, *ranges])
        return plan

    def unskipped(self, index: int) -> int:
        """The number of batch `index` when skipped batches are counted too."""
        for start, stop in self.skipped:
            if index < start:
                break
            index += stop - start
        return index


class BatchPlan(SkippingPlan):
    """An infinite sequence of batches over several streams.

    Each stream repeats forever, reshuffled on every pass. An epoch has as many examples as all streams together: it
    takes the next `rate * examples_per_epoch` examples of each stream, continuing where the last epoch stopped. Epochs
    above 2^20 examples are planned in windows of about that size, each with a proportional share of every stream. The
    examples of a window are shuffled and packed into rows, and rows are grouped into batches; at the end of an epoch
    rows are spread evenly over the last batches (see `RowCounts`). So at temperature 1 every example is seen exactly
    once an epoch, no batch is nearly empty, and no batch mixes epochs.

    Memory is that of a few windows. It does not grow with the number of examples, except for 8 bytes for each dropped
    overlong one; lengths are read from the caches' memory-mapped files. The next window of a large epoch is planned in
    a thread while one is read.

    The batches of an epoch are known once its windows are planned. To resume late in the data without planning all
    windows before, keep `known_rows`, a short JSON list, in the checkpoint, and restore it by `remember`.

    Attributes:
      streams: the directions.
      config: shape and mixture.
      source_prefixes: tags and markers at the start of the encoder input, one tuple a stream.
      target_prefixes: tags at the start of the decoder labels, one tuple a stream.
      overlong: examples dropped (or truncated) for their length, by direction.
      skipped: see `SkippingPlan`.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        vocabulary: Vocabulary,
        tags: TagPolicy,
        config: BatchConfig,
        seed: int,
        shuffle: bool = True,
        skipped: Sequence[tuple[int, int]] = (),
    ):
        """Counts the usable examples of the streams; plans nothing yet.

        Args:
          streams: directions, at least one.
          vocabulary: gives the tags' ids.
          tags: where tags are inserted.
          config: shape and mixture.
          seed: of every random order.
          shuffle: False keeps the streams' order and one pass of each an epoch, for evaluation.
          skipped: see the attribute.

        Raises:
          UserError: if a language has no tag, or no example of a stream fits into a row.
        """
        super().__init__(skipped)
        if not streams:
            raise UserError("BatchPlan: there is no training data; give at least one corpus")
        self.streams = tuple(streams)
        self.config = config
        self.source_prefixes = tuple(
            tags.source_prefix(vocabulary, stream.source_language, stream.target_language, stream.marker)
            for stream in streams
        )
        self.target_prefixes = tuple(tags.target_prefix(vocabulary, stream.target_language) for stream in streams)
        self.overlong: Counter[str] = Counter()
        self._seed = seed
        self._shuffle = shuffle
        self._usable = [self._usable_pairs(index) for index in range(len(streams))]
        self._num_windows = -(-self.examples_per_epoch // _WINDOW_EXAMPLES)
        self._counts = RowCounts(self._num_windows, config.rows)
        self._windows: OrderedDict[tuple[int, int], Future[_Window]] = OrderedDict()
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="batch plan")
        self._lock = threading.Lock()

    # Mixture

    def rates(self) -> dict[str, float]:
        """The share of examples of every direction."""
        rates: defaultdict[str, float] = defaultdict(float)
        for stream, rate in zip(self.streams, self._stream_rates()):
            rates[stream.name] += float(rate)
        return dict(rates)

    @property
    def examples_per_epoch(self) -> int:
        """Examples of an epoch."""
        return sum(usable.size for usable in self._usable)

    def _stream_rates(self) -> np.ndarray:
        sizes: Counter[str] = Counter()
        for stream, usable in zip(self.streams, self._usable):
            sizes[stream.name] += usable.size
        total = sum(sizes.values())
        weights = {name: (size / total) ** (1 / self.config.temperature) for name, size in sizes.items()}
        rates = [weights[s.name] * usable.size / sizes[s.name] for s, usable in zip(self.streams, self._usable)]
        return np.array(rates) / sum(weights.values())

    def _draws(self) -> list[int]:
        """Examples of an epoch by stream: the rates rounded to whole numbers by largest remainder, at least 1."""
        exact = self._stream_rates() * self.examples_per_epoch
        draws = np.floor(exact + 1e-6).astype(np.int64)
        missing = self.examples_per_epoch - int(draws.sum())
        draws[np.argsort(draws - exact, kind="stable")[:missing]] += 1
        starved = draws == 0
        draws[draws.argmax()] -= starved.sum()
        draws[starved] = 1
        return draws.tolist()

    # Lengths

    def _whole_lengths(self, index: int, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source = lengths[:, 0] + (len(self.source_prefixes[index]) + 1)
        return source, lengths[:, 1] + (len(self.target_prefixes[index]) + 1)

    def _usable_pairs(self, index: int) -> _Usable:
        """Pairs that are not dropped; with several segmentations a pair is overlong if any of them is."""
        stream = self.streams[index]
        pairs = stream.cache.num_pairs
        parts = [
            start + self._overlong(index, start, min(start + _WINDOW_EXAMPLES, pairs))
            for start in range(0, pairs, _WINDOW_EXAMPLES)
        ]
        overlong = np.concatenate(parts)
        self.overlong[stream.name] += len(overlong)
        if len(overlong):
            verb = "dropped" if self.config.overlong == "drop" else "truncated"
            logger.info(
                "%s (%s): %d of %d examples %s as overlong", stream.name, stream.cache.name, len(overlong), pairs, verb
            )
        dropped = overlong if self.config.overlong == "drop" else overlong[:0]
        if len(dropped) == pairs:
            raise UserError(
                f"{stream.cache.name}, {stream.name}: all {pairs} examples are longer than source_length="
                f"{self.config.source_length} or target_length={self.config.target_length}"
            )
        return _Usable(pairs - len(dropped), dropped - np.arange(len(dropped)))

    def _overlong(self, index: int, start: int, stop: int) -> Int[np.ndarray, " overlong"]:
        """Which of the pairs `start` to `stop` are overlong, counted from `start`."""
        stream, overlong = self.streams[index], np.zeros(stop - start, dtype=bool)
        for first in range(0, stream.cache.variants * stream.cache.num_pairs, stream.cache.num_pairs):
            source, target = self._whole_lengths(index, stream.lengths[first + start : first + stop])
            overlong |= (source > self.config.source_length) | (target > self.config.target_length)
        return np.flatnonzero(overlong)

    def _row_lengths(self, streams: np.ndarray, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.empty((2, len(records)), dtype=np.int64)
        for index, stream in enumerate(self.streams):
            indices = np.flatnonzero(streams == index)
            if len(indices):
                lengths[:, indices] = self._whole_lengths(index, stream.lengths[records[indices]])
        return np.minimum(lengths[0], self.config.source_length), np.minimum(lengths[1], self.config.target_length)

    # Windows

    def _random(self, *key: object) -> np.random.Generator:
        digest = hashlib.sha256(repr((self._seed, *key)).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def _draw(self, index: int, start: int, stop: int) -> np.ndarray:
        """Records `start` to `stop` of the stream's infinite sequence of passes."""
        usable, stream = self._usable[index], self.streams[index]
        parts = [np.zeros(0, dtype=np.int64)]
        for number in range(start // usable.size, -(-stop // usable.size)):
            first, last = max(start - number * usable.size, 0), min(stop - number * usable.size, usable.size)
            pairs = usable.pairs(self._order(index, number, first, last))
            parts.append(pairs + number % stream.cache.variants * stream.cache.num_pairs)
        return np.concatenate(parts)

    def _order(self, index: int, number: int, first: int, last: int) -> np.ndarray:
        """Items `first` to `last` of pass `number` over the stream's usable pairs."""
        size, stream = self._usable[index].size, self.streams[index]
        if not self._shuffle:
            return np.arange(first, last)
        random = self._random("pass", stream.name, stream.cache.name, number)
        # A stored permutation is the better shuffle, but above a window it would take more memory than all else.
        if size <= _WINDOW_EXAMPLES:
            return random.permutation(size)[first:last]
        return Shuffle(size, random)(np.arange(first, last))

    def _plan_window(self, epoch: int, window: int) -> _Window:
        draws = self._draws()
        bounds = [
            [epoch * count + count * part // self._num_windows for part in (window, window + 1)] for count in draws
        ]
        records = np.concatenate([self._draw(index, *bound) for index, bound in enumerate(bounds)])
        streams = np.repeat(np.arange(len(draws), dtype=np.int16), [stop - start for start, stop in bounds])
        # The first window has the key that epochs had before there were windows: orders do not change.
        key = (epoch, window) if window else (epoch,)
        if self._shuffle:
            order = self._random("examples", *key).permutation(len(records))
            records, streams = records[order], streams[order]
        if not self.config.packing:
            return _Window(streams, records, np.arange(len(records) + 1))
        capacities = (self.config.source_length, self.config.target_length)
        rows, num_rows = pack(*self._row_lengths(streams, records), *capacities)
        if self._shuffle:
            rows = self._random("rows", *key).permutation(num_rows)[rows]
        order = np.argsort(rows, kind="stable")
        row_starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))])
        return _Window(streams[order], records[order], row_starts)

    def _window(self, epoch: int, window: int) -> _Window:
        following = (epoch, window + 1) if window + 1 < self._num_windows else (epoch + 1, 0)
        with self._lock:
            planned = self._submit(epoch, window)
            if self._num_windows > 1:
                self._submit(*following)
        result = planned.result()
        with self._lock:
            if (epoch, window) == self._counts.next_window:
                self._counts.add(result.num_rows)
            starts = self._counts.window_starts(epoch)
        if starts[window + 1] - starts[window] != result.num_rows:
            raise UserError("the stored position in the data is of other data: windows have other rows")
        return result

    def _submit(self, epoch: int, window: int) -> Future[_Window]:
        key = (epoch, window)
        if key not in self._windows:
            self._windows[key] = self._planner.submit(self._plan_window, epoch, window)
            while len(self._windows) > _WINDOWS_IN_MEMORY:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]

    def _count_next_window(self) -> None:
        with self._lock:
            window = self._counts.next_window
        self._window(*window)

    def batches_per_epoch(self, epoch: int = 0) -> int:
        """Batches of an epoch, skipped ones included; epochs may differ by a few.

        Plans the epoch, and those before it that are not counted yet: about a second a million examples.
        """
        while (batches := self._counts.batches(epoch)) is None:
            self._count_next_window()
        return batches

    def known_rows(self) -> list[list[int]]:
        """Rows of every window planned so far, a list an epoch: JSON for a checkpoint, see `remember`."""
        with self._lock:
            return self._counts.to_json()

    def remember(self, known_rows: Sequence[Sequence[int]]) -> None:
        """Restores what `known_rows` gave in an earlier process, so that the windows it counts are not planned again.

        Raises:
          UserError: if it contradicts this plan. What cannot be checked here is checked when a window is planned.
        """
        with self._lock:
            self._counts.extend(known_rows)

    # Batches

    def locate(self, index: int) -> tuple[int, int]:
        """The epoch of batch `index` and its number within it.

        Plans the windows before it whose rows are not counted yet.
        """
        if index < 0:
            raise IndexError(f"batch {index}: numbers start at 0")
        number = self.unskipped(index)
        while True:
            with self._lock:
                found = self._counts.locate(number)
            if found is not None:
                return found
            self._count_next_window()

    def epoch_of(self, index: int) -> int:
        """The epoch of batch `index`."""
        return self.locate(index)[0]

    def examples(self, index: int, start: int = 0, stop: int | None = None) -> RowExamples:
        """Examples in rows `start` to `stop` (None: the last) of batch `index`; rows are numbered from `start`."""
        epoch, batch = self.locate(index)
        with self._lock:
            first, last = self._counts.rows_of(epoch, batch)
            starts = self._counts.window_starts(epoch)
        stop = self.config.rows if stop is None else stop
        first, last = min(first + start, last), min(first + stop, last)
        parts = [
            self._rows_of_window(epoch, window, max(first, window_first), min(last, window_last))
            for window, (window_first, window_last) in enumerate(pairwise(starts))
            if max(first, window_first) < min(last, window_last)
        ]
        if not parts:
            return RowExamples(*(np.zeros(0, dtype=np.int64) for _ in RowExamples._fields))
        rows, streams, records = (np.concatenate(arrays) for arrays in zip(*parts))
        return RowExamples(rows - first, streams, records, *self._row_lengths(streams, records))

    def _rows_of_window(self, epoch: int, number: int, first: int, last: int) -> tuple[np.ndarray, ...]:
        """Row, stream and record of the examples in rows `first` to `last` of the epoch, all in one window."""
        window = self._window(epoch, number)
        with self._lock:
            window_first = self._counts.window_starts(epoch)[number]
        bounds = window.row_starts[first - window_first : last - window_first + 1]
        inside = slice(bounds[0], bounds[-1])
        rows = first + np.repeat(np.arange(last - first), np.diff(bounds))
        return rows, window.streams[inside].astype(np.int64), window.records[inside]

    @property
    def density(self) -> float:
        """Share of the decoder's positions that have a label, over the first epoch or its first million examples."""
        window = self._window(0, 0)
        labels = int(self._row_lengths(window.streams, window.records)[1].sum())
        batches = -(-window.num_rows // self.config.rows)
        return labels / (batches * self.config.rows * self.config.target_length)


def merge_ranges(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges [start, stop) in order, those that touch joined, empty ones dropped."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((int(start), int(stop)) for start, stop in ranges):
        if not 0 <= start <= stop:
            raise UserError(f"skipped range [{start}, {stop}): must be 0 <= start <= stop")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)
