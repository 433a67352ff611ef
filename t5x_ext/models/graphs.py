"""Graph networks over one graph: GCN, GAT, SGC, APPNP and GCNII, with trainable gates on edges and feature channels.

A batch is one graph, its arrays with a leading axis of 1 (`contracts.Batch`):

- `nodes` float [1, nodes, channels]: features;
- `senders`, `receivers` int [1, edges]: a message goes from sender to receiver, so an undirected edge is there twice;
- `edge_weights` float [1, edges], if there is one: 0 where an edge is padding;
- `edge_ids` int [1, edges], if there is one: the logit of each edge, so that both directions can share one.

Shapes are static: an edge that is pruned has weight 0, which is the same as no edge, in degrees and softmax too. A
self-loop of weight 1 is added to every node; graphs should hold none. What is propagated is never cached, since edges
and channels may change from one update to the next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Axes, Batch, Params, PyTree, UserError
from t5x_ext.models.sublayers import Dropout


@dataclasses.dataclass(frozen=True)
class Gates:
    """Trainable factors of edges and feature channels: the sigmoid of a logit each, 0 where the logit is 0.

    The logits are the parameters `gates/edge_logits` and `gates/feature_logits`; what sets one to 0 takes its edge or
    channel out of the graph (`optim.gradual_pruning`).

    Attributes:
      edges: whether edges have logits.
      features: whether feature channels have logits, 1 at the start.
      edge_mean: mean of the edge logits at the start, normally distributed.
      edge_deviation: their standard deviation; some is needed, or ties decide which edges stay.
      straight_through: whether logits that are 0 get the gradient they would get if their gate were open; without it
        nothing tells which of them should grow.

    The authors' code has `edge_mean=0`, `edge_deviation=1`, `straight_through=False`.
    """

    edges: bool = False
    features: bool = False
    edge_mean: float = 2.0
    edge_deviation: float = 0.1
    straight_through: bool = True


def gate(logits: Float[Array, "..."], straight_through: bool = True) -> Float[Array, "..."]:
    """sigmoid(logits), exactly 0 where a logit is 0.

    Args:
      logits: of any shape.
      straight_through: whether the gradient at such a logit is that of the sigmoid instead of 0.

    >>> import jax, jax.numpy as jnp
    >>> gate(jnp.array([0.0, 2.0])).round(2).tolist(), jax.grad(lambda v: gate(v).sum())(jnp.zeros(1)).tolist()
    ([0.0, 0.8799999952316284], [0.25])
    """
    opened = jax.nn.sigmoid(logits)
    if straight_through:
        return opened - jax.lax.stop_gradient(jnp.where(logits == 0, opened, 0.0))
    return jnp.where(logits == 0, 0.0, opened)


class Graph(NamedTuple):
    """One graph as arrays."""

    nodes: Float[Array, "nodes channels"]
    senders: Int[Array, " edges"]
    receivers: Int[Array, " edges"]
    weights: Float[Array, " edges"]  # 0 where there is no edge
    channels: Float[Array, " channels"] | None = None  # factors of the features, in place of multiplied features

    def gated(self, kernel: Float[Array, "channels ..."]) -> Float[Array, "channels ..."]:
        """A kernel that reads the features, multiplied by the channels' factors.

        x diag(c) W is computed as x (diag(c) W): no product with the large x is needed for the gradient of c.
        """
        if self.channels is None:
            return kernel
        return kernel * self.channels.reshape(-1, *(1,) * (kernel.ndim - 1))

    def sum_at_receivers(self, messages: Float[Array, "edges ..."]) -> Float[Array, "nodes ..."]:
        """The sum of the messages that arrive at each node."""
        return jax.ops.segment_sum(messages, self.receivers, self.nodes.shape[0])


class NormalizedEdges(NamedTuple):
    """Entries of D^-1/2 (A + I) D^-1/2, D being sums of the weights that arrive at a node, its self-loop included."""

    edges: Float[Array, " edges"]
    loops: Float[Array, " nodes"]


def normalized_edges(graph: Graph) -> NormalizedEdges:
    """The symmetric normalisation of GCN (arXiv 1609.02907)."""
    scale = jax.lax.rsqrt(1.0 + graph.sum_at_receivers(graph.weights))
    return NormalizedEdges(scale[graph.senders] * graph.weights * scale[graph.receivers], scale * scale)


def propagate(x: Float[Array, "nodes width"], graph: Graph, edges: NormalizedEdges) -> Float[Array, "nodes width"]:
    """D^-1/2 (A + I) D^-1/2 x."""
    return graph.sum_at_receivers(x[graph.senders] * edges.edges[:, None]) + x * edges.loops[:, None]


class GateLayer(nn.Module):
    """The graph of a batch with its gates applied.

    Attributes:
      gates: which there are.
      num_edge_logits: number of edge logits; 0: one an edge.
    """

    gates: Gates
    num_edge_logits: int = 0

    @nn.compact
    def __call__(self, batch: Batch) -> Graph:
        """Reads a batch."""
        nodes, senders = batch["nodes"], batch["senders"]
        if nodes.shape[0] != 1:
            raise UserError(f"a graph network reads one graph a batch, not {nodes.shape[0]}; set num_microbatches = 1")
        weights = batch["edge_weights"][0] if "edge_weights" in batch else jnp.ones(senders.shape[1], nodes.dtype)
        channels = None
        if self.gates.edges:
            size = self.num_edge_logits or senders.shape[1]
            init = _named(_shifted_normal(self.gates.edge_mean, self.gates.edge_deviation), (None,))
            opened = gate(self.param("edge_logits", init, (size,)), self.gates.straight_through)
            weights = weights * (opened[batch["edge_ids"][0]] if "edge_ids" in batch else opened)
        if self.gates.features:
            init = _named(nn.initializers.ones, ("vocab",))
            channels = gate(self.param("feature_logits", init, nodes.shape[2:]), self.gates.straight_through)
        return Graph(nodes[0], senders[0], batch["receivers"][0], weights, channels)


def _named(init: Callable[..., Array], axes: Axes) -> Callable[..., Any]:
    """The initialiser, its result boxed with the logical names of its axes; None is an axis that is never split."""
    return nn.with_logical_partitioning(init, axes)


def _shifted_normal(mean: float, deviation: float) -> Callable[..., Array]:
    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        return mean + deviation * jax.random.normal(key, shape, dtype)

    return init


class Linear(nn.Module):
    """x W + b, W by Glorot's uniform initialiser, b zero.

    Attributes:
      features: size of the output.
      axes: logical names of the kernel's two axes; a kernel that reads the features of a graph has `vocab` first.
    """

    features: int
    axes: tuple[str | None, str | None]

    @nn.compact
    def __call__(
        self, x: Float[Array, "nodes width"], graph: Graph, edges: NormalizedEdges | None = None
    ) -> Float[Array, "nodes features"]:
        """Returns the map of `x`.

        Args:
          x: what is mapped.
          graph: whose gates apply where `x` are its features.
          edges: if given, x W is propagated over them before b is added, which is a layer of GCN.
        """
        init = _named(nn.initializers.glorot_uniform(), self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        y = x @ (graph.gated(kernel) if self.axes[0] == "vocab" else kernel)
        if edges is not None:
            y = propagate(y, graph, edges)
        return y + self.param("bias", _named(nn.initializers.zeros, self.axes[1:]), (self.features,))


class GraphNetwork(nn.Module):
    """What the networks have in common; each maps a batch to the logits of its nodes.

    Attributes:
      num_classes: classes of nodes; a task sets it from its data.
      hidden: width of hidden layers.
      dropout: probability in [0, 1).
      gates: on edges and feature channels.
      num_edge_logits: see `GateLayer`; a task sets it.

    Raises:
      UserError: for values out of range.
    """

    num_classes: int
    hidden: int = 512
    dropout: float = 0.5
    gates: Gates = Gates()
    num_edge_logits: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.hidden < 1:
            raise UserError(f"{name}.hidden is {self.hidden}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{name}.dropout is {self.dropout}; it must be in [0, 1)")
        super().__post_init__()

    @nn.compact
    def __call__(self, batch: Batch, deterministic: bool = True) -> Float[Array, "1 nodes classes"]:
        """Logits of every node, float32; dropout is on with `deterministic=False` and an rng `dropout`."""
        graph = GateLayer(self.gates, self.num_edge_logits, name="gates")(batch)
        return self.node_logits(graph, deterministic)[None]

    def node_logits(self, graph: Graph, deterministic: bool) -> Float[Array, "nodes classes"]:
        """The network on a graph whose gates have been applied."""
        raise NotImplementedError

    def drop(self, x: Float[Array, "..."], deterministic: bool) -> Float[Array, "..."]:
        """Dropout."""
        return Dropout(self.dropout)(x, deterministic)


class GCN(GraphNetwork):
    """Two layers or more of D^-1/2 (A + I) D^-1/2 x W + b, ReLU and dropout between them (arXiv 1609.02907).

    Features are not dropped, as in CGP's code.

    Attributes:
      num_layers: at least 2.
    """

    num_layers: int = 2

    def node_logits(self, graph: Graph, deterministic: bool) -> Float[Array, "nodes classes"]:
        """See `GraphNetwork`."""
        edges, x = normalized_edges(graph), graph.nodes
        for number in range(self.num_layers - 1):
            axes = ("vocab" if number == 0 else "embed", "mlp")
            x = nn.relu(Linear(self.hidden, axes, name=f"layer_{number}")(x, graph, edges))
            x = self.drop(x, deterministic)
        return Linear(self.num_classes, ("mlp", None), name="output")(x, graph, edges)


class SGC(GraphNetwork):
    """Â^K x W + b with Â = D^-1/2 (A + I) D^-1/2: a linear model (arXiv 1902.07153); `hidden` and `dropout` are unused.

    W comes first here, which is the same and propagates classes instead of channels.

    Attributes:
      power: K.
    """

    power: int = 2

    def node_logits(self, graph: Graph, deterministic: bool) -> Float[Array, "nodes classes"]:
        """See `GraphNetwork`."""
        edges = normalized_edges(graph)
        init = _named(nn.initializers.glorot_uniform(), ("vocab", None))
        kernel = self.param("kernel", init, (graph.nodes.shape[-1], self.num_classes))
        x = graph.nodes @ graph.gated(kernel)
        for _ in range(self.power):
            x = propagate(x, graph, edges)
        return x + self.param("bias", _named(nn.initializers.zeros, (None,)), (self.num_classes,))


class APPNP(GraphNetwork):
    """A perceptron, then K steps of personalised PageRank z <- (1 - a) Â z + a h from its output h (arXiv 1810.05997).

    Attributes:
      power: K.
      teleport: a.
    """

    power: int = 10
    teleport: float = 0.1

    def node_logits(self, graph: Graph, deterministic: bool) -> Float[Array, "nodes classes"]:
        """See `GraphNetwork`."""
        edges = normalized_edges(graph)
        x = nn.relu(Linear(self.hidden, ("vocab", "mlp"), name="layer_0")(graph.nodes, graph))
        h = Linear(self.num_classes, ("mlp", None), name="output")(self.drop(x, deterministic), graph)
        step = lambda z, _: ((1 - self.teleport) * propagate(z, graph, edges) + self.teleport * h, None)
        return jax.lax.scan(step, h, None, length=self.power)[0]


class GCNII(GraphNetwork):
    """A deep GCN with initial residual and identity mapping (arXiv 2007.02133), its layers stacked.

    Layer l of L maps h to ReLU((1 - b_l) s + b_l s W_l), s = (1 - a) Â h + a h_0, b_l = log(theta / l + 1). Dropout is
    on features, before every layer and before the output.

    Attributes:
      num_layers: L.
      residual: a, the part of the first representation h_0.
      theta: how fast W_l moves away from the identity.
    """

    num_layers: int = 20
    residual: float = 0.1
    theta: float = 0.5

    def node_logits(self, graph: Graph, deterministic: bool) -> Float[Array, "nodes classes"]:
        """See `GraphNetwork`."""
        edges = normalized_edges(graph)
        x = self.drop(graph.nodes, deterministic)
        first = nn.relu(Linear(self.hidden, ("vocab", "embed"), name="input")(x, graph))
        strengths = jnp.array([math.log(self.theta / number + 1) for number in range(1, self.num_layers + 1)])
        layers = nn.scan(
            _GCNIILayer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.residual, self.dropout, deterministic, name="layers")
        x, _ = layers(first, strengths, first, graph, edges)
        return Linear(self.num_classes, ("embed", None), name="output")(self.drop(x, deterministic), graph)


class _GCNIILayer(nn.Module):
    residual: float
    dropout: float
    deterministic: bool

    @nn.compact
    def __call__(
        self, x: Array, strength: Array, first: Array, graph: Graph, edges: NormalizedEdges
    ) -> tuple[Float[Array, "nodes embed"], None]:
        x = Dropout(self.dropout)(x, self.deterministic)
        support = (1 - self.residual) * propagate(x, graph, edges) + self.residual * first
        init = _named(nn.initializers.glorot_uniform(), ("embed", "mlp"))
        mapped = support @ self.param("kernel", init, (x.shape[-1], x.shape[-1]))
        return nn.relu((1 - strength) * support + strength * mapped), None


class GAT(GraphNetwork):
    """Two layers of attention over neighbours (arXiv 1710.10903), dropout on the input of each.

    The weight of an edge multiplies the exponential of its score, so that weights of 0 take part in no softmax; CGP's
    code multiplies the softmax instead, in the second layer only.

    Attributes:
      num_heads: of the first layer, whose outputs are joined; `hidden` is the size of one head. The second has one.
    """

    hidden: int = 8
    num_heads: int = 8

    def node_logits(self, graph: Graph, deterministic: bool) -> Float[Array, "nodes classes"]:
        """See `GraphNetwork`."""
        x = self.drop(graph.nodes, deterministic)
        x = nn.elu(GraphAttention(self.num_heads, self.hidden, "vocab", name="layer_0")(x, graph))
        return GraphAttention(1, self.num_classes, "embed", name="output")(self.drop(x, deterministic), graph)


class GraphAttention(nn.Module):
    """Each node reads a softmax-weighted mean of its neighbours and itself, for each head.

    Scores are LeakyReLU(a_s . W x_sender + a_r . W x_receiver) with slope 0.2.

    Attributes:
      num_heads: heads.
      head_dim: size of the output of one.
      axis: logical name of the input's channels; `vocab` where they are the features of the graph.
    """

    num_heads: int
    head_dim: int
    axis: str

    @nn.compact
    def __call__(self, x: Float[Array, "nodes width"], graph: Graph) -> Float[Array, "nodes outputs"]:
        """Returns the heads' outputs side by side, plus a bias."""
        heads, dim, axes = self.num_heads, self.head_dim, ("heads", "head_dim")
        glorot = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2))
        kernel = self.param("kernel", _named(glorot, (self.axis, *axes)), (x.shape[-1], heads, dim))
        kernel = graph.gated(kernel) if self.axis == "vocab" else kernel
        values = (x @ kernel.reshape(x.shape[-1], -1)).reshape(-1, heads, dim)
        init = _named(nn.initializers.glorot_uniform(), axes)
        sender_scores, receiver_scores = (
            jnp.sum(values * self.param(name, init, (heads, dim)), axis=-1) for name in ("sender", "receiver")
        )
        attention = attention_weights(sender_scores, receiver_scores, graph)
        read = graph.sum_at_receivers(values[graph.senders] * attention.edges[..., None])
        read = read + values * attention.loops[..., None]
        return read.reshape(-1, heads * dim) + self.param(
            "bias", _named(nn.initializers.zeros, (None,)), (heads * dim,)
        )


