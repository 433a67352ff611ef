"""Which examples stand in which row of which batch, decided from lengths alone.

The plan is global: every host computes the same one from (streams, configuration, seed) and reads only its rows. A
batch is a pure function of those, its number and the ranges that are skipped, so that a position is one integer.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from t5x_ext.contracts import UserError
from t5x_ext.data.packing import pack
from t5x_ext.data.streams import Stream
from t5x_ext.data.tags import TagPolicy
from t5x_ext.data.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# The current epoch, and the next one that prefetching has begun to read.
_EPOCHS_IN_MEMORY = 2


@dataclass(frozen=True)
class BatchConfig:
    """Shape and mixture of batches; shapes are fixed, so that the step compiles once.

    Attributes:
      rows: rows of a batch over all hosts.
      source_length: tokens a row on the encoder's side, tags and end of sentence included.
      target_length: likewise on the decoder's side.
      temperature: a direction with n examples is drawn in proportion to n^(1/temperature) (arXiv 1907.05019): 1 gives
        every example once an epoch, infinity every direction equally often. Within a direction every example counts
        the same.
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
    """Examples of some rows, in the order in which they stand in them; one entry an example, int64.

    Lengths are those in the row: prefix, tokens and end of sentence.
    """

    rows: Int[np.ndarray, " examples"]
    streams: Int[np.ndarray, " examples"]
    records: Int[np.ndarray, " examples"]
    source_lengths: Int[np.ndarray, " examples"]
    target_lengths: Int[np.ndarray, " examples"]


class _Epoch(NamedTuple):
    """Examples sorted by row; row r holds examples `row_starts[r]` to `row_starts[r + 1]`."""

    streams: Int[np.ndarray, " examples"]
    records: Int[np.ndarray, " examples"]
    row_starts: Int[np.ndarray, " rows_plus_1"]

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1


