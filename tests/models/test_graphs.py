"""Graph networks against dense float64 matrices, under permutations, and with edges and channels taken out."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ext.contracts import AXIS_NAMES, UserError
from t5x_ext.models.graphs import (
    APPNP,
    GAT,
    GCN,
    GCNII,
    SGC,
    Gates,
    Graph,
    GraphSizes,
    attention_weights,
    gate,
    graph_axes,
    init_graph_params,
)

NODES, CHANNELS, CLASSES = 12, 7, 3
NETWORKS = {
    "gcn": GCN(CLASSES, hidden=5),
    "deep gcn": GCN(CLASSES, hidden=5, num_layers=3),
    "gat": GAT(CLASSES, hidden=4, num_heads=2),
    "sgc": SGC(CLASSES),
    "appnp": APPNP(CLASSES, hidden=5),
    "gcnii": GCNII(CLASSES, hidden=5, num_layers=4),
}
OPEN = Gates()
GATED = Gates(edges=True, features=True)
each_network = pytest.mark.parametrize("name", NETWORKS)


def make_graph(seed=0):
    """Directed edges without loops, node 11 without any neighbour."""
    rng = np.random.default_rng(seed)
    pairs = [(s, r) for s in range(11) for r in range(11) if s != r and rng.random() < 0.3]
    senders, receivers = np.array(pairs, np.int32).T
    return {
        "nodes": rng.normal(size=(1, NODES, CHANNELS)).astype(np.float32),
        "senders": senders[None],
        "receivers": receivers[None],
    }


def sizes_of(batch):
    return GraphSizes(NODES, batch["senders"].shape[1], CHANNELS)


@partial(jax.jit, static_argnums=(0, 1))
def initial(network, sizes, seed):
    return init_graph_params(network, sizes, jax.random.key(seed))


def make(name, batch, gates=OPEN, seed=0):
    network = NETWORKS[name].clone(gates=gates)
    params = initial(network, sizes_of(batch), seed)
    # Biases begin at 0; here they must show.
    return network, jax.tree.map(lambda leaf: leaf + 0.01 * jnp.arange(leaf.shape[-1]), params)


@partial(jax.jit, static_argnums=0)
def logits(network, params, batch, key):
    rngs = None if key is None else {"dropout": key}
    return network.apply({"params": params}, batch, deterministic=key is None, rngs=rngs)[0]


def run(network, params, batch, key=None):
    return np.asarray(logits(network, params, batch, key))


# --- Dense matrices in float64 ---------------------------------------------------------------------------------------


def adjacency(batch, weights=None):
    """A[receiver, sender]."""
    matrix = np.zeros((NODES, NODES))
    weights = np.ones(batch["senders"].shape[1]) if weights is None else weights
    np.add.at(matrix, (batch["receivers"][0], batch["senders"][0]), weights)
    return matrix


def normalized(batch, weights=None):
    with_loops = adjacency(batch, weights) + np.eye(NODES)
    scale = np.diag(1 / np.sqrt(with_loops.sum(1)))
    return scale @ with_loops @ scale


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def dense(name, params, x, batch, weights=None):
    """The definition of each network, matrix by matrix."""
    p, matrix = float64(params), normalized(batch, weights)
    relu = lambda y: np.maximum(y, 0)
    linear = lambda y, layer: y @ layer["kernel"] + layer["bias"]
    if name in ("gcn", "deep gcn"):
        for layer in sorted(key for key in p if key.startswith("layer_")):
            x = relu(matrix @ x @ p[layer]["kernel"] + p[layer]["bias"])
        return matrix @ x @ p["output"]["kernel"] + p["output"]["bias"]
    if name == "sgc":
        return linear(np.linalg.matrix_power(matrix, 2) @ x, p)
    if name == "appnp":
        h = linear(relu(linear(x, p["layer_0"])), p["output"])
        power = np.linalg.matrix_power(0.9 * matrix, 10)
        # The geometric series in closed form.
        series = np.linalg.solve(np.eye(NODES) - 0.9 * matrix, np.eye(NODES) - power)
        return power @ h + 0.1 * series @ h
    if name == "gcnii":
        first = y = relu(linear(x, p["input"]))
        for number, kernel in enumerate(p["layers"]["kernel"], 1):
            strength = math.log(0.5 / number + 1)
            support = 0.9 * matrix @ y + 0.1 * first
            y = relu((1 - strength) * support + strength * support @ kernel)
        return linear(y, p["output"])
    for layer, last in (("layer_0", False), ("output", True)):
        x = dense_attention(x, p[layer], adjacency(batch, weights) + np.eye(NODES))
        x = x if last else np.where(x > 0, x, np.expm1(x))
    return x


def dense_attention(x, layer, weights):
    heads = []
    for head in range(layer["kernel"].shape[1]):
        values = x @ layer["kernel"][:, head]
        scores = (values @ layer["receiver"][head])[:, None] + (values @ layer["sender"][head])[None]
        parts = np.exp(np.where(scores > 0, scores, 0.2 * scores)) * weights
        heads.append(parts / parts.sum(1, keepdims=True) @ values)
    return np.concatenate(heads, 1) + layer["bias"]


@each_network
def test_it_is_the_dense_definition(name):
    batch = make_graph()
    network, params = make(name, batch)
    np.testing.assert_allclose(
        run(network, params, batch), dense(name, params, batch["nodes"][0].astype(np.float64), batch), atol=2e-5
    )


@each_network
def test_gates_multiply_edges_and_channels(name):
    batch = make_graph()
    network, params = make(name, batch, GATED)
    sigmoid = lambda v: 1 / (1 + np.exp(-float64(v)))
    weights, channels = sigmoid(params["gates"]["edge_logits"]), sigmoid(params["gates"]["feature_logits"])
    rest = {key: value for key, value in params.items() if key != "gates"}
    np.testing.assert_allclose(
        run(network, params, batch), dense(name, rest, batch["nodes"][0] * channels, batch, weights), atol=2e-5
    )


# --- Without edges and channels --------------------------------------------------------------------------------------


@each_network
def test_a_logit_of_zero_is_an_edge_that_is_not_there(name):
    """In degrees and softmax too; the self-loops stay, and so does the node without neighbours."""
    batch = make_graph()
    network, params = make(name, batch, GATED)
    off = np.arange(batch["senders"].shape[1]) % 3 == 0
    logits = jnp.where(off, 0.0, params["gates"]["edge_logits"])
    pruned = params | {"gates": params["gates"] | {"edge_logits": logits}}
    fewer = {key: value if key == "nodes" else value[:, ~off] for key, value in batch.items()}
    left = params | {"gates": params["gates"] | {"edge_logits": logits[~off]}}
    np.testing.assert_allclose(run(network, pruned, batch), run(network, left, fewer), atol=1e-5)
    none = params | {"gates": params["gates"] | {"edge_logits": jnp.zeros_like(logits)}}
    assert np.isfinite(run(network, none, batch)).all()


@each_network
def test_a_logit_of_zero_is_a_channel_that_is_not_there(name):
    batch = make_graph()
    network, params = make(name, batch, GATED)
    logits = params["gates"]["feature_logits"].at[jnp.array([1, 4])].set(0.0)
    pruned = params | {"gates": params["gates"] | {"feature_logits": logits}}
    changed = batch | {"nodes": batch["nodes"].copy()}
    changed["nodes"][..., [1, 4]] = 99.0
    np.testing.assert_array_equal(run(network, pruned, batch), run(network, pruned, changed))
    absent = batch | {"nodes": batch["nodes"].copy()}
    absent["nodes"][..., [1, 4]] = 0.0
    np.testing.assert_allclose(run(network, pruned, batch), run(network, params, absent), atol=1e-6)


def test_padding_edges_and_shared_logits():
    batch = make_graph()
    network, params = make("gcn", batch)
    padded = {key: value if key == "nodes" else np.pad(value, ((0, 0), (0, 3))) for key, value in batch.items()}
    padded["edge_weights"] = np.pad(np.ones_like(batch["senders"], np.float32), ((0, 0), (0, 3)))
    np.testing.assert_allclose(run(network, params, padded), run(network, params, batch), atol=1e-6)
    count = batch["senders"].shape[1]
    shared = NETWORKS["gcn"].clone(gates=Gates(edges=True), num_edge_logits=2)
    params = init_graph_params(shared, sizes_of(batch), jax.random.key(0))
    params["gates"]["edge_logits"] = jnp.array([0.0, 1.0])
    ids = (np.arange(count) % 2).astype(np.int32)[None]
    own, own_params = NETWORKS["gcn"].clone(gates=Gates(edges=True)), dict(params)
    own_params["gates"] = {"edge_logits": jnp.arange(count) % 2 * 1.0}
    np.testing.assert_allclose(run(shared, params, batch | {"edge_ids": ids}), run(own, own_params, batch), atol=1e-6)


# --- Symmetries ------------------------------------------------------------------------------------------------------


@each_network
def test_numbering_nodes_otherwise_permutes_the_output(name):
    batch = make_graph()
    network, params = make(name, batch, GATED)
    order = np.random.default_rng(1).permutation(NODES)
    place = np.argsort(order).astype(np.int32)
    renamed = {
        "nodes": batch["nodes"][:, order],
        "senders": place[batch["senders"]],
        "receivers": place[batch["receivers"]],
    }
    np.testing.assert_allclose(run(network, params, renamed), run(network, params, batch)[order], atol=1e-5)


@each_network
def test_the_order_of_edges_does_not_matter(name):
    batch = make_graph()
    network, params = make(name, batch, GATED)
    order = np.random.default_rng(1).permutation(batch["senders"].shape[1])
    shuffled = {key: value if key == "nodes" else value[:, order] for key, value in batch.items()}
    moved = params | {"gates": params["gates"] | {"edge_logits": params["gates"]["edge_logits"][order]}}
    np.testing.assert_allclose(run(network, moved, shuffled), run(network, params, batch), atol=1e-5)


# --- Attention -------------------------------------------------------------------------------------------------------


def test_attention_sums_to_one_at_every_receiver_and_spares_edges_of_weight_zero():
    batch = make_graph()
    rng = np.random.default_rng(2)
    sender, receiver = rng.normal(size=(2, NODES, 2)) * 3
    weights = rng.random(batch["senders"].shape[1]) * (np.arange(batch["senders"].shape[1]) % 3 > 0)
    graph = Graph(jnp.asarray(batch["nodes"][0]), batch["senders"][0], batch["receivers"][0], jnp.asarray(weights))
    attention = attention_weights(jnp.asarray(sender), jnp.asarray(receiver), graph)
    sums = graph.sum_at_receivers(attention.edges) + attention.loops
    np.testing.assert_allclose(sums, 1.0, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(attention.edges)[weights == 0], 0.0)
    np.testing.assert_allclose(attention.loops[11], 1.0)


def test_attention_stays_finite_with_huge_scores_even_of_edges_that_are_not_there():
    graph = Graph(jnp.zeros((2, 1)), jnp.array([0, 1]), jnp.array([1, 0]), jnp.array([0.0, 1.0]))
    scores = jnp.array([[500.0], [-500.0]])

    def total(scores, weights):
        attention = attention_weights(scores, scores, graph._replace(weights=weights))
        return jnp.sum(attention.edges**2) + jnp.sum(attention.loops**2)

    value, grads = jax.value_and_grad(total, (0, 1))(scores, graph.weights)
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)


# --- Gates, parameters, dropout --------------------------------------------------------------------------------------


def test_a_closed_gate_is_exactly_zero_and_its_gradient_is_a_choice():
    logits = jnp.array([0.0, -0.0, 3.0, -3.0])
    assert gate(logits)[:2].tolist() == gate(logits, False)[:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(gate(logits)[2:], jax.nn.sigmoid(logits[2:]))
    slope = jax.nn.sigmoid(logits) * (1 - jax.nn.sigmoid(logits))
    through = jax.grad(lambda v: gate(v).sum())(logits)
    np.testing.assert_allclose(through, slope, rtol=1e-6)
    closed = jax.grad(lambda v: gate(v, False).sum())(logits)
    np.testing.assert_allclose(closed, jnp.where(logits == 0, 0.0, slope), rtol=1e-6)


def test_the_straight_through_gradient_is_that_of_opening_the_edge():
    """Of a loss that is linear in the edge's weight, by finite differences."""
    batch = make_graph()
    network, params = make("sgc", batch, Gates(edges=True))
    logits = params["gates"]["edge_logits"].at[0].set(0.0)
    with_logits = lambda logits: params | {"gates": {"edge_logits": logits}}
    loss = lambda logits: jnp.sum(jnp.sin(network.apply({"params": with_logits(logits)}, batch)))
    weights = lambda w: batch | {"edge_weights": jnp.ones((1, batch["senders"].shape[1])).at[0, 0].set(w)}
    opened = with_logits(logits.at[0].set(1e-20))  # sigmoid 0.5, not closed
    by_weight = lambda w: jnp.sum(jnp.sin(network.apply({"params": opened}, weights(w))))
    # d loss / d weight at weight 0, times the slope of the sigmoid, 1/4; the gate multiplies the weight by 1/2.
    np.testing.assert_allclose(jax.grad(loss)(logits)[0], jax.grad(by_weight)(0.0) * 2 / 4, rtol=1e-4)


