from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.models import EncoderDecoder, init_params, sinusoidal_positions
from t5x_ext.models.sublayers import ACTIVATIONS, Dropout, Norm, einsum_float32, random_bytes


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_bytes_are_uniform(impl):
    key = jax.random.key(0, impl=impl)
    values = np.asarray(random_bytes(key, (64, 1021)))
    assert values.shape == (64, 1021)
    counts = np.bincount(values.ravel(), minlength=256)
    assert counts.shape == (256,)
    expected = values.size / 256
    # Chi-squared with 255 degrees of freedom: mean 255, deviation 22.6.
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * 22.6
    # Neighbours and the four values of one word are uncorrelated: deviation 1/sqrt(n) = 0.004.
    for shift in (1, 256):
        assert abs(np.corrcoef(values[:, shift:].ravel(), values[:, :-shift].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(("rate", "actual"), [(0.1, 26 / 256), (0.5, 0.5), (0.001, 1 / 256), (0.9999, 255 / 256)])
def test_dropout_has_the_stated_rate_and_keeps_the_mean(rate, actual):
    x = jnp.ones((512, 511))
    y = np.asarray(Dropout(rate).apply({}, x, False, rngs={"dropout": jax.random.key(1)}))
    deviation = np.sqrt(actual * (1 - actual) / y.size)
    assert abs((y == 0).mean() - actual) < 5 * deviation
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - actual)], rtol=1e-6)
    assert Dropout(rate).apply({}, x, True) is x


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_is_computed_in_float32(small_config, kind, dtype):
    config = small_config(norm=kind)
    # A large common offset: in bfloat16 arithmetic the variance would be lost.
    x = jnp.asarray(100 + np.random.default_rng(0).standard_normal((3, 8)), dtype)
    module = Norm(config)
    params = module.init(jax.random.key(0), x)
    y = module.apply(params, x)
    assert y.dtype == dtype
    exact = np.asarray(x, np.float64)
    if kind == "layernorm":
        exact = exact - exact.mean(-1, keepdims=True)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + config.norm_epsilon)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=1e-4 if dtype == jnp.float32 else 2e-2)
    assert set(params["params"]) == ({"scale", "bias"} if kind == "layernorm" else {"scale"})


def test_sinusoidal_positions_in_closed_form():
    got = sinusoidal_positions(jnp.array([[0, 3], [7, 1]]), 6)
    for row, column, position in [(0, 0, 0), (0, 1, 3), (1, 0, 7), (1, 1, 1)]:
        angles = [position * 10000.0 ** (-i / 2) for i in range(3)]
        np.testing.assert_allclose(got[row, column], [*np.sin(angles), *np.cos(angles)], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_einsum_float32_has_the_gradient_of_the_product(dtype):
    rng = np.random.default_rng(0)
    a, b, weight = (jnp.asarray(rng.standard_normal(shape)) for shape in ((3, 4), (5, 4), (3, 5)))
    a, b = a.astype(dtype), b.astype(dtype)
    product, grads = jax.value_and_grad(lambda a, b: (weight * einsum_float32("...e,ve->...v", a, b)).sum(), (0, 1))(
        a, b
    )
    exact_a, exact_b, exact_weight = (np.asarray(x, np.float64) for x in (a, b, weight))
    np.testing.assert_allclose(product, (exact_weight * (exact_a @ exact_b.T)).sum(), rtol=1e-5)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    assert grads[0].dtype == grads[1].dtype == dtype
    np.testing.assert_allclose(np.asarray(grads[0], np.float64), exact_weight @ exact_b, atol=tolerance)
    np.testing.assert_allclose(np.asarray(grads[1], np.float64), exact_weight.T @ exact_a, atol=tolerance)


def hessian_product(loss, x, v):
    """Forward over reverse: the derivative of the gradient along `v`."""
    return jax.jvp(jax.grad(loss), (x,), (v,))[1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_einsum_float32_has_the_hessian_products_of_the_product(dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    arrays, along = (draw(3, 4), draw(5, 4)), (draw(3, 4), draw(5, 4))
    loss = lambda product, operands: jnp.sum(jnp.sin(product("ae,ve->av", *operands).astype(jnp.float32)))
    got = hessian_product(lambda operands: loss(einsum_float32, operands), arrays, along)
    exact, exact_along = jax.tree.map(lambda a: a.astype(jnp.float32), (arrays, along))
    expected = hessian_product(lambda operands: loss(jnp.einsum, operands), exact, exact_along)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.15
    assert all(leaf.dtype == dtype for leaf in got)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b, atol=tolerance), got, expected)


def test_hessian_products_of_a_bfloat16_model_are_close_to_those_in_float32(small_config, packed_batch):
    config = small_config(embed_dim=16, compute_dtype="bfloat16")
    batch = packed_batch()
    params = init_params(config, jax.random.key(0))
    along = init_params(config, jax.random.key(1))

    def product(config):
        def loss(params):
            scores = jax.nn.log_softmax(EncoderDecoder(config).apply({"params": params}, batch))
            return -jnp.mean(jnp.take_along_axis(scores, batch["target_labels"][..., None], -1))

        return jax.jit(lambda params, along: hessian_product(loss, params, along))(params, along)

    low, full = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(product(c))]) for c in (
        config, dataclasses.replace(config, compute_dtype="float32")
    ))  # fmt: skip
    assert float(jnp.linalg.norm(low - full) / jnp.linalg.norm(full)) < 0.05


def test_gelu_is_that_of_bert():
    """Hendrycks & Gimpel, arXiv 1606.08415: x times the normal distribution's probability below x."""
    x = np.array([-2.0, -0.5, 0.0, 1.0, 3.0])
    below = [0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x]
    np.testing.assert_allclose(ACTIVATIONS["gelu"](jnp.asarray(x)), x * below, atol=1e-6)
