"""Placement says where arrays lie; it must never change a value."""

from __future__ import annotations

import dataclasses
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5x_ext.models import EncoderDecoder, TransformerConfig, init_params, logical_axes
from t5x_ext.parallel import (
    AxisRules,
    MeshConfig,
    MeshPlacement,
    data_parallel,
    fsdp,
    fsdp_tensor,
    make_mesh,
    tree_shardings,
)
from t5x_ext.parallel.batches import batch_sharding

CASES = {
    "data_parallel": (MeshConfig(data=8), data_parallel(), 8),
    "rows_that_do_not_divide": (MeshConfig(data=1, fsdp=8), fsdp(), 6),
    "data_and_fsdp": (MeshConfig(data=2, fsdp=4), fsdp(), 8),
    "slices_fsdp_and_tensor": (MeshConfig(slices=2, data=1, fsdp=2, tensor=2), fsdp_tensor(), 8),
}
"""Mesh, rules, rows of the batch."""

# Neither 8 nor 4 divide 36 pieces, 2 does; 6 heads are cut in two.
CONFIG = TransformerConfig(
    vocab_size=36, embed_dim=48, mlp_dim=32, num_heads=6, encoder_layers=1, decoder_layers=1, dropout=0.0,
    scan_layers=True,
)  # fmt: skip


def batch(rows):
    random = np.random.default_rng(0)
    length = {"source": 6, "target": 5}
    names = ("source_tokens", "target_inputs", "target_labels")
    arrays = {name: random.integers(1, 36, (rows, length[name.split("_")[0]])).astype(np.int32) for name in names}
    for side, count in length.items():
        arrays[f"{side}_segment_ids"] = np.repeat([[1] * 3 + [2] * (count - 3)], rows, axis=0).astype(np.int32)
        arrays[f"{side}_positions"] = np.repeat([[0, 1, 2, *range(count - 3)]], rows, axis=0).astype(np.int32)
    return arrays


def loss(model, params, batch):
    scores = model.apply({"params": params}, batch)
    return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(scores), batch["target_labels"][..., None], -1))


@cache
def params():
    return init_params(CONFIG, jax.random.key(0))


@cache
def on_one_device(rows):
    """Loss and gradient of a model that is not placed; most cases have the same rows."""
    return jax.jit(jax.value_and_grad(partial(loss, EncoderDecoder(CONFIG))))(params(), batch(rows))


@pytest.mark.devices(8)
@pytest.mark.parametrize("case", CASES)
def test_a_placed_model_has_the_same_loss_and_gradient(case):
    """Float32 sums in another order: 1e-5 of the largest gradient."""
    config, rules, rows = CASES[case]
    mesh = make_mesh(config)
    plain = on_one_device(rows)
    placed_params = jax.device_put(params(), tree_shardings(mesh, rules, logical_axes(CONFIG), params()))
    rows_cut = NamedSharding(mesh, PartitionSpec()) if rows == 6 else batch_sharding(mesh)
    model = EncoderDecoder(CONFIG, placement=MeshPlacement(mesh, rules))
    placed = jax.jit(jax.value_and_grad(partial(loss, model)))(placed_params, jax.device_put(batch(rows), rows_cut))
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(plain[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), plain, placed)


