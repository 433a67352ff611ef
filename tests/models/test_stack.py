from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from t5x_ext.models import EncoderDecoder, LayerSharing, Stack
from t5x_ext.models.layers import Layer
from t5x_ext.models.stack import scan_runs, unroll_positions
from t5x_ext.models.sublayers import Dropout

SCHEMES = [
    (LayerSharing("none"), 3),
    (LayerSharing("universal"), 3),
    (LayerSharing("sequence", 2), 4),
    (LayerSharing("cycle", 2), 4),
    (LayerSharing("cycle_rev", 2), 4),
    (LayerSharing("sandwich"), 5),
    (LayerSharing("sequence", 2, allow_uneven=True), 3),
    (LayerSharing("cycle_rev", 2, allow_uneven=True), 5),
]
IDS = [f"{sharing.scheme}-{layers}" for sharing, layers in SCHEMES]
X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
MASK = np.tril(np.ones((2, 5, 5), bool))


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


class OneProduct(nn.Module):
    """The smallest layer with a weight, a residual and dropout: it compiles in a tenth of a whole one's time."""

    config: object
    parts: object
    placement: object

    @nn.compact
    def __call__(self, x, mask, deterministic):
        axes = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))
        kernel = self.param("kernel", axes, (X.shape[-1], X.shape[-1]))
        return x + Dropout(self.config.dropout)(jnp.tanh(x @ kernel), deterministic), {}

    def initialise(self):
        self(X, None, True)


def stack_loss(config, layers, sharing, key=None, layer_type=Layer):
    """A function of parameters: a sum over what an encoder stack makes of X, with dropout when there is a key."""
    stack = Stack(config, layers, sharing, layer_type)
    deterministic = key is None
    rngs = None if key is None else {"dropout": key}

    def run(stack, x):
        x, _ = stack(lambda layer, x, _: layer(x, jnp.asarray(MASK), deterministic), x, deterministic=deterministic)
        return stack.normalize(x)

    def loss(params):
        y = stack.apply({"params": params}, jnp.asarray(X), method=run, rngs=rngs)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    return stack, run, loss


def stack_shapes(config, layers, sharing, layer_type=Layer):
    stack, run, _ = stack_loss(config, layers, sharing, layer_type=layer_type)
    return nn.meta.unbox(jax.eval_shape(lambda: stack.init(jax.random.key(0), jnp.asarray(X), method=run)))["params"]


def stack_params(config, layers, sharing, layer_type=Layer):
    rng = np.random.default_rng(1)
    shapes = stack_shapes(config, layers, sharing, layer_type)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0.1, 0.3, a.shape), jnp.float32), shapes)


def toy_step(carry, inputs):
    params, value = inputs
    carry = jnp.sin(carry * params["scale"] + value["shift"])
    return carry, {"out": carry * value["shift"]}


def test_scanned_runs_visit_positions_in_order_for_every_map():
    rng = np.random.default_rng(0)
    for sharing, layers in [*SCHEMES, (LayerSharing("cycle_rev", 3), 9), (LayerSharing("sequence", 2), 6)]:
        sets = {"scale": jnp.asarray(rng.standard_normal((sharing.num_sets(layers), 2)))}
        values = {"shift": jnp.asarray(rng.standard_normal((layers, 2)))}
        start = jnp.ones(2)
        expected = unroll_positions(toy_step, sharing.layer_map(layers), sets, start, values)
        got = scan_runs(toy_step, sharing.runs(layers), sets, start, values)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
        carry = np.ones(2)
        for position, index in enumerate(sharing.layer_map(layers)):
            carry = np.sin(carry * np.asarray(sets["scale"][index]) + np.asarray(values["shift"][position]))
        np.testing.assert_allclose(got[0], carry, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sharing", "layers", "layer_type"),
    [*((*scheme, OneProduct) for scheme in SCHEMES), (*SCHEMES[-1], Layer)],
    ids=[*IDS, f"{IDS[-1]}-whole"],
)
def test_tied_equals_copied_unshared_and_scanned_equals_unrolled(small_config, sharing, layers, layer_type):
    config = small_config(dropout=0.2)
    key = jax.random.key(3)
    params = stack_params(config, layers, sharing, layer_type)
    _, _, unrolled = stack_loss(config, layers, sharing, key, layer_type)
    _, _, scanned = stack_loss(dataclasses.replace(config, scan_layers=True), layers, sharing, key, layer_type)
    _, _, unshared = stack_loss(config, layers, LayerSharing("none"), key, layer_type)
    layer_map = np.array(sharing.layer_map(layers))
    copied = {**params, "layers": jax.tree.map(lambda a: a[layer_map], params["layers"])}

    value, grads = jax.jit(jax.value_and_grad(unrolled))(params)
    scanned_value, scanned_grads = jax.jit(jax.value_and_grad(scanned))(params)
    copied_value, copied_grads = jax.jit(jax.value_and_grad(unshared))(copied)
    np.testing.assert_allclose(copied_value, value, rtol=1e-5)
    np.testing.assert_allclose(scanned_value, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), scanned_grads, grads)
    summed = jax.tree.map(
        lambda g, own: np.stack([g[layer_map == i].sum(0) for i in range(len(own))]),
        copied_grads["layers"],
        grads["layers"],
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), summed, grads["layers"])


