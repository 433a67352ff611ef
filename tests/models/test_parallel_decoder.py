from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import AXIS_NAMES, UserError
from t5x_ext.models import (
    EncoderDecoder,
    ParallelConfig,
    ParallelDecoder,
    config_from_json,
    logical_axes,
    model_from_json,
    model_of,
    model_to_json,
)
from t5x_ext.models.parallel_decoder import uniform_copy

CONFIG = ParallelConfig(
    vocab_size=23, embed_dim=8, mlp_dim=12, num_heads=2, encoder_layers=1, decoder_layers=1, dropout=0.0,
    max_target_length=9,
)  # fmt: skip


@pytest.fixture
def new(random_params):
    """A model with random parameters, its config's fields replaced."""

    def make(**changes):
        model = ParallelDecoder(dataclasses.replace(CONFIG, **changes))
        return model, {"params": random_params(model)}

    return make


def alone(batch, row, source, target):
    """One example of a packed batch in a row of its own, from its slices of both sides."""
    cut = {name: batch[name][row : row + 1, source if name[0] == "s" else target] for name in batch}
    return {name: np.minimum(value, 1) if name.endswith("ids") else value for name, value in cut.items()}


def test_parameters_are_those_of_an_encoder_decoder_and_a_length_head(small_config):
    tree = lambda model: jax.tree.map(lambda leaf: leaf.shape, model.abstract_params())
    parallel, autoregressive = tree(ParallelDecoder(CONFIG)), tree(EncoderDecoder(small_config()))
    assert parallel.pop("length") == {"kernel": (8, 9)}
    assert parallel == autoregressive
    with_auxiliary = tree(ParallelDecoder(dataclasses.replace(CONFIG, auxiliary_layers=2)))
    assert with_auxiliary["auxiliary"]["layers"]["cross_attention"]["query"]["kernel"][0] == 2
    assert "length" not in tree(ParallelDecoder(dataclasses.replace(CONFIG, upsample=2)))
    names = {name for axes in jax.tree.leaves(logical_axes(CONFIG)) for name in (axes,) if name}
    assert names <= set(AXIS_NAMES)


def test_record_gives_the_model_back():
    model = ParallelDecoder(dataclasses.replace(CONFIG, upsample=3, decoder_input="unknown", unk_id=4))
    assert model_from_json(model_to_json(model)) == model
    assert config_from_json(CONFIG.to_json()) == CONFIG
    assert isinstance(model_of(CONFIG), ParallelDecoder)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_input": "noise"},
        {"max_target_length": 1},
        {"upsample": 0},
        {"auxiliary_layers": -1},
        {"upsample": 2, "auxiliary_layers": 1},
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_values_that_are_not_allowed_are_refused(changes):
    with pytest.raises(UserError, match=f"ParallelConfig.{list(changes)[-1]}"):
        dataclasses.replace(CONFIG, **changes)


def test_earlier_positions_see_later_ones(new, packed_batch):
    model, variables = new()
    batch = packed_batch()
    encoded = model.apply(
        variables, batch["source_tokens"], batch["source_segment_ids"], batch["source_positions"], method="encode"
    )
    inputs = model.apply(variables, batch, method="decoder_inputs")
    decode = lambda inputs: model.apply(variables, encoded, batch, inputs, method="decode")
    # One channel: the norms take away what is added to all of them.
    moved = np.abs(decode(inputs.at[0, 1, 0].add(1.0)) - decode(inputs)).max(-1)
    # Row 0 holds examples at positions 0-1 and 2-4.
    assert np.all(moved[0, :2] > 1e-3)
    assert np.all(moved[0, 2:5] == 0)
    assert np.all(moved[1] == 0)


@pytest.mark.parametrize("changes", [{}, {"decoder_input": "unknown"}, {"upsample": 2}])
def test_packed_examples_are_as_if_alone(new, packed_batch, changes):
    model, variables = new(**changes)
    batch = packed_batch()
    packed = model.apply(variables, batch)
    times = 2 if "upsample" in changes else None
    for row, source, target in (
        (0, slice(0, 3), slice(0, 2)),
        (0, slice(3, 5), slice(2, 5)),
        (1, slice(0, 4), slice(0, 5)),
    ):
        own = model.apply(variables, alone(batch, row, source, target))
        there = slice(source.start * times, source.stop * times) if times else target
        np.testing.assert_allclose(packed[row : row + 1, there], own, rtol=1e-4, atol=1e-5)


def test_length_is_never_0_and_depends_on_the_example_alone(new, packed_batch):
    model, variables = new()
    batch = packed_batch()

    def log_probs(batch):
        arrays = [jnp.asarray(batch[f"source_{name}"]) for name in ("tokens", "segment_ids", "positions")]
        encoded = model.apply(variables, *arrays, method="encode")
        return jax.nn.log_softmax(model.apply(variables, encoded, arrays[1], method="length_logits"))

    packed = log_probs(batch)
    assert packed.shape == (2, 6, 9)
    assert np.all(np.exp(packed[0, :5, 0]) == 0)
    own = log_probs(alone(batch, 0, slice(3, 5), slice(2, 5)))
    np.testing.assert_allclose(packed[0, 3:5, 1:], own[0, :, 1:], rtol=1e-5, atol=1e-5)


def test_uniform_copy_of_equal_lengths_is_the_identity_and_keeps_the_ends():
    for source, target in [(1, 1), (7, 7), (5, 9), (9, 5), (1, 4), (300, 300), (300, 299), (2, 300)]:
        ids = lambda length: np.ones((1, length), np.int32)
        index = np.asarray(uniform_copy(*map(jnp.asarray, (ids(source), ids(target), np.arange(target)[None]))))[0]
        assert index[0] == 0
        assert np.all(np.diff(index) >= 0)
        if target > 1:
            assert index[-1] == source - 1
        if source == target:
            assert np.array_equal(index, np.arange(source))


def test_upsampled_positions_follow_the_source(new, packed_batch):
    model, variables = new(upsample=2)
    ids, positions = model.apply(variables, packed_batch(), method="target_layout")
    assert ids[0].tolist() == [1] * 6 + [2] * 4 + [0] * 2
    assert positions[0].tolist()[:10] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


def test_operations_of_a_full_decoder_exceed_those_of_a_causal_one(small_config):
    causal = small_config().flops([5], [7])
    full = dataclasses.replace(CONFIG, max_target_length=2).flops([5], [7])
    assert full - causal == 2 * 7 * 6 * 8 + 2 * 8 * 2  # the later pairs, and the length head