@pytest.mark.devices(8)
def test_hessian_products_on_an_fsdp_mesh_are_those_of_one_device():
    """Forward over reverse, also against the central difference of gradients, which relu would make jump."""
    config = dataclasses.replace(CONFIG, activation="gelu")
    mesh, rules = make_mesh(MeshConfig(data=2, fsdp=4)), fsdp()
    start, along = (init_params(config, jax.random.key(seed)) for seed in (0, 1))
    shardings = tree_shardings(mesh, rules, logical_axes(config), start)

    def product(model, params, along, batch):
        gradient = jax.grad(lambda params: loss(model, params, batch))
        return jax.jvp(gradient, (params,), (along,))[1]

    plain = jax.jit(partial(product, EncoderDecoder(config)))(start, along, batch(8))
    placed_params, placed_along = (jax.device_put(tree, shardings) for tree in (start, along))
    model = EncoderDecoder(config, placement=MeshPlacement(mesh, rules))
    rows = jax.device_put(batch(8), batch_sharding(mesh))
    placed = jax.jit(partial(product, model))(placed_params, placed_along, rows)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * largest), placed, plain)

    gradient = jax.jit(jax.grad(partial(loss, model)))
    moved = lambda step: jax.tree.map(lambda a, b: a + step * b, placed_params, placed_along)
    above, below = gradient(moved(1e-3), rows), gradient(moved(-1e-3), rows)
    difference = jax.tree.map(lambda a, b: (a - b) / 2e-3, above, below)
    norm = lambda tree: float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))))
    assert norm(jax.tree.map(jnp.subtract, difference, placed)) < 0.02 * norm(placed)


@pytest.mark.devices(8)
def test_a_lookup_moves_vectors_and_not_the_table():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    placement = MeshPlacement(mesh, fsdp())
    table = jax.device_put(np.random.default_rng(0).normal(size=(512, 8)).astype(np.float32), kept(mesh))
    tokens = jax.device_put(np.random.default_rng(1).integers(0, 512, (16, 3)).astype(np.int32), batch_sharding(mesh))

    def vectors(table, tokens):
        x = placement.lookup(table, tokens, jnp.bfloat16)
        return placement.activation(x, ("batch", "length", "embed"))

    compiled = jax.jit(vectors).lower(table, tokens).compile()
    np.testing.assert_array_equal(compiled(table, tokens), jnp.take(table, tokens, axis=0).astype(jnp.bfloat16))
    assert compiled.output_shardings.is_equivalent_to(batch_sharding(mesh), 3)
    moved = re.findall(r"\w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all)\(", compiled.as_text())
    assert moved
    assert not any(dims.startswith("512") for dims in moved)


@pytest.mark.devices(8)
def test_equal_tokens_add_their_gradients_in_the_table_s_dtype():
    """A thousand ones: a bfloat16 sum would stop at 256."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    placement = MeshPlacement(mesh, fsdp())
    table, tokens = jax.device_put(np.zeros((4, 8), np.float32), kept(mesh)), np.zeros((8, 125), np.int32)
    gradient = jax.jit(jax.grad(lambda t: placement.lookup(t, tokens, jnp.bfloat16).astype(jnp.float32).sum()))(table)
    np.testing.assert_array_equal(gradient, np.float32([[1000] * 8] + [[0] * 8] * 3))


@pytest.mark.devices(8)
def test_a_weight_is_gathered_in_the_dtype_of_its_use_and_its_gradient_scattered():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    placement = MeshPlacement(mesh, fsdp())
    weight = jax.device_put(np.ones((16, 4), np.float32), NamedSharding(mesh, PartitionSpec("fsdp")))
    x = jax.device_put(np.ones((8, 16), np.float32), batch_sharding(mesh))

    def gradient(weight, x):
        used = lambda w: placement.weight(w.astype(jnp.bfloat16), ("embed", "mlp"))
        return jax.grad(lambda w: jnp.sum(x.astype(jnp.bfloat16) @ used(w)).astype(jnp.float32))(weight)

    compiled = jax.jit(gradient).lower(weight, x).compile()
    np.testing.assert_array_equal(compiled(weight, x), np.full((16, 4), 8.0))
    assert compiled.output_shardings.is_equivalent_to(weight.sharding, 2)


@pytest.mark.devices(8)
def test_rules_that_cut_nothing_leave_weights_alone():
    mesh = make_mesh(MeshConfig(data=8))
    weight = jnp.ones((16, 4))
    assert MeshPlacement(mesh, AxisRules()).weight(weight, ("embed", "mlp")) is weight


def kept(mesh):
    return NamedSharding(mesh, PartitionSpec(None, "fsdp"))
