"""Scores of translations, all computed by sacreBLEU so that they can be compared with published ones.

Every score has sacreBLEU's signature (tokenizer, case, smoothing, references, version). `evaluate_texts` scores one
system in one direction, `evaluate_domains` does so by domain, `paired_test` tests whether two systems differ
significantly, `format_table` makes a text table. `read_directions` and `score_directions` do so for a folder of many
systems in many directions, as WMT publishes them.
"""

from __future__ import annotations

from t5x_ext.evaluate.classification import classification_scores
from t5x_ext.evaluate.comet_scores import CometTexts, comet_scores
from t5x_ext.evaluate.metrics import TOKENIZERS, MetricScore, bleu, chrf, exact_match, ter, tokenizer_for
from t5x_ext.evaluate.scores import Scores, evaluate_domains, evaluate_texts, scores_from_json
from t5x_ext.evaluate.significance import PairedResult, paired_test
from t5x_ext.evaluate.table import format_table
from t5x_ext.evaluate.wmt import (
    ALL_REFERENCES,
    Comparison,
    DirectionTexts,
    Layout,
    SystemResult,
    compare_systems,
    main_reference,
    read_directions,
    score_directions,
)

__all__ = [
    "ALL_REFERENCES",
    "TOKENIZERS",
    "CometTexts",
    "Comparison",
    "DirectionTexts",
    "Layout",
    "MetricScore",
    "PairedResult",
    "Scores",
    "SystemResult",
    "bleu",
    "chrf",
    "classification_scores",
    "comet_scores",
    "compare_systems",
    "evaluate_domains",
    "evaluate_texts",
    "exact_match",
    "format_table",
    "main_reference",
    "paired_test",
    "read_directions",
    "score_directions",
    "scores_from_json",
    "ter",
    "tokenizer_for",
]
