"""Parameters of layers that are stored as something other than arrays (`Stack.materialise`)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import path_name
from t5x_ext.models import EncoderDecoder, LayerSharing


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass
class Quantised:
    values: jax.Array  # int8 [sets, ...]
    scale: jax.Array  # float32, one a set


def quantise(x):
    scale = jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), keepdims=True) / 127
    return Quantised(jnp.round(x / scale).astype(jnp.int8), scale)


def dequantise(params):
    is_quantised = lambda leaf: isinstance(leaf, Quantised)
    restore = lambda leaf: leaf.values * leaf.scale if is_quantised(leaf) else leaf
    return jax.tree.map(restore, params, is_leaf=is_quantised)


@pytest.fixture
def stored(small_config, random_params):
    """Config, parameters whose layers' kernels are int8, and the same parameters as arrays."""
    config = small_config(
        encoder_layers=2,
        decoder_layers=4,
        encoder_sharing=LayerSharing("universal"),
        decoder_sharing=LayerSharing("cycle_rev", 2),
    )
    compress = lambda path, leaf: quantise(leaf) if path_name(path).endswith("kernel") else leaf
    params = random_params(config)
    for side in ("encoder", "decoder"):
        layers = jax.tree_util.tree_map_with_path(compress, params[side]["layers"])
        params[side] = {**params[side], "layers": layers}
    return config, params, dequantise(params)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("scan", [False, True])
def test_int8_leaves_give_the_scores_of_the_arrays_they_stand_for(stored, packed_batch, scan, remat):
    config, params, arrays = stored
    config = dataclasses.replace(config, scan_layers=scan, remat=remat)
    batch = packed_batch()
    got = EncoderDecoder(config, materialise=dequantise).apply({"params": params}, batch)
    expected = EncoderDecoder(config).apply({"params": arrays}, batch)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max() if scan else 0)


def test_gradients_reach_what_is_stored(stored, packed_batch):
    """Of a model whose weights are stored as their halves."""
    config, _, arrays = stored
    batch = packed_batch()
    halve = functools.partial(jax.tree.map, lambda a: a / 2)
    halves = {side: {**arrays[side], "layers": halve(arrays[side]["layers"])} for side in ("encoder", "decoder")}
    double = functools.partial(jax.tree.map, lambda a: a * 2)
    loss = lambda model, params: jnp.sum(jnp.sin(model.apply({"params": params}, batch)))
    plain = jax.grad(functools.partial(loss, EncoderDecoder(config)))(arrays)
    model = EncoderDecoder(dataclasses.replace(config, remat="full", scan_layers=True), materialise=double)
    got = jax.grad(functools.partial(loss, model))({**arrays, **halves})
    for side in ("encoder", "decoder"):
        expected = double(plain[side]["layers"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got[side]["layers"], expected)


@pytest.mark.parametrize("scan", [False, True])
def test_decoding_reads_int8_leaves(stored, packed_batch, scan):
    config, params, arrays = stored
    config = dataclasses.replace(config, scan_layers=scan)
    batch = packed_batch()
    source = [batch[f"source_{name}"] for name in ("tokens", "segment_ids", "positions")]

    def first_step(model, params):
        run = lambda *args, method: model.apply({"params": params}, *args, method=method)
        memory = run(run(*source, method="encode"), method="cross_memory")
        cache = run(2, 4, method="empty_cache")
        return run(jnp.array([1, 1]), jnp.array(0), cache, memory, jnp.asarray(source[1] > 0), method="decode_step")

    got = first_step(EncoderDecoder(config, materialise=dequantise), params)
    expected = first_step(EncoderDecoder(config), arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 if scan else 0), got, expected)


def test_initialisation_does_not_materialise(small_config, packed_batch):
    config, batch = small_config(), packed_batch()

    def refuse(params):
        raise AssertionError("fresh parameters are arrays")

    model = EncoderDecoder(config, materialise=refuse)
    jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    with pytest.raises(AssertionError, match="fresh"):
        model.apply(EncoderDecoder(config).init(jax.random.key(0), batch), batch)
