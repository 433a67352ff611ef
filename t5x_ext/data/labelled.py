"""Batches of labelled texts: one example a row, or several short ones packed into a row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from t5x_ext.contracts import Epoch, UserError
from t5x_ext.data.plan import SkippingPlan
from t5x_ext.data.wordpiece import TokenizedText


@dataclass(frozen=True)
class RowConfig:
    """The shape of a batch of labelled texts.

    Attributes:
      rows: rows of a batch.
      length: tokens of a row; longer examples are truncated.
      examples_per_row: examples that a row may hold, none of which sees another. 1 pads every example to `length`; more
        waste less on short texts. A batch is full when the next example fits nowhere.
    """

    rows: int = 32
    length: int = 128
    examples_per_row: int = 1

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("length", 3), ("examples_per_row", 1)):
            if getattr(self, name) < least:
                raise UserError(f"RowConfig.{name} is {getattr(self, name)}; it must be at least {least}")


class Examples(NamedTuple):
    """Tokenized examples and the numbers of their classes."""

    texts: Sequence[TokenizedText]
    labels: Int[np.ndarray, " examples"]

    @property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each."""
        return np.array([len(text.ids) for text in self.texts], np.int64)


class _Planned(NamedTuple):
    """Where the examples of one batch are."""

    examples: Int[np.ndarray, " count"]
    rows: Int[np.ndarray, " count"]
    slots: Int[np.ndarray, " count"]  # number within the row, from 0
    starts: Int[np.ndarray, " count"]  # first token in the row


