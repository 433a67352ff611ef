from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from t5x_ext.contracts import UserError
from t5x_ext.models import (
    PRESETS,
    Base,
    Big,
    DecoderConfig,
    EncoderConfig,
    LayerSharing,
    MiniLM,
    TransformerConfig,
    Vega4B7,
    config_from_json,
    model_of,
    num_params,
)

HALF = LayerSharing("cycle_rev", 2)
SIZES = {"vocab_size": 23, "embed_dim": 8, "mlp_dim": 12, "num_heads": 2, "dropout": 0.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Base(), 60_915_712),
        (Base(norm_placement="pre", final_norm=True), 60_917_760),
        (Big(), 209_911_808),
        (Big(norm_placement="pre", final_norm=True), 209_915_904),
        (Vega4B7(), 4_693_321_728),
        (Vega4B7(norm="rmsnorm", use_bias=False), 4_691_597_312),
        (Vega4B7(use_bias=False), 4_691_597_312),
        (Base(encoder_layers=12, encoder_sharing=LayerSharing("cycle_rev", 6)), 60_915_712),
        (
            Big(mlp_dim=4096, encoder_sharing=LayerSharing("universal"), decoder_sharing=LayerSharing("universal")),
            62_947_328,
        ),
        (MiniLM(), 22_713_216 - 384 * 385),  # the published model has a pooler
    ],
)
def test_published_sizes(config, expected):
    assert num_params(config) == expected


@pytest.mark.parametrize(
    ("config", "gigaflops"),
    [
        (Base(), 3.677),
        (Base(encoder_layers=12, decoder_layers=12), 6.347),
        (Base(encoder_layers=18, decoder_layers=18), 9.017),
        (Big(), 12.64),
    ],
)
def test_flops_of_the_sharing_page(config, gigaflops):
    assert config.flops([30], [30]) / 1e9 == pytest.approx(gigaflops, abs=6e-4 if gigaflops < 10 else 6e-3)


