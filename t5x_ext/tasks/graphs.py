"""Classes of the nodes of one graph: a graph network, accuracies on the parts of a split, densities after pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from t5x_ext.checkpoints import RunFolder, run_params, trees
from t5x_ext.contracts import Batch, Epoch, Frozen, Params, PyTree, UserError
from t5x_ext.data.graphs import GraphData, NodeGraph, read_graph
from t5x_ext.data.plan import SkippingPlan
from t5x_ext.models import Placement
from t5x_ext.models.graphs import (
    APPNP,
    GAT,
    GCN,
    GCNII,
    SGC,
    Gates,
    GraphNetwork,
    GraphSizes,
    graph_axes,
    init_graph_params,
)
from t5x_ext.parallel import global_batch
from t5x_ext.storage.digests import params_digest
from t5x_ext.train.program import Program
from t5x_ext.train.task import ArraySpec, Definition, Evaluator

TASK = "node_classification"
"""What the record of such a run calls its task."""

NETWORKS: dict[str, type[GraphNetwork]] = {network.__name__: network for network in (GCN, GAT, SGC, APPNP, GCNII)}
"""Networks that a record may name; a run with another one is opened by its own module."""

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class NodeClassification:
    """Classes of nodes, the whole graph in every batch (`train.Task`).

    Attributes:
      data: the graph.
      network: called with `num_classes` and `num_edge_logits`, it gives the model: `models.graphs.GCN` or its like.
      share_edge_logits: whether both directions of an edge have one logit, so that they are pruned together.
    """

    data: GraphData
    network: Callable[..., GraphNetwork] = GCN
    share_edge_logits: bool = False

    @property
    def rows(self) -> int:
        """1: a graph is one example, and every device has it."""
        return 1

    def define(self, sizes: Mapping[str, int], placement: Placement) -> Definition:
        """The network; `sizes` gives `classes`, `nodes`, `channels`, `edges` and `edge_logits`.

        Parameters are sharded as the run says; a graph's arrays are not, so `placement` has nothing to do.
        """
        del placement
        network = self.network(num_classes=sizes["classes"], num_edge_logits=sizes["edge_logits"])
        shape = GraphSizes(sizes["nodes"], sizes["edges"], sizes["channels"])
        whole = lambda dtype, *shape: ArraySpec((1, *shape), dtype, sharded=False)
        batch = {
            "nodes": whole(np.float32, shape.nodes, shape.channels),
            "senders": whole(np.int32, shape.edges),
            "receivers": whole(np.int32, shape.edges),
            "labels": whole(np.int32, shape.nodes),
            "label_weights": whole(np.float32, shape.nodes),
        }
        if self.share_edge_logits:
            batch["edge_ids"] = whole(np.int32, shape.edges)
        return Definition(network, partial(init_graph_params, network, shape), graph_axes(network, shape), batch)

    def prepare(self, folder: RunFolder, cache_dir: str | None, seed: int) -> PreparedNodes:
        """Reads the graph."""
        del folder, cache_dir, seed  # a graph is read in a second, and has no order
        return PreparedNodes(self, read_graph(self.data))


class PreparedNodes:
    """A node classification with its graph (`train.Prepared`).

    Attributes:
      task: what is learned.
      graph: features, edges, labels and split.
      sizes: see `NodeClassification.define`.
      batches: the graph, again and again.
      has_test: True: a graph without test nodes is refused.
    """

    has_test = True

    def __init__(self, task: NodeClassification, graph: NodeGraph):
        """Joins a task and its graph."""
        self.task, self.graph = task, graph
        arrays = graph_arrays(graph, shared=task.share_edge_logits)
        self.sizes = {
            "classes": graph.num_classes,
            "nodes": graph.nodes.shape[0],
            "channels": graph.nodes.shape[1],
            "edges": len(graph.senders),
            "edge_logits": int(arrays["edge_ids"].max()) + 1 if "edge_ids" in arrays else len(graph.senders),
        }
        self.batches = RepeatedGraph(arrays)

    def evaluators(self, program: Program) -> Sequence[Evaluator]:
        """Accuracies and losses on the training, validation and test nodes."""
        return (NodeAccuracies(program, self),)

    def test(self, program: Program, params: Params) -> dict[str, Any]:
        """Accuracies of the final weights, and the density of every parameter that has entries of exactly 0."""
        accuracies = NodeAccuracies(program, self)(params, {}, (), 0)
        return {name.replace("/", "_"): value for name, value in accuracies.items()} | {"density": densities(params)}

    def record(self) -> dict[str, Any]:
        """The network and the sizes of its graph."""
        network = self.task.network(num_classes=self.sizes["classes"], num_edge_logits=self.sizes["edge_logits"])
        fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network) if field.init}
        fields = {name: value for name, value in fields.items() if name not in ("parent", "name")}
        return {
            "task": TASK,
            "network": type(network).__name__,
            "fields": fields | {"gates": dataclasses.asdict(network.gates)},
            "graph": self.batches.description["graph"],
            "share_edge_logits": self.task.share_edge_logits,
        }


class RepeatedGraph(SkippingPlan):
    """One graph as every batch (`contracts.BatchSource`); an epoch is one update.

    Attributes:
      arrays: of the batch.
      description: its digest.
    """

    rows = 1

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        """Repeats a batch."""
        super().__init__()
        self.arrays = dict(arrays)
        self.description: Mapping[str, Any] = {"graph": params_digest(self.arrays)}

    def read(self, index: int, start: int, stop: int) -> Mapping[str, np.ndarray]:
        """The batch, the same for any index."""
        del index, start, stop
        return self.arrays

    def examples(self, index: int) -> list[Any]:
        """The digest of the graph."""
        return [self.description["graph"]]

    def work(self, index: int) -> float | None:
        """None: not counted."""
        return None

    def memory(self) -> Any:
        """Nothing."""
        return None

    def remember(self, memory: Any) -> None:
        """Nothing."""

    def epoch(self) -> Epoch:
        """One batch with one example."""
        return Epoch(1, 1)


class NodeAccuracies:
    """`valid/accuracy`, `valid/loss` and those of `train` and `test`, from one pass over the graph (`train.Evaluator`).

    An accuracy is the part of the nodes whose label has the largest logit, a loss their mean cross-entropy in nats.
    """

    name = "accuracies of nodes"
    every = None

    def __init__(self, program: Program, prepared: PreparedNodes):
        """Prepares the measurement; the program is compiled when first used."""
        self._program, self._batch, graph = program, prepared.batches.arrays, prepared.graph
        self._weights = np.stack([graph.train, graph.valid, graph.test]).astype(np.float32)

    def __call__(self, params: Params, frozen: Frozen, mutable: PyTree, step: int) -> dict[str, float]:
        """Measures."""
        self._program.check_interrupt()
        placed = global_batch(self._program.mesh, self._batch, ())
        accuracies, losses = jax.device_get(_measure(self._program.model, params, placed, self._weights))
        return {
            f"{part}/{name}": float(value)
            for name, values in (("accuracy", accuracies), ("loss", losses))
            for part, value in zip(PARTS, values, strict=True)
        }


class NodeClassifier:
    """A trained node classification, ready to use on a graph.

    Where edges have logits, it must be the graph that the run was trained on.
    """

    def __init__(self, network: GraphNetwork, params: Params, shared: bool = False):
        """Joins a network and its parameters.

        Args:
          network: the model.
          params: its parameters.
          shared: whether both directions of an edge have one logit.
        """
        self._network, self._params, self._shared = network, jax.tree.map(jnp.asarray, params), shared

    @classmethod
    def from_run(cls, run_dir: epath.PathLike, checkpoint: str | int = "best") -> NodeClassifier:
        """Opens the folder of a run.

        Raises:
          UserError: if it is of another task or damaged, or its network is not built in.
        """
        folder = RunFolder(run_dir)
        record = folder.read_record()
        if record["task"] != TASK:
            raise UserError(f"{run_dir} is a run of the task {record['task']!r}, which classifies no nodes")
        if record["network"] not in NETWORKS:
            known = ", ".join(NETWORKS)
            raise UserError(f"{folder.model_json}: network {record['network']!r} is not built in; known are {known}")
        fields = dict(record["fields"])
        try:
            network = NETWORKS[record["network"]](**fields | {"gates": Gates(**fields["gates"])})
        except (TypeError, KeyError) as error:
            raise UserError(f"{folder.model_json} does not describe a {record['network']}: {error}") from error
        return cls(network, run_params(folder, checkpoint), record["share_edge_logits"])

    def probabilities(self, graph: NodeGraph) -> Float[np.ndarray, "nodes classes"]:
        """The probability of each class for each node; float32.

        Raises:
          UserError: if the graph has other channels, or other edges where edges have logits.
        """
        arrays = graph_arrays(graph, shared=self._shared)
        for name, size in (("feature_logits", graph.nodes.shape[1]), ("edge_logits", self._edges(arrays))):
            known = self._params.get("gates", {}).get(name)
            if known is not None and known.shape != (size,):
                raise UserError(f"the run has {known.size} {name}, this graph needs {size}; it is another graph")
        return np.asarray(jax.nn.softmax(_logits(self._network, self._params, arrays)[0]))

    def predict(self, graph: NodeGraph) -> Int[np.ndarray, " nodes"]:
        """The most probable class of each node."""
        return self.probabilities(graph).argmax(axis=-1)

    def _edges(self, arrays: Mapping[str, np.ndarray]) -> int:
        return int(arrays["edge_ids"].max()) + 1 if self._shared else arrays["senders"].shape[1]


def graph_arrays(graph: NodeGraph, *, shared: bool = False) -> dict[str, np.ndarray]:
    """A graph as a batch, its training nodes counting.

    Args:
      graph: the graph.
      shared: whether both directions of an edge have one logit.
    """
    arrays = {
        "nodes": graph.nodes[None],
        "senders": graph.senders[None],
        "receivers": graph.receivers[None],
        "labels": graph.labels[None],
        "label_weights": graph.train[None].astype(np.float32),
    }
    return arrays | ({"edge_ids": graph.pair_ids()[None]} if shared else {})


def densities(params: Params) -> dict[str, dict[str, int]]:
    """Entries that are not 0 and all entries of each parameter that has some of exactly 0, without biases."""
    counts = {
        name: {"active": int(np.count_nonzero(leaf)), "entries": leaf.size}
        for name, leaf in trees.flatten(params).items()
        if not name.endswith("bias")
    }
    return {name: count for name, count in counts.items() if count["active"] < count["entries"]}


@partial(jax.jit, static_argnums=0)
def _logits(network: GraphNetwork, params: Params, batch: Batch) -> Float[Array, "1 nodes classes"]:
    scores: Any = network.apply({"params": params}, batch)
    return scores


@partial(jax.jit, static_argnums=0)
def _measure(
    network: GraphNetwork, params: Params, batch: Batch, weights: Float[Array, "parts nodes"]
) -> tuple[Float[Array, " parts"], Float[Array, " parts"]]:
    """Accuracy and mean cross-entropy over the nodes of each part."""
    log_probs = jax.nn.log_softmax(_logits(network, params, batch)[0])
    labels = batch["labels"][0]
    label_log_probs = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    counts = jnp.sum(weights, axis=1)
    hits = (jnp.argmax(log_probs, axis=-1) == labels).astype(jnp.float32)
    return weights @ hits / counts, -(weights @ label_log_probs) / counts
