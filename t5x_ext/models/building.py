"""Models from configs and records, and what follows from a model without its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax.core import meta
from jaxtyping import Array

from t5x_ext.contracts import Params, PyTree
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
from t5x_ext.models.language_model import LanguageModel
from t5x_ext.models.parallel_decoder import ParallelDecoder
from t5x_ext.models.parts import LayerParts
from t5x_ext.models.placement import UNPLACED, Placement
from t5x_ext.models.transformer import Transformer


def model_of(config: LayerConfig, **options: Any) -> Any:
    """The model that a config describes: `EncoderDecoder`, `ParallelDecoder`, `LanguageModel` or `Encoder`.

    Args:
      config: of one of the four.
      options: attributes of the model, as `placement` or `parts`.
    """
    if isinstance(config, ParallelConfig):
        return ParallelDecoder(config, **options)
    if isinstance(config, TransformerConfig):
        return EncoderDecoder(config, **options)
    if isinstance(config, DecoderConfig):
        return LanguageModel(config, **options)
    if isinstance(config, EncoderConfig):
        return Encoder(config, **options)
    raise TypeError(f"no model is described by a {type(config).__name__}")


def init_params(model: Transformer | LayerConfig, key: Array) -> Params:
    """The parameters of a new model: nested dictionaries of float32 arrays. Traceable by `jit` and `eval_shape`.

    Args:
      model: the module, or a config, which stands for its model with default parts.
      key: random key.
    """
    return jax.jit(lambda key: meta.unbox(_as_model(model).init_boxed(key)))(key)


def logical_axes(model: Transformer | LayerConfig) -> PyTree:
    """The parameter tree with a tuple of logical axis names (`contracts.AXIS_NAMES`) for each array.

    Nothing is allocated. The leaves are tuples: map over the result with `is_leaf=lambda x: isinstance(x, tuple)`.

    Args:
      model: the module, or a config, which stands for its model with default parts.
    """
    boxed = jax.eval_shape(lambda: _as_model(model).init_boxed(jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=meta.is_axis_metadata)


def count_params(params: Params) -> int:
    """Numbers in a tree of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def num_params(model: Transformer | LayerConfig) -> int:
    """Parameters of a model: M sets a stack, for any number of positions. Nothing is allocated.

    Args:
      model: the module, or a config, which stands for its model with default parts.
    """
    return count_params(_as_model(model).abstract_params())


def model_to_json(model: Transformer) -> dict[str, Any]:
    """Config and parts as JSON: what `model_from_json` needs."""
    parts = model.parts.to_json()
    return model.config.to_json() | ({"parts": parts} if parts else {})


def model_from_json(record: Mapping[str, Any], placement: Placement = UNPLACED) -> Any:
    """The model of a `model_to_json` dictionary or of the `to_json` dictionary of a config.

    Raises:
      UserError: for an unknown kind of config or part, an unknown field or a value that is not allowed.
    """
    fields = dict(record)
    parts = LayerParts.from_json(fields.pop("parts", {}))
    return model_of(config_from_json(fields), parts=parts, placement=placement)


def _as_model(model: Transformer | LayerConfig) -> Transformer:
    return model_of(model) if isinstance(model, LayerConfig) else model
