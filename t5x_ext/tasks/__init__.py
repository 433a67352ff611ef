"""Floor 5: tasks, the only floor that knows data, models and scores together.

A `Run` is given a task (`train.Task`): what model is trained on which batches, how it is measured during training and
tested at the end, and what a reader of its run folder needs.
"""

from __future__ import annotations

from t5x_ext.tasks.classification import Classification, TextClassifier
from t5x_ext.tasks.graphs import NodeClassification, NodeClassifier
from t5x_ext.tasks.held_out import HeldOutLoss
from t5x_ext.tasks.language_model import LanguageModeling
from t5x_ext.tasks.of_run import text_task, with_data, with_model
from t5x_ext.tasks.opening import open_run
from t5x_ext.tasks.parallel_translation import ParallelTranslation
from t5x_ext.tasks.sentences import SentenceEncoder
from t5x_ext.tasks.translation import Translation

__all__ = [
    "Classification",
    "HeldOutLoss",
    "LanguageModeling",
    "NodeClassification",
    "NodeClassifier",
    "ParallelTranslation",
    "SentenceEncoder",
    "TextClassifier",
    "Translation",
    "open_run",
    "text_task",
    "with_data",
    "with_model",
]
