#!/usr/bin/env python3
"""Gradual pruning of graph networks: accuracies at densities of weights, edges and features, with controls.

example: scripts/bench_cgp.py --graph=../shared/data/graphs/cora.npz --out=cgp.json

Every arm is trained for 200 updates from --seeds different starts and measured every 5 updates from the end of pruning
on (dense arms from the beginning); the accuracy of the test nodes is that of the best measurement on the validation
nodes. What was found is written to --out after every run, with the processor seconds that it took, and is not computed
again. The table is printed at the end.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from t5x_ext.data import GraphData, NodeGraph, read_graph
from t5x_ext.models import APPNP, GAT, GCN, GCNII, SGC, Gates
from t5x_ext.models.graphs import GraphNetwork, GraphSizes, init_graph_params
from t5x_ext.objectives import NodeCrossEntropy
from t5x_ext.optim import PruningGroup, Regrowth, adam, gradual_pruning, mean_accumulator, pruning_masks
from t5x_ext.tasks.graphs import graph_arrays
from t5x_ext.train import create_state, make_train_step

_GRAPH = flags.DEFINE_string("graph", None, "a graph in a format of data.graphs", required=True)
_OUT = flags.DEFINE_string("out", None, "file for the numbers as JSON", required=True)
_ARMS = flags.DEFINE_list("arms", [], "which arms, by name; none: all")
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each arm")
_MINUTES = flags.DEFINE_float("minutes", 20.0, "processor minutes after which no further run begins")

STEPS, END, EVERY, MEASURE_EVERY = 200, 100, 10, 5
AUTHORS = {"edge_mean": 0.0, "edge_deviation": 1.0, "straight_through": False}


class Arm(NamedTuple):
    """One way of training."""

    name: str
    network: Callable[..., GraphNetwork] = GCN
    hidden: int = 512
    weights: float | None = None  # densities at the end; None: the group is not pruned
    edges: float | None = None
    features: float | None = None
    authors: bool = False  # gates, ranking and decay of logits as in the authors' code
    rate: float | None = 0.2  # of death and regrowth at the start; None: nothing grows again
    random_edges: float = 1.0  # part of the edges that is there at all
    edge_weights: bool = False  # whether edges have weights though they are not pruned

    @property
    def gates(self) -> Gates:
        """What the model multiplies edges and features by."""
        options: dict[str, Any] = AUTHORS if self.authors else {}
        return Gates(self.edges is not None or self.edge_weights, self.features is not None, **options)

    def groups(self) -> list[PruningGroup]:
        """What is pruned."""
        importance = "magnitude" if self.authors else "value"
        groups = (
            (self.weights, PruningGroup(["kernel$"], self.weights or 1.0, name="weights")),
            (self.edges, PruningGroup(["edge_logits"], self.edges or 1.0, importance=importance, name="edges")),
            (
                self.features,
                PruningGroup(["feature_logits"], self.features or 1.0, importance=importance, name="features"),
            ),
        )
        return [group for density, group in groups if density is not None]


ALL = {"weights": 0.1, "edges": 0.9, "features": 0.5}
ARMS = (
    Arm("GCN dense"),
    Arm("GCN W .1", weights=0.1),
    Arm("GCN W .1 A .9 F .5, authors", **ALL, authors=True),
    Arm("GCN A .5, authors", edges=0.5, authors=True),
    Arm("GCN A .9, authors", edges=0.9, authors=True),
    Arm("GCN-128 dense", hidden=128),
    Arm("GCN-128 A .5, authors", hidden=128, edges=0.5, authors=True),
    Arm("GCN-128 A .5", hidden=128, edges=0.5),
    Arm(
        "GCN-128 random half of the edges, authors' weights",
        hidden=128,
        random_edges=0.5,
        edge_weights=True,
        authors=True,
    ),
    Arm("GCN-128 random half of the edges, no weights", hidden=128, random_edges=0.5),
    Arm("GCN-128 W .1 A .9 F .5", hidden=128, **ALL),
    Arm("GCN-128 W .1 A .9 F .5, no regrowth", hidden=128, **ALL, rate=None),
    Arm("GAT dense", GAT, 8),
    Arm("GAT W .1 A .9 F .5", GAT, 8, **ALL),
    Arm("SGC dense", SGC),
    Arm("SGC W .1 A .9 F .5", SGC, **ALL),
    Arm("APPNP-64 dense", APPNP, 64),
    Arm("APPNP-64 W .1 A .9 F .5", APPNP, 64, **ALL),
    Arm("GCNII-64 dense", GCNII, 64),
    Arm("GCNII-64 W .1 A .9 F .5", GCNII, 64, **ALL),
    Arm("GCN F .5", features=0.5),
    Arm("GCN W .01", weights=0.01),
    Arm("GCN W .1 A .9, authors", weights=0.1, edges=0.9, authors=True),
    Arm("GCN W .1 A .9 F .5", **ALL),
)


def main(arguments: Sequence[str]) -> None:
    """Trains every arm."""
    del arguments
    out, graph = Path(_OUT.value), read_graph(GraphData(_GRAPH.value))
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    for arm in ARMS:
        known = {row["seed"] for row in rows if row["arm"] == arm.name}
        missing = [seed for seed in range(_SEEDS.value) if seed not in known]
        if not missing or (_ARMS.value and arm.name not in _ARMS.value):
            continue
        if sum(row["processor_seconds"] for row in rows) > 60 * _MINUTES.value:
            break
        for row in runs(arm, graph, missing):
            rows.append(row)
            out.write_text(json.dumps(rows, indent=1))
            print(row, flush=True)
    print(table(rows))


def runs(arm: Arm, graph: NodeGraph, seeds: Sequence[int]) -> Any:
    """The runs of an arm; its programs are compiled once, and the first run pays for that."""
    begun = time.process_time()
    graph = with_part_of_edges(graph, arm.random_edges)
    network = arm.network(num_classes=graph.num_classes, hidden=arm.hidden, gates=arm.gates)
    sizes = GraphSizes(*graph.nodes.shape[:1], len(graph.senders), graph.nodes.shape[1])
    batch = jax.tree.map(jnp.asarray, graph_arrays(graph))
    inner = adam(0.01, b2=0.999, eps=1e-8, l2=5e-4, no_decay=() if arm.authors else ("logits$",))
    groups, regrowth = arm.groups(), arm.rate and Regrowth(arm.rate, 0.005, "momentum", steps=STEPS)
    optimizer = gradual_pruning(inner, groups, end=END, every=EVERY, regrowth=regrowth or None) if groups else inner
    step = make_train_step(NodeCrossEntropy(network), optimizer, mean_accumulator(), seed=0)
    step = jax.jit(step, donate_argnums=0)
    parts = np.stack([graph.valid, graph.test])

    @jax.jit
    def accuracies(params: Any, batch: Any) -> jax.Array:
        hits = jnp.argmax(network.apply({"params": params}, batch)[0], axis=-1) == batch["labels"][0]
        return (parts @ hits.astype(jnp.float32)) / parts.sum(1)

    for seed in seeds:
        params = init_graph_params(network, sizes, jax.random.key(seed))
        state = create_state(params, optimizer, with_ema=False)
        # Another start of the count is another sequence of dropout keys, and the same program.
        state = state._replace(step=state.step + seed * 10**6)
        best: tuple[float, float] = (-1.0, 0.0)
        for number in range(1, STEPS + 1):
            state, _ = step(state, {}, batch)
            if number % MEASURE_EVERY == 0 and (number > END or not groups):
                valid, test = (float(value) for value in accuracies(state.params, batch))
                best = max(best, (valid, test), key=lambda pair: pair[0])
        found = {"arm": arm.name, "seed": seed, "valid": best[0], "test": best[1], "active": active(state, groups)}
        now = time.process_time()
        yield found | {"processor_seconds": round(now - begun, 1)}
        begun = now


def with_part_of_edges(graph: NodeGraph, part: float) -> NodeGraph:
    """A random part of the directed edges, the same for all runs."""
    if part == 1.0:
        return graph
    edges = len(graph.senders)
    kept = np.sort(np.random.default_rng(0).permutation(edges)[: int(edges * part)])
    return graph._replace(senders=graph.senders[kept], receivers=graph.receivers[kept])


def active(state: Any, groups: Sequence[PruningGroup]) -> dict[str, str]:
    """Active entries of all, by parameter."""
    if not groups:
        return {}
    masks = jax.tree_util.tree_leaves_with_path(pruning_masks(state.optimizer_state, state.params))
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): f"{int(mask.sum())}/{mask.size}" for path, mask in masks}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean test accuracy in per cent with its standard error, by arm."""
    lines = ["| arm | test accuracy, % | validation, % | runs | processor seconds a run |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == name]
        cells = [spread([100 * row[part] for row in own]) for part in ("test", "valid")]
        seconds = statistics.mean(row["processor_seconds"] for row in own)
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {len(own)} | {seconds:.0f} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard error."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


if __name__ == "__main__":
    app.run(main)
