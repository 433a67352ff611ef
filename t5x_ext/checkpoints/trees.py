"""A training state as named arrays: what is written, what is compared, and how it becomes a state again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_ext.contracts import PyTree, UserError, path_name


class LeafSpec(NamedTuple):
    """Shape and dtype of an array; that of typed random keys reads like `key<fry>`."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class StructureError(UserError):
    """A checkpoint holds another tree than the one asked for; `details` lists every difference, one a line."""

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
    """A plain array that Orbax can write. NumPy arrays are copied: the caller may go on changing them."""
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


def check_same(stored: Mapping[str, LeafSpec], wanted: Mapping[str, LeafSpec], where: str) -> None:
    """Raises `StructureError` when a checkpoint does not hold exactly the wanted arrays."""
    lines = [f"missing in the checkpoint: {name} {wanted[name]}" for name in wanted if name not in stored]
    lines += [f"only in the checkpoint: {name} {stored[name]}" for name in stored if name not in wanted]
    lines += [
        f"different: {name} is {stored[name]} in the checkpoint, wanted {wanted[name]}"
        for name in wanted
        if name in stored and stored[name] != wanted[name]
    ]
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise StructureError(f"{where} belongs to another model or optimizer: {lines[0]}{more}", "\n".join(lines))
