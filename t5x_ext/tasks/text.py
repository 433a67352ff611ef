"""What tasks on packed text have in common: their data, batches that know the model's work, their record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from t5x_ext.checkpoints import ModelRecord, RunFolder
from t5x_ext.contracts import Epoch
from t5x_ext.data import BatchConfig, DataConfig, PackedBatches, PreparedData, VocabularyConfig
from t5x_ext.models import DecoderConfig, TransformerConfig
from t5x_ext.train.task import ArraySpec

Flops = Callable[[np.ndarray, np.ndarray], float]
"""From source and target tokens of each example to the operations of one forward pass over all of them."""


def pair_flops(config: TransformerConfig | DecoderConfig) -> Flops:
    """The operations of a model over pairs of texts; a language model reads the targets only."""
    return config.flops if isinstance(config, TransformerConfig) else lambda source, target: config.flops(target)


class TextBatches:
    """Packed batches of a task (`contracts.BatchSource`).

    Attributes:
      packed: all arrays.
      description: what decides the batches, as JSON.
    """

    def __init__(
        self, packed: PackedBatches, description: Mapping[str, Any], flops: Flops, names: Collection[str] | None = None
    ):
        """Joins batches with what the model makes of them.

        Args:
          packed: the batches.
          description: see the attribute.
          flops: operations of a forward pass.
          names: arrays that the model reads; None: all.
        """
        self.packed, self.description, self._flops, self._names = packed, description, flops, names

    @property
    def rows(self) -> int:
        """Rows of a batch, over all hosts."""
        return self.packed.rows

    def read(self, index: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows `start` to `stop` of batch `index`, int32 [rows, length]."""
        arrays = self.packed.read(index, start, stop)
        return arrays if self._names is None else {name: arrays[name] for name in self._names}

    def skipping(self, ranges: Any) -> TextBatches:
        """The same batches without some ranges [start, stop) of them, see `SkippingPlan.skipping`."""
        return TextBatches(self.packed.skipping(ranges), self.description, self._flops, self._names)

    def unskipped(self, index: int) -> int:
        """The number that batch `index` has where nothing is skipped."""
        return self.packed.unskipped(index)

    def examples(self, index: int) -> list[Any]:
        """Where the examples of batch `index` come from."""
        return list(self.packed.examples(index))

    def work(self, index: int) -> float:
        """Model FLOPs of an update on batch `index`: forward and backward pass."""
        return 3 * self._flops(*self.packed.example_lengths(index))

    def memory(self) -> Any:
        """See `contracts.BatchSource`."""
        return self.packed.memory()

    def remember(self, memory: Any) -> None:
        """See `contracts.BatchSource`."""
        self.packed.remember(memory)

    def epoch(self) -> Epoch:
        """See `contracts.BatchSource`."""
        return self.packed.epoch()


def packed_arrays(shape: BatchConfig, names: Collection[str]) -> dict[str, ArraySpec]:
    """The arrays of packed batches of that shape."""
    lengths = {"source": shape.source_length, "target": shape.target_length}
    return {name: ArraySpec((shape.rows, lengths[name.split("_")[0]])) for name in names}


def with_vocabulary_of(data: DataConfig, folder: RunFolder) -> DataConfig:
    """The same data, its vocabulary that of another run."""
    return dataclasses.replace(data, vocabulary=VocabularyConfig(path=str(folder.vocabulary)))


def text_record(task: str, model: Mapping[str, Any], data: DataConfig, prepared: PreparedData) -> dict[str, Any]:
    """The record of a run on text, see `checkpoints.ModelRecord`."""
    record = ModelRecord(
        dict(model), dataclasses.asdict(data.tags), prepared.directions, prepared.vocabulary.fingerprint(), task
    )
    return record._asdict() | {"directions": list(record.directions)}
