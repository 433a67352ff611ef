"""The parts of Adafactor for stacked layers and attention kernels: every layer is one matrix.

With names of axes, stacked layers get the updates that they would get as separate parameters, and attention kernels are
factored as matrices embed x (heads * head_dim). Optax factors the two largest axes instead: for a kernel
[layers, embed, heads, 64] it keeps the full second moment, because 64 is too short a side to factor.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Params, PyTree, UserError, path_name
from t5x_ext.optim.matrices import Axes, MatrixShape, matrix_shape, named_axes


class FactoredState(NamedTuple):
    """Second moments; a tree that does not apply to a parameter has an empty `optax.MaskedNode` for it."""

    count: Int[Array, ""]  # type: ignore[assignment]  # updates done, int32
    v_row: PyTree  # float32, batch + rows: mean square over the columns
    v_col: PyTree  # float32, batch + cols: mean square over the rows
    v: PyTree  # float32, the shape of a parameter that is not factored


class _Scaled(NamedTuple):
    """An update of one parameter with its new moments."""

    update: Array
    v_row: Any
    v_col: Any
    v: Any


def scale_by_factored_rms(
    decay_rate: float = 0.8, eps: float = 1e-30, min_dim_size_to_factor: int = 128, axes: PyTree = None
) -> optax.GradientTransformation:
    r"""Divides by the root of a second moment that is stored as row and column means only.

    .. math::
      \beta_t = 1 - t^{-\text{decay\_rate}}, \quad
      r_t = \beta_t r_{t-1} + (1 - \beta_t) \, \text{mean}_\text{cols}(g^2 + \epsilon), \quad
      y = g \, \left(\frac{r \, c^T}{\text{mean}(r)}\right)^{-1/2}

    and c is the mean over rows. Vectors and matrices with a short side keep the full moment.

    Args:
      decay_rate: exponent of the decay; updates count from 1.
      eps: added to the squared gradient.
      min_dim_size_to_factor: matrices whose shorter side has fewer entries are not factored.
      axes: tree of axis names, see `matrices.matrix_shape`.

    Returns:
      An `optax.GradientTransformation`; moments are float32, updates keep their dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> scale = scale_by_factored_rms(min_dim_size_to_factor=2)
      >>> gradient = jnp.array([[1.0, -2.0], [2.0, -4.0]])
      >>> updates, _ = scale.update(gradient, scale.init(gradient))
      >>> updates.round(4).tolist()
      [[1.0, -1.0], [1.0, -1.0]]

    References:
      Shazeer and Stern, Adafactor (arXiv 1804.04235), sections 3 and 7.
    """
    find_axes = named_axes(axes)

    def layout(path: tuple, leaf: Array) -> MatrixShape | None:
        name = path_name(path)
        matrix = matrix_shape(leaf.shape, find_axes(name, leaf.shape))
        return matrix if min(matrix.sizes[1:]) >= min_dim_size_to_factor and matrix.rows else None

    def init(params: Params) -> FactoredState:
        def zeros(shape: Callable[[MatrixShape | None, Array], tuple[int, ...] | None]) -> PyTree:
            def leaf_zeros(path: tuple, leaf: Array) -> Any:
                wanted = shape(layout(path, leaf), leaf)
                return optax.MaskedNode() if wanted is None else jnp.zeros(wanted, jnp.float32)

            return jax.tree_util.tree_map_with_path(leaf_zeros, params)

        return FactoredState(
            jnp.zeros((), jnp.int32),
            zeros(lambda matrix, _: matrix.batch + matrix.rows if matrix else None),
            zeros(lambda matrix, _: matrix.batch + matrix.cols if matrix else None),
            zeros(lambda matrix, leaf: None if matrix else leaf.shape),
        )

    def update(updates: PyTree, state: FactoredState, params: Params | None = None) -> tuple[PyTree, FactoredState]:
        del params
        decay = 1.0 - (state.count + 1).astype(jnp.float32) ** -decay_rate
        mix = lambda old, new: decay * old + (1.0 - decay) * new

        def step(path: tuple, leaf: Array, v_row: Any, v_col: Any, v: Any) -> _Scaled:
            matrix = layout(path, leaf)
            square = jnp.square(leaf.astype(jnp.float32)) + eps
            if matrix is None:
                v = mix(v, square)
                scale = jax.lax.rsqrt(v)
            else:
                rows, cols = _sides(matrix)
                v_row, v_col = mix(v_row, square.mean(cols)), mix(v_col, square.mean(rows))
                relative = v_row / v_row.mean(rows, keepdims=True)
                scale = jax.lax.rsqrt(jnp.expand_dims(relative, cols)) * jax.lax.rsqrt(jnp.expand_dims(v_col, rows))
            return _Scaled((leaf * scale).astype(leaf.dtype), v_row, v_col, v)

        results = jax.tree_util.tree_map_with_path(step, updates, *state[1:])
        is_result = lambda node: isinstance(node, _Scaled)
        scaled, *moments = (jax.tree.map(itemgetter(i), results, is_leaf=is_result) for i in range(4))
        return scaled, FactoredState(optax.safe_increment(state.count), *moments)

    return optax.GradientTransformation(init, update)


def clip_by_matrix_rms(threshold: float, axes: PyTree = None) -> optax.GradientTransformation:
    """Scales the update of every matrix (or vector) down to this root mean square, layers of a stack separately.

    Args:
      threshold: largest root mean square.
      axes: tree of axis names, see `matrices.matrix_shape`.

    References:
      Adafactor (arXiv 1804.04235), section 6.
    """
    find_axes = named_axes(axes)

    def update(updates: PyTree, state: PyTree, params: Params | None = None) -> tuple[PyTree, PyTree]:
        del params

        def clipped(path: tuple, leaf: Array) -> Array:
            rms = _rms(leaf, find_axes(path_name(path), leaf.shape))
            return (leaf / jnp.maximum(1.0, rms / threshold)).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(clipped, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_param_rms(min_scale: float = 1e-3, axes: PyTree = None) -> optax.GradientTransformation:
    """Multiplies updates by the root mean square of their weights, every matrix (or vector) separately.

    Args:
      min_scale: smallest factor, so that weights of zero can move.
      axes: tree of axis names, see `matrices.matrix_shape`.

    References:
      Adafactor (arXiv 1804.04235), section 8.
    """
    find_axes = named_axes(axes)

    def update(updates: PyTree, state: PyTree, params: Params | None = None) -> tuple[PyTree, PyTree]:
        if params is None:
            raise UserError("scale_by_param_rms: update needs params, since steps are relative to the weights")

        def scaled(path: tuple, leaf: Array, param: Array) -> Array:
            rms = _rms(param, find_axes(path_name(path), param.shape))
            return (leaf * jnp.maximum(rms, min_scale)).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(scaled, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _rms(x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
    """Root mean square of each matrix, broadcastable to `x`."""
    batch = len(matrix_shape(x.shape, axes).batch)
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), tuple(range(batch, x.ndim)), keepdims=True))


def _sides(matrix: MatrixShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the axes of rows and of columns."""
    first, second = len(matrix.batch), len(matrix.batch) + len(matrix.rows)
    return tuple(range(first, second)), tuple(range(second, second + len(matrix.cols)))
