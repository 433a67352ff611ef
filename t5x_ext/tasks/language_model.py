"""Language modelling: lines of text, a decoder alone, held-out loss and perplexity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from t5x_ext.checkpoints import RunFolder
from t5x_ext.contracts import Frozen, Params, PyTree, UserError
from t5x_ext.data import DataConfig, PreparedData, prepare
from t5x_ext.models import DecoderConfig, Placement, init_params, logical_axes, model_of, model_to_json
from t5x_ext.tasks.held_out import HeldOutLoss
from t5x_ext.tasks.text import TextBatches, packed_arrays, pair_flops, text_record, with_vocabulary_of
from t5x_ext.train.program import Program
from t5x_ext.train.task import Definition, Evaluator

if TYPE_CHECKING:
    from t5x_ext.train.run import Run

ARRAYS = ("target_inputs", "target_labels", "target_segment_ids", "target_positions")
"""The arrays of `contracts.TranslationBatch` that a language model is trained on."""


@dataclass(frozen=True)
class LanguageModeling:
    """A language model of the target side of corpora (`train.Task`); `corpora.monolingual_text` gives such corpora.

    A trained model scores texts: `t5x_ext.load(run_dir).score(...)`.

    Attributes:
      data: corpora, vocabulary, tags and batch shape; each corpus is read in its own direction.
      model: sizes; the vocabulary size is taken from the data.
    """

    data: DataConfig
    model: DecoderConfig

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.data.batch.rows

    def check(self, run: Run) -> None:
        """Refuses what a language model cannot do.

        Raises:
          UserError: for test corpora, which would have to be translated, and a metric of decoded text.
        """
        if self.data.test:
            raise UserError("LanguageModeling.data has test corpora: a language model translates none; leave them out")
        metric = run.evaluation.metric
        if metric.startswith(("valid/bleu", "valid/chrf", "valid/exact_match")):
            raise UserError(
                f"EvaluationConfig.metric is {metric!r}, but a language model decodes nothing; take 'valid/loss'"
            )

    def starting_from(self, folder: RunFolder) -> LanguageModeling:
        """The same task with the vocabulary of a run whose weights it starts from."""
        return dataclasses.replace(self, data=with_vocabulary_of(self.data, folder))

    def define(self, sizes: Mapping[str, int], placement: Placement) -> Definition:
        """A decoder over packed lines; `sizes` gives `vocab_size`."""
        model = model_of(self.sized(sizes), placement=placement)
        return Definition(
            model, partial(init_params, model), logical_axes(model), packed_arrays(self.data.batch, ARRAYS)
        )

    def sized(self, sizes: Mapping[str, int]) -> DecoderConfig:
        """The model's config with the size of the vocabulary in use."""
        return dataclasses.replace(self.model, vocab_size=sizes["vocab_size"])

    def prepare(self, folder: RunFolder, cache_dir: str | None, seed: int) -> PreparedLanguageModel:
        """Vocabulary, token caches and batch plan."""
        return PreparedLanguageModel(self, prepare(self.data, str(folder.path), cache_dir or str(folder.cache), seed))


class PreparedLanguageModel:
    """A language-modelling task with its data (`train.Prepared`).

    Attributes:
      task: what is learned.
      data: vocabulary, batches and held-out text.
      sizes: `vocab_size`.
      batches: training batches.
      has_test: False: there is nothing to decode.
    """

    has_test = False

    def __init__(self, task: LanguageModeling, data: PreparedData):
        """Joins a task and its data."""
        self.task, self.data = task, data
        self.sizes = {"vocab_size": data.vocabulary.size}
        self.batches = TextBatches(data.batches, data.description, pair_flops(task.sized(self.sizes)), ARRAYS)

    def evaluators(self, program: Program) -> Sequence[Evaluator]:
        """Loss and perplexity; nothing without validation corpora."""
        return (_Perplexity(program, self._valid_batches, rows=self.batches.rows),) if self.data.valid else ()

    def test(self, program: Program, params: Params) -> dict[str, Any]:
        """Nothing: test corpora are refused."""
        return {}

    def record(self) -> dict[str, Any]:
        """Model, tags, directions and the vocabulary's fingerprint."""
        model = model_of(self.task.sized(self.sizes))
        return text_record("language_model", model_to_json(model), self.task.data, self.data)

    def _valid_batches(self, start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
        for batch in self.data.valid_batches(start, stop):
            yield {name: batch[name] for name in ARRAYS}


class _Perplexity(HeldOutLoss):
    """Loss, its metrics, and `valid/perplexity`, the exponential of the unsmoothed loss."""

    def __call__(self, params: Params, frozen: Frozen, mutable: PyTree, step: int) -> dict[str, float]:
        values = super().__call__(params, frozen, mutable, step)
        nll = values.get("valid/nll", values.get("valid/loss"))
        return values if nll is None else values | {"valid/perplexity": math.exp(min(nll, 700.0))}