def batch_arrays(config: RowConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays of a batch, int32.

    `tokens`, `segment_ids` (the example's number in its row from 1, 0 for padding), `positions` (from 0 in each
    example) and `token_types` are [rows, length]; `starts` (index of each example's first token), `target_labels` (the
    class) and `target_segment_ids` (1 where there is an example, else 0) are [rows, examples_per_row].
    """
    tokens: tuple[int, ...] = (config.rows, config.length)
    examples: tuple[int, ...] = (config.rows, config.examples_per_row)
    names = dict.fromkeys(("tokens", "segment_ids", "positions", "token_types"), tokens)
    return names | dict.fromkeys(("starts", "target_labels", "target_segment_ids"), examples)


def packed(
    lengths: Int[np.ndarray, " examples"], order: Int[np.ndarray, " examples"], config: RowConfig
) -> list[_Planned]:
    """Batches of examples in an order, each example in the first row that has room for it.

    Args:
      lengths: tokens of each example, at most `config.length`.
      order: numbers of the examples.
      config: shape of a batch.
    """
    batches: list[_Planned] = []
    placed: list[tuple[int, int, int, int]] = []
    used, counts, first_open = np.zeros(config.rows, np.int64), np.zeros(config.rows, np.int64), 0
    for example in order.tolist():
        size = int(lengths[example])
        fits = (used[first_open:] + size <= config.length) & (counts[first_open:] < config.examples_per_row)
        if not fits.any():
            batches.append(_Planned(*np.array(placed, np.int64).T))
            placed = []
            used[:], counts[:], first_open = 0, 0, 0
            fits = np.ones(1, bool)
        row = first_open + int(np.argmax(fits))
        placed.append((example, row, int(counts[row]), int(used[row])))
        used[row] += size
        counts[row] += 1
        while first_open < config.rows - 1 and counts[first_open] == config.examples_per_row:
            first_open += 1
    if placed:
        batches.append(_Planned(*np.array(placed, np.int64).T))
    return batches


def filled(examples: Examples, plan: _Planned, config: RowConfig, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows `start` to `stop` of a planned batch, see `batch_arrays`."""
    arrays = {name: np.zeros((stop - start, shape[1]), np.int32) for name, shape in batch_arrays(config).items()}
    for example, row, slot, begin in zip(*(part.tolist() for part in plan), strict=True):
        if not start <= row < stop:
            continue
        text, at = examples.texts[example], row - start
        where = slice(begin, begin + len(text.ids))
        arrays["tokens"][at, where] = text.ids
        arrays["segment_ids"][at, where] = slot + 1
        arrays["positions"][at, where] = np.arange(len(text.ids))
        arrays["token_types"][at, where] = text.types
        arrays["starts"][at, slot] = begin
        arrays["target_labels"][at, slot] = examples.labels[example]
        arrays["target_segment_ids"][at, slot] = 1
    return arrays


class LabelledBatches(SkippingPlan):
    """Training batches without end, shuffled anew every epoch (`contracts.BatchSource`).

    An epoch sees every example once; its last batch may hold fewer than the others. Batch i is a function of (examples,
    shape, seed, i, skipped ranges).

    Attributes:
      rows: rows of a batch.
      description: what decides the batches, as JSON.
    """

    def __init__(
        self,
        examples: Examples,
        config: RowConfig,
        seed: int,
        description: Mapping[str, Any],
        work: Callable[[Int[np.ndarray, " examples"]], float] | None = None,
        names: Collection[str] | None = None,
    ):
        """Prepares batches.

        Args:
          examples: tokenized, each at most `config.length` long.
          config: shape of a batch.
          seed: of the order.
          description: see the attribute.
          work: from the lengths of a batch's examples to model FLOPs of an update; None: not known.
          names: arrays that the model reads; None: all of `batch_arrays`.
        """
        super().__init__()
        self.rows, self.description = config.rows, dict(description)
        self._examples, self._config, self._seed = examples, config, seed
        self._work, self._names = work, tuple(names or batch_arrays(config))
        self._lengths = examples.lengths
        self._sizes: list[int] = []  # batches of each epoch planned so far
        self._latest: tuple[int, list[_Planned]] = (-1, [])
        self._planning = threading.Lock()

    def read(self, index: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows `start` to `stop` of batch `index`, see `batch_arrays`."""
        arrays = filled(self._examples, self._planned(index), self._config, start, stop)
        return {name: arrays[name] for name in self._names}

    def examples(self, index: int) -> list[int]:
        """Numbers of the examples of batch `index`, in the order of the file."""
        numbers: list[int] = self._planned(index).examples.tolist()
        return numbers

    def example_lengths(self, index: int) -> Int[np.ndarray, " examples"]:
        """Tokens of the examples of batch `index`."""
        return self._lengths[self._planned(index).examples]

    def work(self, index: int) -> float | None:
        """Model FLOPs of an update on batch `index`; None if they are not known."""
        return None if self._work is None else self._work(self.example_lengths(index))

    def memory(self) -> list[int]:
        """Batches of each epoch planned so far."""
        return list(self._sizes)

    def remember(self, memory: Sequence[int]) -> None:
        """Takes what `memory` gave in an earlier process."""
        if len(memory) > len(self._sizes):
            self._sizes[:] = memory

    def epoch(self) -> Epoch:
        """Size of the first epoch."""
        return Epoch(self._size(0), len(self._lengths))

    def _planned(self, index: int) -> _Planned:
        index, epoch = self.unskipped(index), 0
        while index >= self._size(epoch):
            index -= self._size(epoch)
            epoch += 1
        return self._epoch(epoch)[index]

    def _size(self, epoch: int) -> int:
        with self._planning:  # batches are read in several threads
            while len(self._sizes) <= epoch:
                self._sizes.append(len(self._plan(len(self._sizes))))
        return self._sizes[epoch]

    def _epoch(self, epoch: int) -> list[_Planned]:
        latest = self._latest  # read once: other threads may change it
        if latest[0] != epoch:
            self._latest = latest = (epoch, self._plan(epoch))
        return latest[1]

    def _plan(self, epoch: int) -> list[_Planned]:
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._lengths))
        return packed(self._lengths, order, self._config)


def in_order(
    examples: Examples, config: RowConfig, start: int = 0, stop: int | None = None
) -> list[dict[str, np.ndarray]]:
    """All examples in their order, as batches of rows `start` to `stop`: for evaluation.

    Args:
      examples: tokenized, each at most `config.length` long.
      config: shape of a batch.
      start: first row of this host.
      stop: row after its last; None: all.
    """
    stop = config.rows if stop is None else stop
    plans = packed(examples.lengths, np.arange(len(examples.labels)), config)
    return [filled(examples, plan, config, start, stop) for plan in plans]


def where_examples_are(examples: Examples, config: RowConfig) -> list[tuple[Bool[np.ndarray, "..."], np.ndarray]]:
    """For each batch of `in_order`: which [rows, slots] hold an example, and the numbers of those, row by row."""
    found = []
    for plan in packed(examples.lengths, np.arange(len(examples.labels)), config):
        numbers = np.full((config.rows, config.examples_per_row), -1)
        numbers[plan.rows, plan.slots] = plan.examples
        found.append((numbers >= 0, numbers[numbers >= 0]))
    return found
