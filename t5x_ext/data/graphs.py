"""Graphs with labelled nodes from files: features, edges, labels and a split into training, validation and test nodes.

Read are (see `read_graph`):

- `.npz` in Planetoid's layout: `allx`, `tx`, `ally`, `ty`, `y`, `test_index`, `edges`;
- `.npz` with whole arrays: features, labels, edges or an adjacency matrix, and masks or indices of a split;
- `NAME.content` and `NAME.cites`, as Cora and Citeseer were first published;
- a folder in Geom-GCN's layout: `out1_node_feature_label.txt`, `out1_graph_edges.txt`, splits as `*_split_*.npz`.

No pickle is opened, for a pickle may run any program.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from t5x_ext.contracts import UserError

UNKNOWN = -1
"""Label of a node without one."""

_FORMATS = (
    "give an .npz file (Planetoid's arrays, or features, labels and edges), NAME.content beside NAME.cites, or "
    "a folder in Geom-GCN's layout"
)
_FEATURES = ("x", "features", "node_features", "feat", "attr_matrix", "attr")
_LABELS = ("y", "labels", "node_labels", "label")
_EDGES = ("edges", "edge_index")
_ADJACENCY = ("adj_matrix", "adj")
_SPLIT = {
    "train": ("train_mask", "train_masks", "train_index", "train_idx", "idx_train"),
    "valid": ("val_mask", "val_masks", "valid_mask", "valid_masks", "val_index", "valid_index", "val_idx", "idx_val"),
    "test": ("test_mask", "test_masks", "test_index", "test_idx", "idx_test"),
}


@dataclass(frozen=True)
class GraphData:
    """Where a graph is and how it is read.

    Attributes:
      path: a file or folder in one of the formats of `data.graphs`.
      split: which split, where the file has several; the seed of a random one, where it has none.
      undirected: whether every edge is there in both directions; False keeps directions as they are.
      normalize_features: whether the features of each node are divided by the sum of their magnitudes.
      missing_nodes: what happens to an edge of a node that is not there: `"error"`, or `"drop"` the edge.
      train_per_class: training nodes of each class in a random split, which takes 500 further nodes for validation
        and 1,000 for the test, or a third and the rest of a smaller graph.

    Raises:
      UserError: for values out of range.
    """

    path: str
    split: int = 0
    undirected: bool = True
    normalize_features: bool = True
    missing_nodes: Literal["error", "drop"] = "error"
    train_per_class: int = 20

    def __post_init__(self) -> None:
        for name, least in (("split", 0), ("train_per_class", 1)):
            if getattr(self, name) < least:
                raise UserError(f"GraphData.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.missing_nodes not in ("error", "drop"):
            raise UserError(f"GraphData.missing_nodes is {self.missing_nodes!r}; it must be 'error' or 'drop'")


class NodeGraph(NamedTuple):
    """A graph with labelled nodes; edges are sorted by receiver, without loops and duplicates."""

    nodes: Float[np.ndarray, "nodes channels"]  # float32
    senders: Int[np.ndarray, " edges"]  # int32
    receivers: Int[np.ndarray, " edges"]  # int32
    labels: Int[np.ndarray, " nodes"]  # int32; -1: none
    train: Bool[np.ndarray, " nodes"]
    valid: Bool[np.ndarray, " nodes"]
    test: Bool[np.ndarray, " nodes"]

    @property
    def num_classes(self) -> int:
        """Classes of the training nodes."""
        return int(self.labels[self.train].max()) + 1

    def pair_ids(self) -> Int[np.ndarray, " edges"]:
        """The number of each edge's pair of nodes, the same for both directions; int32."""
        low, high = np.minimum(self.senders, self.receivers), np.maximum(self.senders, self.receivers)
        keys = low.astype(np.int64) * len(self.nodes) + high
        return np.unique(keys, return_inverse=True)[1].reshape(-1).astype(np.int32)


class _Raw(NamedTuple):
    """What a file holds, before it is checked."""

    nodes: np.ndarray  # [nodes, channels]
    edges: np.ndarray  # [2, edges]
    labels: np.ndarray  # [nodes], -1: none
    split: tuple[np.ndarray, np.ndarray, np.ndarray] | None  # masks


