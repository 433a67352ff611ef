"""Floor 6: pipelines, from raw text to scores, as stages that are put together in gin.

A `Pipeline` runs its stages in order. Each reads artefacts of earlier ones (texts, models, scores) and makes one.
Killed anywhere, it resumes when it is run again, and `audit` follows a score back to the texts it began with.
"""

from __future__ import annotations

from t5x_ext.pipeline.artefact import Artefact, Model, TextFiles, Weights
from t5x_ext.pipeline.cleaning import Clean
from t5x_ext.pipeline.combining import Average, Choice, GreedyEnsemble, choose_greedily
from t5x_ext.pipeline.manifest import StageAudit, audit
from t5x_ext.pipeline.pipeline import Pipeline, Status, execute, status_of
from t5x_ext.pipeline.postprocess import narrow_punctuation, widen_as_released, widen_punctuation
from t5x_ext.pipeline.scoring import Evaluate, Translate
from t5x_ext.pipeline.selection import Select, moore_lewis
from t5x_ext.pipeline.stage import CheckedStage, Interrupted, SharedStage, Stage, TypedStage
from t5x_ext.pipeline.texts import Texts
from t5x_ext.pipeline.training import Train
from t5x_ext.pipeline.workspace import Workspace, open_model

__all__ = [
    "Artefact",
    "Average",
    "CheckedStage",
    "Choice",
    "Clean",
    "Evaluate",
    "GreedyEnsemble",
    "Interrupted",
    "Model",
    "Pipeline",
    "Select",
    "SharedStage",
    "Stage",
    "StageAudit",
    "Status",
    "TextFiles",
    "Texts",
    "Train",
    "Translate",
    "TypedStage",
    "Weights",
    "Workspace",
    "audit",
    "choose_greedily",
    "execute",
    "moore_lewis",
    "narrow_punctuation",
    "open_model",
    "status_of",
    "widen_as_released",
    "widen_punctuation",
]
