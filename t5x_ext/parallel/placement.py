"""Where a model's arrays lie during the step: rows of activations cut, weights gathered just before their use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Axes
from t5x_ext.parallel.mesh import BATCH_AXES, batch_devices
from t5x_ext.parallel.rules import AxisRules
from t5x_ext.parallel.shardings import Cut, partition_spec


@dataclass(frozen=True)
class MeshPlacement:
    """The placement of a model on a mesh (`models.Placement`).

    Without it the compiler derives layouts from those of the parameters, and where parameters are cut along `embed`
    it cuts activations so, too, and moves them between layouts in every layer.

    Attributes:
      mesh: of the parameters.
      rules: of the parameters.
    """

    mesh: Mesh
    rules: AxisRules

    def activation(self, x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
        """`x` with its rows cut over the mesh axes of a batch, and other axes by rule where those are still free."""
        return jax.lax.with_sharding_constraint(x, self._sharding(x, axes, gathered=True))

    def weight(self, weight: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
        """`weight` gathered along the mesh axes over which rows are cut; its gradient is scattered there again."""
        kept, gathered = (self._sharding(weight, axes, gathered=gathered) for gathered in (False, True))
        return weight if kept == gathered else _gathered(kept, gathered, weight)

    def lookup(
        self, table: Float[Array, "vocab embed"], tokens: Int[Array, "batch length"], dtype: jnp.dtype
    ) -> Float[Array, "batch length embed"]:
        """Rows of a table that stays cut: a device looks up its columns of every token of its group.

        The vectors change places afterwards (all-to-all). That moves vectors of tokens only; gathering the table first
        would move the whole table, and its whole gradient back.
        """
        columns = self._sharding(table, ("vocab", "embed"), gathered=False).spec[1]
        if columns not in BATCH_AXES or tokens.shape[0] % batch_devices(self.mesh):
            return jnp.take(table, tokens, axis=0).astype(dtype)
        rows = tuple(axis for axis in BATCH_AXES if axis != columns)
        tokens = jax.lax.with_sharding_constraint(tokens, NamedSharding(self.mesh, PartitionSpec(rows)))
        vectors = jnp.take(table, tokens, axis=0).astype(dtype)
        return jax.lax.with_sharding_constraint(vectors, NamedSharding(self.mesh, PartitionSpec(rows, None, columns)))

    def _sharding(self, x: Array, axes: Axes, gathered: bool) -> NamedSharding:
        cuts = [self._cut(name, gathered) for name in axes]
        return NamedSharding(self.mesh, partition_spec(self.mesh, cuts, x.shape))

    def _cut(self, name: str | None, gathered: bool) -> Cut:
        if name in ("batch", "length"):
            return BATCH_AXES if name == "batch" else None
        along = self.rules.mesh_axis(name)
        return None if gathered and along in BATCH_AXES else along


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(kept: NamedSharding, gathered: NamedSharding, weight: Array) -> Array:
    return _gather(kept, gathered, weight)


def _gather(kept: NamedSharding, gathered: NamedSharding, weight: Array) -> Array:
    # The first constraint keeps the compiler from gathering before a cast, in twice the bytes.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(weight, kept), gathered)


def _gathered_forward(kept: NamedSharding, gathered: NamedSharding, weight: Array) -> tuple[Array, None]:
    # The plain operation: `jvp` of a gradient (a Hessian-vector product) differentiates this, not the custom rule.
    return _gather(kept, gathered, weight), None


def _gathered_backward(kept: NamedSharding, gathered: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    # Transposing the constraints themselves would ask for the whole gradient on every device first.
    return (jax.lax.with_sharding_constraint(gradient, kept),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
