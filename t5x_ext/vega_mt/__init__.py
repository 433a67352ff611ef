"""Floor 5: Vega-MT's pipeline (arXiv 2209.09444), from raw text to scores, as stages that are put together in gin.

A `Pipeline` runs its stages in order. Each reads artefacts of earlier ones (texts, models, scores) and makes one;
killed anywhere it goes on, and `audit` follows a score back to the texts it began with.
"""

from __future__ import annotations

from t5x_ext.vega_mt.artefact import Artefact, Model, TextFiles, Weights
from t5x_ext.vega_mt.manifest import StageAudit, audit
from t5x_ext.vega_mt.pipeline import Interrupted, Pipeline, Stage, Status, execute, status_of
from t5x_ext.vega_mt.texts import Texts
from t5x_ext.vega_mt.training import Train
from t5x_ext.vega_mt.workspace import Workspace, open_model

__all__ = [
    "Artefact",
    "Interrupted",
    "Model",
    "Pipeline",
    "Stage",
    "StageAudit",
    "Status",
    "TextFiles",
    "Texts",
    "Train",
    "Weights",
    "Workspace",
    "audit",
    "execute",
    "open_model",
    "status_of",
]
