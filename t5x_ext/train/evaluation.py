"""Held-out measurements: the loss and decoded text during training, and the final test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from t5x_ext.contracts import FamilyCorpus, Loss, Params
from t5x_ext.data import PreparedData, TextDirection
from t5x_ext.decode import DecodeConfig, Translator
from t5x_ext.evaluate import Scores, evaluate_texts, exact_match
from t5x_ext.parallel import global_batch, host_rows
from t5x_ext.train.program import Program
from t5x_ext.train.state import TrainState
from t5x_ext.train.step import make_evaluation_step


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


class HeldOut:
    """From a training state to named values: `valid/loss`, `valid/nll`, `valid/bleu`, `valid/bleu/en-de`, ..."""

    def __init__(self, program: Program, data: PreparedData, check: Callable[[], None] = lambda: None):
        """Prepares the measurements; programs are compiled when first used.

        Args:
          program: the run on its mesh.
          data: validation batches and text.
          check: called between batches; what it raises ends the measurement.
        """
        self._run, self._data, self._model, self._mesh = program.run, data, program.model, program.mesh
        self._step = jax.jit(make_evaluation_step(program.objective))
        self._rows = host_rows(program.mesh, program.run.data.batch.rows)
        self._check = check

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Measures; an empty dictionary where there is no validation text."""
        if not self._data.valid:
            return {}
        return self._losses(state) | self._scores(state)

    def _losses(self, state: TrainState) -> dict[str, float]:
        total: Loss | None = None
        for batch in self._data.valid_batches(*self._rows):
            self._check()
            loss = jax.device_get(self._step(state.evaluation_params, global_batch(self._mesh, batch)))
            total = loss if total is None else jax.tree.map(np.add, total, loss)
        if total is None:
            return {}
        values = {"valid/loss": float(total.sum) / float(total.weight)}
        for name, (value, weight) in total.metrics.items():
            values[f"valid/{name}"] = float(value) / float(weight)
        return values

    def _scores(self, state: TrainState) -> dict[str, float]:
        evaluation = self._run.evaluation
        if evaluation.max_lines == 0:
            return {}
        data = self._data
        names = list(dict.fromkeys(direction.name for direction in data.valid))
        translator = Translator(self._model, state.evaluation_params, data.vocabulary, self._run.data.tags, names)
        decoded = decode_directions(
            translator, data.valid, evaluation.decode, evaluation.max_lines, lambda lines: self._check()
        )
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


def run_test(program: Program, weights: Params, data: PreparedData, show: bool = True) -> dict[str, Any]:
    """Decodes and scores the test directions.

    Args:
      program: the run on its mesh.
      weights: to decode with, on that mesh.
      data: the test text and the vocabulary.
      show: whether this process shows its progress.

    Returns:
      The part of `results.json` about the test: scores by direction, their means, exact match by family where the
      corpora know families, and a sample translation of each direction.
    """
    translator = Translator(program.model, weights, data.vocabulary, program.run.data.tags, data.directions)
    num_lines = sum(len(direction.texts()[0]) for direction in data.test)
    disable = None if show else True
    with tqdm(total=num_lines, desc="decoding the test", unit="line", disable=disable, file=sys.stderr) as bar:
        decoded = decode_directions(translator, data.test, program.run.evaluation.test_decode, progress=bar.update)
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
