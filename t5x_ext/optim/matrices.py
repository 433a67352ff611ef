"""Parameters of any shape as matrices: which axes are batch, rows and columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from t5x_ext.contracts import MERGED_AXES, PyTree, UserError, path_name

Axes = Sequence[str | None] | None
"""Logical axis names of one parameter; None: the last two axes are the matrix, those before them batch."""


class MatrixShape(NamedTuple):
    """The shape of a parameter, `batch + rows + cols`; `rows` is empty for a vector, all are for a scalar."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of matrices, rows and columns."""
        return math.prod(self.batch), math.prod(self.rows), math.prod(self.cols)


def matrix_shape(shape: Sequence[int], axes: Axes = None) -> MatrixShape:
    """Splits a shape into batch, rows and columns.

    With names, `layers` is a batch axis, and `heads` and `head_dim` are merged if adjacent. Of the other axes the last
    one is the columns, the second-to-last the rows, and any earlier ones are batch. One remaining axis means a vector
    (no matrix).

    Args:
      shape: of a parameter.
      axes: a name (or None) an axis. Without names the last two axes are the matrix.

    Raises:
      UserError: if `layers` is not a leading axis, or there is not one name an axis.

    Example:
      >>> matrix_shape((24, 2048, 32, 64), ("layers", "embed", "heads", "head_dim"))
      MatrixShape(batch=(24,), rows=(2048,), cols=(32, 64))
      >>> matrix_shape((24, 2048), ("layers", "embed"))
      MatrixShape(batch=(24,), rows=(), cols=(2048,))
      >>> matrix_shape((24, 2048))
      MatrixShape(batch=(), rows=(24,), cols=(2048,))
    """
    shape = tuple(shape)
    if axes is None:
        return MatrixShape(shape[:-2], shape[-2:-1], shape[-1:])
    if len(axes) != len(shape):
        raise UserError(f"axis names {tuple(axes)} do not fit the shape {shape}: want one an axis")
    leading = next((i for i, axis in enumerate(axes) if axis != "layers"), len(axes))
    if "layers" in axes[leading:]:
        raise UserError(f"axis names {tuple(axes)}: layers must come first")
    sides: list[tuple[int, ...]] = []
    position = leading
    while position < len(shape):
        width = 2 if tuple(axes[position : position + 2]) in MERGED_AXES else 1
        sides.append(shape[position : position + width])
        position += width
    batch = shape[:leading] + tuple(size for side in sides[:-2] for size in side)
    rows, cols = [(), (), *sides][-2:]
    return MatrixShape(batch, rows, cols)


def as_matrices(x: Float[Array, "..."], axes: Axes = None) -> Float[Array, "batch rows cols"]:
    """A parameter as a batch of matrices by `matrix_shape`; vectors have one row.

    Example:
      >>> import jax.numpy as jnp
      >>> as_matrices(jnp.ones((3, 8, 2, 4)), ("layers", "embed", "heads", "head_dim")).shape
      (3, 8, 8)
    """
    return x.reshape(matrix_shape(x.shape, axes).sizes)


def from_matrices(matrices: Float[Array, "batch rows cols"], shape: Sequence[int]) -> Float[Array, "..."]:
    """The inverse of `as_matrices`, for a parameter of this shape."""
    return matrices.reshape(tuple(shape))


def named_axes(axes: PyTree) -> Callable[[str, Sequence[int]], Axes]:
    """Looks up the axis names of a parameter by its path, also for trees with masked or missing parameters.

    Args:
      axes: the tree of parameters with a tuple of names for each, as `models.logical_axes` gives; None: no names.

    Returns:
      `(name, shape) -> axes`, which raises UserError for a parameter without one name an axis.
    """
    if axes is None:
        return lambda name, shape: None
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda node: isinstance(node, tuple))
    names = {path_name(path): leaf for path, leaf in leaves}

    def find(name: str, shape: Sequence[int]) -> Axes:
        if len(names.get(name, ())) != len(shape):
            found = names.get(name)
            raise UserError(
                f"parameter {name} of shape {tuple(shape)} has axis names {found}: want one an axis; "
                "the tree of axes is of another model"
            )
        return names.get(name, ())

    return find
