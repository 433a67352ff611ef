"""Schedules, Adam, accumulation and path rules against closed forms and float64 recursions."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.optim import adam, freeze, inverse_sqrt, linear_decay, mean_accumulator, scale_by_path

STEPS = np.array([0, 1, 2, 3, 4, 5, 9, 16, 100, 1000])


def test_inverse_sqrt_is_its_formula():
    schedule = inverse_sqrt(7e-4, warmup_steps=4)
    expected = [7e-4 * min(step / 4, (4 / step) ** 0.5 if step else 0.0) for step in STEPS.tolist()]
    np.testing.assert_allclose([schedule(step) for step in STEPS.tolist()], expected, rtol=1e-6)
    assert float(schedule(4)) == np.float32(7e-4)  # continuous: both branches meet at the peak


def test_linear_decay_is_its_formula():
    schedule = linear_decay(1.0, warmup_steps=4, total_steps=16, end=0.25)
    expected = np.interp(STEPS, [0, 4, 16], [0.0, 1.0, 0.25])
    np.testing.assert_allclose([schedule(step) for step in STEPS.tolist()], expected, rtol=1e-6)
    assert float(linear_decay(1.0, warmup_steps=0, total_steps=2)(0)) == 1.0
    trial = linear_decay(1.0, warmup_steps=100, total_steps=2)  # as under --steps=2: it ends within the warm-up
    np.testing.assert_allclose([trial(0), trial(1), trial(99)], [0.0, 0.01, 0.99], rtol=1e-6)


@pytest.mark.parametrize("schedule", [inverse_sqrt(3e-4, 10), linear_decay(3e-4, 10, 500), linear_decay(3e-4, 0, 9)])
def test_schedules_are_the_same_compiled_and_vectorised(schedule):
    eager = [schedule(step) for step in STEPS.tolist()]
    compiled = [jax.jit(schedule)(jnp.int32(step)) for step in STEPS.tolist()]
    np.testing.assert_allclose(compiled, eager, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.asarray(STEPS)), eager, rtol=1e-6)
    assert compiled[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inverse_sqrt(0.0, 10), "peak = 0.0 must be positive"),
        (lambda: inverse_sqrt(1.0, 0), "warmup_steps = 0"),
        (lambda: linear_decay(1.0, 10, 0), "total_steps = 0 at least 1"),
        (lambda: linear_decay(1.0, -1, 10), "at least 0"),
        (lambda: linear_decay(1.0, 1, 10, end=2.0), "end = 2.0"),
        (lambda: adam(-1.0), "learning_rate = -1.0"),
        (lambda: adam(1.0, b2=1.0), "b2 = 1.0"),
        (lambda: adam(1.0, eps=-1e-9), "eps"),
        (lambda: adam(1.0, weight_decay=-0.1), "weight_decay"),
        (lambda: adam(1.0, clip_norm=0.0), "clip_norm = 0.0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def random_tree(seed):
    kernel, bias = jax.random.split(jax.random.key(seed))
    return {"kernel": jax.random.normal(kernel, (3, 2)), "bias": jax.random.normal(bias, (2,))}


def adam_in_float64(params, gradients, schedule, weight_decay, clip_norm, b1=0.9, b2=0.98, eps=1e-9):
    """Adam as written in the papers, decay on `kernel` only."""
    params = {name: np.float64(value) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for step, gradient in enumerate(gradients):
        norm = np.sqrt(sum(np.sum(np.float64(value) ** 2) for value in gradient.values()))
        for name, value in params.items():
            g = np.float64(gradient[name]) * min(1.0, clip_norm / norm)
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            direction = first[name] / (1 - b1 ** (step + 1)) / (np.sqrt(second[name] / (1 - b2 ** (step + 1))) + eps)
            decay = weight_decay * value if name == "kernel" else 0.0
            params[name] = value - schedule(step) * (direction + decay)
    return params


@pytest.mark.parametrize("clip_norm", [1e9, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_the_float64_recursion(weight_decay, clip_norm):
    schedule = inverse_sqrt(0.05, warmup_steps=3)
    optimizer = adam(schedule, weight_decay=weight_decay, no_decay=["bias$"], clip_norm=clip_norm)
    params = initial = random_tree(0)
    gradients = [random_tree(seed) for seed in range(1, 9)]
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
    expected = adam_in_float64(initial, gradients, schedule, weight_decay, clip_norm)
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=2e-5, atol=1e-6)


def test_a_batch_accumulates_the_same_however_it_is_split():
    """Oracle: the gradient of the mean over all labels in float64; microbatches are of unequal weight."""
    rng = np.random.default_rng(0)
    x, y, weights = rng.normal(size=(24, 3)), rng.normal(size=24), rng.integers(0, 2, size=24)
    params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
    residual = x @ np.float64(params["w"]) - y
    expected = (2 * residual * weights) @ x / weights.sum()

    def summed_loss(params, x, y, weights):
        return jnp.sum(weights * (x @ params["w"] - y) ** 2)

    accumulator = mean_accumulator()
    for bounds in ([0, 24], [0, 8, 16, 24], [0, 1, 2, 23, 24]):
        state = accumulator.init(params, jnp.int32(0))
        for start, stop in pairwise(bounds):
            part = [jnp.asarray(array[start:stop], jnp.float32) for array in (x, y, weights)]
            gradient = jax.grad(summed_loss)(params, *part)
            state = jax.jit(accumulator.add)(state, gradient, part[2].sum())
        np.testing.assert_allclose(accumulator.finish(state)["w"], expected, rtol=1e-5)


def test_accumulation_runs_in_float32_and_without_labels_is_zero():
    accumulator = mean_accumulator()
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    state = accumulator.init(params, jnp.int32(0))
    assert accumulator.finish(state)["w"].tolist() == [0.0, 0.0]
    for _ in range(1000):  # in bfloat16 the sum would stop growing at 256
        state = accumulator.add(state, {"w": jnp.ones(2, jnp.bfloat16)}, jnp.float32(1.0))
    assert accumulator.finish(state)["w"].tolist() == [1.0, 1.0]
    assert accumulator.finish(state)["w"].dtype == jnp.float32
    state = accumulator.init(params, jnp.int32(0))
    state = accumulator.add(state, {"w": jnp.full(2, jnp.nan, jnp.bfloat16)}, jnp.float32(0.0))
    assert accumulator.finish(state)["w"].tolist() == [0.0, 0.0]


PARAMS = {"embedding": jnp.ones((2, 2)), "layers": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}}


def test_multipliers_scale_the_first_match_and_layers_apart():
    rule = scale_by_path({"kernel$": [0.0, 0.5, 2.0], "layers/": 10.0})
    updates, _ = jax.jit(rule.update)(PARAMS, rule.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["embedding"], np.ones((2, 2)))
    np.testing.assert_array_equal(updates["layers"]["bias"], np.full((3, 2), 10.0))
    np.testing.assert_array_equal(updates["layers"]["kernel"][:, 0, 0], [0.0, 0.5, 2.0])


def test_frozen_parameters_do_not_move_even_under_decay_and_nan():
    optimizer = optax.chain(adam(0.1, weight_decay=0.5), freeze(["^embedding", "bias"]))
    params, state = PARAMS, optimizer.init(PARAMS)
    gradients = {"embedding": jnp.full((2, 2), jnp.nan), "layers": PARAMS["layers"]}
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["embedding"], PARAMS["embedding"])
    np.testing.assert_array_equal(params["layers"]["bias"], PARAMS["layers"]["bias"])
    assert np.all(params["layers"]["kernel"] < 1.0)


def test_rules_that_match_nothing_or_do_not_fit_are_refused():
    with pytest.raises(UserError, match="pattern 'embeding' matches no parameter; names look like 'embedding'"):
        freeze(["embeding"]).init(PARAMS)
    with pytest.raises(UserError, match="pattern 'decoder' matches no parameter"):
        scale_by_path({"kernel": 1.0, "decoder": 1.0}).init(PARAMS)
    with pytest.raises(UserError, match=r"2 values for layers/bias of shape \(3, 2\)"):
        scale_by_path({"bias": [1.0, 2.0]}).init(PARAMS)
