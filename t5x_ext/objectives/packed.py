"""Examples of packed batches, for objectives whose rows hold several."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_ext.contracts import AnyArray, Batch


def single_examples(
    batch: Batch, count: int, segment_ids: Int[AnyArray, "batch length"]
) -> tuple[Batch, Int[Array, ""]]:
    """Extracts `count` evenly spaced examples from a packed batch, each alone in a row of its own.

    Args:
      batch: arrays [batch, ...]; those whose names end in `segment_ids` say by number which example each position
        belongs to, 0 being padding, and are set to 0 at the positions of other examples.
      count: rows to return.
      segment_ids: those by which examples are counted.

    Returns:
      The arrays [count, 1, ...], and how many examples were found: with fewer than `count` in the batch all are taken,
      and the remaining rows are padding.
    """
    per_row = jnp.max(segment_ids, axis=1)
    ends = jnp.cumsum(per_row)
    found = jnp.minimum(count, ends[-1])
    order = jnp.arange(count)
    numbers = order * ends[-1] // jnp.maximum(found, 1)
    rows = jnp.minimum(jnp.searchsorted(ends, numbers, side="right"), len(ends) - 1)
    segments = jnp.where(order < found, numbers - (ends - per_row)[rows] + 1, 0)

    def only(name: str, values: Array) -> Array:
        taken = values[rows][:, None]
        if not name.endswith("segment_ids"):
            return taken
        return jnp.where(taken == segments.reshape(-1, *(1,) * (taken.ndim - 1)), taken, 0)

    return {name: only(name, jnp.asarray(values)) for name, values in batch.items()}, found
