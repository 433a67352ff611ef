from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest

from t5x_ext.corpora import ParallelText
from t5x_ext.data import BatchConfig, DataConfig
from t5x_ext.models import TransformerConfig
from t5x_ext.objectives import LabelSmoothedCrossEntropy
from t5x_ext.optim import adam
from t5x_ext.parallel import MeshConfig, fsdp
from t5x_ext.tasks import Translation
from t5x_ext.train import Run

TINY = TransformerConfig(embed_dim=64, mlp_dim=128, num_heads=4, encoder_layers=1, decoder_layers=1)
VOCAB_SIZE = 512


@pytest.fixture(scope="session")
def make_run():
    """A run whose texts do not exist: 16 rows of 32 in two microbatches, parameters cut over all devices."""

    def make(rows: int = 16, length: int = 32, model: dict[str, Any] | None = None, **changes: Any) -> Run:
        texts = ParallelText("nowhere.en", "nowhere.de", "en", "de")
        batch = BatchConfig(rows=rows, source_length=length, target_length=length)
        fields = {
            "task": Translation(DataConfig(train=(texts,), batch=batch), dataclasses.replace(TINY, **(model or {}))),
            "optimizer": adam(1e-3),
            "steps": 1,
            "num_microbatches": 2,
            "objective": partial(LabelSmoothedCrossEntropy, chunk_tokens=256),
            "mesh": MeshConfig(data=1, fsdp=-1),
            "axis_rules": fsdp(),
        }
        return Run(**{**fields, **changes})

    return make
