"""Adafactor: Optax's where Optax sees the same matrices, Flora without compression, layers apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.optim import adafactor, flora

SHAPES = {"matrix": (6, 10), "wide": (3, 10), "vector": (10,), "scalar": ()}


def draw(seed, shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {name: jax.random.normal(key, shape, dtype) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def weights_after(optimizer, shapes, updates=4):
    """Weights after some updates, each with gradients of another scale."""
    params = draw(0, shapes)
    state = optimizer.init(params)
    for number in range(updates):
        grads = jax.tree.map(lambda leaf, number=number: leaf * 10.0**number, draw(number + 1, shapes))
        step, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, step)
    return params


def close(result, expected, rtol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), result, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"multiply_by_parameter_scale": False, "clipping_threshold": None},
        {"clipping_threshold": 0.3, "decay_rate": 0.6, "eps": 1e-3},
    ],
    ids=str,
)
def test_on_vectors_and_matrices_it_is_that_of_optax(settings):
    schedule = optax.linear_schedule(0.1, 0.3, 4)
    ours = weights_after(adafactor(schedule, min_dim_size_to_factor=6, **settings), SHAPES)
    close(ours, weights_after(optax.adafactor(schedule, min_dim_size_to_factor=6, **settings), SHAPES))


def test_with_momentum_it_is_flora_where_nothing_can_be_compressed():
    shared = {"mu_dtype": jnp.bfloat16, "weight_decay": 0.1, "no_decay": ["vector"], "clipping_threshold": 0.5}
    ours = adafactor(0.1, 0.8, min_dim_size_to_factor=6, **shared)
    theirs = flora(0.1, b1=0.8, min_dim_size_to_compress=6, compressible=lambda name: False, **shared)
    close(weights_after(ours, SHAPES), weights_after(theirs, SHAPES), rtol=0)


def test_momentum_is_an_average_in_float32_whatever_it_is_stored_in():
    gradient = {"w": jnp.full((4,), 2.0, jnp.bfloat16)}
    optimizer = adafactor(1.0, 0.75, mu_dtype=jnp.bfloat16, clipping_threshold=None, multiply_by_parameter_scale=False)
    state = optimizer.init(gradient)
    for expected in (0.25, 0.4375, 0.578125):  # 1 - 0.75^t, each a bfloat16
        step, state = optimizer.update(gradient, state, gradient)
        np.testing.assert_array_equal(step["w"], np.full(4, -expected))
        assert step["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("b1", [None, 0.9])
def test_layers_of_a_stack_are_as_parameters_of_their_own(b1):
    axes = {"in": ("layers", "embed", "heads", "head_dim"), "out": ("layers", "heads", "head_dim", "embed")}
    shapes = {"in": (3, 6, 2, 4), "out": (3, 2, 4, 6)}
    matrices = {"in": (6, 8), "out": (8, 6)}
    grow = lambda i, leaf: leaf * 3.0**i  # layers of unlike sizes, whose clipping and scale differ
    params, grads = (
        jax.tree.map(
            lambda *x: jnp.stack(x),
            *(
                {name: grow(i, leaf) for name, leaf in draw(seed + i, {n: s[1:] for n, s in shapes.items()}).items()}
                for i in range(3)
            ),
        )
        for seed in (0, 10)
    )
    optimizer = adafactor(0.1, b1, axes=axes, min_dim_size_to_factor=6)
    alone = adafactor(0.1, b1, min_dim_size_to_factor=6)
    step, _ = optimizer.update(grads, optimizer.init(params), params)
    for i in range(3):
        layer = lambda tree, i=i: {name: tree[name][i].reshape(matrices[name]) for name in matrices}
        expected, _ = alone.update(layer(grads), alone.init(layer(params)), layer(params))
        close(layer(step), expected)


def test_state_is_rows_and_columns_of_second_moments_and_whole_momentum():
    params = {"kernel": jnp.ones((256, 512)), "bias": jnp.ones(512)}
    size = lambda optimizer: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params)))
    assert size(adafactor(0.1)) == 256 + 512 + 512 + 1
    assert size(adafactor(0.1, 0.9)) == 256 + 512 + 512 + 1 + 257 * 512


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"b1": 1.0}, "adafactor: b1 = 1.0 must be at least 0 and below 1"),
        ({"learning_rate": -1}, "adafactor: learning_rate = -1 must be at least 0"),
        ({"eps": 0}, "adafactor: eps = 0 must be above 0"),
        ({"clipping_threshold": 0}, "adafactor: clipping_threshold = 0 must be above 0"),
        ({"min_dim_size_to_factor": 0}, "adafactor: min_dim_size_to_factor = 0 must be an integer of at least 1"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_one_line(settings, message):
    with pytest.raises(UserError) as error:
        adafactor(**{"learning_rate": 0.1, **settings})
    assert str(error.value) == message
