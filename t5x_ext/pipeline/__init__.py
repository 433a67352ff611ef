"""Floor 6: pipelines, from raw text to scores, made of stages that gin puts together.

A `Pipeline` runs its stages in order. Each reads artefacts of earlier stages (texts, models, scores, or any other kind)
and makes one. A killed pipeline resumes when it is run again, and `audit` follows a score back to the texts it began
with.
"""

from __future__ import annotations

from t5x_ext.pipeline.artefact import Artefact, Kind, Model, TextFiles, Weights
from t5x_ext.pipeline.cleaning import Clean
from t5x_ext.pipeline.combining import Average, Choice, GreedyEnsemble, choose_greedily
from t5x_ext.pipeline.execute import execute
from t5x_ext.pipeline.manifest import StageAudit, audit
from t5x_ext.pipeline.pipeline import Pipeline
from t5x_ext.pipeline.postprocess import POSTPROCESSORS, Postprocessor, narrow_punctuation, widen_punctuation
from t5x_ext.pipeline.scoring import Evaluate, Translate
from t5x_ext.pipeline.selection import Select, moore_lewis
from t5x_ext.pipeline.stage import (
    CheckedStage,
    ComputingStage,
    Interrupted,
    ModelOrigin,
    ModelStage,
    SharedStage,
    Stage,
    StageDefaults,
    StageWork,
    TypedStage,
    decoding_work,
    origin_of,
)
from t5x_ext.pipeline.stage_folder import PipelineFolder, StageFolder
from t5x_ext.pipeline.status import Status, status_of, statuses
from t5x_ext.pipeline.texts import Texts
from t5x_ext.pipeline.training import Train
from t5x_ext.pipeline.workspace import OpenModel, Workspace, open_model

__all__ = [
    "POSTPROCESSORS",
    "Artefact",
    "Average",
    "CheckedStage",
    "Choice",
    "Clean",
    "ComputingStage",
    "Evaluate",
    "GreedyEnsemble",
    "Interrupted",
    "Kind",
    "Model",
    "ModelOrigin",
    "ModelStage",
    "OpenModel",
    "Pipeline",
    "PipelineFolder",
    "Postprocessor",
    "Select",
    "SharedStage",
    "Stage",
    "StageAudit",
    "StageDefaults",
    "StageFolder",
    "StageWork",
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
    "decoding_work",
    "execute",
    "moore_lewis",
    "narrow_punctuation",
    "open_model",
    "origin_of",
    "status_of",
    "statuses",
    "widen_punctuation",
]
