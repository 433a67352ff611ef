"""BLEU, chrF and TER with their signatures, computed by sacreBLEU, and exact match."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from t5x_ext.contracts import UserError

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

References: TypeAlias = Sequence[str] | Sequence[Sequence[str | None]]
"""One line a hypothesis, or several sets of such lines (None if a set has no reference for a line)."""

TOKENIZERS = ("13a", "zh", "ja-mecab", "char", "intl", "none")
"""The BLEU tokenizers that need no download."""

_BY_LANGUAGE = {"zh": "zh", "ja": "ja-mecab"}


@dataclass(frozen=True)
class MetricScore:
    """A corpus score and how it was computed.

    Attributes:
      name: `BLEU`, `chrF2` or `TER`.
      value: on the scale of 0 to 100 (TER may exceed it).
      signature: sacreBLEU's, to be printed with the value.
    """

    name: str
    value: float
    signature: str

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} ({self.signature})"

    def to_json(self) -> dict[str, Any]:
        """Name, value and signature as JSON values."""
        return {"name": self.name, "value": self.value, "signature": self.signature}


def tokenizer_for(language: str, override: str | None = None) -> str:
    """The BLEU tokenizer for text in a language: what WMT and sacreBLEU use, unless overridden.

    Args:
      language: a language code; script and region do not matter (`zh_Hans`, `ja-JP`).
      override: one of `TOKENIZERS`. WMT22 scored Japanese with `char`.

    Raises:
      UserError: if `override` is no known tokenizer.

    >>> tokenizer_for("de"), tokenizer_for("zh-CN"), tokenizer_for("ja"), tokenizer_for("ja", "char")
    ('13a', 'zh', 'ja-mecab', 'char')
    """
    if override is None:
        return _BY_LANGUAGE.get(_primary(language), "13a")
    if override not in TOKENIZERS:
        near = difflib.get_close_matches(override, TOKENIZERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"tokenizer={override!r}: one of {', '.join(TOKENIZERS)}{hint}")
    return override


def bleu(hypotheses: Sequence[str], references: References, tokenizer: str = "13a") -> MetricScore:
    """Corpus BLEU (Papineni et al. 2002), cased, up to 4-grams, exponential smoothing: sacreBLEU's defaults.

    Args:
      hypotheses: detokenized lines.
      references: detokenized lines, one set or several.
      tokenizer: one of `TOKENIZERS`; `tokenizer_for` picks by language.

    Raises:
      UserError: if line counts differ, there are no lines, or the tokenizer is unknown.
    """
    return _score(bleu_metric(tokenizer), hypotheses, references)


def chrf(hypotheses: Sequence[str], references: References) -> MetricScore:
    """Corpus chrF2 (Popović 2015): character 6-grams, no word n-grams, spaces ignored; arguments as for `bleu`."""
    return _score(chrf_metric(), hypotheses, references)


def ter(hypotheses: Sequence[str], references: References, target_language: str = "") -> MetricScore:
    """Translation edit rate (Snover et al. 2006): edits per 100 reference words, lower is better; slow on long lines.

    Arguments are those of `bleu`. Lower-cased and tercom-tokenized, sacreBLEU's defaults, with its Asian support for
    Chinese and Japanese, without which a line is a single word.
    """
    return _score(ter_metric(target_language), hypotheses, references)


def exact_match(hypotheses: Sequence[str], references: References) -> float:
    """Per cent of the hypotheses that equal one of their references, up to spaces at the ends.

    Raises:
      UserError: if line counts differ, or there are no lines.
    """
    sets = checked_references(hypotheses, references)
    matches = (
        any(reference is not None and line.strip() == reference.strip() for reference in line_references)
        for line, *line_references in zip(hypotheses, *sets)
    )
    return 100.0 * sum(matches) / len(hypotheses)


def bleu_metric(tokenizer: str) -> Metric:
    """A new BLEU metric of sacreBLEU."""
    from sacrebleu.metrics.bleu import BLEU

    name = tokenizer_for("", tokenizer)
    try:
        return BLEU(tokenize=name)
    except RuntimeError as error:  # sacreBLEU raises it for a missing dictionary package
        raise UserError(f"tokenizer={name!r} lacks its packages: pip install 'sacrebleu[ja]'") from error


def chrf_metric() -> Metric:
    """A new chrF2 metric of sacreBLEU."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def ter_metric(target_language: str) -> Metric:
    """A new TER metric of sacreBLEU."""
    from sacrebleu.metrics.ter import TER

    asian = _primary(target_language) in _BY_LANGUAGE
    return TER(normalized=asian, asian_support=asian)


def checked_references(hypotheses: Sequence[str], references: References) -> list[list[str | None]]:
    """References in sacreBLEU's form: a list of sets, each as long as the hypotheses.

    Raises:
      UserError: if line counts differ, there are no lines, a line has no reference, or a string is given for lines.
    """
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise UserError("hypotheses and references are lists of lines, not one string: split them on line ends")
    single = not references or references[0] is None or isinstance(references[0], str)
    sets: list[list[str | None]] = [list(references)] if single else [list(lines or ()) for lines in references]  # type: ignore[arg-type]
    if not hypotheses:
        raise UserError("no lines to score: hypotheses are empty")
    for number, lines in enumerate(sets, start=1):
        if len(lines) != len(hypotheses):
            which = f"reference set {number}" if len(sets) > 1 else "the references"
            raise UserError(
                f"{len(hypotheses)} hypotheses but {len(lines)} lines in {which}: "
                "line i must be the same segment everywhere"
            )
    for number, line_references in enumerate(zip(*sets), start=1):
        if all(reference is None for reference in line_references):
            raise UserError(f"line {number} has no reference: give at least one for every line")
    return sets


def _primary(language: str) -> str:
    return language.replace("_", "-").partition("-")[0].lower()


def _score(metric: Metric, hypotheses: Sequence[str], references: References) -> MetricScore:
    score = metric.corpus_score(hypotheses, checked_references(hypotheses, references))  # type: ignore[arg-type]
    return MetricScore(score.name, float(score.score), str(metric.get_signature()))
