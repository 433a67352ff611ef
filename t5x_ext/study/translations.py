"""What a pipeline translates: BLEU and exact match, as sums over lines that can be resampled, and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from t5x_ext.contracts import UserError
from t5x_ext.corpora import read_lines
from t5x_ext.evaluate import tokenizer_for
from t5x_ext.pipeline import TextFiles, Translate, Workspace
from t5x_ext.pipeline.stage_folder import PipelineFolder
from t5x_ext.study.measurements import MeasuredRun


class _OfTranslations:
    """A value of the translations of one stage of a pipeline, `Arm.part`, by direction, and the mean of directions."""

    name: ClassVar[str]

    def __call__(self, run: MeasuredRun) -> dict[str, float]:
        """The value by direction, and the mean."""
        values = {name: float(self.score(sums.sum(axis=0))) for name, sums in self.lines(run).items()}
        return {self.name: float(np.mean([*values.values()])), **values}

    def lines(self, run: MeasuredRun) -> dict[str, Float[np.ndarray, "lines sums"]]:
        """What the score sums up, line by line, by direction.

        Raises:
          UserError: where the stage has no translations that can be scored.
        """
        return {
            f"{self.name}/{'-'.join(text.languages)}": self.sums(*_sides(run, text), text.languages[1])
            for text in _texts(run)
        }

    def sums(
        self, hypotheses: Sequence[str], references: Sequence[str], language: str
    ) -> Float[np.ndarray, "lines sums"]:
        """Of each line what the score sums up."""
        raise NotImplementedError

    def score(self, sums: Float[np.ndarray, "*samples sums"]) -> Float[np.ndarray, "*samples"]:
        """The value of sums over lines."""
        raise NotImplementedError


@dataclass(frozen=True)
class TranslationBleu(_OfTranslations):
    """BLEU of the translations of one stage of a pipeline, `Arm.part`: `bleu/en-de` and so on, and `bleu`, their mean.

    Cased, with the tokenizer of the target language, as sacreBLEU's defaults. The test text should have the same lines
    in all directions, see `statistics.resampled`.
    """

    name: ClassVar[str] = "bleu"

    def sums(
        self, hypotheses: Sequence[str], references: Sequence[str], language: str
    ) -> Float[np.ndarray, "lines 10"]:
        """What BLEU sums up, see `counts_of`."""
        return counts_of(hypotheses, references, language)

    def score(self, sums: Float[np.ndarray, "*samples 10"]) -> Float[np.ndarray, "*samples"]:
        """BLEU of sums over lines."""
        return bleu_of_counts(sums)


@dataclass(frozen=True)
class ExactMatch(_OfTranslations):
    """Per cent of the lines of one stage of a pipeline, `Arm.part`, that equal their reference.

    Its values are `exact_match/en-de` and so on, and `exact_match`, their mean.
    """

    name: ClassVar[str] = "exact_match"

    def sums(self, hypotheses: Sequence[str], references: Sequence[str], language: str) -> Float[np.ndarray, "lines 2"]:
        """For each line 1 or 0, whether it is its reference, and 1."""
        return np.array([[one == other, 1] for one, other in zip(hypotheses, references, strict=True)], float)

    def score(self, sums: Float[np.ndarray, "*samples 2"]) -> Float[np.ndarray, "*samples"]:
        """Per cent of sums over lines."""
        return 100 * sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class DecodingSpeed:
    """Sentences a second that the stage `Arm.part`, a `pipeline.Translate`, translates of its first text.

    `speed/single` is with one sentence at a time, `speed/full` with the batches of `DecodeConfig.batch_tokens`. Every
    text is translated once before it is timed, so that nothing is compiled meanwhile; the median of `repeats` counts.
    On CPUs it is seconds of the wall: run nothing beside it.

    Attributes:
      single: sentences that are translated one at a time, from the first on.
      full: sentences that are translated in full batches.
      repeats: how often each is timed.
    """

    single: int = 40
    full: int = 400
    repeats: int = 3

    def __call__(self, run: MeasuredRun) -> dict[str, float]:
        """Sentences a second.

        Raises:
          UserError: where the part is no stage that translates.
        """
        stage = next((stage for stage in run.config.stages if stage.name == run.arm.part), None)
        if not isinstance(stage, Translate):
            raise UserError(f"DecodingSpeed: {run.arm.part!r} (Arm.part) is no stage that translates")
        text = next(_texts(run))
        source, target = text.languages
        workspace = Workspace(PipelineFolder(run.folder), stage.name)
        translator = workspace.open(workspace.model_for(stage.model, (source, target)))
        lines = list(read_lines(str(run.folder / text.files[0])))
        translate = lambda batch: translator.translate(batch, source, target, stage.decode)
        return {
            "speed/single": self._speed(translate, [[line] for line in lines[: self.single]]),
            "speed/full": self._speed(translate, [lines[: self.full]]),
        }

    def _speed(self, translate: Callable[[list[str]], object], batches: Sequence[list[str]]) -> float:
        seconds = []
        for _ in range(self.repeats + 1):
            started = time.perf_counter()
            for batch in batches:
                translate(batch)
            seconds.append(time.perf_counter() - started)
        return sum(map(len, batches)) / float(np.median(seconds[1:]))


def _texts(run: MeasuredRun) -> Iterator[TextFiles]:
    artefact = PipelineFolder(run.folder).stage(run.arm.part).artefact
    texts = artefact.corpora if artefact else ()
    if not texts or any(text.reference is None for text in texts):
        raise UserError(f"stage {run.arm.part!r} (Arm.part) has no translations with references")
    yield from texts


def _sides(run: MeasuredRun, text: TextFiles) -> tuple[list[str], list[str]]:
    """Translations and references."""
    assert text.reference is not None
    hypotheses, references = (list(read_lines(str(run.folder / file))) for file in (text.files[1], text.reference))
    return hypotheses, references


def counts_of(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Float[np.ndarray, "lines 10"]:
    """What BLEU adds up over lines: lengths of translation and reference, n-grams that match, and all, n = 1 to 4."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=tokenizer_for(language), effective_order=True)
    found = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        score = metric.sentence_score(hypothesis, [reference])
        found.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(found, float)


def bleu_of_counts(counts: Float[np.ndarray, "*samples 10"]) -> Float[np.ndarray, "*samples"]:
    """Corpus BLEU from sums over lines, see `counts_of`; 0 if no n-gram of some order matches, without smoothing."""
    lengths, references, matches, totals = counts[..., 0], counts[..., 1], counts[..., 2:6], counts[..., 6:10]
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.minimum(0.0, 1 - references / lengths)
        logarithm = np.log(matches / totals).mean(axis=-1)
        return 100 * np.nan_to_num(np.exp(brevity + logarithm))
