"""Shardings of a model's arrays during the step: activations by rows, weights gathered just before their use."""

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
from t5x_ext.parallel.shardings import AxisSharding, partition_spec


@dataclass(frozen=True)
class MeshPlacement:
    """The placement of a model on a mesh (`models.Placement`).

    Without it the compiler derives shardings of activations from those of the parameters: if parameters are sharded
    along `embed`, it shards activations along `embed` too, and reshards them in every layer.

    Attributes:
      mesh: of the parameters.
      rules: of the parameters.
    """

    mesh: Mesh
    rules: AxisRules

    def activation(self, x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
        """`x` with rows sharded over `BATCH_AXES`, and other axes by the rules if their mesh axis is none of those."""
        return jax.lax.with_sharding_constraint(x, self._sharding(x, axes, gathered=True))

    def weight(self, weight: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
        """`weight` gathered along `BATCH_AXES`; its gradient is scattered along them."""
        kept, gathered = (self._sharding(weight, axes, gathered=gathered) for gathered in (False, True))
        return weight if kept == gathered else _gathered(kept, gathered, weight)

    def lookup(
        self, table: Float[Array, "vocab embed"], tokens: Int[Array, "batch length"], dtype: jnp.dtype
    ) -> Float[Array, "batch length embed"]:
        """Embeddings from a table that stays sharded: a device looks up its columns for all tokens of its group.

        An all-to-all then reshards the embeddings by rows. It moves only the embeddings of the batch; gathering the
        table would move the whole table, and its whole gradient back.
        """
        columns = self._sharding(table, ("vocab", "embed"), gathered=False).spec[1]
        if columns not in BATCH_AXES or tokens.shape[0] % batch_devices(self.mesh):
            return jnp.take(table, tokens, axis=0).astype(dtype)
        rows = tuple(axis for axis in BATCH_AXES if axis != columns)
        tokens = jax.lax.with_sharding_constraint(tokens, NamedSharding(self.mesh, PartitionSpec(rows)))
        vectors = jnp.take(table, tokens, axis=0).astype(dtype)
        return jax.lax.with_sharding_constraint(vectors, NamedSharding(self.mesh, PartitionSpec(rows, None, columns)))

    def _sharding(self, x: Array, axes: Axes, gathered: bool) -> NamedSharding:
        wanted = [self._axis_sharding(name, gathered) for name in axes]
        return NamedSharding(self.mesh, partition_spec(self.mesh, wanted, x.shape))

    def _axis_sharding(self, name: str | None, gathered: bool) -> AxisSharding:
        if name in ("batch", "length"):
            return BATCH_AXES if name == "batch" else None
        along = self.rules.mesh_axis(name)
        return None if gathered and along in BATCH_AXES else along


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(kept: NamedSharding, gathered: NamedSharding, weight: Array) -> Array:
    return _gather(kept, gathered, weight)


def _gather(kept: NamedSharding, gathered: NamedSharding, weight: Array) -> Array:
    # The first constraint keeps the compiler from gathering before a cast, which would move twice the bytes.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(weight, kept), gathered)


def _gathered_forward(kept: NamedSharding, gathered: NamedSharding, weight: Array) -> tuple[Array, None]:
    # The plain operation: `jvp` of a gradient (a Hessian-vector product) differentiates this, not the custom rule.
    return _gather(kept, gathered, weight), None


def _gathered_backward(kept: NamedSharding, gathered: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    # The transpose of the constraints would first replicate the gradient on every device.
    return (jax.lax.with_sharding_constraint(gradient, kept),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
