"""Vega-MT's data augmentation: bidirectional self-training, and cycle translation of monolingual text."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from t5x_ext.contracts import UserError
from t5x_ext.corpora.noise import WordNoise
from t5x_ext.decode import DecodeConfig
from t5x_ext.evaluate.metrics import chrf_metric
from t5x_ext.pipeline.artefact import Artefact, Kind, TextFiles
from t5x_ext.pipeline.stage import Stage, StageDefaults, StageWork, decoding_work, models_and_corpora
from t5x_ext.pipeline.texts import languages_of
from t5x_ext.pipeline.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Synthesize(StageDefaults):
    """One round of bidirectional self-training: a model translates real text, and its translations serve in both roles.

    For every direction s-t of the model and every real text in s, the translation into t is training text forward (s-t,
    sequence distillation, with a synthetic target) and backward (t-s, back-translation, with a synthetic source). If
    both are decoded alike and without noise, they are one text, which a `bidirectional` run reads in both directions.
    Otherwise they are two texts, each for one direction only.

    Attributes:
      name: of the stage.
      model: the stage of the model.
      texts: stages of real text; each side of a pair is a text of its own.
      directions: those that are decoded; empty: all of the model.
      forward: how the targets of self-training are decoded; None: no self-training.
      backward: how the sources of back-translation are decoded, for example by sampling; None: no back-translation.
      noise: noise on the sources of back-translation after decoding ("beam + noise" with beam search); the clean
        translation is kept beside it. Real text and training targets stay clean.

    Raises:
      UserError: if both roles are None, and for noise without back-translation.

    References:
      Sennrich et al., arXiv 1511.06709 (back-translation); Edunov et al., arXiv 1808.09381 (sampling and noise for it);
      Zan et al., arXiv 2209.09444. Their text on self-training was not available to us: the details are ours.
    """

    makes: ClassVar[Kind] = "corpora"

    name: str
    model: str
    texts: tuple[str, ...]
    directions: tuple[str, ...] = ()
    forward: DecodeConfig | None = field(default_factory=DecodeConfig)
    backward: DecodeConfig | None = field(default_factory=DecodeConfig)
    noise: WordNoise | None = None

    def __post_init__(self) -> None:
        if self.forward is None and self.backward is None:
            raise UserError("Synthesize.forward and Synthesize.backward are both None: nothing is to be decoded")
        if self.noise is not None and self.backward is None:
            raise UserError("Synthesize.noise is for the sources of back-translation, and Synthesize.backward is None")
        for direction in self.directions:
            languages_of(direction)

    def reads(self) -> Mapping[str, Kind]:
        """The model and the texts."""
        return models_and_corpora([self.model], self.texts)

    def program(self, earlier: Mapping[str, Stage]) -> StageWork | None:
        """Of its two searches, the one with more hypotheses."""
        decode = max(filter(None, (self.forward, self.backward)), key=lambda decode: decode.search.rows_per_source)
        return decoding_work(self.model, decode, earlier)

    def make(self, workspace: Workspace) -> Artefact:
        """Decodes direction by direction, or resumes."""
        texts = workspace.corpora(self.texts)
        directions = self.directions or workspace.models(self.model).directions
        found = [
            made
            for direction in directions
            for text in texts
            for made in self._written(text, *languages_of(direction), workspace)
        ]
        if not found:
            raise _nothing(self.name, directions)
        return Artefact("corpora", tuple(found), counts={"lines": sum(text.lines for text in found)})

    def _written(self, text: TextFiles, source: str, target: str, workspace: Workspace) -> Iterator[TextFiles]:
        real = text.file_in(source)
        if real is None:
            return
        both = self.forward == self.backward and self.noise is None
        files: dict[DecodeConfig, str] = {}
        for role, config in (("forward", self.forward), ("backward", None if both else self.backward)):
            if config is None:
                continue
            name = f"{_named(text, real)}.{role}.{source}-{target}"
            translated = files.setdefault(config, workspace.own(f"{name}.{target}"))
            workspace.translate(self.model, real, translated, (source, target), config)
            if not _says_anything(translated, workspace):
                continue
            if role == "forward":
                yield TextFiles(name, (source, target), (real, translated), text.lines, "target", one_way=not both)
            else:
                learned = self._noisy(translated, name, target, workspace)
                yield TextFiles(name, (target, source), (learned, real), text.lines, "source", one_way=True)

    def _noisy(self, translated: str, name: str, language: str, workspace: Workspace) -> str:
        """The file of a translation with noise; without noise, that of the translation itself."""
        if self.noise is None:
            return translated
        noise, noisy = self.noise, workspace.own(f"{name}.noisy.{language}")
        lines = (noise(line, number, language) for number, line in enumerate(workspace.lines(translated)))
        workspace.write_lines(noisy, lines)
        return noisy


@dataclass(frozen=True)
class CycleTranslate(StageDefaults):
    """Back-translation of monolingual text, of which the worst lines are first translated to a pivot and back.

    For a line y in language L and models f: L-P and g: P-L, let z = f(y) and y' = g(z). The training pair is (z, y), as
    in back-translation; but it is (z, y') if y is among the share `tau` of lines with the lowest language model scores
    of its text and y' scores better. A score is the log-probability divided by the number of tokens. y' is rejected if
    it has drifted from y, by its length in characters relative to y's or by chrF with y.

    Attributes:
      name: of the stage.
      model: the stage of the model that translates both ways.
      language_model: the stage of the language model; not used if `tau` is 0.
      texts: stages of real text; each side of a pair is a text of its own.
      directions: L-P of each language to augment, such as `de-en` for German text through English.
      tau: fraction of lines that may be replaced, those with the lowest scores; 0: plain back-translation.
      min_length_ratio: smallest allowed length of y' relative to y.
      max_length_ratio: largest allowed length of y' relative to y.
      min_chrf: smallest allowed chrF2 of y' with y, between 0 and 1.
      decode: how both translations are decoded.

    Raises:
      UserError: for values outside their range.

    References:
      Named in arXiv 2209.09444; it goes back to the group's arXiv 1907.00494. The rule for which lines are replaced,
      and the limits on drift, are ours.
    """

    makes: ClassVar[Kind] = "corpora"

    name: str
    model: str
    language_model: str
    texts: tuple[str, ...]
    directions: tuple[str, ...]
    tau: float = 0.3
    min_length_ratio: float = 0.7
    max_length_ratio: float = 1.4
    min_chrf: float = 0.3
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        for name in ("tau", "min_chrf"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"CycleTranslate.{name}={getattr(self, name)}: must be 0 to 1")
        if not 0 <= self.min_length_ratio <= self.max_length_ratio:
            raise UserError(
                f"CycleTranslate.min_length_ratio={self.min_length_ratio}, max_length_ratio={self.max_length_ratio}: "
                "the first must be at most the second"
            )
        for direction in self.directions:
            languages_of(direction)

    def reads(self) -> Mapping[str, Kind]:
        """The models and the texts."""
        return models_and_corpora((self.model, self.language_model), self.texts)

    def program(self, earlier: Mapping[str, Stage]) -> StageWork | None:
        """The search with the translation model."""
        return decoding_work(self.model, self.decode, earlier)

    def make(self, workspace: Workspace) -> Artefact:
        """Translates and scores step by step, and keeps the result of each step."""
        found: list[TextFiles] = []
        counts = {"lines": 0, "tried": 0, "replaced": 0, "by_length": 0, "by_chrf": 0, "by_score": 0}
        for direction in self.directions:
            language, pivot = languages_of(direction)
            texts = [(text, real) for text in workspace.corpora(self.texts) if (real := text.file_in(language))]
            if not texts:
                raise _nothing(self.name, [direction])
            for text, real in texts:
                name = f"{_named(text, real)}.cycle.{pivot}-{language}"
                found += self._cycled(name, real, language, pivot, text.lines, counts, workspace)
        if not found:
            raise _nothing(self.name, self.directions)
        return Artefact("corpora", tuple(found), counts=counts)

    def _cycled(
        self, name: str, real: str, language: str, pivot: str, lines: int, counts: dict[str, int], workspace: Workspace
    ) -> Iterator[TextFiles]:
        there = workspace.own(f"{name}.{pivot}")
        workspace.translate(self.model, real, there, (language, pivot), self.decode)
        if not _says_anything(there, workspace):
            return
        counts["lines"] += lines
        low = self._low(name, real, language, lines, workspace)
        if not low:
            yield TextFiles(name, (pivot, language), (there, real), lines, "source")
            return
        back = self._back(name, there, language, pivot, low, workspace)
        kept = self._kept(name, real, back, language, low, counts, workspace)
        better = workspace.own(f"{name}.{language}")
        workspace.write_lines(better, (kept.get(number, line) for number, line in enumerate(workspace.lines(real))))
        yield TextFiles(name, (pivot, language), (there, better), lines, "source")

    def _low(self, name: str, real: str, language: str, lines: int, workspace: Workspace) -> dict[int, float]:
        """Scores of the lines that may be replaced, by line number, in the order of the text."""
        count = int(self.tau * lines)
        if not count:
            return {}
        output = workspace.scratch(f"{name}.scores")
        scores = workspace.score(self.language_model, real, language, self.decode, output)
        order = sorted(range(lines), key=scores.__getitem__)
        return {number: scores[number] for number in sorted(order[:count])}

    def _back(
        self, name: str, there: str, language: str, pivot: str, low: dict[int, float], workspace: Workspace
    ) -> str:
        """The file with y' of these lines."""
        selected = workspace.scratch(f"{name}.there")
        workspace.write_lines(selected, (line for number, line in enumerate(workspace.lines(there)) if number in low))
        back = workspace.scratch(f"{name}.back")
        workspace.translate(self.model, selected, back, (pivot, language), self.decode)
        return back

    def _kept(
        self,
        name: str,
        real: str,
        back: str,
        language: str,
        low: dict[int, float],
        counts: dict[str, int],
        workspace: Workspace,
    ) -> dict[int, str]:
        """The lines that replace real ones, by number; the reasons against the others are counted."""
        output = workspace.scratch(f"{name}.back.scores")
        scores = workspace.score(self.language_model, back, language, self.decode, output)
        originals = (line for number, line in enumerate(workspace.lines(real)) if number in low)
        kept = {}
        for number, line, other, score in zip(low, originals, workspace.lines(back), scores):
            counts["tried"] += 1
            reason = self._reason_against(line, other, score > low[number])
            counts[reason or "replaced"] += 1
            if reason is None:
                kept[number] = other
        return kept

    def _reason_against(self, line: str, other: str, is_better: bool) -> str | None:
        if not self.min_length_ratio * len(line) <= len(other) <= self.max_length_ratio * len(line):
            return "by_length"
        if chrf_metric().sentence_score(other, [line]).score < 100 * self.min_chrf:
            return "by_chrf"
        return None if is_better else "by_score"


def _named(text: TextFiles, file: str) -> str:
    """The text's name after that of its stage: parallel and monolingual text of one corpus often have the same name."""
    return f"{file.partition('/')[0]}.{text.name}"


def _says_anything(file: str, workspace: Workspace) -> bool:
    """Whether any line of a translation is not empty: a model that has learned little may end every line at once."""
    found = any(line.strip() for line in workspace.lines(file))
    if not found:
        logger.warning("%s: skipped, because every translation is empty", file)
    return found


def _nothing(stage: str, directions: Sequence[str]) -> UserError:
    return UserError(
        f"stage {stage!r}: there is no text to translate in {', '.join(directions)}, or all translations are empty"
    )
