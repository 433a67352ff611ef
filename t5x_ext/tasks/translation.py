"""Translation: pairs of lines, an encoder-decoder, held-out loss, decoded text and its scores."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from t5x_ext.checkpoints import RunFolder
from t5x_ext.contracts import FamilyCorpus, Frozen, Params, PyTree, TranslationBatch, UserError
from t5x_ext.data import DataConfig, PreparedData, TextDirection, prepare
from t5x_ext.decode import DecodeConfig, Greedy, Translator
from t5x_ext.evaluate import Scores, evaluate_texts, exact_match
from t5x_ext.models import (
    UNPLACED,
    EncoderDecoder,
    LayerParts,
    Placement,
    TransformerConfig,
    init_params,
    logical_axes,
    model_of,
    model_to_json,
)
from t5x_ext.parallel import is_primary
from t5x_ext.tasks.held_out import HeldOutLoss
from t5x_ext.tasks.text import TextBatches, packed_arrays, text_record, with_vocabulary_of
from t5x_ext.train.intervals import Interval, check_interval
from t5x_ext.train.program import Program
from t5x_ext.train.task import Definition, Evaluator

if TYPE_CHECKING:
    from t5x_ext.train.run import Run

_DECODED_METRICS = ("valid/bleu", "valid/chrf", "valid/exact_match")


@dataclass(frozen=True)
class Translation:
    """Translation between the languages of parallel corpora (`train.Task`).

    Attributes:
      data: corpora, vocabulary, tags and batch shape.
      model: sizes; the vocabulary size is taken from the data.
      parts: what the layers are made of: adapters, for example.
      max_lines: so many lines of each direction are decoded during training; 0 measures the loss only.
      decode: search used during training.
      decode_every: updates between decodings, or epochs or examples; None: `EvaluationConfig.every`.
      test_decode: search used for the final test.
    """

    data: DataConfig
    model: TransformerConfig
    parts: LayerParts = field(default_factory=LayerParts)
    max_lines: int = 200
    decode: DecodeConfig = field(default_factory=lambda: DecodeConfig(Greedy()))
    decode_every: Interval | None = None
    test_decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        if self.decode_every is not None:
            check_interval("Translation.decode_every", self.decode_every)

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.data.batch.rows

    def check(self, run: Run) -> None:
        """Refuses a metric that nothing will measure.

        Raises:
          UserError: if it needs decoded text, and none is decoded.
        """
        metric = run.evaluation.metric
        if self.max_lines == 0 and metric.startswith(_DECODED_METRICS):
            raise UserError(
                f"EvaluationConfig.metric is {metric!r} but Translation.max_lines is 0, so that nothing is decoded; "
                "decode some lines, or take 'valid/loss'"
            )

    def starting_from(self, folder: RunFolder) -> Translation:
        """The same task with the vocabulary of a run whose weights it starts from."""
        return dataclasses.replace(self, data=with_vocabulary_of(self.data, folder))

    def define(self, sizes: Mapping[str, int], placement: Placement) -> Definition:
        """An encoder-decoder over packed pairs; `sizes` gives `vocab_size`."""
        model = self.build(sizes, placement)
        batch = packed_arrays(self.data.batch, TranslationBatch.__annotations__)
        return Definition(model, partial(init_params, model), logical_axes(model), batch)

    def build(self, sizes: Mapping[str, int], placement: Placement = UNPLACED) -> EncoderDecoder:
        """The model, with the size of the vocabulary in use."""
        model: EncoderDecoder = model_of(self.sized(sizes), parts=self.parts, placement=placement)
        return model

    def sized(self, sizes: Mapping[str, int]) -> TransformerConfig:
        """The model's config with the size of the vocabulary in use."""
        return dataclasses.replace(self.model, vocab_size=sizes["vocab_size"])

    def prepare(self, folder: RunFolder, cache_dir: str | None, seed: int) -> PreparedTranslation:
        """Vocabulary, token caches and batch plan."""
        return PreparedTranslation(self, prepare(self.data, str(folder.path), cache_dir or str(folder.cache), seed))


