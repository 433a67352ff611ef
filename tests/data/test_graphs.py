"""Graphs from every format that is read, and every mistake in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.data import GraphData, read_graph

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data" / "graphs"
N = 12


def plain(**changes):
    """Twelve nodes of two classes on a path, a loop and a double edge among the edges."""
    senders = np.array([*range(N - 1), 3, 0])
    receivers = np.array([*range(1, N), 3, 1])
    arrays = {
        "features": np.arange(N * 3, dtype=np.float32).reshape(N, 3) % 5,
        "labels": np.arange(N) % 2,
        "edge_index": np.stack([senders, receivers]),
        "train_mask": np.arange(N) < 4,
        "val_mask": (np.arange(N) >= 4) & (np.arange(N) < 7),
        "test_mask": np.arange(N) >= 7,
    }
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def save(tmp_path, arrays, name="graph.npz"):
    path = tmp_path / name
    np.savez(path, **arrays)
    return str(path)


def read(tmp_path, arrays, **options):
    return read_graph(GraphData(save(tmp_path, arrays), **options))


def sparse(name, dense):
    rows, columns = np.nonzero(dense)
    pointers = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(dense)))])
    return {
        f"{name}_data": dense[rows, columns],
        f"{name}_indices": columns,
        f"{name}_indptr": pointers,
        f"{name}_shape": np.array(dense.shape),
    }


def edges_of(graph):
    return set(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))


PATH = {(i, i + 1) for i in range(N - 1)}
BOTH = PATH | {(b, a) for a, b in PATH}


# --- What is read ----------------------------------------------------------------------------------------------------


def test_edges_are_in_both_directions_without_loops_and_duplicates(tmp_path):
    graph = read(tmp_path, plain())
    assert edges_of(graph) == BOTH
    assert len(graph.senders) == len(BOTH)
    assert (np.diff(graph.receivers) >= 0).all()
    assert edges_of(read(tmp_path, plain(), undirected=False)) == PATH
    ids = graph.pair_ids()
    assert ids.max() + 1 == len(PATH)
    assert (np.bincount(ids) == 2).all()


def test_features_are_divided_by_their_sum_and_empty_rows_stay(tmp_path):
    features = plain()["features"]
    features[5] = 0
    graph = read(tmp_path, plain(features=features))
    np.testing.assert_allclose(graph.nodes.sum(1), np.where(np.arange(N) == 5, 0, 1), rtol=1e-6)
    assert graph.nodes.dtype == np.float32
    np.testing.assert_array_equal(read(tmp_path, plain(features=features), normalize_features=False).nodes, features)


@pytest.mark.parametrize(
    "changes",
    [
        {"edge_index": None, "edges": plain()["edge_index"].T},
        {"edge_index": None, "senders": plain()["edge_index"][0], "receivers": plain()["edge_index"][1]},
        {"features": None, "x": plain()["features"], "labels": None, "y": plain()["labels"].astype(float)},
        {"features": None, **sparse("attr", plain()["features"])},
        {"labels": np.array(["even", "odd"])[plain()["labels"]]},
        {"labels": np.eye(2, dtype=np.int8)[plain()["labels"]]},
        {"labels": plain()["labels"][:, None]},
        {"train_mask": None, "train_index": np.arange(4)},
        {"val_mask": None, "valid_masks": plain()["val_mask"][None]},
        {"val_mask": None, "val_masks": np.stack([plain()["val_mask"]] * 2, axis=1)},
    ],
)
def test_names_and_shapes_that_other_collections_use(tmp_path, changes):
    expected, graph = read(tmp_path, plain()), read(tmp_path, plain(**changes))
    for a, b in zip(expected, graph, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_adjacency_matrix_gives_the_edges(tmp_path):
    matrix = np.zeros((N, N), np.float32)
    matrix[tuple(plain()["edge_index"])] = 1
    assert edges_of(read(tmp_path, plain(edge_index=None, **sparse("adj", matrix)))) == BOTH
    assert edges_of(read(tmp_path, plain(edge_index=None, adj=matrix))) == BOTH


def test_planetoids_arrays_with_test_nodes_that_are_missing(tmp_path):
    """As in Citeseer: test indices out of order, and nodes in no part, without features and label."""
    features, one_hot = plain()["features"], np.eye(2, dtype=np.int8)[plain()["labels"]]
    test_index = np.array([10, 8, 11])
    arrays = {
        **sparse("x", features[:4]),
        **sparse("allx", features[:8]),
        **sparse("tx", features[test_index]),
        "y": one_hot[:4],
        "ally": one_hot[:8],
        "ty": one_hot[test_index],
        "edges": plain()["edge_index"],
        "test_index": test_index,
        "n_nodes": np.array(N),
    }
    graph = read(tmp_path, arrays, normalize_features=False)
    present = np.arange(N) != 9
    np.testing.assert_array_equal(graph.nodes, features * present[:, None])
    np.testing.assert_array_equal(graph.labels, np.where(present, np.arange(N) % 2, -1))
    assert graph.train.nonzero()[0].tolist() == [0, 1, 2, 3]
    assert graph.valid.nonzero()[0].tolist() == [4, 5, 6, 7]
    assert graph.test.nonzero()[0].tolist() == [8, 10, 11]
    assert edges_of(graph) == BOTH


def test_one_of_several_splits_and_a_random_one(tmp_path):
    masks = np.stack([np.arange(N) < 4, np.arange(N) >= 8])
    arrays = plain(train_mask=None, train_masks=masks, val_mask=None, val_masks=np.roll(masks, 4, 1))
    arrays["test_mask"] = np.roll(masks[0], 8)
    del arrays["test_mask"]
    arrays["test_masks"] = np.roll(masks, 8, 1)
    assert read(tmp_path, arrays, split=1).train.nonzero()[0].tolist() == [8, 9, 10, 11]
    random = plain(train_mask=None, val_mask=None, test_mask=None)
    graph = read(tmp_path, random, split=3, train_per_class=2)
    assert np.bincount(graph.labels[graph.train]).tolist() == [2, 2]
    assert graph.valid.sum() == 2
    assert graph.test.sum() == 6
    assert (graph.train == read(tmp_path, random, split=3, train_per_class=2).train).all()
    assert (graph.train != read(tmp_path, random, split=4, train_per_class=2).train).any()


CONTENT = "\n".join(f"p{i} {i % 2} 1 {'AB'[i % 2]}" for i in range(N))


def test_content_and_cites(tmp_path):
    (tmp_path / "g.content").write_text(CONTENT)
    (tmp_path / "g.cites").write_text("\n".join(f"p{i}\tp{i + 1}" for i in range(N - 1)))
    for path in (tmp_path, tmp_path / "g.content", tmp_path / "g.cites"):
        graph = read_graph(GraphData(str(path), train_per_class=2))
        assert edges_of(graph) == BOTH
        assert graph.labels.tolist() == [0, 1] * 6
    directed = read_graph(GraphData(str(tmp_path), train_per_class=2, undirected=False))
    assert edges_of(directed) == {(i + 1, i) for i in range(N - 1)}, "who cites sends, who is cited receives"


def test_geom_gcn(tmp_path):
    lines = [f"{i}\t{i % 2},1\t{i % 2}" for i in reversed(range(N))]
    (tmp_path / "out1_node_feature_label.txt").write_text("node_id\tfeature\tlabel\n" + "\n".join(lines))
    edges = "\n".join(f"{i}\t{i + 1}" for i in range(N - 1))
    (tmp_path / "out1_graph_edges.txt").write_text("node_id\tnode_id\n" + edges)
    masks = {name: plain()[name].astype(float) for name in ("train_mask", "val_mask", "test_mask")}
    save(tmp_path, masks, "texas_split_0.6_0.2_0.npz")
    graph = read_graph(GraphData(str(tmp_path), undirected=False, normalize_features=False))
    assert edges_of(graph) == PATH
    assert graph.nodes[:, 0].tolist() == [0.0, 1.0] * 6
    assert graph.labels.tolist() == [0, 1] * 6
    assert graph.train.sum() == 4
    with pytest.raises(UserError, match=r"no \*_split_\*_7.npz"):
        read_graph(GraphData(str(tmp_path), split=7))


# --- Mistakes --------------------------------------------------------------------------------------------------------


MISTAKES = [
    (
        {"edge_index": np.array([[0, 1], [1, 12]])},
        "edge 1 goes from node 1 to node 12, but the graph has nodes 0 to 11; .*missing_nodes = 'drop'",
    ),
    ({"edge_index": np.array([[0, -1], [1, 2]])}, "edge 1 goes from node -1 to node 2"),
    ({"labels": np.arange(N) % 2 + 2 * (np.arange(N) == 9)}, "node 9 has label 3, which no training node has; .* 0, 1"),
    ({"labels": np.where(np.arange(N) == 5, -1, 0)}, "node 5 is a validation node and has no label"),
    ({"labels": np.eye(2)[np.arange(N) % 2] + (np.arange(N) == 4)[:, None]}, "node 4 has 2 labels; a node must have"),
    ({"labels": np.arange(N) / 2}, "labels have dtype float64; they must be whole numbers or names"),
    ({"labels": np.arange(N - 1) % 2}, "11 labels do not fit 12 nodes"),
    (
        {"features": np.where(np.arange(N * 3).reshape(N, 3) == 7, np.nan, 1)},
        "node 2 has a feature that is not",
    ),
    ({"features": np.ones(N)}, r"features have shape \(12,\); they must be \[nodes, channels\]"),
    ({"features": None}, "has no array called any of x, features, .*; its arrays are edge_index, labels"),
    ({"edge_index": np.array([[0, 0], [0, 0]])}, "no edges between different nodes"),
    ({"edge_index": np.ones((3, 4), int)}, r"edges have shape \(3, 4\) and dtype int64; want integers \[2, edges\]"),
    ({"val_mask": None}, "has train_mask, test_mask but no val_mask"),
    ({"val_mask": plain()["test_mask"]}, "node 7 is in two parts of the split"),
    ({"val_mask": np.zeros(N, bool)}, "the split has no validation nodes"),
    (
        {"train_mask": None, "train_index": np.array([0, 1, 40])},
        "train_index names node 40; the graph has nodes",
    ),
    (
        {"features": None, **sparse("x", np.eye(N)), "x_indptr": np.arange(5)},
        "are no matrix of shape 12 x 12",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_said_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, plain(**changes))
    assert "\n" not in str(caught.value)
    assert "graph.npz" in str(caught.value)


def test_edges_of_missing_nodes_can_be_skipped(tmp_path):
    arrays = plain(edge_index=np.array([[0, 1, 5], [1, 12, 6]]))
    assert edges_of(read(tmp_path, arrays, missing_nodes="drop", undirected=False)) == {(0, 1), (5, 6)}
    (tmp_path / "g.content").write_text(CONTENT)
    (tmp_path / "g.cites").write_text("p0 p1\np2 stranger\n")
    with pytest.raises(UserError, match=r"g.cites, line 2: an edge names node stranger, which is not there"):
        read_graph(GraphData(str(tmp_path / "g.cites")))
    data = GraphData(str(tmp_path / "g.cites"), missing_nodes="drop", train_per_class=2)
    assert edges_of(read_graph(data)) == {(0, 1), (1, 0)}


def test_no_pickle_is_opened(tmp_path):
    (tmp_path / "ind.cora.allx").write_bytes(pickle.dumps([1]))
    for path in (tmp_path, tmp_path / "ind.cora.allx"):
        with pytest.raises(UserError, match=r"Python pickles, which can run any program .* save its arrays with"):
            read_graph(GraphData(str(path)))
    objects = save(tmp_path, plain(labels=np.array([{}] * N)))
    with pytest.raises(UserError, match="Python objects, which are not opened"):
        read_graph(GraphData(objects))


def test_files_that_are_none(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    (tmp_path / "graph.pt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("absent.npz", "does not exist; give an .npz file"),
        ("broken.npz", "cannot be read as .npz"),
        ("graph.pt", "is in no format that is known"),
        ("empty", "is a folder without a graph"),
    ):
        with pytest.raises(UserError, match=message):
            read_graph(GraphData(str(tmp_path / name)))
    for options, message in (({"split": -1}, "split is -1"), ({"missing_nodes": "keep"}, "'error' or 'drop'")):
        with pytest.raises(UserError, match=message):
            GraphData("x", **options)


# --- Real data -------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/graphs")
def test_cora_and_wisconsin():
    cora = read_graph(GraphData(str(SHARED / "cora.npz")))
    assert (cora.nodes.shape, len(cora.senders), cora.num_classes) == ((2708, 1433), 10556, 7)
    assert [int(part.sum()) for part in (cora.train, cora.valid, cora.test)] == [140, 500, 1000]
    wisconsin = read_graph(GraphData(str(SHARED / "wisconsin.npz"), split=3))
    assert (wisconsin.nodes.shape, wisconsin.num_classes) == ((251, 1703), 5)
    assert [int(part.sum()) for part in (wisconsin.train, wisconsin.valid, wisconsin.test)] == [120, 80, 51]
