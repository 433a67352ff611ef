"""BLEU of what a pipeline has translated, as sums over lines, so that differences can be resampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from t5x_ext.contracts import UserError
from t5x_ext.corpora import read_lines
from t5x_ext.evaluate import tokenizer_for
from t5x_ext.pipeline import TextFiles
from t5x_ext.pipeline.stage_folder import PipelineFolder
from t5x_ext.study.measurements import MeasuredRun


@dataclass(frozen=True)
class TranslationBleu:
    """BLEU of the translations of one stage of a pipeline, `Arm.part`: `bleu/en-de` and so on, and `bleu`, their mean.

    Cased, with the tokenizer of the target language, as sacreBLEU's defaults. The test text should have the same lines
    in all directions, see `statistics.resampled`.
    """

    def __call__(self, run: MeasuredRun) -> dict[str, float]:
        """Corpus BLEU by direction, and the mean."""
        values = {name: float(self.score(counts.sum(axis=0))) for name, counts in self.lines(run).items()}
        return {"bleu": float(np.mean([*values.values()])), **values}

    def lines(self, run: MeasuredRun) -> dict[str, Float[np.ndarray, "lines 10"]]:
        """What BLEU sums up, line by line, by direction.

        Raises:
          UserError: where the stage has no translations that can be scored.
        """
        return {f"bleu/{'-'.join(text.languages)}": _counts(run, text) for text in self._texts(run)}

    def score(self, sums: Float[np.ndarray, "*samples 10"]) -> Float[np.ndarray, "*samples"]:
        """BLEU of sums over lines."""
        return bleu_of_counts(sums)

    def _texts(self, run: MeasuredRun) -> Iterator[TextFiles]:
        artefact = PipelineFolder(run.folder).stage(run.arm.part).artefact
        texts = artefact.corpora if artefact else ()
        if not texts or any(text.reference is None for text in texts):
            raise UserError(f"stage {run.arm.part!r} (Arm.part) has no translations with references")
        yield from texts


def _counts(run: MeasuredRun, text: TextFiles) -> Float[np.ndarray, "lines 10"]:
    assert text.reference is not None
    hypotheses, references = (list(read_lines(str(run.folder / file))) for file in (text.files[1], text.reference))
    return counts_of(hypotheses, references, text.languages[1])


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
