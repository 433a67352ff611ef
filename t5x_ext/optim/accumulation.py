"""Accumulation of microbatches' gradients: the exact mean over labels, in float32."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_ext.contracts import Accumulator, Params, PyTree


class MeanAccumulatorState(NamedTuple):
    """Running sums of an exact mean."""

    sum: PyTree  # float32, the shape of the parameters: gradients of the summed loss
    weight: Float[Array, ""]  # float32: labels counted so far


def mean_accumulator() -> Accumulator:
    r"""Exact, dense accumulation: the gradient of the mean loss over all labels of all microbatches.

    .. math::
      g = \frac{\sum_i \nabla S_i}{\sum_i n_i}

    with :math:`S_i` the loss summed over microbatch i and :math:`n_i` its number of labels, so the result does not
    depend on the split into microbatches. Without any label the gradient is zero, not NaN.

    Returns:
      A `contracts.Accumulator`; `finish` gives float32 gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> accumulator = mean_accumulator()
      >>> state = accumulator.init({"w": jnp.zeros(2)}, jnp.int32(0))
      >>> state = accumulator.add(state, {"w": jnp.array([3.0, 0.0])}, 1.0)
      >>> state = accumulator.add(state, {"w": jnp.array([1.0, 8.0])}, 3.0)
      >>> accumulator.finish(state)["w"].tolist()
      [1.0, 2.0]
    """

    def init(params: Params, step: Array) -> MeanAccumulatorState:
        del step
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return MeanAccumulatorState(zeros, jnp.zeros((), jnp.float32))

    def add(state: MeanAccumulatorState, grads: PyTree, weight: Array | float) -> MeanAccumulatorState:
        total = jax.tree.map(lambda old, new: old + new.astype(jnp.float32), state.sum, grads)
        return MeanAccumulatorState(total, state.weight + weight)

    def finish(state: MeanAccumulatorState) -> PyTree:
        empty = state.weight == 0
        divisor = jnp.where(empty, 1.0, state.weight)
        return jax.tree.map(lambda total: jnp.where(empty, 0.0, total / divisor), state.sum)

    return Accumulator(init, add, finish)