def read_graph(data: GraphData) -> NodeGraph:
    """Reads a graph.

    Raises:
      UserError: if there is no such file or folder, its format is not known, an edge names a node that is not there, a
        validation or test node has a class of which no node is trained on, or anything else does not fit together.
    """
    path = Path(data.path)
    raw = _read(path, data)
    if raw.nodes.ndim != 2 or raw.nodes.shape[0] != len(raw.labels):
        raise UserError(f"{path}: features of shape {raw.nodes.shape} do not fit {len(raw.labels)} labels")
    bad = ~np.isfinite(raw.nodes).all(axis=1)
    if bad.any():
        raise UserError(f"{path}: node {int(bad.argmax())} has a feature that is not a finite number")
    senders, receivers = _edges(path, raw, data)
    train, valid, test = raw.split or _random_split(path, raw.labels, data)
    _check_split(path, raw.labels, train, valid, test)
    nodes = raw.nodes.astype(np.float32)
    if data.normalize_features:
        sums = np.abs(nodes).sum(axis=1, keepdims=True)
        nodes = (nodes / np.where(sums > 0, sums, 1)).astype(np.float32)
    return NodeGraph(nodes, senders, receivers, raw.labels.astype(np.int32), train, valid, test)


def _read(path: Path, data: GraphData) -> _Raw:
    if not path.exists():
        raise UserError(f"{path} does not exist; {_FORMATS}")
    if re.match(r"(ind|trans)\.\w+\.(x|y|tx|ty|allx|ally|graph)$", path.name) or (
        path.is_dir() and any(path.glob("ind.*.allx"))
    ):
        raise UserError(
            f"{path} is in Planetoid's format of Python pickles, which can run any program when they are opened; "
            "save its arrays with numpy.savez, each under its own name, on data that you trust"
        )
    if path.is_dir():
        if (path / "out1_graph_edges.txt").exists():
            return _read_geom_gcn(path, data)
        contents = sorted(path.glob("*.content"))
        if len(contents) == 1:
            return _read_cites(contents[0], data)
        raise UserError(f"{path} is a folder without a graph; {_FORMATS}")
    if path.suffix in (".content", ".cites"):
        return _read_cites(path.with_suffix(".content"), data)
    if path.suffix == ".npz":
        return _read_npz(path, data)
    raise UserError(f"{path} is in no format that is known; {_FORMATS}")


# --- .npz ------------------------------------------------------------------------------------------------------------


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        why = "it holds Python objects, which are not opened" if "allow_pickle" in str(error) else str(error)
        raise UserError(f"{path} cannot be read as .npz: {' '.join(why.split())}") from error


def _read_npz(path: Path, data: GraphData) -> _Raw:
    arrays = _load(path)
    planetoid = any(name == "allx" or name.startswith("allx_") for name in arrays)
    return (_planetoid if planetoid else _whole)(path, arrays, data)


def _planetoid(path: Path, arrays: Mapping[str, np.ndarray], data: GraphData) -> _Raw:
    """Nodes are those of `allx`, then the test nodes in the order of `test_index`; those in neither have no label."""
    known, test = (_matrix(path, arrays, name) for name in ("allx", "tx"))
    test_index = _array(path, arrays, "test_index").astype(np.int64).reshape(-1)
    count = int(arrays["n_nodes"]) if "n_nodes" in arrays else max(int(test_index.max(initial=-1)) + 1, len(known))
    outside = (test_index < 0) | (test_index >= count)
    if outside.any() or len(test_index) != len(test) or len(known) > count:
        raise UserError(
            f"{path}: {count} nodes do not fit {len(known)} rows of allx, {len(test)} of tx and test_index up to "
            f"{int(test_index.max(initial=-1))}"
        )
    nodes = np.zeros((count, known.shape[1]), np.float32)
    labels = np.full(count, UNKNOWN)
    if test.shape[1] != known.shape[1]:
        raise UserError(f"{path}: tx has {test.shape[1]} channels and allx {known.shape[1]}")
    nodes[: len(known)], nodes[test_index] = known, test
    known_labels, test_labels = (_array(path, arrays, name) for name in ("ally", "ty"))
    widths = {part.shape[1] for part in (known_labels, test_labels) if part.ndim == 2}
    if len(widths) > 1:
        raise UserError(f"{path}: ally and ty have different numbers of classes, {sorted(widths)}")
    labels[: len(known)] = _class_numbers(path, known_labels, np.arange(len(known)))
    labels[test_index] = _class_numbers(path, test_labels, test_index)
    split = _stored_split(path, arrays, count, data) if "train_masks" in arrays or "train_mask" in arrays else None
    if split is None:
        trained = len(_array(path, arrays, "y"))
        valid_stop = min(trained + 500, len(known))
        split = _mask(range(trained), count), _mask(range(trained, valid_stop), count), _mask(test_index, count)
        if data.split:
            raise UserError(f"{path} has one split; GraphData.split is {data.split}, it must be 0")
    return _Raw(nodes, _edge_pairs(path, _array(path, arrays, "edges", *_EDGES)), labels, split)


