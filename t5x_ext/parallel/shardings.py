"""Shardings derived from logical axis names; those of optimizer state follow the parameters by structure."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ext.contracts import MERGED_AXES, Axes, Params, PyTree, UserError, path_name
from t5x_ext.parallel.rules import AxisRules

logger = logging.getLogger(__name__)

AxisSharding: TypeAlias = str | tuple[str, ...] | None
"""The mesh axes over which one axis of an array is sharded, as in a `PartitionSpec`; None: not sharded."""


def partition_spec(mesh: Mesh, wanted: Sequence[AxisSharding], shape: Sequence[int]) -> PartitionSpec:
    """The wanted shardings as far as possible.

    An axis is not sharded if its mesh axes do not divide its size, or if an earlier axis uses one of them.

    Args:
      mesh: has the mesh axes.
      wanted: mesh axes for each axis of the array.
      shape: of the array.
    """
    spec: list[AxisSharding] = []
    taken: set[str] = set()
    for mesh_axes, size in zip(wanted, shape, strict=True):
        is_impossible = taken.intersection(_names(mesh_axes)) or size % _num_shards(mesh, mesh_axes)
        spec.append(None if is_impossible else mesh_axes)
        taken.update(_names(spec[-1]))
    return PartitionSpec(*spec)


def tree_shardings(mesh: Mesh, rules: AxisRules, logical_axes: PyTree, params: Params) -> PyTree:
    """A `NamedSharding` for every parameter.

    An axis is not sharded if its mesh axis does not divide its size (logged), or if an earlier axis of the same array
    uses that mesh axis.

    Args:
      mesh: from `make_mesh`.
      rules: logical axis name to mesh axis.
      logical_axes: the tree of `params` with a tuple of axis names (None: never sharded) for each array.
      params: arrays or `jax.ShapeDtypeStruct`s; only shapes are read.

    Raises:
      UserError: if an array has another number of names than axes, or a name is unknown.
    """
    axes = _by_parts(logical_axes)

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name, names = path_name(path), axes.get(_parts(path))
        if len(names or ()) != len(leaf.shape):
            raise UserError(f"parameter {name} of shape {leaf.shape} has axis names {names}: want one an axis")
        return NamedSharding(mesh, _spec(mesh, rules, name, names or (), leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, params)


def state_shardings(
    mesh: Mesh, state: PyTree, params: Params, param_shardings: PyTree, logical_axes: PyTree = None
) -> PyTree:
    """A `NamedSharding` for every array of a training state or optimizer state.

    A leaf whose path ends in the path of a parameter follows that parameter, for any chain, mask or partition of
    optimizers: the parameters themselves, their EMA, and moments. Leading and trailing axes whose sizes match the
    parameter's are sharded like them. One axis may differ in between. If the leaf is integer (packed bits), that axis
    inherits the sharding of the axis it replaces. If it is floating point (the rank of a compressed moment), it is
    replicated, because updates sum over it, and the freed mesh axes go to the largest remaining axis. Mesh axes that do
    not divide an axis are dropped. Added axes (the rank of a basis) are replicated, and so is everything else, such as
    counts and keys.

    If sizes are ambiguous, names decide: `layers` is the first axis, and `heads` and `head_dim` are merged. If names do
    not decide either, removed axes are taken to be as far back as possible, added ones as far forward. A wrong guess
    costs time, but does not change values.

    Args:
      mesh: the mesh of `param_shardings`.
      state: arrays or `jax.ShapeDtypeStruct`s, for example `jax.eval_shape(optimizer.init, params)`.
      params: arrays or `jax.ShapeDtypeStruct`s.
      param_shardings: from `tree_shardings`, shaped like `params`.
      logical_axes: the tree of `params` with a tuple of axis names for each array, as for `tree_shardings`; None: no
        names.
    """
    shapes = {_parts(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shardings = dict(zip(shapes, jax.tree.leaves(param_shardings), strict=True))
    axes = _by_parts(logical_axes)

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        parts = _parts(path)
        suffixes = (parts[start:] for start in range(len(parts) + 1))
        owner = next((suffix for suffix in suffixes if suffix in shapes), None)
        if owner is None:
            return NamedSharding(mesh, PartitionSpec())
        if shapes[owner] == leaf.shape:
            return shardings[owner]
        names = axes.get(owner, (None,) * len(shapes[owner]))
        return NamedSharding(mesh, _spec_like(mesh, leaf, shapes[owner], shardings[owner].spec, names))

    return jax.tree_util.tree_map_with_path(sharding, state)


def _spec_like(mesh: Mesh, leaf: Any, like: tuple[int, ...], spec: PartitionSpec, axes: Axes) -> PartitionSpec:
    """The spec of a leaf that belongs to a parameter of the shape `like` but has another shape.

    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
    >>> axes, spec = ("layers", "embed", "mlp"), PartitionSpec(None, "fsdp", None)
    >>> of = lambda shape, dtype: _spec_like(mesh, jax.ShapeDtypeStruct(shape, dtype), (24, 2048, 16384), spec, axes)
    >>> of((24, 256, 16384), jnp.float32), of((24, 256, 16384), jnp.uint8), of((24, 4, 2048, 16384), jnp.float32)
    (P(None, None, 'fsdp'), P(None, 'fsdp', None), P(None, None, 'fsdp', None))
    """
    shape: tuple[int, ...] = leaf.shape
    mesh_axes = [_names(entry) for entry in spec] + [()] * (len(like) - len(spec))
    front, back = _alignment(shape, like, axes)
    added = len(shape) - front - back
    found = mesh_axes[:front] + [()] * added + mesh_axes[len(like) - back :]
    freed = tuple(name for names in mesh_axes[front : len(like) - back] for name in names)
    if freed and added == 1 and front + back:
        others = [axis for axis in range(len(shape)) if axis != front]
        taker = max(others, key=lambda axis: shape[axis]) if jnp.issubdtype(leaf.dtype, jnp.floating) else front
        names = found[taker] + freed
        if shape[taker] % _num_shards(mesh, names) == 0:
            found[taker] = names
    return PartitionSpec(*((names if len(names) > 1 else names[0]) if names else None for names in found))


def _alignment(shape: tuple[int, ...], like: tuple[int, ...], axes: Axes) -> tuple[int, int]:
    """How many leading and trailing axes of a leaf match those of its parameter.

    >>> axes = ("layers", "embed", "heads", "head_dim")
    >>> _alignment((6, 512, 64), (6, 512, 8, 64), axes)  # the rank replaces all heads, not one
    (2, 0)
    >>> _alignment((6, 8, 512, 8, 64), (6, 512, 8, 64), axes), _alignment((6, 6, 512, 8, 64), (6, 512, 8, 64), axes)
    ((1, 3), (1, 3))
    """
    shorter, more = min(len(shape), len(like)), len(shape) - len(like)
    layers = _matching(axes, ("layers",) * len(axes), len(axes))
    inside = {i for i in range(1, len(like)) if axes[i - 1 : i + 1] in MERGED_AXES}

    def preference(ends: tuple[int, int]) -> tuple[bool, int, int]:
        front, back = ends
        can_be = front >= layers and (more >= 0 or inside.isdisjoint((front, len(like) - back)))
        return can_be, front + back, -front if more > 0 else front

    fronts = range(_matching(shape, like, shorter) + 1)
    backs = range(_matching(shape[::-1], like[::-1], shorter) + 1)
    return max(((f, b) for f in fronts for b in backs if f + b <= shorter), key=preference)


def _matching(a: Sequence[Any], b: Sequence[Any], limit: int) -> int:
    """The number of equal leading entries, at most `limit`."""
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def _by_parts(logical_axes: PyTree) -> dict[tuple[str, ...], Axes]:
    is_axes = lambda node: isinstance(node, tuple)
    leaves = jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=is_axes)
    return {_parts(path): names for path, names in leaves}


def _parts(path: tuple) -> tuple[str, ...]:
    return tuple(path_name((key,)) for key in path)


def _spec(mesh: Mesh, rules: AxisRules, name: str, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    wanted = [rules.mesh_axis(axis) for axis in axes]
    spec = partition_spec(mesh, wanted, shape)
    for index, (axis, size, mesh_axis) in enumerate(zip(axes, shape, wanted, strict=True)):
        if mesh_axis is not None and mesh_axis not in spec[: index + 1]:
            reason = f"{mesh.shape[mesh_axis]} devices along {mesh_axis} do not divide it"
            logger.info("parameter %s: axis %s of size %d is not sharded: %s", name, axis, size, reason)
    return spec


def _names(sharding: AxisSharding) -> tuple[str, ...]:
    return sharding if isinstance(sharding, tuple) else () if sharding is None else (sharding,)


def _num_shards(mesh: Mesh, sharding: AxisSharding) -> int:
    return math.prod(mesh.shape[name] for name in _names(sharding))
