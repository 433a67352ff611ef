"""What the three models have in common: tables of vectors, stacks of layers, masks, and shapes without arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import AnyArray, Batch, Params, PyTree
from t5x_ext.models.config import LayerConfig
from t5x_ext.models.layers import Layer
from t5x_ext.models.parts import LayerParts
from t5x_ext.models.placement import UNPLACED, Placement
from t5x_ext.models.sharing import LayerSharing
from t5x_ext.models.stack import Materialise, Stack, as_stored
from t5x_ext.models.sublayers import (
    Aux,
    Dropout,
    Positions,
    compute_dtype,
    einsum_float32,
    named_axes,
    sinusoidal_positions,
)

TABLES = {
    "all": ("embedding", "embedding", "embedding"),
    "decoder": ("source_embedding", "target_embedding", "target_embedding"),
    "none": ("source_embedding", "target_embedding", "output_embedding"),
}
"""Names of the tables for source, target and output, by `tied_embeddings`."""


class Embedding(nn.Module):
    """A table of vectors, normal with deviation embed_dim**-0.5, read by row or as an output projection.

    Attributes:
      config: gives the width and the dtype.
      rows: vectors of the table.
      axis: logical name of the axis of rows; None: it is never sharded.
      placement: where arrays are stored on a mesh of devices.
    """

    config: LayerConfig
    rows: int
    axis: str | None = "vocab"
    placement: Placement = UNPLACED

    def setup(self) -> None:
        """Creates the table."""
        width = self.config.embed_dim
        init = nn.initializers.normal(width**-0.5)
        self.table = self.param("table", named_axes(init, (self.axis, "embed")), (self.rows, width))

    def __call__(self, rows: Int[AnyArray, "batch length"]) -> Float[Array, "batch length embed"]:
        """The vectors of some rows."""
        return self.placement.lookup(self.table, rows, compute_dtype(self.config))

    def project(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Scores of every row, accumulated in float32."""
        dtype = compute_dtype(self.config)
        table = self.placement.weight(self.table.astype(dtype), (self.axis, "embed"))
        return einsum_float32("...e,ve->...v", hidden.astype(dtype), table)


class Transformer(nn.Module):
    """Base of the models; each adds tables, stacks and methods.

    Every method runs through `model.apply({"params": params}, ..., method="name", rngs={"dropout": key})`. Dropout is
    applied only with `deterministic=False` and an rng `dropout`; the rng may be of any JAX implementation (`rbg` is
    cheaper than the default on every device). Models are compared and hashed by their fields, so that they can be
    static arguments of `jax.jit`.

    Attributes:
      config: sizes and switches.
      positions: `(positions int [...], embed_dim) -> float [..., embed_dim]`, added to the embeddings.
      placement: where arrays are stored on a mesh of devices.
      parts: what the layers are made of.
      materialise: turns the stored parameters of one layer into arrays, see `Stack`.
    """

    config: LayerConfig
    positions: Positions = sinusoidal_positions
    placement: Placement = UNPLACED
    parts: LayerParts = LayerParts()
    materialise: Materialise = as_stored

    def hidden(self, batch: Batch, deterministic: bool = True) -> Float[Array, "batch length embed"]:
        """The output of the last stack, after its final norm, in the compute dtype."""
        return self.hidden_and_aux(batch, deterministic)[0]

    def hidden_and_aux(
        self, batch: Batch, deterministic: bool = True
    ) -> tuple[Float[Array, "batch length embed"], Aux]:
        """As `hidden`, and the side outputs of all layers by name, stacked over the N positions of a stack.

        What a part of the layers gives as `{"balance_loss": array}` is found, if that part is the feed-forward
        sub-layer of the stack `decoder`, as `decoder/feed_forward/balance_loss` [N, ...]. The default parts give none.
        """
        raise NotImplementedError

    @nn.nowrap
    def dummy_batch(self) -> dict[str, Int[Array, "1 1"]]:
        """The arrays that the model reads, with one row and one token."""
        raise NotImplementedError

    @nn.nowrap
    def init_boxed(self, key: Array) -> PyTree:
        """New parameters, each in a Flax box with the logical names of its axes."""
        return self.init(key, self.dummy_batch())["params"]

    @nn.nowrap
    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters; nothing is allocated."""
        return jax.tree.map(lambda leaf: leaf, _abstract(self))

    @nn.nowrap
    def _stack(self, num_layers: int, sharing: LayerSharing, with_cross_attention: bool = False) -> Stack:
        layer_type = functools.partial(Layer, with_cross_attention=with_cross_attention)
        return Stack(self.config, num_layers, sharing, layer_type, self.parts, self.placement, self.materialise)

    @nn.nowrap
    def _tables(self, *names: str) -> list[Embedding]:
        """A table of the vocabulary for each name; one table for equal names."""
        make = lambda name: Embedding(self.config, self.config.vocab_size, placement=self.placement, name=name)
        tables = {name: make(name) for name in dict.fromkeys(names)}
        return [tables[name] for name in names]

    def _deterministic(self, deterministic: bool) -> bool:
        return deterministic or not self.has_rng("dropout")

    def _scaled(self, vectors: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        return vectors * math.sqrt(self.config.embed_dim) if self.config.scale_embedding else vectors

    def _position_vectors(self, positions: Int[AnyArray, "batch length"]) -> Float[Array, "batch length embed"]:
        return self.positions(positions, self.config.embed_dim).astype(compute_dtype(self.config))

    def _dropped(
        self, x: Float[Array, "batch length embed"], deterministic: bool
    ) -> Float[Array, "batch length embed"]:
        """Embeddings as the first layer reads them."""
        dropout: Dropout = self.dropout
        return dropout(self.placement.activation(x, ("batch", "length", "embed")), deterministic)


@functools.lru_cache(maxsize=256)
def _abstract(model: Transformer) -> Params:
    return jax.eval_shape(lambda: meta.unbox(model.init_boxed(jax.random.key(0))))


def one_token(*names: str) -> dict[str, Int[Array, "1 1"]]:
    """A batch of one token for each name."""
    return dict.fromkeys(names, jnp.zeros((1, 1), jnp.int32))


def segment_mask(
    queries: Int[AnyArray, "batch length"], keys: Int[AnyArray, "batch memory_length"]
) -> Bool[Array, "batch length memory_length"]:
    """True where query and key belong to the same example and the key is not padding."""
    keys = jnp.asarray(keys)[:, None, :]
    return (queries[:, :, None] == keys) & (keys > 0)


def causal_mask(segment_ids: Int[AnyArray, "batch length"]) -> Bool[Array, "batch length length"]:
    """True where the key belongs to the query's example and is not after it."""
    length = segment_ids.shape[1]
    return segment_mask(segment_ids, segment_ids) & jnp.tril(jnp.ones((length, length), bool))


def under(name: str, aux: Mapping[str, Array]) -> Aux:
    """Side outputs under the name of their stack."""
    return {f"{name}/{key}": value for key, value in aux.items()}
