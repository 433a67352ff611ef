"""What is computed: the config of an encoder-decoder Transformer, its layers, and how they share parameters.

`TransformerConfig` (and its presets) describes a model, `EncoderDecoder` computes it, `init_params` makes its
parameters, `logical_axes` names their axes, `LayerSharing` says which layers of a stack use the same parameters.
"""

from __future__ import annotations

from t5x_ext.models.adapter_presets import houlsby, lora, mam, parallel, pfeiffer
from t5x_ext.models.adapters import AdapterResidual, LoraProjection, PrefixAttention, merged_lora
from t5x_ext.models.config import TransformerConfig
from t5x_ext.models.encoder_decoder import EncoderDecoder, init_params, logical_axes
from t5x_ext.models.layers import Layer
from t5x_ext.models.parts import LayerParts
from t5x_ext.models.placement import UNPLACED, Placement
from t5x_ext.models.presets import PRESETS, Base, Big, Vega4B7, VegaTiny
from t5x_ext.models.sharing import LayerRun, LayerSharing
from t5x_ext.models.stack import Stack
from t5x_ext.models.sublayers import Aux, KeyValue, sinusoidal_positions

__all__ = [
    "PRESETS",
    "UNPLACED",
    "AdapterResidual",
    "Aux",
    "Base",
    "Big",
    "EncoderDecoder",
    "KeyValue",
    "Layer",
    "LayerParts",
    "LayerRun",
    "LayerSharing",
    "LoraProjection",
    "Placement",
    "PrefixAttention",
    "Stack",
    "TransformerConfig",
    "Vega4B7",
    "VegaTiny",
    "houlsby",
    "init_params",
    "logical_axes",
    "lora",
    "mam",
    "merged_lora",
    "parallel",
    "pfeiffer",
    "sinusoidal_positions",
]
