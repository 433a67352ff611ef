"""Floor 5: Vega-MT's pipeline (arXiv 2209.09444), from raw text to scores, as stages that are put together in gin.

A `Pipeline` runs its stages in order. Each reads artefacts of earlier ones (texts, models, scores) and makes one;
killed anywhere it goes on, and `audit` follows a score back to the texts it began with.
"""

from __future__ import annotations

from t5x_ext.vega_mt.artefact import Artefact, Model, TextFiles, Weights
from t5x_ext.vega_mt.augmentation import CycleTranslate, Synthesize
from t5x_ext.vega_mt.cleaning import Clean
from t5x_ext.vega_mt.combining import Average, Choice, GreedyEnsemble, choose_greedily
from t5x_ext.vega_mt.manifest import StageAudit, audit
from t5x_ext.vega_mt.noising import NoisyDev
from t5x_ext.vega_mt.pipeline import Pipeline, Status, execute, status_of
from t5x_ext.vega_mt.postprocess import narrow_punctuation, widen_as_released, widen_punctuation
from t5x_ext.vega_mt.scoring import Evaluate, Translate
from t5x_ext.vega_mt.selection import Select, moore_lewis
from t5x_ext.vega_mt.stage import CheckedStage, Interrupted, SharedStage, Stage, TypedStage
from t5x_ext.vega_mt.texts import Texts
from t5x_ext.vega_mt.training import Train
from t5x_ext.vega_mt.workspace import Workspace, open_model

__all__ = [
    "Artefact",
    "Average",
    "CheckedStage",
    "Choice",
    "Clean",
    "CycleTranslate",
    "Evaluate",
    "GreedyEnsemble",
    "Interrupted",
    "Model",
    "NoisyDev",
    "Pipeline",
    "Select",
    "SharedStage",
    "Stage",
    "StageAudit",
    "Status",
    "Synthesize",
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
