"""A training state as named arrays: flattening, comparing, and restoring it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from t5x_ext.contracts import PyTree, UserError, path_name


class LeafSpec(NamedTuple):
    """Shape and dtype of an array; the dtype of typed random keys is like `key<fry>`."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class StructureError(UserError):
    """A checkpoint holds another tree than the one asked for; `details` is a table of every difference."""

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by name; empty subtrees and None have none."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from names with slashes.

    >>> nested({"step": 1, "params/dense/kernel": 2})
    {'step': 1, 'params': {'dense': {'kernel': 2}}}
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *branches, last = name.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[last] = leaf
    return tree


def leaf_spec(name: str, leaf: Any) -> LeafSpec:
    """Shape and dtype of a leaf; a Python number counts as an array without axes.

    Raises:
      TypeError: if it is neither an array nor a number.
    """
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    if isinstance(array, np.ndarray) and array.dtype.kind in "OUS":
        raise TypeError(f"{name} is a {type(leaf).__name__}; a checkpoint holds arrays and numbers")
    return LeafSpec(tuple(array.shape), str(array.dtype))


def to_stored(leaf: Any) -> jax.Array | np.ndarray:
    """A plain array that Orbax can write. NumPy arrays are copied, so the caller may change them."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def from_stored(stored: jax.Array | np.ndarray, wanted: Any) -> Any:
    """The inverse of `to_stored`, for a leaf of the wanted kind."""
    if is_key(wanted):
        return jax.random.wrap_key_data(jnp.asarray(stored), impl=jax.random.key_impl(jnp.empty((), wanted.dtype)))
    if isinstance(wanted, jax.Array | jax.ShapeDtypeStruct | np.ndarray):
        return stored
    return type(wanted)(stored.item())


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def check_structure(stored: PyTree, wanted: PyTree, where: str) -> None:
    """Checks that two trees hold arrays of the same names, shapes and dtypes.

    Args:
      stored: arrays as loaded.
      wanted: arrays or `jax.ShapeDtypeStruct`s as the model has them.
      where: what `stored` is, for the start of the message.

    Raises:
      StructureError: if they differ.
    """
    check_same(specs(stored), specs(wanted), where)


def specs(tree: PyTree) -> dict[str, LeafSpec]:
    """Shape and dtype of every leaf by name."""
    return {name: leaf_spec(name, leaf) for name, leaf in flatten(tree).items()}


def check_same(stored: Mapping[str, LeafSpec], wanted: Mapping[str, LeafSpec], where: str) -> None:
    """Raises `StructureError` when a checkpoint does not hold exactly the wanted arrays."""
    names = [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]
    if not names:
        return
    rows = [("array", "in the checkpoint", "wanted")]
    rows += [(name, str(stored.get(name, "-")), str(wanted.get(name, "-"))) for name in names]
    table = tabulate(rows, tablefmt="plain", disable_numparse=True)
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    first = _difference(names[0], stored.get(names[0]), wanted.get(names[0]))
    raise StructureError(f"{where} belongs to another model or optimizer: {first}{more}", table)


def _difference(name: str, stored: LeafSpec | None, wanted: LeafSpec | None) -> str:
    if stored is None:
        return f"missing in the checkpoint: {name} {wanted}"
    if wanted is None:
        return f"only in the checkpoint: {name} {stored}"
    return f"different: {name} is {stored} in the checkpoint, wanted {wanted}"