class PreparedTranslation:
    """A translation task with its data (`train.Prepared`).

    Attributes:
      task: what is learned.
      data: vocabulary, batches and held-out text.
      sizes: `vocab_size`.
      batches: training batches.
    """

    def __init__(self, task: Translation, data: PreparedData):
        """Joins a task and its data."""
        self.task, self.data = task, data
        self.sizes = {"vocab_size": data.vocabulary.size}
        self.batches = TextBatches(data.batches, data.description, task.sized(self.sizes).flops)

    @property
    def has_test(self) -> bool:
        """Whether there is a test corpus."""
        return bool(self.data.test)

    def evaluators(self, program: Program) -> Sequence[Evaluator]:
        """Loss and, unless `max_lines` is 0, scores of decoded text; nothing without validation corpora."""
        if not self.data.valid:
            return ()
        loss = HeldOutLoss(program, self.data.valid_batches, rows=self.batches.rows)
        return (loss, DecodedText(program, self)) if self.task.max_lines else (loss,)

    def test(self, program: Program, params: Params) -> dict[str, Any]:
        """Decodes and scores the test corpora.

        Returns:
          Scores by direction, their means, exact match by family where the corpora know families, and a sample
          translation of each direction.
        """
        data = self.data
        translator = self.translator(program, params, data.directions)
        num_lines = sum(len(direction.texts()[0]) for direction in data.test)
        disable = None if is_primary() else True
        with tqdm(total=num_lines, desc="decoding the test", unit="line", disable=disable, file=sys.stderr) as bar:
            decoded = decode_directions(translator, data.test, self.task.test_decode, progress=bar.update)
        scores = {one.direction.name: one.scores() for one in decoded}
        results: dict[str, Any] = {
            "mean_bleu": float(np.mean([score.bleu.value for score in scores.values()])),
            "mean_chrf": float(np.mean([score.chrf.value for score in scores.values()])),
            "mean_exact_match": float(np.mean([score.exact_match for score in scores.values()])),
            "directions": {name: score.to_json() for name, score in scores.items()},
            "samples": [_sample(one, index) for index, one in enumerate(decoded)],
        }
        families = _family_matches(decoded)
        return results | ({"families": families} if families else {})

    def record(self) -> dict[str, Any]:
        """Model, tags, directions and the vocabulary's fingerprint."""
        return text_record("translation", model_to_json(self.task.build(self.sizes)), self.task.data, self.data)

    def translator(self, program: Program, params: Params, directions: Sequence[str]) -> Translator:
        """The program's model with these parameters, ready to translate."""
        return Translator(program.model, params, self.data.vocabulary, self.task.data.tags, directions)


class DecodedText:
    """BLEU, chrF and exact match of decoded validation text: `valid/bleu`, `valid/bleu/en-de`, ... (`train.Evaluator`).

    Values without a direction are means over directions.
    """

    name = "decoded text"

    def __init__(self, program: Program, prepared: PreparedTranslation):
        """Prepares the measurement; programs are compiled when first used."""
        self._program, self._prepared = program, prepared
        self.every = prepared.task.decode_every

    def __call__(self, params: Params, frozen: Frozen, mutable: PyTree, step: int) -> dict[str, float]:
        """Decodes the first `max_lines` lines of each direction, and scores them."""
        task, data = self._prepared.task, self._prepared.data
        names = list(dict.fromkeys(direction.name for direction in data.valid))
        translator = self._prepared.translator(self._program, params, names)
        check = self._program.check_interrupt
        decoded = decode_directions(translator, data.valid, task.decode, task.max_lines, lambda lines: check())
        values: dict[str, list[float]] = {}
        for one in decoded:
            scores = one.scores()
            for metric, value in (
                ("bleu", scores.bleu.value),
                ("chrf", scores.chrf.value),
                ("exact_match", scores.exact_match),
            ):
                values.setdefault(f"valid/{metric}", []).append(value)
                if len(decoded) > 1:
                    values[f"valid/{metric}/{one.direction.name}"] = [value]
        return {name: float(np.mean(value)) for name, value in values.items()}


@dataclass(frozen=True)
class Decoded:
    """Lines of one direction with their translations."""

    direction: TextDirection
    sources: list[str]
    references: list[str]
    hypotheses: list[str]

    def scores(self) -> Scores:
        """BLEU, chrF and exact match."""
        return evaluate_texts(self.hypotheses, self.references, self.direction.target_language)


def decode_directions(
    translator: Translator,
    directions: Sequence[TextDirection],
    config: DecodeConfig,
    max_lines: int | None = None,
    progress: Any = None,
) -> list[Decoded]:
    """Translates the source side of each direction, the first `max_lines` lines of it (None: all)."""
    decoded = []
    for direction in directions:
        sources, references = direction.texts()
        sources, references = sources[:max_lines], references[:max_lines]
        languages = direction.source_language, direction.target_language
        hypotheses = translator.translate(sources, *languages, config, progress)
        decoded.append(Decoded(direction, sources, references, hypotheses))
    return decoded


def _sample(decoded: Decoded, index: int) -> dict[str, str]:
    """One line of a direction, another one in each direction."""
    line = (index * 37) % len(decoded.sources)
    return {
        "direction": decoded.direction.name,
        "source": decoded.sources[line],
        "translation": decoded.hypotheses[line],
        "reference": decoded.references[line],
    }


def _family_matches(decoded: Sequence[Decoded]) -> dict[str, float]:
    """Exact match in per cent by family, over all directions."""
    lines: dict[str, tuple[list[str], list[str]]] = {}
    for one in decoded:
        corpus = one.direction.corpus
        if not isinstance(corpus, FamilyCorpus):
            continue
        for family, hypothesis, reference in zip(corpus.families(), one.hypotheses, one.references):
            hypotheses, references = lines.setdefault(family, ([], []))
            hypotheses.append(hypothesis)
            references.append(reference)
    return {family: exact_match(*texts) for family, texts in sorted(lines.items())}
