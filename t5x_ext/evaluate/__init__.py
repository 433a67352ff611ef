"""Floor 3: text in, scores out, all of it through sacreBLEU so that a number can be compared with a paper's.

Every score carries sacreBLEU's signature (tokenizer, case, smoothing, references, version). `evaluate_texts` gives the
scores of one system in one direction, `evaluate_domains` the same by domain, `paired_test` says whether two systems
differ by more than chance, `format_table` prints what a terminal shows.
"""

from __future__ import annotations

from t5x_ext.evaluate.metrics import TOKENIZERS, MetricScore, bleu, chrf, exact_match, ter, tokenizer_for
from t5x_ext.evaluate.scores import Scores, evaluate_domains, evaluate_texts, scores_from_json
from t5x_ext.evaluate.significance import PairedResult, paired_test
from t5x_ext.evaluate.table import format_table

__all__ = [
    "TOKENIZERS",
    "MetricScore",
    "PairedResult",
    "Scores",
    "bleu",
    "chrf",
    "evaluate_domains",
    "evaluate_texts",
    "exact_match",
    "format_table",
    "paired_test",
    "scores_from_json",
    "ter",
    "tokenizer_for",
]