class Noise(nn.Module):
    """A layer that outputs its dropout mask."""

    config: object
    parts: object
    placement: object

    @nn.compact
    def __call__(self, deterministic=False):
        self.param("unused", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), (1,))
        return Dropout(0.5)(jnp.ones(64), deterministic)

    def initialise(self):
        self(deterministic=True)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_dropout_differs_between_two_uses_of_a_set(small_config, scan, impl):
    stack = Stack(small_config(scan_layers=scan, final_norm=False), 4, LayerSharing("universal"), Noise)

    def run(stack):
        return stack(lambda layer, carry, _: (carry, layer()), None, deterministic=False)[1]

    def masks(key):
        return np.asarray(
            stack.apply({"params": {"layers": {"unused": jnp.zeros((1, 1))}}}, method=run, rngs={"dropout": key})
        )

    first, other = masks(jax.random.key(0, impl=impl)), masks(jax.random.key(1, impl=impl))
    assert len({tuple(mask) for mask in [*first.tolist(), *other.tolist()]}) == 8


@pytest.mark.parametrize("policy", ["full", "dots_saveable", "dots_with_no_batch_dims_saveable"])
@pytest.mark.parametrize("scan", [False, True])
def test_remat_changes_memory_and_not_gradients(small_config, policy, scan):
    sharing, layers = LayerSharing("cycle", 1), 2
    config = small_config(dropout=0.3)
    params, key = stack_params(config, layers, sharing), jax.random.key(0)
    _, _, plain = stack_loss(config, layers, sharing, key)
    _, _, rematerialised = stack_loss(small_config(dropout=0.3, remat=policy, scan_layers=scan), layers, sharing, key)
    assert any(e.primitive.name.startswith("remat") for e in primitives(jax.make_jaxpr(rematerialised)(params).jaxpr))
    expected, got = jax.jit(jax.grad(plain))(params), jax.jit(jax.grad(rematerialised))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("scan", [False, True])
def test_gradients_need_no_gather_or_scatter(small_config, scan):
    for sharing, layers in [(LayerSharing("cycle_rev", 2), 4), (LayerSharing("sandwich"), 4)]:
        config = small_config(scan_layers=scan)
        params = stack_shapes(config, layers, sharing)
        _, _, loss = stack_loss(config, layers, sharing)
        names = {e.primitive.name for e in primitives(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)}
        assert not {name for name in names if "gather" in name or "scatter" in name}


def test_scanned_program_does_not_grow_with_depth(small_config):
    def products(layers):
        config = small_config(scan_layers=True)
        sharing = LayerSharing("sequence", 2)
        params = stack_shapes(config, layers, sharing)
        _, _, loss = stack_loss(config, layers, sharing)
        return sum(e.primitive.name == "dot_general" for e in primitives(jax.make_jaxpr(loss)(params).jaxpr))

    assert products(4) == products(12)


def test_dropout_is_placed_as_in_fairseq(small_config, packed_batch):
    def draws(**rates):
        config = small_config(**rates)
        model = EncoderDecoder(config)
        batch = packed_batch()
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
        traced = jax.make_jaxpr(lambda p, k: model.apply(p, batch, False, rngs={"dropout": k}))(
            params, jax.random.key(0)
        )
        return sum(e.primitive.name == "random_bits" for e in primitives(traced.jaxpr))

    # One layer a stack: two embeddings and five sub-layers; three attentions; two feed-forward activations.
    assert draws(dropout=0.1) == 2 + 2 + 3
    assert draws(attention_dropout=0.1) == 3
    assert draws(activation_dropout=0.1) == 2
    assert draws() == 0