def _whole(path: Path, arrays: Mapping[str, np.ndarray], data: GraphData) -> _Raw:
    nodes = _matrix(path, arrays, *_FEATURES)
    labels = _class_numbers(path, _array(path, arrays, *_LABELS), np.arange(len(nodes)))
    if {"senders", "receivers"} <= arrays.keys():
        edges = np.stack([arrays["senders"], arrays["receivers"]])
    elif any(name in arrays or f"{name}_indptr" in arrays for name in _ADJACENCY):
        edges = _nonzero(path, arrays)
    else:
        edges = _array(path, arrays, *_EDGES)
    return _Raw(nodes, _edge_pairs(path, edges), labels, _stored_split(path, arrays, len(nodes), data))


def _array(path: Path, arrays: Mapping[str, np.ndarray], *names: str) -> np.ndarray:
    """The first array of one of these names."""
    found = next((name for name in names if name in arrays), None)
    if found is None:
        wanted = names[0] if len(names) == 1 else f"array called any of {', '.join(names)}"
        raise UserError(f"{path} has no {wanted}; its arrays are {', '.join(sorted(arrays)) or 'none'}")
    return arrays[found]


def _matrix(path: Path, arrays: Mapping[str, np.ndarray], *names: str) -> np.ndarray:
    """A dense matrix from a dense one or from the four arrays of a compressed sparse row matrix."""
    name = next((name for name in names if f"{name}_indptr" in arrays), None)
    if name is None:
        matrix = _array(path, arrays, *names)
        if matrix.ndim != 2:
            raise UserError(f"{path}: features have shape {matrix.shape}; they must be [nodes, channels]")
        return matrix
    rows, columns, values, shape = _sparse(path, arrays, name)
    dense = np.zeros(shape, np.float32)
    np.add.at(dense, (rows, columns), values)
    return dense