def matmul_flops(jaxpr):
    """2 x multiply-adds of every product in a traced function."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            total += 2 * equation.outvars[0].aval.size * np.prod([equation.invars[0].aval.shape[i] for i in contracted])
        total += sum(matmul_flops(inner) for inner in jaxprs_in_params(equation.params))
    return total


def traced_flops(config, lengths):
    """Of the forward pass over one row with `lengths[side]` tokens."""
    model = model_of(config)
    batch = {name: np.ones((1, lengths.get(name.split("_")[0], 7)), np.int32) for name in model.dummy_batch()}
    return matmul_flops(jax.make_jaxpr(lambda p: model.apply({"params": p}, batch))(model.abstract_params()).jaxpr)


def test_flops_are_those_of_the_traced_models(small_config):
    config = small_config(encoder_layers=3, decoder_layers=2)
    above_the_diagonal = 2 * 7 * 6 * config.embed_dim
    traced = traced_flops(config, {"source": 5, "target": 7})
    assert config.flops([5], [7]) == traced - config.decoder_layers * above_the_diagonal
    decoder, encoder = DecoderConfig(**SIZES, layers=2), EncoderConfig(**SIZES, layers=3)
    assert decoder.flops([7]) == traced_flops(decoder, {}) - decoder.layers * above_the_diagonal
    assert encoder.flops([7]) == traced_flops(encoder, {})


def test_flops_count_positions_and_add_over_examples():
    once, twice = Base(), Base(encoder_layers=12, decoder_layers=12)
    output = 2 * 512 * 32768 * 11
    assert twice.flops([9], [11]) - output == 2 * (once.flops([9], [11]) - output)
    assert once.flops([9, 4], [11, 6]) == once.flops([9], [11]) + once.flops(np.array([4]), np.array([6]))


@pytest.mark.parametrize(
    "config",
    [
        *(preset() for preset in PRESETS.values()),
        Base(decoder_layers=4, decoder_sharing=HALF),
        DecoderConfig(layers=4, sharing=HALF, tied_embeddings="none"),
        EncoderConfig(layers=4, sharing=HALF, max_positions=7),
    ],
)
def test_json_round_trip(config):
    back = config_from_json(json.loads(json.dumps(config.to_json())))
    assert isinstance(config, type(back))
    assert back.to_json() == config.to_json()
    assert dataclasses.asdict(back) == dataclasses.asdict(config)


def test_old_records_have_no_kind():
    fields = {"vocab_size": 99, "encoder_layers": 2, "decoder_layers": 3, "norm": "rmsnorm"}
    assert config_from_json(fields) == TransformerConfig(
        vocab_size=99, encoder_layers=2, decoder_layers=3, norm="rmsnorm"
    )
    sharing = {"scheme": "cycle_rev", "unique_layers": 2, "allow_uneven": False}
    old = fields | {
        "encoder_layers": 0,
        "decoder_layers": 4,
        "encoder_sharing": {"scheme": "universal"},
        "decoder_sharing": sharing,
        "tied_embeddings": "decoder",
    }
    assert config_from_json(old) == DecoderConfig(
        vocab_size=99, layers=4, sharing=HALF, tied_embeddings="decoder", norm="rmsnorm"
    )


@pytest.mark.parametrize(
    ("read", "fields", "message"),
    [
        (
            config_from_json,
            {"kind": "graph"},
            "this version knows encoder_decoder, parallel, decoder, encoder",
        ),
        (TransformerConfig.from_json, {"kind": "decoder"}, "of the kind 'decoder', not 'encoder_decoder'"),
        (config_from_json, {"kind": "decoder", "encoder_layers": 2}, "unknown field 'encoder_layers' of DecoderConfig"),
    ],
)
def test_mistaken_records_are_one_line(read, fields, message):
    with pytest.raises(UserError, match=message):
        read(fields)


def test_shallow_models_have_one_layer_a_stack():
    config = Base(decoder_layers=4, decoder_sharing=HALF).shallow()
    assert (config.encoder_layers, config.decoder_layers, config.decoder_sharing) == (1, 1, LayerSharing())
    assert EncoderConfig(layers=5, sharing=LayerSharing("sandwich")).shallow() == EncoderConfig(layers=1)


def test_presets_override_defaults_only():
    for preset in PRESETS.values():
        base = EncoderConfig if issubclass(preset, EncoderConfig) else TransformerConfig
        names = [{field.name for field in dataclasses.fields(config)} for config in (preset, base)]
        assert names[0] == names[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 0}, "embed_dim is 0; it must be a positive integer"),
        ({"embed_dim": "512"}, "positive integer"),
        ({"encoder_layers": -1}, "encoder_layers is -1; it must be a positive integer"),
        ({"encoder_layers": 0}, r"encoder_layers is 0; a language model is a DecoderConfig\(layers=..., sharing=...\)"),
        ({"activation": "tanh"}, "one of relu, gelu"),
        ({"vocab_size": True}, "positive integer"),
        ({"num_heads": 3}, "num_heads is 3; it must be a divisor of embed_dim=8"),
        ({"embed_dim": 9, "num_heads": 3}, "even"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"use_bias": 1}, "True or False"),
        ({"norm": "batchnorm"}, "one of layernorm, rmsnorm"),
        ({"remat": "some"}, "one of none, full, dots_saveable, dots_with_no_batch_dims_saveable"),
        ({"tied_embeddings": "both"}, "one of all, decoder, none"),
        ({"encoder_sharing": "cycle"}, "a LayerSharing"),
        ({"encoder_sharing": LayerSharing("cycle", 4)}, "the stack has 1"),
        ({"norm_epsilon": 0.0}, "a positive number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_one_line(small_config, changes, message):
    with pytest.raises(UserError, match=message) as error:
        small_config(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"embed": 8}, {"encoder_sharing": {"sheme": "cycle"}}])
def test_unknown_json_fields_are_refused(fields):
    with pytest.raises(UserError, match=r"unknown field '(embed|sheme)'"):
        TransformerConfig.from_json(fields)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DecoderConfig, {"layers": 0}, "DecoderConfig.layers is 0; it must be a positive integer"),
        (DecoderConfig, {"layers": 1, "sharing": HALF}, "the stack has 1"),
        (DecoderConfig, {"tied_embeddings": True}, "one of all, decoder, none"),
        (EncoderConfig, {"max_positions": 0}, "max_positions is 0; it must be a positive integer, or None for sines"),
        (EncoderConfig, {"token_types": -1}, "token_types is -1; it must be a positive integer, or 0 for none"),
        (EncoderConfig, {"embedding_norm": "yes"}, "True or False"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes_of_the_other_configs_are_one_line(config, changes, message):
    with pytest.raises(UserError, match=message) as error:
        config(**changes)
    assert "\n" not in str(error.value)
