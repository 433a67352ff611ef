"""What holds for every optimizer of `table.py`, ours and Optax's."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import (
    AXES,
    MATRIX,
    ROWS,
    VALLEYS,
    begin,
    make_update,
    minimize,
    network_params,
    quadratic,
    rosenbrock,
    rows_of_data,
    step,
)
from table import run as run_steps

from t5x_ext.checkpoints import CheckpointStore
from t5x_ext.parallel import MeshConfig, fsdp_tensor, make_mesh, state_shardings, tree_shardings

each_row = pytest.mark.parametrize("row", ROWS, ids=str)


def close(result, expected, tolerance):
    """Differences are measured in units of the largest entry of an array."""
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0)


def same(result, expected):
    """Bit for bit; random keys by their data."""
    data = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(data(a), data(b)), result, expected)


@cache
def compiled(row):
    """The optimizer and the update of parameters, compiled."""
    optimizer = row.make(row.learning_rate, AXES)
    return optimizer, jax.jit(make_update(row, optimizer))


@cache
def trained(row):
    """Parameters and state after the steps of the table, compiled, on one device."""
    optimizer, update = compiled(row)
    params = network_params()
    return run_steps(update, params, begin(optimizer, params))


@each_row
def test_a_quadratic_is_minimised(row):
    losses = minimize(row, *row.quadratic, quadratic, MATRIX)
    assert losses[-1] < 1e-3 * losses[0]


@each_row
def test_rosenbrocks_valley_is_followed(row):
    losses = minimize(row, *row.rosenbrock, rosenbrock, VALLEYS)
    assert losses[-1] < 2e-3 * losses[0]


@each_row
def test_compiled_updates_are_the_eager_ones(row):
    params = network_params()
    optimizer, update = compiled(row)
    result = step(update, params, begin(optimizer, params), rows_of_data(0))
    expected = step(make_update(row, optimizer), params, optimizer.init(params), rows_of_data(0))
    close(result[0], expected[0], row.tolerance)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    types = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    assert types(result[1]) == types(expected[1]) == types(jax.eval_shape(optimizer.init, params))


@each_row
def test_microbatches_are_one_large_batch_and_the_learning_rate_may_be_injected(row):
    make = optax.inject_hyperparams(lambda learning_rate: row.make(learning_rate, AXES))
    optimizer = make(learning_rate=row.learning_rate)
    update, params = jax.jit(make_update(row, optimizer)), network_params()
    moved, state = run_steps(update, params, begin(optimizer, params), microbatches=2)
    close(moved, trained(row)[0], row.tolerance)
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    stopped, _ = run_steps(update, moved, state, microbatches=2)
    same(stopped, moved)


@each_row
def test_training_goes_on_from_a_checkpoint_bit_for_bit(row, tmp_path):
    optimizer, update = compiled(row)
    params = network_params()
    halfway = run_steps(update, params, begin(optimizer, params), stop=2)
    template = jax.eval_shape(lambda params: (params, optimizer.init(params)), params)
    with CheckpointStore(tmp_path) as store:
        store.save(2, dict(zip(("params", "state"), halfway, strict=True)))
        restored, _ = store.restore(dict(zip(("params", "state"), template, strict=True)))
    same(run_steps(update, restored["params"], restored["state"], start=2), trained(row))


@each_row
def test_parameters_in_bfloat16_keep_a_state_in_float32(row):
    optimizer, update = compiled(row)
    params = network_params(jnp.bfloat16)
    state = begin(optimizer, params)
    moved, after = run_steps(update, params, state)
    types = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert types(moved) == types(params)
    if row.own:
        assert types(after) == types(state) == types(trained(row)[1])
    expected = trained(row)[0]
    if row.name == "gradual_pruning":
        # Rounding may put an entry on the other side of a threshold: few, and what both keep is as close as ever.
        kept = jax.tree.map(lambda a, b: (np.asarray(a) != 0) == (np.asarray(b) != 0), moved, expected)
        assert np.mean(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(kept)])) > 0.98
        moved, expected = (jax.tree.map(lambda a, same: np.where(same, a, 0), tree, kept) for tree in (moved, expected))
    close(moved, expected, 0.05)


@each_row
def test_states_keep_their_types_where_64_bits_are_on(row):
    if not row.own:
        pytest.skip("Optax's own")
    optimizer, _ = compiled(row)
    shaped = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    params, pieces = shaped(network_params()), [shaped(rows_of_data(0))]
    with jax.enable_x64(True):
        state = jax.eval_shape(optimizer.init, params)
        after = jax.eval_shape(make_update(row, optimizer), params, state, pieces, [params])
    types = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert types(after) == types((params, state))
    assert np.float64 not in types(after)


@each_row
def test_zero_gradients_move_nothing_from_the_start(row):
    if not row.own:
        pytest.skip("Optax's own: its sam divides by the norm")
    optimizer, update = compiled(row)
    params = jax.tree.map(jnp.zeros_like, network_params())
    zero = rows_of_data(0)._replace(targets=jnp.zeros((8, 8), jnp.float32))
    moved, state = step(update, params, begin(optimizer, params), zero)
    same(moved, params)
    moved, state = run_steps(update, moved, state, stop=2)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(moved))


@each_row
def test_an_update_that_is_not_finite_can_be_left_out(row):
    """As the training step does it: the state of before is kept, and goes on as if nothing had been."""
    optimizer, update = compiled(row)
    params = network_params()
    before = run_steps(update, params, begin(optimizer, params), stop=2)
    bad = rows_of_data(9)._replace(targets=jnp.full((8, 8), jnp.nan, jnp.float32))
    after = step(update, *before, bad)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after[0]))
    same(run_steps(update, *before, start=2), trained(row))


@pytest.mark.devices(8)
@each_row
def test_eight_devices_are_one_and_shardings_stay(row):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer, _ = compiled(row)
    params = network_params()
    shardings = tree_shardings(mesh, fsdp_tensor(), AXES, params)
    state = jax.eval_shape(optimizer.init, params)
    of_state = state_shardings(mesh, state, params, shardings)
    params = jax.device_put(params, shardings)
    update = jax.jit(make_update(row, optimizer), out_shardings=(shardings, of_state))  # as training does it
    state = jax.jit(optimizer.init, out_shardings=of_state)(params)
    result = run_steps(update, params, state)
    close(result[0], trained(row)[0], row.tolerance)
    for leaf, expected in zip(jax.tree.leaves(result), jax.tree.leaves((shardings, of_state)), strict=True):
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
    # What comes out goes in again as it is; only a random key that is handed through has its layout written otherwise.
    has_key = any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state))
    assert update._cache_size() == 1 + has_key
