"""Corpora and how they are cleaned: text files, CLDR, seqio tasks, filters, typing and word noise.

A corpus yields aligned pairs of lines (`contracts.Corpus`). `data` turns them into a vocabulary, tokens and batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from t5x_ext.corpora.beam import BeamRunner
from t5x_ext.corpora.cleaning import clean_line
from t5x_ext.corpora.filters.config import PairRules
from t5x_ext.corpora.labelled_text import LabelledText
from t5x_ext.corpora.parallel_text import ParallelText, aligned_files, monolingual_text, read_lines

if TYPE_CHECKING:
    from t5x_ext.corpora.cldr import CldrCorpus
    from t5x_ext.corpora.seqio_mixture import SeqioMixture

__all__ = [
    "BeamRunner",
    "CldrCorpus",
    "LabelledText",
    "PairRules",
    "ParallelText",
    "SeqioMixture",
    "aligned_files",
    "clean_line",
    "monolingual_text",
    "read_lines",
]

# Imported on first use: these need babel, or seqio with TensorFlow.
_LAZY = {"CldrCorpus": "t5x_ext.corpora.cldr", "SeqioMixture": "t5x_ext.corpora.seqio_mixture"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
