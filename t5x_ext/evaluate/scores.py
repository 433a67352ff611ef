"""All scores of one system in one direction, over all lines or by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t5x_ext.contracts import UserError
from t5x_ext.evaluate.metrics import (
    MetricScore,
    References,
    bleu,
    checked_references,
    chrf,
    exact_match,
    ter,
    tokenizer_for,
)


@dataclass(frozen=True)
class Scores:
    """Scores of a set of translations.

    Attributes:
      bleu: corpus BLEU with the tokenizer of the target language.
      chrf: corpus chrF2.
      exact_match: per cent of lines equal to a reference.
      num_lines: number of scored lines.
      ter: translation edit rate, if asked for.
    """

    bleu: MetricScore
    chrf: MetricScore
    exact_match: float
    num_lines: int
    ter: MetricScore | None = None

    def to_json(self) -> dict[str, Any]:
        """Numbers and signatures; `signature` is that of BLEU."""
        fields: dict[str, Any] = {
            "bleu": self.bleu.value,
            "chrf": self.chrf.value,
            "exact_match": self.exact_match,
            "lines": self.num_lines,
            "signature": self.bleu.signature,
            "chrf_signature": self.chrf.signature,
        }
        if self.ter is not None:
            fields |= {"ter": self.ter.value, "ter_signature": self.ter.signature}
        return fields


def scores_from_json(fields: Mapping[str, Any]) -> Scores:
    """The inverse of `Scores.to_json`."""
    ter_score = MetricScore("TER", fields["ter"], fields["ter_signature"]) if "ter" in fields else None
    return Scores(
        bleu=MetricScore("BLEU", fields["bleu"], fields["signature"]),
        chrf=MetricScore("chrF2", fields["chrf"], fields["chrf_signature"]),
        exact_match=fields["exact_match"],
        num_lines=fields["lines"],
        ter=ter_score,
    )


def evaluate_texts(
    hypotheses: Sequence[str],
    references: References,
    target_language: str,
    *,
    tokenizer: str | None = None,
    with_ter: bool = False,
) -> Scores:
    """Scores detokenized translations.

    Args:
      hypotheses: the translations, one a line.
      references: one line a hypothesis, or several sets of them.
      target_language: its code picks the BLEU tokenizer.
      tokenizer: a BLEU tokenizer instead of the language's own, one of `TOKENIZERS`.
      with_ter: also the translation edit rate, which is slow on long lines.

    Raises:
      UserError: if line counts differ, there are no lines, or the tokenizer is unknown.
    """
    sets = checked_references(hypotheses, references)
    return Scores(
        bleu=bleu(hypotheses, sets, tokenizer_for(target_language, tokenizer)),
        chrf=chrf(hypotheses, sets),
        exact_match=exact_match(hypotheses, sets),
        num_lines=len(hypotheses),
        ter=ter(hypotheses, sets, target_language) if with_ter else None,
    )


def evaluate_domains(
    hypotheses: Sequence[str],
    references: References,
    domains: Sequence[str],
    target_language: str,
    *,
    tokenizer: str | None = None,
    with_ter: bool = False,
) -> dict[str, Scores]:
    """Scores each domain separately, in the order of first appearance.

    Args:
      hypotheses: see `evaluate_texts`.
      references: see `evaluate_texts`.
      domains: a label for each hypothesis (a corpus's name, a phrase's family).
      target_language: see `evaluate_texts`.
      tokenizer: see `evaluate_texts`.
      with_ter: see `evaluate_texts`.

    Raises:
      UserError: as `evaluate_texts`, and if there is not one label a line.
    """
    sets = checked_references(hypotheses, references)
    if len(domains) != len(hypotheses):
        raise UserError(f"{len(hypotheses)} hypotheses but {len(domains)} domain labels: give one a line")
    members: dict[str, list[int]] = {}
    for index, domain in enumerate(domains):
        members.setdefault(domain, []).append(index)
    return {
        domain: evaluate_texts(
            [hypotheses[index] for index in indices],
            [[lines[index] for index in indices] for lines in sets],
            target_language,
            tokenizer=tokenizer,
            with_ter=with_ter,
        )
        for domain, indices in members.items()
    }
