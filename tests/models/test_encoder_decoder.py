from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from t5x_ext.contracts import AXIS_NAMES, Decodable
from t5x_ext.models import EncoderDecoder, KeyValue, LayerSharing, Vega4B7, init_params, logical_axes

VARIANTS = {
    "pre-norm, tied": {},
    "post-norm, partly tied": {"norm_placement": "post", "final_norm": False, "tied_embeddings": "decoder"},
    "rmsnorm, no biases, untied": {"norm": "rmsnorm", "use_bias": False, "tied_embeddings": "none", "num_heads": 1},
    "bias-free layernorm, shared": {
        "use_bias": False,
        "scale_embedding": False,
        "encoder_layers": 3,
        "encoder_sharing": LayerSharing("sandwich"),
        "decoder_layers": 2,
        "decoder_sharing": LayerSharing("universal"),
    },
}


class Reference:
    """One unpacked pair through the model in float64 numpy, written from the paper and without the library's code."""

    def __init__(self, config, params):
        self.config = config
        self.params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def logits(self, source, target):
        params, config = self.params, self.config
        tables = {
            "all": ["embedding"] * 3,
            "decoder": ["source_embedding", "target_embedding", "target_embedding"],
            "none": ["source_embedding", "target_embedding", "output_embedding"],
        }[config.tied_embeddings]
        encoded = self.encode(tables[0], source)
        x = self.embed(tables[1], target)
        for index in config.decoder_sharing.layer_map(config.decoder_layers):
            layer = jax.tree.map(lambda a, i=index: a[i], params["decoder"]["layers"])
            x = self.sublayer(x, layer, "self_attention", lambda y, p: self.attention(y, y, p, True))
            x = self.sublayer(x, layer, "cross_attention", lambda y, p: self.attention(y, encoded, p, False))
            x = self.sublayer(x, layer, "feed_forward", self.feed_forward)
        return self.final_norm("decoder", x) @ params[tables[2]]["table"].T

    def encode(self, table, source):
        config = self.config
        encoded = self.embed(table, source)
        for index in config.encoder_sharing.layer_map(config.encoder_layers):
            layer = jax.tree.map(lambda a, i=index: a[i], self.params["encoder"]["layers"])
            encoded = self.sublayer(encoded, layer, "self_attention", lambda y, p: self.attention(y, y, p, False))
            encoded = self.sublayer(encoded, layer, "feed_forward", self.feed_forward)
        return self.final_norm("encoder", encoded)

    def embed(self, table, tokens):
        d = self.config.embed_dim
        x = self.params[table]["table"][tokens] * (np.sqrt(d) if self.config.scale_embedding else 1)
        for position in range(len(tokens)):
            for i in range(d // 2):
                angle = position / 10000 ** (i / (d // 2 - 1))
                x[position, i] += np.sin(angle)
                x[position, d // 2 + i] += np.cos(angle)
        return x

    def sublayer(self, x, layer, name, function):
        norm = layer[f"{name}_residual"]["norm"]
        if self.config.norm_placement == "pre":
            return x + function(self.norm(x, norm), layer[name])
        return self.norm(x + function(x, layer[name]), norm)

    def final_norm(self, side, x):
        return self.norm(x, self.params[side]["final_norm"]) if self.config.final_norm else x

    def norm(self, x, params):
        if self.config.norm == "layernorm":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + self.config.norm_epsilon)
        else:
            x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.config.norm_epsilon)
        return x * params["scale"] + params.get("bias", 0)

    def feed_forward(self, x, params):
        inner = np.maximum(x @ params["up"]["kernel"] + params["up"].get("bias", 0), 0)
        return inner @ params["down"]["kernel"] + params["down"].get("bias", 0)

    def attention(self, x, memory, params, causal):
        total = np.zeros_like(x) + params["out"].get("bias", 0)
        for head in range(self.config.num_heads):
            query, key, value = (
                y @ params[name]["kernel"][:, head] + params[name].get("bias", np.zeros((99, 1)))[head]
                for name, y in (("query", x), ("key", memory), ("value", memory))
            )
            for position in range(len(x)):
                visible = position + 1 if causal else len(memory)
                scores = np.exp(key[:visible] @ query[position] / np.sqrt(self.config.head_dim))
                total[position] += (scores / scores.sum()) @ value[:visible] @ params["out"]["kernel"][head]
        return total


def examples(batch):
    """(row, source slice, target slice) of each packed example."""
    for row, ids in enumerate(batch["target_segment_ids"]):
        for segment in range(1, ids.max() + 1):
            (source,) = np.nonzero(batch["source_segment_ids"][row] == segment)
            (target,) = np.nonzero(ids == segment)
            yield row, source, target


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_rows_give_the_logits_of_the_float64_reference(small_config, random_params, packed_batch, variant, scan):
    config = small_config(**VARIANTS[variant], scan_layers=scan)
    params, batch = random_params(config), packed_batch()
    logits = np.asarray(EncoderDecoder(config).apply({"params": params}, batch))
    assert logits.dtype == np.float32
    reference, seen = Reference(config, params), 0
    for row, source, target in examples(batch):
        expected = reference.logits(batch["source_tokens"][row, source], batch["target_inputs"][row, target])
        np.testing.assert_allclose(logits[row, target], expected, rtol=2e-5, atol=2e-5)
        seen += 1
    assert seen == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_and_initial_parameters_stay_those_of_the_first_release(
    small_config, random_params, packed_batch, golden, variant
):
    """Checkpoints and runs from then go on: same parameters from a key, same scores from parameters."""
    config = small_config(**VARIANTS[variant])
    golden(config, variant, EncoderDecoder(config).apply({"params": random_params(config)}, packed_batch()))


def test_it_is_decodable(small_config):
    assert isinstance(EncoderDecoder(small_config()), Decodable)


def test_packed_equals_unpacked(small_config, random_params, packed_batch):
    config = small_config(encoder_layers=2, decoder_layers=2)
    model, params, packed = EncoderDecoder(config), random_params(config), packed_batch()
    alone = {name: np.zeros((3, values.shape[1]), np.int32) for name, values in packed.items()}
    for one, (row, source, target) in enumerate(examples(packed)):
        for name, values in packed.items():
            cells = source if name.startswith("source") else target
            alone[name][one, : len(cells)] = 1 if name.endswith("segment_ids") else values[row, cells]
    logits, unpacked = (model.apply({"params": params}, batch) for batch in (packed, alone))
    for one, (row, _, target) in enumerate(examples(packed)):
        np.testing.assert_allclose(unpacked[one, : len(target)], logits[row, target], rtol=2e-5, atol=2e-5)


def test_padding_other_examples_and_the_future_change_nothing(small_config, random_params, packed_batch):
    config = small_config()
    model, params, batch = EncoderDecoder(config), random_params(config), packed_batch()
    logits = np.asarray(model.apply({"params": params}, batch))
    changed = {name: values.copy() for name, values in batch.items()}
    changed["source_tokens"][batch["source_segment_ids"] != 1] = 3
    changed["target_inputs"][batch["target_segment_ids"] != 1] = 3
    changed["target_inputs"][:, 1] = 4
    after = np.asarray(model.apply({"params": params}, changed))
    np.testing.assert_array_equal(after[:, 0], logits[:, 0])
    assert not np.allclose(after[:, 1], logits[:, 1])


def teacher_forced_and_cached(config, params, batch, cache_of=lambda cache: cache):
    """Logits of the whole target at once and step by step, one example a row."""
    model = EncoderDecoder(config)
    run = lambda *args, method: model.apply({"params": params}, *args, method=method)
    full = model.apply({"params": params}, batch)
    encoded = run(batch["source_tokens"], batch["source_segment_ids"], batch["source_positions"], method="encode")
    rows, length = batch["target_inputs"].shape
    memory, cache = run(encoded, method="cross_memory"), run(rows, length, method="empty_cache")
    step = jax.jit(lambda *args: run(*args, method="decode_step"))
    steps = []
    for position in range(length):
        tokens = batch["target_inputs"][:, position]
        logits, cache = step(tokens, jnp.array(position), cache_of(cache), memory, batch["source_segment_ids"] > 0)
        steps.append(logits)
    return np.asarray(full), np.stack(steps, axis=1), cache, memory


SHARED = {
    "encoder_layers": 2,
    "encoder_sharing": LayerSharing("universal"),
    "decoder_layers": 4,
    "decoder_sharing": LayerSharing("cycle_rev", 2),
}


@pytest.mark.parametrize("changes", [{}, SHARED, {**SHARED, "scan_layers": True, "norm_placement": "post"}])
def test_cached_decoding_is_full_recomputation(small_config, random_params, packed_batch, changes):
    config = small_config(**changes)
    batch = packed_batch(source=((6,), (4,)), target=((7,), (7,)))
    full, stepwise, cache, memory = teacher_forced_and_cached(config, random_params(config), batch)
    np.testing.assert_allclose(stepwise, full, rtol=2e-5, atol=2e-5)
    layers = config.decoder_layers
    assert {leaf.shape for leaf in jax.tree.leaves(cache)} == {(layers, 2, 7, 2, 4)}
    assert {leaf.shape for leaf in jax.tree.leaves(memory)} == {(layers, 2, 6, 2, 4)}


def test_caches_belong_to_positions_and_not_to_sets(small_config, random_params, packed_batch):
    config = small_config(**SHARED)
    batch = packed_batch(source=((6,), (4,)), target=((7,), (7,)))
    params, layer_map = random_params(config), np.array([0, 1, 1, 0])
    assert config.decoder_sharing.layer_map(4) == tuple(layer_map)

    def one_slot_per_set(cache):
        last_user = np.array([3, 2, 2, 3])
        return KeyValue(*(leaf[last_user] for leaf in cache))

    full, stepwise, _, memory = teacher_forced_and_cached(config, params, batch, one_slot_per_set)
    # Five hundred times the tolerance of the test above.
    assert np.abs(stepwise - full).max() > 0.01
    # Cross-attention reads the encoder alone, so there positions of one set do agree.
    np.testing.assert_array_equal(memory.key[0], memory.key[3])


def test_decode_step_reads_no_future_cache(small_config, random_params):
    config = small_config()
    model, params = EncoderDecoder(config), random_params(config)
    run = lambda *args, method: model.apply({"params": params}, *args, method=method)
    cache = run(2, 5, method="empty_cache")
    memory = KeyValue(*jnp.ones((2, 1, 2, 3, 2, 4)))
    dirty = jax.tree.map(lambda leaf: leaf.at[:, :, 3:].set(9.0), cache)
    arguments = jnp.array([3, 4]), jnp.array(2)
    mask = jnp.ones((2, 3), bool)
    clean_logits, _ = run(*arguments, cache, memory, mask, method="decode_step")
    dirty_logits, after = run(*arguments, dirty, memory, mask, method="decode_step")
    np.testing.assert_array_equal(clean_logits, dirty_logits)
    np.testing.assert_array_equal(after.key[:, :, 3:], 9.0)


@pytest.mark.parametrize("scheme", ["sequence", "cycle", "cycle_rev"])
def test_as_many_sets_as_layers_is_bitwise_the_ordinary_model(small_config, random_params, packed_batch, scheme):
    ordinary = small_config(encoder_layers=2, decoder_layers=2)
    shared = dataclasses.replace(
        ordinary, encoder_sharing=LayerSharing(scheme, 2), decoder_sharing=LayerSharing(scheme, 2)
    )
    params, batch = random_params(ordinary), packed_batch()
    np.testing.assert_array_equal(
        EncoderDecoder(shared).apply({"params": params}, batch),
        EncoderDecoder(ordinary).apply({"params": params}, batch),
    )


def test_bfloat16_compute_is_close_and_keeps_float32_where_it_matters(small_config, packed_batch):
    config = small_config(embed_dim=16, compute_dtype="bfloat16")
    params, batch = init_params(config, jax.random.key(0)), packed_batch()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    @functools.partial(jax.jit, static_argnums=0)
    def logits(config, params):
        return EncoderDecoder(config).apply({"params": params}, batch)

    low, full = logits(config, params), logits(dataclasses.replace(config, compute_dtype="float32"), params)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, full, atol=0.03 * np.abs(full).max())
    assert EncoderDecoder(config).apply({"params": params}, 1, 2, method="empty_cache").key.dtype == jnp.bfloat16
    grads = jax.grad(lambda p: logits(config, p).sum())(params)
    assert all(leaf.dtype == jnp.float32 and bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_bfloat16_products_are_bfloat16_in_the_backward_pass_too(small_config, packed_batch):
    config = small_config(compute_dtype="bfloat16", num_heads=1)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    loss = lambda p: jnp.square(EncoderDecoder(config).apply({"params": p}, packed_batch())).sum()
    operands = {
        operand.aval.dtype
        for equation in equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
        if equation.primitive.name == "dot_general"
        for operand in equation.invars
    }
    assert operands == {jnp.dtype("bfloat16")}


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_dropout_needs_both_the_switch_and_the_rng(small_config, random_params, packed_batch):
    config = small_config(dropout=0.5)
    model, params, batch = EncoderDecoder(config), random_params(config), packed_batch()
    rngs = {"dropout": jax.random.key(0)}
    plain = model.apply({"params": params}, batch)
    np.testing.assert_array_equal(model.apply({"params": params}, batch, rngs=rngs), plain)
    np.testing.assert_array_equal(model.apply({"params": params}, batch, False), plain)
    dropped = model.apply({"params": params}, batch, False, rngs=rngs)
    assert not np.allclose(dropped, plain)
    np.testing.assert_array_equal(model.apply({"params": params}, batch, False, rngs=rngs), dropped)


def test_activation_and_positions_can_be_others(small_config, random_params, packed_batch):
    config = small_config()
    params, batch = random_params(config), packed_batch()
    plain = EncoderDecoder(config).apply({"params": params}, batch)
    gelu = EncoderDecoder(dataclasses.replace(config, activation="gelu")).apply({"params": params}, batch)
    assert not np.allclose(gelu, plain)
    nowhere = EncoderDecoder(config, positions=lambda positions, d: jnp.zeros((*positions.shape, d)))
    shifted = {**batch, "source_positions": batch["source_positions"] + 3}
    np.testing.assert_array_equal(nowhere.apply({"params": params}, batch), nowhere.apply({"params": params}, shifted))
    assert not np.allclose(EncoderDecoder(config).apply({"params": params}, shifted), plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logical_axes_name_every_axis(small_config, variant):
    config = small_config(**VARIANTS[variant])
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    axes = logical_axes(config)
    sizes = {"embed": 8, "mlp": 12, "heads": config.num_heads, "head_dim": config.head_dim, "vocab": 23}

    def check(path, leaf, names):
        assert len(names) == len(leaf.shape)
        assert set(names) <= set(AXIS_NAMES)
        side = config.encoder_sharing if path[0].key == "encoder" else config.decoder_sharing
        layers = config.encoder_layers if path[0].key == "encoder" else config.decoder_layers
        expected = {**sizes, "layers": side.num_sets(layers)}
        assert leaf.shape == tuple(expected[name] for name in names)
        assert (names[0] == "layers") == (path[1].key == "layers")

    jax.tree_util.tree_map_with_path(check, shapes, axes)


def test_large_models_have_axes_and_shapes_without_memory():
    axes = logical_axes(Vega4B7())
    assert axes["decoder"]["layers"]["feed_forward"]["up"]["kernel"] == ("layers", "embed", "mlp")
    assert axes["embedding"]["table"] == ("vocab", "embed")


def test_initial_parameters(small_config):
    config = small_config(
        vocab_size=4000, embed_dim=64, mlp_dim=128, encoder_layers=2, encoder_sharing=LayerSharing("cycle", 2)
    )
    params = init_params(config, jax.random.key(0))
    assert params["embedding"]["table"].std() == pytest.approx(64**-0.5, rel=0.01)
    layers = params["encoder"]["layers"]
    limits = {
        "query": (layers["self_attention"]["query"]["kernel"], np.sqrt(0.5 * 6 / 128)),
        "out": (layers["self_attention"]["out"]["kernel"], np.sqrt(6 / 128)),
        "up": (layers["feed_forward"]["up"]["kernel"], np.sqrt(6 / 192)),
        "down": (layers["feed_forward"]["down"]["kernel"], np.sqrt(6 / 192)),
    }
    for kernel, limit in limits.values():
        assert 0.98 * limit < np.abs(kernel).max() <= limit
        assert not np.allclose(kernel[0], kernel[1])
    biases = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "bias"]
    scales = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "scale"]
    assert all((leaf == 0).all() for leaf in biases)
    assert all((leaf == 1).all() for leaf in scales)
