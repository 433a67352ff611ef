"""Whether two systems differ significantly: sacreBLEU's paired tests, with a seed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from t5x_ext.contracts import UserError
from t5x_ext.evaluate.metrics import (
    References,
    bleu_metric,
    checked_references,
    chrf_metric,
    ter_metric,
    tokenizer_for,
)

_KINDS = {"bootstrap": "bs", "approximate_randomization": "ar"}


@dataclass(frozen=True)
class PairedResult:
    """One metric of two systems on the same lines.

    Attributes:
      metric: `BLEU`, `chrF2` or `TER`.
      baseline: the baseline's score.
      system: the other system's score.
      p_value: probability of a difference at least as large if the systems were equally good; two-sided, 1 if the
        scores are equal.
      signature: sacreBLEU's, with kind, number of samples and seed of the test.
    """

    metric: str
    baseline: float
    system: float
    p_value: float
    signature: str

    @property
    def difference(self) -> float:
        """The system's score minus the baseline's."""
        return self.system - self.baseline

    def to_json(self) -> dict[str, Any]:
        """The fields and the difference as JSON values."""
        return {**asdict(self), "difference": self.difference}


def paired_test(
    baseline: Sequence[str],
    system: Sequence[str],
    references: References,
    target_language: str,
    *,
    kind: Literal["bootstrap", "approximate_randomization"] = "bootstrap",
    num_samples: int | None = None,
    seed: int = 12345,
    tokenizer: str | None = None,
    with_ter: bool = False,
) -> dict[str, PairedResult]:
    """Tests the difference of two systems for significance.

    Args:
      baseline: one system's lines.
      system: the other system's lines, for the same segments.
      references: one line a segment, or several sets of them.
      target_language: its code picks the BLEU tokenizer.
      kind: paired bootstrap resampling (Koehn 2004) or paired approximate randomization (Riezler and Maxwell 2005).
      num_samples: resamples or trials; None: sacreBLEU's 1,000 or 10,000.
      seed: of the resampling, at least 1 (for sacreBLEU 0 means no seed); the default is sacreBLEU's.
      tokenizer: a BLEU tokenizer instead of the language's own.
      with_ter: also test the translation edit rate.

    Returns:
      A result by metric name: `BLEU`, `chrF2` and, if asked for, `TER`.

    Raises:
      UserError: if line counts differ, there are no lines, kind or tokenizer are unknown, or seed or number of samples
        are below 1.
    """
    if kind not in _KINDS:
        raise UserError(f"kind={kind!r}: one of {', '.join(_KINDS)}")
    if seed < 1 or (num_samples is not None and num_samples < 1):
        raise UserError(f"seed={seed}, num_samples={num_samples}: both must be at least 1")
    sets = checked_references(baseline, references)
    checked_references(system, references)

    from sacrebleu.significance import PairedTest

    metrics = {"BLEU": bleu_metric(tokenizer_for(target_language, tokenizer)), "chrF2": chrf_metric()}
    if with_ter:
        metrics["TER"] = ter_metric(target_language)
    with _sacrebleu_seed(seed):
        signatures, columns = PairedTest(
            [("baseline", list(baseline)), ("system", list(system))],
            metrics,
            sets,  # type: ignore[arg-type]
            test_type=_KINDS[kind],
            n_samples=num_samples or 0,
        )()
    return {name: _result(name, columns[name], str(signatures[name])) for name in metrics}


def _result(name: str, column: Sequence[Any], signature: str) -> PairedResult:
    baseline, system = column
    # sacreBLEU counts samples whose difference is strictly larger. Equal systems have no such samples and would get the
    # smallest possible p.
    p_value = 1.0 if system.score == baseline.score else float(system.p_value)
    return PairedResult(name, float(baseline.score), float(system.score), p_value, signature)


@contextlib.contextmanager
def _sacrebleu_seed(seed: int) -> Iterator[None]:
    """Sets sacreBLEU's seed, which it reads from the environment only."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before
