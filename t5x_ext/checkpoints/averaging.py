"""Averaging the parameters of several checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import numpy as np

from t5x_ext.checkpoints.trees import LeafSpec, specs
from t5x_ext.contracts import Params, UserError


def average_params(checkpoints: Iterable[Params]) -> Params:
    """The mean of several parameter trees, leaf by leaf, in their own dtypes.

    Sums run in float64, so k equal float32 (or narrower) checkpoints average to exactly their own bits: k times such a
    number is exact in float64. One tree is held at a time besides the sum, so pass a generator for large models.

    Args:
      checkpoints: trees of numpy arrays of one structure, as `CheckpointStore.restore_params` gives.

    Returns:
      A tree of numpy arrays.

    Raises:
      UserError: if there is no tree, or two of them differ in names, shapes or dtypes.

    Example:
      >>> import numpy as np
      >>> average_params([{"w": np.float32([1.0, 2.0])}, {"w": np.float32([2.0, 4.0])}])["w"].tolist()
      [1.5, 3.0]
    """
    remaining = iter(checkpoints)
    first = next(remaining, None)
    if first is None:
        raise UserError("cannot average checkpoints: none was given")
    first_specs = specs(first)
    # Starting from the first tree instead of zeros keeps the sign of -0.0.
    total = jax.tree.map(lambda leaf: np.array(leaf, np.float64), first)
    count = 1
    for count, params in enumerate(remaining, start=2):
        _check_same(specs(params), first_specs, count)
        total = jax.tree.map(lambda old, new: np.add(old, new, out=old, dtype=np.float64), total, params)
    return jax.tree.map(lambda leaf, like: np.asarray(leaf / count, like.dtype), total, first)


def _check_same(these: Mapping[str, LeafSpec], first: Mapping[str, LeafSpec], number: int) -> None:
    for name in {**first, **these}:
        if these.get(name) != first.get(name):
            raise UserError(
                f"cannot average checkpoint {number} with the first: {name} is {these.get(name)} there, "
                f"{first.get(name)} in the first"
            )
