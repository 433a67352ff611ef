"""Floor 3: text in, scores out, all of it through sacreBLEU so that a number can be compared with a paper's.

Every score carries sacreBLEU's signature (tokenizer, case, smoothing, references, version). `evaluate_texts` gives the
scores of one system in one direction, `evaluate_domains` the same by domain, `paired_test` says whether two systems
differ by more than chance, `format_table` prints what a terminal shows. `read_directions` and `score_directions` do so
for a folder of many systems in many directions, as WMT publishes them.
"""

from __future__ import annotations

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
