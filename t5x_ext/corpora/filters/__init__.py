"""Filters for raw text, parallel or of one language: cleaning of lines, rules with counts, exact and near duplicates.

`filter_corpora` does all of it; `t5x_ext clean` is its command. Rules import the libraries of the extra `clean`
(py3langid, regex, datasketch) when they need them.
"""

from t5x_ext.corpora.filters.chunks import ChunkFilter, FilteredChunk
from t5x_ext.corpora.filters.config import FilterConfig, Filtering, PairRules
from t5x_ext.corpora.filters.duplicates import DUPLICATE_RULES, near_duplicate_probability
from t5x_ext.corpora.filters.held_out import hold_out
from t5x_ext.corpora.filters.report import CorpusReport, FilterReport
from t5x_ext.corpora.filters.rules import PAIR_RULES, pair_rules, rules_identity
from t5x_ext.corpora.filters.run import filter_corpora
from t5x_ext.corpora.filters.text import duplicate_key, length, normalize_punctuation, unescape_entities

RULES = (*PAIR_RULES, *DUPLICATE_RULES)
"""Names of all rules, in the order in which they are tried."""

__all__ = [
    "RULES",
    "ChunkFilter",
    "CorpusReport",
    "FilterConfig",
    "FilterReport",
    "FilteredChunk",
    "Filtering",
    "PairRules",
    "duplicate_key",
    "filter_corpora",
    "hold_out",
    "length",
    "near_duplicate_probability",
    "normalize_punctuation",
    "pair_rules",
    "rules_identity",
    "unescape_entities",
]
