"""Packed batches: fills the plan's rows with the cache's tokens, by array operations."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import grain
import numpy as np
from jaxtyping import Int

from t5x_ext.contracts import BatchSource, Epoch, UserError
from t5x_ext.data.plan import BatchPlan, RowExamples
from t5x_ext.data.switching import SwitchingPlan
from t5x_ext.data.vocabulary import Vocabulary

# The plan is infinite, but grain needs a length: more batches than any run reads.
_ENDLESS = 1 << 60


class PreviewExample(NamedTuple):
    """One example of a packed row, as text; `direction` as in `en-de`."""

    direction: str
    source: str
    target: str


class ExampleId(NamedTuple):
    """The origin of an example of a batch.

    Attributes:
      corpus: name of the corpus.
      direction: as in `en-de`.
      pair: index among the pairs of the corpus that cleaning kept, from 0; the record's number if the cache holds one
        segmentation of each.
      segmentation: index of the segmentation that was read.
      row: of the batch.
      source: text; None unless asked for.
      target: text; None unless asked for.
    """

    corpus: str
    direction: str
    pair: int
    segmentation: int
    row: int
    source: str | None = None
    target: str | None = None


class PackedBatches:
    """Batch i of a plan as arrays: numpy int32 [rows, length], the same shapes for every i.

    Attributes:
      plan: which examples are in which row.
      vocabulary: gives the end-of-sentence id and the text of previews.
    """

    def __init__(self, plan: BatchPlan | SwitchingPlan, vocabulary: Vocabulary):
        self.plan = plan
        self.vocabulary = vocabulary
        self._source_prefixes = _Prefixes.of(plan.source_prefixes)
        self._target_prefixes = _Prefixes.of(plan.target_prefixes)
        self._reverse = np.array([stream.reverse for stream in plan.streams])
        caches = {stream.cache.path: stream.cache for stream in plan.streams}
        self._caches = list(caches.values())
        self._cache_numbers = np.array([list(caches).index(stream.cache.path) for stream in plan.streams])

    @property
    def rows(self) -> int:
        """Rows of a batch, over all hosts."""
        return self.plan.config.rows

    @property
    def cache_paths(self) -> list[str]:
        """Folders of the caches."""
        return [cache.path for cache in self._caches]

    def skipping(self, ranges: Sequence[tuple[int, int]]) -> Self:
        """The same batches without some ranges [start, stop) of them, see `SkippingPlan.skipping`."""
        other = copy.copy(self)
        other.plan = self.plan.skipping(ranges)
        return other

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Batch `index`, all rows."""
        return self.read(index, 0, self.rows)

    def read(self, index: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows `start` to `stop` of batch `index`; only their records are read, with one read a cache.

        Raises:
          UserError: if a cache has been damaged or cannot be read any more.
        """
        try:
            return self._filled(index, start, stop)
        except UserError:
            raise
        except Exception as error:
            error.add_note(f"while batch {index} was read from {', '.join(self.cache_paths)}")
            raise

    def unskipped(self, index: int) -> int:
        """The number that batch `index` has where nothing is skipped."""
        return self.plan.unskipped(index)

    def memory(self) -> list[list[int]]:
        """What spares a resumed run planning from the beginning, see `BatchPlan.known_rows`."""
        return self.plan.known_rows()

    def remember(self, memory: list[list[int]]) -> None:
        """Takes what `memory` gave in an earlier process."""
        self.plan.remember(memory)

    def epoch(self) -> Epoch:
        """Size of the first epoch; planning it takes about a second a million examples."""
        return Epoch(self.plan.batches_per_epoch(0), self.plan.examples_per_epoch)

    def _filled(self, index: int, start: int, stop: int) -> dict[str, np.ndarray]:
        config, eos_id = self.plan.config, self.vocabulary.eos_id
        examples = self.plan.examples(index, start, stop)
        source_text, target_text = self._read(examples)
        source = _Side(examples.rows, examples.source_lengths, (stop - start, config.source_length))
        target = _Side(examples.rows, examples.target_lengths, (stop - start, config.target_length))
        labels = target.tokens(self._target_prefixes.select(examples.streams), target_text, eos_id)
        return {
            "source_tokens": source.tokens(self._source_prefixes.select(examples.streams), source_text, eos_id),
            "source_segment_ids": source.segment_ids,
            "source_positions": source.positions,
            "target_inputs": target.shift(labels, eos_id),
            "target_labels": labels,
            "target_segment_ids": target.segment_ids,
            "target_positions": target.positions,
        }

    def _read(self, examples: RowExamples) -> tuple[_Text, _Text]:
        """The tokens that were read, and where every example's source and target start in them."""
        numbers = self._cache_numbers[examples.streams]
        blocks = [np.zeros(0, dtype=np.int32)]
        starts = np.zeros((2, len(numbers)), dtype=np.int64)
        offset = 0
        for number in np.unique(numbers):
            indices = np.flatnonzero(numbers == number)
            tokens = self._caches[number].read_tokens(examples.records[indices])
            both = tokens.source_lengths + tokens.target_lengths
            starts[0, indices] = offset + np.cumsum(both, dtype=np.int64) - both
            starts[1, indices] = starts[0, indices] + tokens.source_lengths
            blocks.append(tokens.ids)
            offset += len(tokens.ids)
        ids = np.concatenate(blocks)
        reverse = self._reverse[examples.streams]
        return _Text(ids, np.where(reverse, starts[1], starts[0])), _Text(ids, np.where(reverse, starts[0], starts[1]))

    def examples(self, index: int, texts: bool = False) -> list[ExampleId]:
        """The origins of the examples of batch `index`, all rows, in order.

        Args:
          index: the batch.
          texts: also read the examples, and give both sides as text, truncated as in the batch.
        """
        examples = self.plan.examples(index)
        ids = []
        for row, number, record in zip(examples.rows.tolist(), examples.streams.tolist(), examples.records.tolist()):
            stream = self.plan.streams[number]
            segmentation, pair = divmod(record, stream.cache.num_pairs)
            ids.append(ExampleId(stream.cache.name, stream.name, pair, segmentation, row))
        if not texts:
            return ids
        shown = (example for row in self.preview(index, self.rows) for example in row)
        return [known._replace(source=text.source, target=text.target) for known, text in zip(ids, shown)]

    def example_lengths(self, index: int) -> tuple[Int[np.ndarray, " examples"], Int[np.ndarray, " examples"]]:
        """Source and target tokens of every example of batch `index`, all rows of all hosts, int64; reads no tokens.

        Tags and end of sentence are counted, padding is not. `flops` of the model's config of these lengths are the
        model FLOPs of the batch.
        """
        examples = self.plan.examples(index)
        return examples.source_lengths, examples.target_lengths

    def preview(self, index: int, rows: int = 2) -> list[list[PreviewExample]]:
        """The first rows of a batch as text: for every row its examples, read back from the packed arrays."""
        rows = min(rows, self.rows)
        batch, examples = self.read(index, 0, rows), self.plan.examples(index, 0, rows)
        preview: list[list[PreviewExample]] = [[] for _ in range(rows)]
        for row, stream in zip(examples.rows.tolist(), examples.streams.tolist()):
            segment = len(preview[row]) + 1
            source = batch["source_tokens"][row][batch["source_segment_ids"][row] == segment]
            target = batch["target_labels"][row][batch["target_segment_ids"][row] == segment]
            texts = self.vocabulary.decode([np.asarray(source), np.asarray(target)])
            preview[row].append(PreviewExample(self.plan.streams[stream].name, *texts))
        return preview


class _Text(NamedTuple):
    """Token ids of many examples, concatenated."""

    ids: Int[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " examples"]  # index of each example's first token


@dataclass(frozen=True)
class _Prefixes:
    """The prefixes (tags and markers) of examples, left-aligned in a table."""

    ids: Int[np.ndarray, "examples longest"]
    lengths: Int[np.ndarray, " examples"]

    @classmethod
    def of(cls, prefixes: Sequence[tuple[int, ...]]) -> _Prefixes:
        lengths = np.array([len(prefix) for prefix in prefixes], dtype=np.int64)
        ids = np.zeros((len(prefixes), lengths.max()), dtype=np.int32)
        for row, prefix in zip(ids, prefixes):
            row[: len(prefix)] = prefix
        return cls(ids, lengths)

    def select(self, streams: Int[np.ndarray, " examples"]) -> _Prefixes:
        return _Prefixes(self.ids[streams], self.lengths[streams])


class _Side:
    """One side of packed rows: example k takes `lengths[k]` positions of its row, after the examples before it.

    Examples are sorted by row.
    """

    def __init__(
        self, rows: Int[np.ndarray, " examples"], lengths: Int[np.ndarray, " examples"], shape: tuple[int, int]
    ):
        self._shape = shape
        self._lengths = lengths
        self._row_starts = np.searchsorted(rows, rows)
        before = np.cumsum(lengths) - lengths
        self._starts = rows * shape[1] + before - before[self._row_starts]
        self._within = _ranges(lengths)
        self._positions = np.repeat(self._starts, lengths) + self._within

    @cached_property
    def segment_ids(self) -> Int[np.ndarray, "rows length"]:
        """Numbers of the examples within their row, from 1; 0 is padding."""
        numbers = np.arange(len(self._lengths)) - self._row_starts + 1
        return self._scatter(np.repeat(numbers, self._lengths))

    @cached_property
    def positions(self) -> Int[np.ndarray, "rows length"]:
        """Positions within the example, from 0."""
        return self._scatter(self._within)

    def tokens(self, prefixes: _Prefixes, text: _Text, eos_id: int) -> Int[np.ndarray, "rows length"]:
        """Prefix, text (truncated to the example's length) and end of sentence of every example."""
        tokens = np.zeros(self._shape, dtype=np.int32)
        flat = tokens.reshape(-1)
        for column in range(prefixes.ids.shape[1]):
            has = np.flatnonzero(prefixes.lengths > column)
            flat[self._starts[has] + column] = prefixes.ids[has, column]
        lengths = self._lengths - prefixes.lengths - 1
        within = _ranges(lengths)
        indices = np.repeat(self._starts + prefixes.lengths, lengths) + within
        flat[indices] = text.ids[np.repeat(text.starts, lengths) + within]
        flat[self._starts + self._lengths - 1] = eos_id
        return tokens

    def shift(self, labels: Int[np.ndarray, "rows length"], eos_id: int) -> Int[np.ndarray, "rows length"]:
        """Decoder inputs: within every example an end of sentence, then the labels shifted right by one position."""
        inputs = np.zeros_like(labels)
        inputs[:, 1:] = labels[:, :-1]
        inputs.reshape(-1)[self._starts] = eos_id
        return np.where(self.segment_ids > 0, inputs, 0)

    def _scatter(self, values: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, "rows length"]:
        array = np.zeros(self._shape, dtype=np.int32)
        array.reshape(-1)[self._positions] = values
        return array


def _ranges(lengths: Int[np.ndarray, " examples"]) -> Int[np.ndarray, " total"]:
    """0 to length - 1 for every length, concatenated."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


class _Source:
    """Rows of an infinite sequence of batches, as a data source of grain."""

    def __init__(self, batches: BatchSource, start: int, row_start: int, row_stop: int):
        self._batches = batches
        self._start = start
        self._rows = (row_start, row_stop)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        number = self._start + index
        try:
            return self._batches.read(number, *self._rows)
        except UserError as error:
            raise UserError(f"batch {number}: {error}") from error


def batch_iterator(
    batches: BatchSource,
    start: int = 0,
    row_start: int = 0,
    row_stop: int | None = None,
    num_threads: int = 2,
    prefetch: int = 8,
) -> Iterator[Mapping[str, np.ndarray]]:
    """Batches from `start` on, without end, read ahead by grain's threads.

    The position in the data is the number of batches consumed, which the caller counts; batches read ahead do not
    count.

    Args:
      batches: what to read.
      start: number of the first batch.
      row_start: first row of this host.
      row_stop: row after this host's last; None: all rows.
      num_threads: threads that read ahead; 0 reads on demand.
      prefetch: batches read ahead.

    Raises:
      UserError: if a cache has been damaged or can no longer be read, naming batch and file. Errors in a reading thread
        are raised in place of its batch and end the iterator.
    """
    row_stop = batches.rows if row_stop is None else row_stop
    source = grain.MapDataset.source(_Source(batches, start, row_start, row_stop))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    # grain would continue after a batch that failed; a generator that has raised is exhausted.
    yield from source.to_iter_dataset(options)
