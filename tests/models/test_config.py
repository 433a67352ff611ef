from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from t5x_ext.contracts import UserError
from t5x_ext.models import PRESETS, Base, Big, EncoderDecoder, LayerSharing, TransformerConfig, Vega4B7, init_params

HALF = LayerSharing("cycle_rev", 2)


def initialised_size(config):
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_bias": False},
        {"norm": "rmsnorm"},
        {"norm": "rmsnorm", "use_bias": False, "final_norm": False},
        {"norm_placement": "post", "final_norm": False, "tied_embeddings": "decoder"},
        {"norm_placement": "post", "tied_embeddings": "none"},
        {"encoder_layers": 4, "encoder_sharing": HALF, "decoder_layers": 3},
        {"encoder_layers": 2, "decoder_layers": 6, "decoder_sharing": HALF, "scan_layers": True},
        {"encoder_layers": 5, "encoder_sharing": LayerSharing("sandwich"), "decoder_layers": 1},
        {"encoder_layers": 0, "encoder_sharing": HALF, "decoder_layers": 3},
        {"encoder_layers": 0, "norm": "rmsnorm", "tied_embeddings": "decoder"},
        {"encoder_layers": 0, "use_bias": False, "final_norm": False, "tied_embeddings": "none"},
    ],
)
def test_num_params_is_the_size_of_the_initialised_tree(small_config, changes):
    config = small_config(**changes)
    assert config.num_params() == initialised_size(config)


@pytest.mark.parametrize("name", PRESETS)
def test_num_params_of_presets(name):
    assert PRESETS[name]().num_params() == initialised_size(PRESETS[name]())


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
    ],
)
def test_published_sizes(config, expected):
    assert config.num_params() == expected


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


@pytest.mark.parametrize("encoder_layers", [3, 0])
def test_flops_are_those_of_the_traced_model(small_config, encoder_layers):
    source, target = 5, 7
    config = small_config(encoder_layers=encoder_layers, decoder_layers=2)
    ids = {name: np.ones((1, target if "target" in name else source), np.int32) for name in batch_names()}
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    traced = jax.make_jaxpr(lambda p: EncoderDecoder(config).apply({"params": p}, ids))(shapes)
    above_the_diagonal = config.decoder_layers * 2 * target * (target - 1) * config.embed_dim
    assert config.flops([source], [target]) == matmul_flops(traced.jaxpr) - above_the_diagonal


def batch_names():
    sides = {
        "source": ("tokens", "segment_ids", "positions"),
        "target": ("inputs", "labels", "segment_ids", "positions"),
    }
    return [f"{side}_{name}" for side, names in sides.items() for name in names]


def test_flops_count_positions_and_add_over_examples():
    once, twice = Base(), Base(encoder_layers=12, decoder_layers=12)
    output = 2 * 512 * 32768 * 11
    assert twice.flops([9], [11]) - output == 2 * (once.flops([9], [11]) - output)
    assert once.flops([9, 4], [11, 6]) == once.flops([9], [11]) + once.flops(np.array([4]), np.array([6]))


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = dataclasses.replace(PRESETS[name](), decoder_layers=4, decoder_sharing=HALF)
    back = TransformerConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert back.to_json() == config.to_json()
    assert back.decoder_sharing == HALF


def test_presets_override_defaults_only():
    for preset in PRESETS.values():
        assert {field.name for field in dataclasses.fields(preset)} == {
            field.name for field in dataclasses.fields(TransformerConfig)
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 0}, "embed_dim is 0; it must be a positive integer"),
        ({"embed_dim": "512"}, "positive integer"),
        ({"encoder_layers": -1}, "encoder_layers is -1; it must be a positive integer, or 0 for no encoder"),
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
def test_mistakes_are_one_line(small_config, changes, message):
    with pytest.raises(UserError, match=message) as error:
        small_config(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"embed": 8}, {"encoder_sharing": {"sheme": "cycle"}}])
def test_unknown_json_fields_are_refused(fields):
    with pytest.raises(UserError, match=r"unknown field '(embed|sheme)'"):
        TransformerConfig.from_json(fields)