@each_network
def test_every_axis_has_a_name_of_the_one_vocabulary(name):
    batch = make_graph()
    network = NETWORKS[name].clone(gates=GATED)
    params = init_graph_params(network, sizes_of(batch), jax.random.key(0))
    axes = graph_axes(network, sizes_of(batch))
    is_axes = lambda node: isinstance(node, tuple)
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=is_axes)
    for leaf, names in zip(jax.tree.leaves(params), jax.tree.leaves(axes, is_leaf=is_axes), strict=True):
        assert len(names) == leaf.ndim
        used = [axis for axis in names if axis is not None]
        assert set(used) <= set(AXIS_NAMES)
        assert len(used) == len(set(used))
        assert leaf.dtype == jnp.float32


def test_edge_logits_begin_around_their_mean_and_feature_logits_at_one():
    network = GCN(CLASSES, gates=Gates(True, True, edge_mean=2.0, edge_deviation=0.1))
    params = init_graph_params(network, GraphSizes(5, 20_000, 4), jax.random.key(0))
    logits = np.asarray(params["gates"]["edge_logits"])
    assert logits.mean() == pytest.approx(2.0, abs=0.01)
    assert logits.std() == pytest.approx(0.1, rel=0.05)
    assert params["gates"]["feature_logits"].tolist() == [1.0] * 4


@each_network
def test_dropout_is_on_in_training_only_and_differs_by_key(name):
    batch = make_graph()
    network, params = make(name, batch)
    train = lambda key: run(network, params, batch, jax.random.key(key))
    same = (train(0) == train(1)).all()
    assert same == (name == "sgc"), "SGC is linear and drops nothing"
    np.testing.assert_array_equal(train(0), train(0))
    np.testing.assert_array_equal(run(network, params, batch), run(network, params, batch))


def test_mistakes_are_said_in_one_line():
    with pytest.raises(UserError, match=r"GCN.hidden is 0; it must be at least 1"):
        GCN(3, hidden=0)
    with pytest.raises(UserError, match=r"GAT.dropout is 1.0; it must be in \[0, 1\)"):
        GAT(3, dropout=1.0)
    batch = make_graph()
    network, params = make("gcn", batch)
    two = {key: np.concatenate([value, value]) for key, value in batch.items()}
    with pytest.raises(UserError, match="one graph a batch, not 2"):
        run(network, params, two)
