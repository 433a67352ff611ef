"""Random projections for compressed momentum and accumulation: functions of a key, so none is stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_ext.contracts import UserError

Projection: TypeAlias = Callable[[Array, tuple[int, int], Any], Array]
"""`(key, (rank, dim), dtype) -> P`, [rank, dim], with `E[P^T P]` the identity, for a key without batch axes."""


@partial(jax.jit, static_argnums=(1, 2))
def gaussian(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Float[Array, "rank dim"]:
    """Independent normal entries of variance 1 / rank: the projection of Flora.

    The expected squared error of `P^T P x` is (dim + 1) / rank times the square of `x`. Entries are sampled in float32
    and then cast, because sampling in another dtype gives other numbers.

    Example:
      >>> gaussian(jax.random.key(0), (2, 3)).shape
      (2, 3)
    """
    return (jax.random.normal(key, shape, jnp.float32) / jnp.sqrt(float(shape[0]))).astype(dtype)


@partial(jax.jit, static_argnums=(1, 2))
def orthogonal(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Float[Array, "rank dim"]:
    r"""Orthogonal rows of length sqrt(dim / rank): random rows of a cosine transform, after random signs.

    .. math::
      P_{ij} = \sqrt{2 / \text{rank}} \, \cos\!\left(\pi \frac{(2 k_i + 1)(2 j + 1)}{4 \, \text{dim}}\right) \epsilon_j

    with :math:`k_1 \dots k_\text{rank}` sampled without repetition and :math:`\epsilon_j = \pm 1`. The expected squared
    error of `P^T P x` is dim / rank - 1 times the square of `x`: less than for a Gaussian, the same as for uniformly
    random orthogonal rows, and zero for rank = dim. It needs 2 dim random numbers instead of rank x dim, and no
    factorisation.

    Args:
      key: random key.
      shape: (rank, dim), rank at most dim and dim at most 32,768 (products of indices are 32-bit).
      dtype: of the result; computed in float32.

    Raises:
      UserError: if the shape is out of range.

    Example:
      >>> p = orthogonal(jax.random.key(0), (2, 4))
      >>> abs(p @ p.T).round(4).tolist()
      [[2.0, 0.0], [0.0, 2.0]]

    References:
      Randomized cosine transforms for projections: Ailon and Chazelle (The fast Johnson-Lindenstrauss transform, 2009),
      Avron, Maymounkov and Toledo (Blendenpik, 2010). Not part of Flora.
    """
    rank, dim = shape
    if not rank <= dim <= 2**15:
        raise UserError(f"orthogonal: (rank, dim) = {tuple(shape)}: want rank <= dim <= {2**15}")
    choose, flip = jax.random.split(key)
    odd = 2 * jnp.arange(dim, dtype=jnp.uint32) + 1
    chosen = jax.random.permutation(choose, odd)[:rank]
    # cos has period 8 dim in the product; small angles keep float32 exact to its last bits.
    turns = (chosen[:, None] * odd % (8 * dim)).astype(jnp.float32) / (4 * dim)
    signs = jax.random.rademacher(flip, (dim,), jnp.float32)
    return (jnp.sqrt(2.0 / rank) * jnp.cos(jnp.pi * turns) * signs).astype(dtype)
