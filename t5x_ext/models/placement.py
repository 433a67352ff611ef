"""The seam through which a model is told where its arrays lie; a model alone leaves that to the compiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import AnyArray, Axes


@runtime_checkable
class Placement(Protocol):
    """Says where arrays lie while they are computed with; see `parallel.MeshPlacement`. Values never change."""

    def activation(self, x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
        """An activation, its gradient laid out alike."""
        ...

    def weight(self, weight: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
        """A weight about to be used, in the dtype it is used in; its gradient goes back to where the weight is kept."""
        ...

    def lookup(
        self, table: Float[Array, "vocab embed"], tokens: Int[AnyArray, "batch length"], dtype: jnp.dtype
    ) -> Float[Array, "batch length embed"]:
        """The table's rows of tokens, cast to `dtype`; gradients of equal tokens add up in the table's dtype."""
        ...


@dataclass(frozen=True)
class Unplaced:
    """Leaves everything to the compiler: one device, or what it propagates from arguments."""

    def activation(self, x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
        """Returns `x`."""
        return x

    def weight(self, weight: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
        """Returns `weight`."""
        return weight

    def lookup(
        self, table: Float[Array, "vocab embed"], tokens: Int[AnyArray, "batch length"], dtype: jnp.dtype
    ) -> Float[Array, "batch length embed"]:
        """The rows of `table`."""
        return jnp.take(table, tokens, axis=0).astype(dtype)


UNPLACED = Unplaced()
