from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.models import (
    PRESETS,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    LanguageModel,
    LayerConfig,
    LayerParts,
    MiniLM,
    VegaTiny,
    count_params,
    init_params,
    logical_axes,
    model_from_json,
    model_of,
    model_to_json,
    num_params,
    parts,
)
from t5x_ext.models.sublayers import FeedForward


class Other(FeedForward):
    """A built-in kind for the time of a test."""


@pytest.mark.parametrize(
    ("config", "model"), [(VegaTiny(), EncoderDecoder), (DecoderConfig(), LanguageModel), (MiniLM(), Encoder)]
)
def test_a_config_describes_one_model(config, model):
    assert model_of(config) == model(config)
    assert num_params(config) == num_params(model(config)) == count_params(model(config).abstract_params())


def test_layers_alone_are_no_model():
    with pytest.raises(TypeError, match="no model is described by a LayerConfig"):
        model_of(LayerConfig())


@pytest.mark.parametrize("name", PRESETS)
def test_records_round_trip(monkeypatch, name):
    monkeypatch.setitem(parts.KINDS["feed_forward"], "other", Other)
    config = PRESETS[name]()
    record = json.loads(json.dumps(model_to_json(model_of(config))))
    assert "parts" not in record
    assert record == json.loads(json.dumps(config.to_json()))
    model = model_of(config, parts=LayerParts(feed_forward=Other))
    record = json.loads(json.dumps(model_to_json(model)))
    assert record["parts"] == {"feed_forward": {"kind": "other"}}
    back = model_from_json(record)
    assert (back.parts, back.config.to_json()) == (model.parts, config.to_json())
    with pytest.raises(UserError, match="unknown kind 'another'"):
        model_from_json({**record, "parts": {"feed_forward": {"kind": "another"}}})


def test_counts_shapes_and_axes_agree():
    model = Encoder(EncoderConfig(vocab_size=23, embed_dim=8, mlp_dim=12, num_heads=2, layers=2))
    params = init_params(model, jax.random.key(0))
    assert num_params(model) == sum(np.asarray(leaf).size for leaf in jax.tree.leaves(params))
    same = jax.tree.map(lambda a, b: a.shape == b.shape and b.dtype == jnp.float32, model.abstract_params(), params)
    assert jax.tree.all(same)
    ranks = jax.tree.map(len, logical_axes(model), is_leaf=lambda node: isinstance(node, tuple))
    assert jax.tree.all(jax.tree.map(lambda a, rank: a.ndim == rank, params, ranks))


def test_abstract_parameters_may_be_changed():
    model = LanguageModel(DecoderConfig(vocab_size=23, embed_dim=8, mlp_dim=12, num_heads=2, layers=1))
    model.abstract_params().clear()
    assert set(model.abstract_params()) == {"decoder", "embedding"}