class Attention(NamedTuple):
    """What each receiver gives to its edges and its self-loop; sums to 1 over both."""

    edges: Float[Array, "edges heads"]
    loops: Float[Array, "nodes heads"]


def attention_weights(
    sender_scores: Float[Array, "nodes heads"], receiver_scores: Float[Array, "nodes heads"], graph: Graph
) -> Attention:
    """Softmax over the edges that arrive at a node and its self-loop, exponentials multiplied by the edges' weights."""
    scores = nn.leaky_relu(sender_scores[graph.senders] + receiver_scores[graph.receivers], 0.2)
    loops = nn.leaky_relu(sender_scores + receiver_scores, 0.2)
    there = jnp.where(graph.weights[:, None] > 0, scores, -jnp.inf)
    best = jnp.maximum(jax.ops.segment_max(there, graph.receivers, graph.nodes.shape[0]), loops)
    best = jax.lax.stop_gradient(best)
    # An edge of weight 0 may outscore the best of the others; its exponential must stay finite for its gradient.
    edge_parts = jnp.exp(jnp.minimum(scores - best[graph.receivers], 30.0)) * graph.weights[:, None]
    loop_parts = jnp.exp(loops - best)
    total = graph.sum_at_receivers(edge_parts) + loop_parts
    return Attention(edge_parts / total[graph.receivers], loop_parts / total)


def init_graph_params(network: GraphNetwork, sizes: GraphSizes, key: Array) -> Params:
    """Parameters of a network for graphs of these sizes; traceable."""
    return meta.unbox(_boxed(network, sizes, key))


def graph_axes(network: GraphNetwork, sizes: GraphSizes) -> PyTree:
    """The parameter tree with a tuple of logical axis names for each array; nothing is allocated."""
    boxed = jax.eval_shape(lambda: _boxed(network, sizes, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=meta.is_axis_metadata)


class GraphSizes(NamedTuple):
    """What decides the shapes of a graph network's parameters beside its config."""

    nodes: int
    edges: int
    channels: int


def _boxed(network: GraphNetwork, sizes: GraphSizes, key: Array) -> PyTree:
    edge = jnp.zeros((1, sizes.edges), jnp.int32)
    batch = {"nodes": jnp.zeros((1, sizes.nodes, sizes.channels)), "senders": edge, "receivers": edge, "edge_ids": edge}
    return network.init(key, batch)["params"]