def _nonzero(path: Path, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    name = next(name for name in _ADJACENCY if name in arrays or f"{name}_indptr" in arrays)
    if name in arrays:
        return np.stack(np.nonzero(arrays[name]))
    rows, columns, values, _ = _sparse(path, arrays, name)
    return np.stack([rows[values != 0], columns[values != 0]])


def _sparse(
    path: Path, arrays: Mapping[str, np.ndarray], name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple]:
    """Rows, columns and values of a compressed sparse row matrix, and its shape."""
    pointers, columns, values, shape = (
        _array(path, arrays, f"{name}_{part}") for part in ("indptr", "indices", "data", "shape")
    )
    height, width = (int(size) for size in shape)
    fits = len(pointers) == height + 1 and pointers[0] == 0 and pointers[-1] == len(columns) == len(values)
    if not fits or (np.diff(pointers) < 0).any() or (columns < 0).any() or (columns >= width).any():
        raise UserError(
            f"{path}: {name}_indptr, {name}_indices and {name}_data are no matrix of shape {height} x {width}"
        )
    return np.repeat(np.arange(height), np.diff(pointers)), columns, values, (height, width)


def _edge_pairs(path: Path, edges: np.ndarray) -> np.ndarray:
    """Edges as [2, edges]."""
    if edges.ndim != 2 or 2 not in edges.shape or not np.issubdtype(edges.dtype, np.integer):
        raise UserError(f"{path}: edges have shape {edges.shape} and dtype {edges.dtype}; want integers [2, edges]")
    return edges if edges.shape[0] == 2 else edges.T


def _class_numbers(path: Path, labels: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Labels as numbers, from numbers, from names, or from one column a class."""
    if len(labels) != len(nodes):
        raise UserError(f"{path}: {len(labels)} labels do not fit {len(nodes)} nodes")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 1:
        if labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and (labels % 1 == 0).all()):
            return np.where(labels < 0, UNKNOWN, labels).astype(np.int64)
        if labels.dtype.kind in "US":
            return np.unique(labels, return_inverse=True)[1].reshape(-1)
        raise UserError(f"{path}: labels have dtype {labels.dtype}; they must be whole numbers or names")
    classes = (labels != 0).sum(axis=1)
    if (classes > 1).any():
        several = int((classes > 1).argmax())
        raise UserError(f"{path}: node {int(nodes[several])} has {int(classes[several])} labels; a node must have one")
    return np.where(classes == 1, labels.argmax(axis=1), UNKNOWN)


def _stored_split(
    path: Path, arrays: Mapping[str, np.ndarray], count: int, data: GraphData
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The masks of a split; None if the file has none."""
    names = {part: next((name for name in _SPLIT[part] if name in arrays), None) for part in _SPLIT}
    missing = [part for part, name in names.items() if name is None]
    if len(missing) == 3:
        return None
    if missing:
        raise UserError(f"{path} has {', '.join(filter(None, names.values()))} but no {_SPLIT[missing[0]][0]}")
    train, valid, test = (_split_part(path, str(name), arrays[str(name)], count, data) for name in names.values())
    return train, valid, test


def _split_part(path: Path, name: str, values: np.ndarray, count: int, data: GraphData) -> np.ndarray:
    if "mask" not in name:
        outside = (values < 0) | (values >= count)
        if outside.any():
            raise UserError(
                f"{path}: {name} names node {int(values[outside][0])}; the graph has nodes 0 to {count - 1}"
            )
        return _mask(values, count)
    masks = values.reshape(1, -1) if values.ndim == 1 else values
    if masks.shape[1] != count and masks.shape[0] == count:
        masks = masks.T
    if masks.shape[1] != count:
        raise UserError(f"{path}: {name} has shape {values.shape}; there are {count} nodes")
    if data.split >= len(masks):
        raise UserError(f"{path} has {len(masks)} splits; GraphData.split is {data.split}, it must be below that")
    return masks[data.split].astype(bool)


def _mask(indices: Sequence[int] | np.ndarray | range, count: int) -> np.ndarray:
    mask = np.zeros(count, bool)
    mask[np.asarray(indices, np.int64)] = True
    return mask


# --- Texts -----------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Numbered lines of fields between white space; empty lines are skipped."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return [(number, line.split()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _numbers(path: Path, number: int, fields: Sequence[str]) -> list[float]:
    try:
        return [float(field) for field in fields]
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}; features must be numbers") from error


def _read_cites(content: Path, data: GraphData) -> _Raw:
    """One node a line: id, features, class; one edge a line: cited id, citing id."""
    cites = content.with_suffix(".cites")
    rows: dict[str, tuple[list[float], str]] = {}
    for number, fields in _lines(content):
        if len(fields) < 3 or fields[0] in rows:
            wrong = f"node {fields[0]} is there twice" if fields[0] in rows else "want id, features and class"
            raise UserError(f"{content}, line {number}: {wrong}")
        rows[fields[0]] = _numbers(content, number, fields[1:-1]), fields[-1]
    widths = {len(features) for features, _ in rows.values()}
    if len(widths) != 1:
        raise UserError(f"{content}: nodes have different numbers of features, {sorted(widths)}")
    ids = {name: index for index, name in enumerate(rows)}
    pairs = _named_pairs(cites, _lines(cites), ids, data)
    labels = np.unique([label for _, label in rows.values()], return_inverse=True)[1].reshape(-1)
    nodes = np.array([features for features, _ in rows.values()], np.float32)
    return _Raw(nodes, pairs, labels, None)


def _named_pairs(
    path: Path, lines: Sequence[tuple[int, list[str]]], ids: Mapping[str, int], data: GraphData
) -> np.ndarray:
    """Edges [2, edges] from two ids a line, sender after receiver as a citation has them."""
    pairs = []
    for number, fields in lines:
        if len(fields) != 2:
            raise UserError(f"{path}, line {number}: want two node ids, found {len(fields)} fields")
        missing = [name for name in fields if name not in ids]
        if missing and data.missing_nodes == "error":
            raise UserError(
                f"{path}, line {number}: an edge names node {missing[0]}, which is not there; correct the file, or set "
                "GraphData.missing_nodes = 'drop' to skip such edges"
            )
        if not missing:
            pairs.append((ids[fields[1]], ids[fields[0]]))
    return np.array(pairs, np.int64).reshape(-1, 2).T


def _read_geom_gcn(folder: Path, data: GraphData) -> _Raw:
    """A header, then id, features between commas and class a line; a header and two ids a line.

    Where nodes have different numbers of features, as in the film graph, those are indices of channels.
    """
    path = folder / "out1_node_feature_label.txt"
    rows: dict[str, tuple[list[float], str]] = {}
    for number, fields in _lines(path)[1:]:
        if len(fields) != 3:
            raise UserError(f"{path}, line {number}: want id, features between commas and class")
        rows[fields[0]] = _numbers(path, number, fields[1].split(",")), fields[2]
    widths = {len(features) for features, _ in rows.values()}
    if len(widths) == 1:
        nodes = np.array([features for features, _ in rows.values()], np.float32)
    else:
        channels = int(max(max(features) for features, _ in rows.values())) + 1
        nodes = np.zeros((len(rows), channels), np.float32)
        for row, (features, _) in zip(nodes, rows.values(), strict=True):
            row[np.array(features, np.int64)] = 1
    order = sorted(rows, key=lambda name: int(name) if name.isdigit() else -1)
    ids = {name: index for index, name in enumerate(order)}
    position = np.array([list(rows).index(name) for name in order])
    labels = np.unique([rows[name][1] for name in order], return_inverse=True)[1].reshape(-1)
    edges_path = folder / "out1_graph_edges.txt"
    pairs = _named_pairs(edges_path, _lines(edges_path)[1:], ids, data)
    splits = sorted(folder.glob(f"*_split_*_{data.split}.npz"))
    if not splits and any(folder.glob("*_split_*.npz")):
        raise UserError(f"{folder} has no *_split_*_{data.split}.npz; GraphData.split names one that is there")
    split = _stored_split(splits[0], _load(splits[0]), len(rows), GraphData(data.path)) if splits else None
    return _Raw(nodes[position], pairs[::-1], labels, split)


# --- Checks ----------------------------------------------------------------------------------------------------------


def _edges(path: Path, raw: _Raw, data: GraphData) -> tuple[np.ndarray, np.ndarray]:
    """Sorted edges without loops and duplicates, in both directions if wanted; int32."""
    count = len(raw.labels)
    outside = ((raw.edges < 0) | (raw.edges >= count)).any(axis=0)
    if outside.any() and data.missing_nodes == "error":
        number = int(outside.argmax())
        sender, receiver = (int(node) for node in raw.edges[:, number])
        raise UserError(
            f"{path}: edge {number} goes from node {sender} to node {receiver}, but the graph has nodes 0 to "
            f"{count - 1}; correct the file, or set GraphData.missing_nodes = 'drop' to skip such edges"
        )
    senders, receivers = raw.edges[:, ~outside].astype(np.int64)
    if data.undirected:
        senders, receivers = np.concatenate([senders, receivers]), np.concatenate([receivers, senders])
    keys = np.unique((receivers * count + senders)[senders != receivers])
    if not len(keys):
        raise UserError(f"{path}: the graph has no edges between different nodes")
    return (keys % count).astype(np.int32), (keys // count).astype(np.int32)


def _random_split(path: Path, labels: np.ndarray, data: GraphData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    order = np.random.default_rng(data.split).permutation(np.flatnonzero(labels != UNKNOWN))
    train = np.concatenate(
        [order[labels[order] == label][: data.train_per_class] for label in np.unique(labels[order])]
    )
    rest = order[~np.isin(order, train)]
    valid = rest[: min(500, len(rest) // 3)]
    test = rest[len(valid) :][:1000]
    if not len(valid):
        raise UserError(
            f"{path} has no split and {len(order)} labelled nodes, too few for train_per_class = {data.train_per_class}"
        )
    return _mask(train, len(labels)), _mask(valid, len(labels)), _mask(test, len(labels))


def _check_split(path: Path, labels: np.ndarray, train: np.ndarray, valid: np.ndarray, test: np.ndarray) -> None:
    for name, mask in (("training", train), ("validation", valid), ("test", test)):
        if not mask.any():
            raise UserError(f"{path}: the split has no {name} nodes")
        unlabelled = mask & (labels == UNKNOWN)
        if unlabelled.any():
            raise UserError(f"{path}: node {int(unlabelled.argmax())} is a {name} node and has no label")
    twice = train.astype(int) + valid + test > 1
    if twice.any():
        raise UserError(f"{path}: node {int(twice.argmax())} is in two parts of the split")
    known = np.unique(labels[train])
    unseen = (valid | test) & ~np.isin(labels, known)
    if unseen.any():
        node = int(unseen.argmax())
        raise UserError(
            f"{path}: node {node} has label {int(labels[node])}, which no training node has; the task knows the labels "
            f"{', '.join(map(str, known.tolist()))}"
        )
