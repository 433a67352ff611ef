"""What is computed: the config of an encoder-decoder Transformer, its layers, and how they share parameters.

`TransformerConfig` (and its presets) describes a model, `EncoderDecoder` computes it, `init_params` makes its
parameters, `logical_axes` names their axes, `LayerSharing` says which layers of a stack use the same parameters.
"""

from __future__ import annotations

from t5x_ext.models.config import TransformerConfig
from t5x_ext.models.encoder_decoder import EncoderDecoder, init_params, logical_axes
from t5x_ext.models.layers import KeyValue, sinusoidal_positions
from t5x_ext.models.placement import UNPLACED, Placement
from t5x_ext.models.presets import PRESETS, Base, Big, Vega4B7, VegaTiny
from t5x_ext.models.sharing import LayerSharing, Run
from t5x_ext.models.stack import Stack

__all__ = [
    "PRESETS",
    "UNPLACED",
    "Base",
    "Big",
    "EncoderDecoder",
    "KeyValue",
    "LayerSharing",
    "Placement",
    "Run",
    "Stack",
    "TransformerConfig",
    "Vega4B7",
    "VegaTiny",
    "init_params",
    "logical_axes",
    "sinusoidal_positions",
]
