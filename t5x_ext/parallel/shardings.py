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

Cut: TypeAlias = str | tuple[str, ...] | None
"""The mesh axes that one axis of an array is cut over, as in a `PartitionSpec`."""


def partition_spec(mesh: Mesh, cuts: Sequence[Cut], shape: Sequence[int]) -> PartitionSpec:
    """The cuts that are possible: an axis stays whole if its mesh axes do not divide it, or an earlier one has one.

    Args:
      mesh: has the mesh axes.
      cuts: what is wanted of each axis.
      shape: its sizes.
    """
    spec: list[Cut] = []
    taken: set[str] = set()
    for cut, size in zip(cuts, shape, strict=True):
        is_whole = taken.intersection(_names(cut)) or size % _pieces(mesh, cut)
        spec.append(None if is_whole else cut)
        taken.update(_names(spec[-1]))
    return PartitionSpec(*spec)


def tree_shardings(mesh: Mesh, rules: AxisRules, logical_axes: PyTree, params: Params) -> PyTree:
    """A `NamedSharding` for every parameter.

    An axis stays whole when its mesh axis does not divide its size (logged), or when an earlier axis of the same array
    has taken that mesh axis.

    Args:
      mesh: from `make_mesh`.
      rules: logical axis name to mesh axis.
      logical_axes: the tree of `params` with a tuple of axis names (None: never cut) for each array.
      params: arrays or `jax.ShapeDtypeStruct`s; only shapes are read.

    Raises:
      UserError: if names and shapes disagree in number or a name is unknown.
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

    A leaf whose path ends in the path of a parameter follows that parameter, however chained, masked or partitioned the
    optimizer is: the parameters themselves, averages of them, and moments. Axes that have the parameter's sizes,
    counted from the front and from the back, are cut as there. Between them an axis of integers (packed bits) takes the
    cut of the axis in whose place it stands. A floating axis there is the rank of a compressed moment: it stays whole,
    since every update sums over it, and the largest axis that was not compressed takes the cut beside its own. Cuts go
    only where they divide. Axes that are merely added (the rank of a basis) stay whole, and so does everything else,
    such as counts and keys.

    Where sizes tie, names tell what is missing or added: `layers` stay in front, `heads` and `head_dim` go together.
    Without names, and where names say no more, missing axes are looked for as far behind as possible, added ones as far
    in front. A leaf that is cut elsewhere than it might be costs time, and changes no value.

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
    cuts = [_names(cut) for cut in spec] + [()] * (len(like) - len(spec))
    front, back = _alignment(shape, like, axes)
    added = len(shape) - front - back
    found = cuts[:front] + [()] * added + cuts[len(like) - back :]
    lost = tuple(name for cut in cuts[front : len(like) - back] for name in cut)
    if lost and added == 1 and front + back:
        others = [axis for axis in range(len(shape)) if axis != front]
        taker = max(others, key=lambda axis: shape[axis]) if jnp.issubdtype(leaf.dtype, jnp.floating) else front
        names = found[taker] + lost
        if shape[taker] % _pieces(mesh, names) == 0:
            found[taker] = names
    return PartitionSpec(*((cut if len(cut) > 1 else cut[0]) if cut else None for cut in found))


def _alignment(shape: tuple[int, ...], like: tuple[int, ...], axes: Axes) -> tuple[int, int]:
    """How many of the first sizes and of the last sizes of a leaf are those of its parameter.

    >>> axes = ("layers", "embed", "heads", "head_dim")
    >>> _alignment((6, 512, 64), (6, 512, 8, 64), axes)  # a rank in the place of all heads, not one head
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
    """How many of the first entries, `limit` at most, are the same."""
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def _by_parts(logical_axes: PyTree) -> dict[tuple[str, ...], Axes]:
    is_axes = lambda node: isinstance(node, tuple)
    leaves = jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=is_axes)
    return {_parts(path): names for path, names in leaves}


def _parts(path: tuple) -> tuple[str, ...]:
    return tuple(path_name((key,)) for key in path)


def _spec(mesh: Mesh, rules: AxisRules, name: str, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    cuts = [rules.mesh_axis(axis) for axis in axes]
    spec = partition_spec(mesh, cuts, shape)
    for position, (axis, size, cut) in enumerate(zip(axes, shape, cuts, strict=True)):
        if cut is not None and cut not in spec[: position + 1]:
            reason = f"{mesh.shape[cut]} devices along {cut} do not divide it"
            logger.info("parameter %s: axis %s of size %d stays whole: %s", name, axis, size, reason)
    return spec


def _names(cut: Cut) -> tuple[str, ...]:
    return cut if isinstance(cut, tuple) else () if cut is None else (cut,)


def _pieces(mesh: Mesh, cut: Cut) -> int:
    return math.prod(mesh.shape[name] for name in _names(cut))
