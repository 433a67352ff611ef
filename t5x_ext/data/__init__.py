"""Text to batches: corpora, vocabulary, token cache, global batch plan and packed batches.

`prepare` walks the whole way; each step is also usable alone. Everything but the filling of batches happens once,
offline, keyed by content; batch i is a pure function of (caches, configuration, seed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from t5x_ext.data.batches import ExampleId, PackedBatches, batch_iterator
from t5x_ext.data.beam import BeamRunner
from t5x_ext.data.cache import TokenCache, build_cache
from t5x_ext.data.cleaning import CleaningConfig, clean_line
from t5x_ext.data.encoding import SubwordSampling
from t5x_ext.data.parallel_text import ParallelText, aligned_files, monolingual_text, read_lines
from t5x_ext.data.pipeline import DataConfig, PreparedData, prepare, prepare_vocabulary
from t5x_ext.data.plan import BatchConfig, BatchPlan
from t5x_ext.data.streams import Stream, TextDirection, text_directions
from t5x_ext.data.tags import TagPolicy
from t5x_ext.data.vocabulary import Vocabulary, VocabularyConfig, train_vocabulary

if TYPE_CHECKING:
    from t5x_ext.data.cldr import CldrCorpus
    from t5x_ext.data.seqio_mixture import SeqioMixture

__all__ = [
    "BatchConfig",
    "BatchPlan",
    "BeamRunner",
    "CldrCorpus",
    "CleaningConfig",
    "DataConfig",
    "ExampleId",
    "PackedBatches",
    "ParallelText",
    "PreparedData",
    "SeqioMixture",
    "Stream",
    "SubwordSampling",
    "TagPolicy",
    "TextDirection",
    "TokenCache",
    "Vocabulary",
    "VocabularyConfig",
    "aligned_files",
    "batch_iterator",
    "build_cache",
    "clean_line",
    "monolingual_text",
    "prepare",
    "prepare_vocabulary",
    "read_lines",
    "text_directions",
    "train_vocabulary",
]

# Corpora whose libraries (babel, seqio with TensorFlow) are loaded by those who use them only.
_LAZY = {"CldrCorpus": "t5x_ext.data.cldr", "SeqioMixture": "t5x_ext.data.seqio_mixture"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
