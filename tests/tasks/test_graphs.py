"""Classes of nodes: what can be learned is learned under pruning, the folder opens, mistakes are one line."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import numpy as np
import pytest

import t5x_ext
from t5x_ext.contracts import UserError
from t5x_ext.data import GraphData, read_graph
from t5x_ext.models import GCN, Gates
from t5x_ext.objectives import NodeCrossEntropy
from t5x_ext.optim import PruningGroup, Regrowth, adam, gradual_pruning
from t5x_ext.tasks import NodeClassification, NodeClassifier
from t5x_ext.train import CheckpointConfig, EvaluationConfig, Run, execute

N, STEPS, PRUNED_AT = 60, 40, 20


def write_graph(path, seed=0):
    """Two communities whose features say little: edges within a community are ten times as many as those between."""
    rng = np.random.default_rng(seed)
    labels = np.arange(N) % 2
    edges = [(a, b) for a in range(N) for b in range(a) if rng.random() < (0.2 if labels[a] == labels[b] else 0.02)]
    edges += [(node, (node + 2) % N) for node in range(N)]
    features = np.abs(rng.normal(size=(N, 8)) + np.where(labels[:, None] == np.arange(8) % 2, 0.7, 0.0))
    part = np.arange(N) // 20
    masks = {f"{name}_mask": part == number for number, name in enumerate(("train", "val", "test"))}
    np.savez(path, features=features, labels=labels, edge_index=np.array(edges).T, **masks)
    return str(path)


@pytest.fixture
def run(tmp_path):
    groups = [
        PruningGroup(["kernel$"], 0.25, name="weights"),
        PruningGroup(["edge_logits$"], 0.9, name="edges", importance="value"),
        PruningGroup(["feature_logits$"], 0.5, name="features", importance="value"),
    ]
    optimizer = adam(0.02, b2=0.999, eps=1e-8, l2=5e-4, no_decay=["logits$"])
    network = partial(GCN, hidden=16, dropout=0.0, gates=Gates(edges=True, features=True))
    return Run(
        task=NodeClassification(GraphData(write_graph(tmp_path / "graph.npz")), network),
        steps=STEPS,
        optimizer=gradual_pruning(optimizer, groups, end=PRUNED_AT, every=5, regrowth=Regrowth(steps=STEPS)),
        objective=NodeCrossEntropy,
        evaluation=EvaluationConfig(10, "valid/accuracy", higher_is_better=True, select_from=PRUNED_AT),
        checkpoints=CheckpointConfig(every=0),
        log_every=10,
        tensorboard=False,
    )


def test_communities_are_found_by_a_pruned_network_and_the_folder_predicts(run, tmp_path):
    results = execute(run, str(tmp_path / "run"))
    assert results["test_accuracy"] >= 0.85
    graph = read_graph(run.task.data)
    # Exactly the asked number of entries: 8 x 16 and 16 x 2 kernels, the edges, 8 channels.
    expected = {
        "gates/edge_logits": (int(0.9 * len(graph.senders)), len(graph.senders)),
        "gates/feature_logits": (4, 8),
    }
    found = {name: (count["active"], count["entries"]) for name, count in results["density"].items()}
    assert {name: found[name] for name in expected} == expected
    kernels = [counts for name, counts in found.items() if name.endswith("kernel")]
    assert sorted(kernels) == [(8, 32), (32, 128)]
    classifier = t5x_ext.load(str(tmp_path / "run"))
    assert isinstance(classifier, NodeClassifier)
    right = (classifier.predict(graph) == graph.labels)[graph.test]
    assert np.mean(right) == pytest.approx(results["test_accuracy"])
    np.testing.assert_allclose(classifier.probabilities(graph).sum(1), 1.0, rtol=1e-5)
    other = read_graph(GraphData(write_graph(tmp_path / "other.npz", seed=1)))
    with pytest.raises(UserError, match=r"the run has \d+ edge_logits, this graph needs \d+; it is another graph"):
        classifier.predict(other)


def test_a_killed_run_ends_where_an_uninterrupted_one_does(run, tmp_path):
    whole = execute(run, str(tmp_path / "whole"))
    first = dataclasses.replace(run, checkpoints=CheckpointConfig(every=15))
    execute(dataclasses.replace(first, steps=15), str(tmp_path / "resumed"))
    again = execute(first, str(tmp_path / "resumed"))
    assert again["density"] == whole["density"]
    for name in ("test_accuracy", "test_loss", "train_loss"):
        assert again[name] == pytest.approx(whole[name], rel=1e-6)


def test_no_checkpoint_is_chosen_before_pruning_ends(run, tmp_path):
    run = dataclasses.replace(run, steps=30, evaluation=dataclasses.replace(run.evaluation, every=5, patience=100))
    execute(run, str(tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"] for row in rows if "valid/accuracy" in row}
    assert min(measured) < PRUNED_AT
    # Early checkpoints are not as sparse as the last one; the best one is.
    best = NodeClassifier.from_run(str(tmp_path / "run"), "best")
    graph = read_graph(run.task.data)
    assert np.count_nonzero(best._params["gates"]["feature_logits"]) == 4
    assert best.predict(graph).shape == (N,)


def test_mistakes_are_one_line(run, tmp_path):
    execute(dataclasses.replace(run, steps=2), str(tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "model.json").read_text())
    (tmp_path / "run" / "model.json").write_text(json.dumps({**record, "network": "Mine"}))
    with pytest.raises(UserError, match="network 'Mine' is not built in; known are GCN"):
        t5x_ext.load(str(tmp_path / "run"), "last")
    (tmp_path / "run" / "model.json").write_text(json.dumps({**record, "fields": {**record["fields"], "sides": 3}}))
    with pytest.raises(UserError, match="does not describe a GCN"):
        t5x_ext.load(str(tmp_path / "run"), "last")
    missing = dataclasses.replace(run, task=NodeClassification(GraphData(str(tmp_path / "absent.npz"))))
    with pytest.raises(UserError, match=r"absent.npz does not exist"):
        execute(missing, str(tmp_path / "nothing"))
