"""What is computed: configs of Transformers, the four models over one set of layers, how layers share parameters.

`TransformerConfig` describes an `EncoderDecoder`, `ParallelConfig` a `ParallelDecoder` (which writes all tokens at
once), `DecoderConfig` a `LanguageModel`, `EncoderConfig` an `Encoder`; `LayerParts` says what their layers are made of,
`LayerSharing` which layers of a stack use the same parameters.
`init_params` makes parameters, `logical_axes` names their axes, `num_params` counts them; `model_to_json` and
`model_from_json` write and read what a run folder says of its model.
"""

from __future__ import annotations

from t5x_ext.models.adapter_presets import houlsby, lora, mam, parallel, pfeiffer
from t5x_ext.models.adapters import AdapterResidual, LoraProjection, PrefixAttention, merged_lora
from t5x_ext.models.building import (
    count_params,
    init_params,
    logical_axes,
    model_from_json,
    model_of,
    model_to_json,
    num_params,
)
from t5x_ext.models.classifier import Classifier, Pooling, pooled
from t5x_ext.models.config import (
    DecoderConfig,
    EncoderConfig,
    LayerConfig,
    ParallelConfig,
    TransformerConfig,
    config_from_json,
)
from t5x_ext.models.encoder import Encoder
from t5x_ext.models.encoder_decoder import EncoderDecoder
from t5x_ext.models.graphs import APPNP, GAT, GCN, GCNII, SGC, Gates
from t5x_ext.models.language_model import LanguageModel
from t5x_ext.models.layers import Layer
from t5x_ext.models.parallel_decoder import ParallelDecoder
from t5x_ext.models.parts import LayerParts
from t5x_ext.models.placement import UNPLACED, Placement
from t5x_ext.models.presets import PRESETS, Base, Big, MiniLM, Vega4B7, VegaTiny
from t5x_ext.models.sharing import LayerRun, LayerSharing
from t5x_ext.models.stack import Stack
from t5x_ext.models.sublayers import Aux, KeyValue, sinusoidal_positions
from t5x_ext.models.transformer import Transformer

__all__ = [
    "APPNP",
    "GAT",
    "GCN",
    "GCNII",
    "PRESETS",
    "SGC",
    "UNPLACED",
    "AdapterResidual",
    "Aux",
    "Base",
    "Big",
    "Classifier",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "Gates",
    "KeyValue",
    "LanguageModel",
    "Layer",
    "LayerConfig",
    "LayerParts",
    "LayerRun",
    "LayerSharing",
    "LoraProjection",
    "MiniLM",
    "ParallelConfig",
    "ParallelDecoder",
    "Placement",
    "Pooling",
    "PrefixAttention",
    "Stack",
    "Transformer",
    "TransformerConfig",
    "Vega4B7",
    "VegaTiny",
    "config_from_json",
    "count_params",
    "houlsby",
    "init_params",
    "logical_axes",
    "lora",
    "mam",
    "merged_lora",
    "model_from_json",
    "model_of",
    "model_to_json",
    "num_params",
    "parallel",
    "pfeiffer",
    "pooled",
    "sinusoidal_positions",
]
