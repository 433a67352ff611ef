"""Graphs as batches and what is recorded of them, against counting edge by edge; no network is computed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.contracts import UserError
from t5x_ext.data.graphs import NodeGraph
from t5x_ext.models import UNPLACED
from t5x_ext.tasks import NodeClassification
from t5x_ext.tasks.graphs import PreparedNodes, RepeatedGraph, densities, graph_arrays
from t5x_ext.tasks.of_run import text_task
from t5x_ext.train import Run


@st.composite
def graphs(draw):
    """A few nodes, some edges in both directions and some in one."""
    nodes = draw(st.integers(2, 6))
    edge = st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)).filter(lambda edge: edge[0] != edge[1])
    edges = sorted(draw(st.sets(edge, min_size=1)), key=lambda edge: edge[::-1])
    senders, receivers = (np.array(side, np.int32) for side in zip(*edges))
    train = np.arange(nodes) % 2 == 0
    labels = np.arange(nodes, dtype=np.int32) % draw(st.integers(1, 3))
    return NodeGraph(np.ones((nodes, 3), np.float32), senders, receivers, labels, train, ~train, ~train)


@settings(max_examples=30)
@given(graphs())
def test_both_directions_of_a_pair_share_a_logit_and_no_two_pairs_do(graph):
    pairs = [frozenset(edge) for edge in zip(graph.senders.tolist(), graph.receivers.tolist())]
    ids = graph_arrays(graph, shared=True)["edge_ids"][0]
    assert sorted(set(ids.tolist())) == list(range(len(set(pairs))))
    for one, first in zip(pairs, ids):
        for other, second in zip(pairs, ids):
            assert (one == other) == (first == second)
    assert "edge_ids" not in graph_arrays(graph)


@settings(max_examples=8)
@given(graphs(), st.booleans())
def test_the_definition_describes_the_batch_and_has_a_logit_for_each_edge_or_pair(graph, shared):
    task = NodeClassification(data=None, share_edge_logits=shared)
    prepared = PreparedNodes(task, graph)
    edges = list(zip(graph.senders.tolist(), graph.receivers.tolist()))
    assert prepared.sizes == {
        "classes": max(graph.labels[graph.train]) + 1,
        "nodes": len(graph.nodes),
        "channels": 3,
        "edges": len(edges),
        "edge_logits": len(set(map(frozenset, edges))) if shared else len(edges),
    }
    batch = prepared.batches.read(0, 0, 1)
    specs = task.define(prepared.sizes, UNPLACED).batch
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (spec.shape, np.dtype(spec.dtype)) for name, spec in specs.items()
    }
    assert not any(spec.sharded for spec in specs.values()), "every device has the whole graph"
    assert batch["label_weights"].sum() == graph.train.sum()


@settings(max_examples=20)
@given(graphs(), st.integers(0, 99))
def test_every_batch_is_the_graph_and_its_digest_follows_any_entry(graph, index):
    batches = RepeatedGraph(graph_arrays(graph))
    for name, array in batches.read(index, 0, 1).items():
        np.testing.assert_array_equal(array, graph_arrays(graph)[name])
    assert batches.examples(index) == [batches.description["graph"]]
    assert (batches.epoch().batches, batches.epoch().examples) == (1, 1)
    labels = graph.labels.copy()
    labels[index % len(labels)] += 1
    assert RepeatedGraph(graph_arrays(graph._replace(labels=labels))).description != batches.description
    assert RepeatedGraph(graph_arrays(graph)).description == batches.description


def test_densities_count_the_entries_that_are_not_zero_of_parameters_that_have_some():
    rng = np.random.default_rng(0)
    pruned = rng.normal(size=(5, 4)) * (rng.random((5, 4)) < 0.5)
    params = {
        "layer": {"kernel": pruned, "bias": np.zeros(4)},
        "whole": {"kernel": np.ones((2, 2))},
        "gates": {"edge_logits": np.zeros(3)},
    }
    assert densities(params) == {
        "layer/kernel": {"active": sum(value != 0 for value in pruned.flat), "entries": 20},
        "gates/edge_logits": {"active": 0, "entries": 3},
    }


def test_what_is_for_text_names_the_tasks_that_it_is_for():
    run = object.__new__(Run)
    object.__setattr__(run, "task", NodeClassification(data=None))
    with pytest.raises(UserError) as error:
        text_task(run)
    message = "this is for the tasks Translation, LanguageModeling; the run's task is NodeClassification"
    assert str(error.value) == message