class BatchPlan:
    """An infinite sequence of batches over several streams.

    An epoch has as many examples as all streams together. Each stream is an endless run of passes, a pass being a
    random order of its examples; an epoch takes the next stretch of every run, as long as the stream's rate says. What
    is drawn is shuffled over the whole epoch and packed. An epoch's rows are dealt out evenly over its batches, of
    which none has more than `rows`; missing rows are left empty. So at temperature 1 every example is seen exactly once
    an epoch, no batch is nearly empty, and no epoch reaches into the next.

    Attributes:
      streams: the directions.
      config: shape and mixture.
      source_prefixes: tags at the start of the encoder input, one tuple a stream.
      target_prefixes: likewise of the decoder labels.
      overlong: examples dropped (or truncated) for their length, by direction.
      skipped: ranges [start, stop) of batch numbers that are left out, counted without leaving any out.
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
        """Measures the streams; nothing is planned yet.

        Args:
          streams: directions, at least one.
          vocabulary: gives the tags' ids.
          tags: where tags stand.
          config: shape and mixture.
          seed: decides every order.
          shuffle: False keeps the streams' order and one pass of each an epoch, for evaluation.
          skipped: see the attribute.

        Raises:
          UserError: where a language has no tag, or no example of a stream fits into a row.
        """
        if not streams:
            raise UserError("BatchPlan: there is no training data; give at least one corpus")
        self.streams = tuple(streams)
        self.config = config
        self.source_prefixes = tuple(
            tags.source_prefix(vocabulary, stream.source_language, stream.target_language) for stream in streams
        )
        self.target_prefixes = tuple(tags.target_prefix(vocabulary, stream.target_language) for stream in streams)
        self.overlong: Counter[str] = Counter()
        self.skipped = _merge_ranges(skipped)
        self._seed = seed
        self._shuffle = shuffle
        self._usable = [self._usable_pairs(index) for index in range(len(streams))]
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._first_batches = [0]
        self._lock = threading.RLock()

    def skipping(self, ranges: Sequence[tuple[int, int]]) -> BatchPlan:
        """The same plan with more ranges [start, stop) left out, in the numbers that `unskipped` gives.

        Positions up to the first new range stay what they were, so that a run which goes back to a checkpoint before
        the range goes on from the checkpoint's position.
        """
        plan = BatchPlan.__new__(BatchPlan)
        plan.__dict__.update(self.__dict__)
        plan.skipped = _merge_ranges([*self.skipped, *ranges])
        return plan

    # Mixture

    def rates(self) -> dict[str, float]:
        """The share of examples drawn from every direction."""
        rates: defaultdict[str, float] = defaultdict(float)
        for stream, rate in zip(self.streams, self._stream_rates()):
            rates[stream.name] += float(rate)
        return dict(rates)

    @property
    def examples_per_epoch(self) -> int:
        """Examples that an epoch draws."""
        return sum(len(usable) for usable in self._usable)

    def _stream_rates(self) -> np.ndarray:
        sizes: Counter[str] = Counter()
        for stream, usable in zip(self.streams, self._usable):
            sizes[stream.name] += len(usable)
        total = sum(sizes.values())
        weights = {name: (size / total) ** (1 / self.config.temperature) for name, size in sizes.items()}
        rates = [weights[s.name] * len(usable) / sizes[s.name] for s, usable in zip(self.streams, self._usable)]
        return np.array(rates) / sum(weights.values())

    def _draws(self) -> list[int]:
        """Examples an epoch draws from every stream: the rates in whole numbers, by largest remainder, at least 1."""
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

    def _usable_pairs(self, index: int) -> Int[np.ndarray, " pairs"]:
        """Pairs that may be drawn; with several segmentations a pair is dropped if any of them is too long."""
        stream = self.streams[index]
        source, target = self._whole_lengths(index, stream.lengths)
        all_fit = (source <= self.config.source_length) & (target <= self.config.target_length)
        fits = np.logical_and.reduce(all_fit.reshape(stream.cache.variants, -1), axis=0)
        overlong = int(len(fits) - fits.sum())
        self.overlong[stream.name] += overlong
        if overlong:
            verb = "dropped" if self.config.overlong == "drop" else "truncated"
            logger.info(
                "%s (%s): %d of %d examples %s as overlong", stream.name, stream.cache.name, overlong, len(fits), verb
            )
        usable = np.flatnonzero(fits) if self.config.overlong == "drop" else np.arange(len(fits))
        if not len(usable):
            raise UserError(
                f"{stream.cache.name}, {stream.name}: all {len(fits)} examples are longer than source_length="
                f"{self.config.source_length} or target_length={self.config.target_length}"
            )
        return usable

    def _row_lengths(self, streams: np.ndarray, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.empty((2, len(records)), dtype=np.int64)
        for index, stream in enumerate(self.streams):
            places = np.flatnonzero(streams == index)
            if len(places):
                lengths[0, places], lengths[1, places] = self._whole_lengths(index, stream.lengths[records[places]])
        return np.minimum(lengths[0], self.config.source_length), np.minimum(lengths[1], self.config.target_length)

    # Epochs

    def _random(self, *key: object) -> np.random.Generator:
        digest = hashlib.sha256(repr((self._seed, *key)).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def _draw(self, index: int, start: int, stop: int) -> np.ndarray:
        """Records from `start` to `stop` in the stream's endless run of passes."""
        usable, stream = self._usable[index], self.streams[index]
        size = len(usable)
        parts = []
        for number in range(start // size, -(-stop // size)):
            order = usable
            if self._shuffle:
                order = self._random("pass", stream.name, stream.cache.name, number).permutation(usable)
            first, last = max(start - number * size, 0), min(stop - number * size, size)
            parts.append(order[first:last] + number % stream.cache.variants * stream.cache.num_pairs)
        return np.concatenate(parts)

    def _plan_epoch(self, epoch: int) -> _Epoch:
        draws = self._draws()
        drawn = [self._draw(index, epoch * count, (epoch + 1) * count) for index, count in enumerate(draws) if count]
        records = np.concatenate(drawn)
        streams = np.repeat(np.arange(len(draws), dtype=np.int16), draws)
        if self._shuffle:
            order = self._random("examples", epoch).permutation(len(records))
            records, streams = records[order], streams[order]
        if not self.config.packing:
            return _Epoch(streams, records, np.arange(len(records) + 1))
        capacities = (self.config.source_length, self.config.target_length)
        rows, num_rows = pack(*self._row_lengths(streams, records), *capacities)
        if self._shuffle:
            rows = self._random("rows", epoch).permutation(num_rows)[rows]
        order = np.argsort(rows, kind="stable")
        row_starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))])
        return _Epoch(streams[order], records[order], row_starts)

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = self._plan_epoch(epoch)
                while len(self._epochs) > _EPOCHS_IN_MEMORY:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]

    def batches_per_epoch(self, epoch: int = 0) -> int:
        """Batches of an epoch, skipped ones included; epochs may differ by a few."""
        with self._lock:
            while len(self._first_batches) < epoch + 2:
                rows = self._epoch(len(self._first_batches) - 1).num_rows
                self._first_batches.append(self._first_batches[-1] - (-rows // self.config.rows))
            return self._first_batches[epoch + 1] - self._first_batches[epoch]

    # Batches

    def unskipped(self, index: int) -> int:
        """The number that batch `index` has when none is left out, as `skipped` counts."""
        for start, stop in self.skipped:
            if index < start:
                break
            index += stop - start
        return index

    def locate(self, index: int) -> tuple[int, int]:
        """The epoch of batch `index` and its number within it.

        Epochs before it are planned once to know how many batches they have.
        """
        if index < 0:
            raise IndexError(f"batch {index}: numbers start at 0")
        number, epoch = self.unskipped(index), 0
        while number >= self._first_batches[epoch] + self.batches_per_epoch(epoch):
            epoch += 1
        return epoch, number - self._first_batches[epoch]

    def epoch_of(self, index: int) -> int:
        """The epoch of batch `index`."""
        return self.locate(index)[0]

    def examples(self, index: int, start: int = 0, stop: int | None = None) -> RowExamples:
        """Examples in rows `start` to `stop` (None: the last) of batch `index`; rows are numbered from `start`."""
        epoch_number, batch = self.locate(index)
        epoch, batches = self._epoch(epoch_number), self.batches_per_epoch(epoch_number)
        first, last = (batch * epoch.num_rows // batches, (batch + 1) * epoch.num_rows // batches)
        stop = self.config.rows if stop is None else stop
        bounds = epoch.row_starts[min(first + start, last) : min(first + stop, last) + 1]
        streams, records = epoch.streams[bounds[0] : bounds[-1]], epoch.records[bounds[0] : bounds[-1]]
        rows = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        return RowExamples(rows, streams.astype(np.int64), records, *self._row_lengths(streams, records))

    @property
    def density(self) -> float:
        """Share of the decoder's positions in the first epoch that hold a label."""
        epoch = self._epoch(0)
        labels = int(self._row_lengths(epoch.streams, epoch.records)[1].sum())
        return labels / (self.batches_per_epoch(0) * self.config.rows * self.config.target_length)


def _merge_ranges(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((int(start), int(stop)) for start, stop in ranges):
        if not 0 <= start <= stop:
            raise UserError(f"skipped range [{start}, {stop}): must be 0 <= start <= stop")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)
