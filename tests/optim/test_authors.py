"""Trajectories recorded from the authors' released code; `authors.json` says how, and holds numbers only."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_ext.optim import PruningGroup, Regrowth, flora, fsam, ginger, gradual_pruning
from t5x_ext.optim.bits import unpack

RECORDED = json.loads((Path(__file__).parent / "authors.json").read_text())


def shaped(flat, shapes):
    return {name: jnp.float32(flat[name]).reshape(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("compiled", [True, False])
def test_flora_is_that_of_the_authors(compiled):
    """A wide matrix, a tall one and a vector through two changes of projection; clipping, decay, scale of weights."""
    shapes, recorded = {"wide": (3, 5), "tall": (6, 4), "bias": (3,)}, RECORDED["flora"]
    given = {len(ps[0]) // 2: jnp.float32(ps).reshape(len(ps), 2, -1) for ps in recorded["projections"].values()}
    epochs = {}  # by key, in the order of their first use

    def projection(key, shape, dtype):
        def look_up(key):
            known = epochs.setdefault(shape[1], [])
            if key.tobytes() not in known:
                known.append(key.tobytes())
            return np.asarray(given[shape[1]][known.index(key.tobytes())], dtype)

        data = jax.random.key_data(key)
        if compiled:
            return jax.pure_callback(look_up, jax.ShapeDtypeStruct(shape, dtype), data)
        return look_up(np.asarray(data))

    optimizer = flora(
        0.05,
        rank=2,
        b1=0.7,
        resample_every=6,
        min_dim_size_to_compress=2,
        projection=projection,
        clipping_threshold=0.8,
        weight_decay=0.1,
    )
    params = shaped(recorded["params"], shapes)
    state, update = optimizer.init(params), jax.jit(optimizer.update) if compiled else optimizer.update
    expected = {step: shaped(flat, shapes) for step, flat in recorded["trajectory"]}
    for step, gradient in enumerate(recorded["gradients"]):
        updates, state = update(shaped(gradient, shapes), state, params)
        params = optax.apply_updates(params, updates)
        if step in expected:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params, expected[step])
    assert [len(keys) for keys in epochs.values()] == [3, 3]


def test_fsam_is_that_of_the_authors():
    shapes = {"inner.bias": (4,), "inner.weight": (4, 5), "outer.weight": (3, 4)}
    recorded = RECORDED["fsam"]
    options = {"sparsity": 0.7, "mask_update_interval": 3, "maskable": ["^(?!.*(bias|embed))"], "eps": 1e-7}
    optimizer = fsam(optax.sgd(0.1, momentum=0.9), rho=0.2, **options)

    def loss(params, inputs, targets):
        hidden = jnp.tanh(inputs @ params["inner.weight"].T + params["inner.bias"])
        return jnp.mean((hidden @ params["outer.weight"].T - targets) ** 2)

    @jax.jit
    def step(params, state, *data):
        grad_fn = lambda params, index=0: jax.grad(loss)(params, *data)
        updates, state = optimizer.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params = shaped(recorded["params"], shapes)
    state = optimizer.init(params)
    for number, (expected, masks) in enumerate(zip(recorded["trajectory"], recorded["masks"], strict=True)):
        inputs, targets = (jnp.float32(recorded[name][number]) for name in ("inputs", "targets"))
        params, state = step(params, state, inputs.reshape(6, 5), targets.reshape(6, 3))
        for name, mask in masks.items():
            np.testing.assert_array_equal(np.ravel(unpack(state.mask[name], shapes[name])), np.bool_(mask))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params, shaped(expected, shapes))


def test_ginger_is_that_of_the_authors():
    """At a damping of 0.5, where their code is exact."""
    shapes, recorded = {"w": (2, 4), "b": (3,)}, RECORDED["ginger"]
    optimizer = ginger(0.5, rank=2, b1=0.9, b2=0.9, damping=0.5, clip_value=0.4)
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    update = jax.jit(lambda g, state, n: optimizer.update(g, state, params, curvature_grad_fn=lambda params: n))
    state = optimizer.init(params)
    recorded_steps = zip(*(recorded[key] for key in ("gradients", "curvature_gradients", "updates")), strict=True)
    for gradient, curvature_gradient, expected in recorded_steps:
        updates, state = update(shaped(gradient, shapes), state, shaped(curvature_gradient, shapes))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), updates, shaped(expected, shapes))


CGP_SHAPES = {
    "conv1.weight": (4, 5),
    "conv2.weight": (5, 3),
    "edge_weight_train": (14,),
    "x_weight": (6,),
    "bias": (5,),
}
CGP_INNER = {
    "adam": (optax.scale_by_adam(eps=1e-8), "momentum", "keep"),
    "sgd": (optax.trace(0.9), "gradient", "mask"),
}


@pytest.mark.parametrize("inner", CGP_INNER)
def test_gradual_pruning_is_that_of_the_authors(inner):
    """Their strict thresholds with the ties of features that all begin at 1, death, growth, and no last event."""
    recorded, (moments, score, slots) = RECORDED["cgp"][inner], CGP_INNER[inner]
    groups = [PruningGroup(["weight$"], 0.3), PruningGroup(["edge_weight"], 0.5), PruningGroup(["x_weight"], 0.5)]
    optimizer = gradual_pruning(
        optax.chain(optax.add_decayed_weights(0.01), moments, optax.scale(-0.05)),
        groups,
        end=8,
        every=2,
        regrowth=Regrowth(0.3, 0.005, score, steps=10),
        slots=slots,
        authors_rule=True,
    )
    params = shaped(recorded["params"], CGP_SHAPES)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step, (gradient, expected) in enumerate(zip(recorded["gradients"], recorded["trajectory"], strict=True), 1):
        updates, state = update(shaped(gradient, CGP_SHAPES), state, params)
        params = optax.apply_updates(params, updates)
        for name, leaf in shaped(expected, CGP_SHAPES).items():
            np.testing.assert_allclose(params[name], leaf, atol=3e-6, err_msg=f"{name} after update {step}")
