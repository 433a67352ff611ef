"""From lines to batches: vocabulary, token cache, global batch plan and packed batches.

`prepare` does all steps; each can also be used alone. Everything but filling batches is done once, offline, and keyed
by content. Batch i is a pure function of (caches, configuration, seed).
"""

from __future__ import annotations

from t5x_ext.data.batches import ExampleId, PackedBatches, batch_iterator
from t5x_ext.data.cache import TokenCache, build_cache
from t5x_ext.data.encoding import SubwordSampling
from t5x_ext.data.graphs import GraphData, NodeGraph, read_graph
from t5x_ext.data.labelled import RowConfig
from t5x_ext.data.plan import BatchConfig, BatchPlan
from t5x_ext.data.prepare import DataConfig, PreparedData, prepare, prepare_vocabulary
from t5x_ext.data.streams import Stream, TextDirection, text_directions
from t5x_ext.data.tags import TagPolicy
from t5x_ext.data.vocabulary import Vocabulary, VocabularyConfig, train_vocabulary
from t5x_ext.data.wordpiece import WordPiece

__all__ = [
    "BatchConfig",
    "BatchPlan",
    "DataConfig",
    "ExampleId",
    "GraphData",
    "NodeGraph",
    "PackedBatches",
    "PreparedData",
    "RowConfig",
    "Stream",
    "SubwordSampling",
    "TagPolicy",
    "TextDirection",
    "TokenCache",
    "Vocabulary",
    "VocabularyConfig",
    "WordPiece",
    "batch_iterator",
    "build_cache",
    "prepare",
    "prepare_vocabulary",
    "read_graph",
    "text_directions",
    "train_vocabulary",
]
