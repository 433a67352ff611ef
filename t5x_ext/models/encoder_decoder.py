"""The encoder-decoder Transformer: teacher-forced scores, and the steps of incremental decoding."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import Batch, Params, PyTree, TranslationBatch, UserError
from t5x_ext.models.config import TransformerConfig
from t5x_ext.models.layers import (
    Activation,
    DecoderLayer,
    Dropout,
    EncoderLayer,
    KeyValue,
    Positions,
    compute_dtype,
    einsum_float32,
    named_axes,
    sinusoidal_positions,
)
from t5x_ext.models.placement import UNPLACED, Placement
from t5x_ext.models.stack import Stack


class Embedding(nn.Module):
    """A table of token vectors, normal with deviation embed_dim**-0.5, read by token or as an output projection."""

    config: TransformerConfig
    placement: Placement = UNPLACED

    def setup(self) -> None:
        """Creates the table."""
        config = self.config
        init = nn.initializers.normal(config.embed_dim**-0.5)
        shape = (config.vocab_size, config.embed_dim)
        self.table = self.param("table", named_axes(init, ("vocab", "embed")), shape)

    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... embed"]:
        """The vectors of tokens."""
        return self.placement.lookup(self.table, tokens, compute_dtype(self.config))

    def project(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Scores of every token, accumulated in float32."""
        dtype = compute_dtype(self.config)
        table = self.placement.weight(self.table.astype(dtype), ("vocab", "embed"))
        return einsum_float32("...e,ve->...v", hidden.astype(dtype), table)


class EncoderDecoder(nn.Module):
    """An encoder-decoder Transformer over packed rows, or with `encoder_layers=0` its decoder alone.

    Without an encoder `hidden` and `project` give the scores of a language model of the target side; `encode` raises
    UserError.

    Every method runs through `model.apply({"params": params}, ..., method="name", rngs={"dropout": key})`. Dropout is
    applied only with `deterministic=False` and an rng `dropout`; the rng may be of any JAX implementation (`rbg` is
    cheaper than the default on every device).

    Attributes:
      config: sizes and switches.
      activation: of the feed-forward sub-layers.
      positions: `(positions int [...], embed_dim) -> float [..., embed_dim]`, added to the embeddings.
      placement: where arrays lie on a mesh of devices.
    """

    config: TransformerConfig
    activation: Activation = nn.relu
    positions: Positions = sinusoidal_positions
    placement: Placement = UNPLACED

    def setup(self) -> None:
        """Creates tables and stacks."""
        config = self.config
        names = _TABLES[config.tied_embeddings]
        tables = {name: Embedding(config, self.placement, name=name) for name in dict.fromkeys(names)}
        self.source_table, self.target_table, self.output_table = (tables[name] for name in names)
        self.dropout = Dropout(config.dropout)
        if config.has_encoder:
            self.encoder = Stack(
                config, EncoderLayer, self.activation, config.encoder_layers, config.encoder_sharing, self.placement
            )
        # A layer of a language model is one of an encoder that sees no later position.
        decoder_layer = DecoderLayer if config.has_encoder else EncoderLayer
        self.decoder = Stack(
            config, decoder_layer, self.activation, config.decoder_layers, config.decoder_sharing, self.placement
        )

    def __call__(self, batch: Batch, deterministic: bool = True) -> Float[Array, "batch length vocab"]:
        """Scores of every label given the labels before it, float32."""
        return self.project(self.hidden(batch, deterministic))

    def hidden(self, batch: Batch, deterministic: bool = True) -> Float[Array, "batch length embed"]:
        """The decoder's output, after its final norm, in the compute dtype; `project` turns it into scores."""
        source_ids, target_ids = batch["source_segment_ids"], batch["target_segment_ids"]
        length = target_ids.shape[1]
        self_mask = _segment_mask(target_ids, target_ids) & jnp.tril(jnp.ones((length, length), bool))
        reads: tuple[Array, ...] = (self_mask,)
        if self.config.has_encoder:
            encoded = self.encode(batch["source_tokens"], source_ids, batch["source_positions"], deterministic)
            reads = (encoded, self_mask, _segment_mask(target_ids, source_ids))
        deterministic = self._deterministic(deterministic)
        x = self._embed(self.target_table, batch["target_inputs"], batch["target_positions"], deterministic)
        x, _ = self.decoder(lambda layer, x, _: (layer(x, *reads, deterministic), None), x, deterministic=deterministic)
        return self.decoder.normalize(x)

    def project(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Scores of every token of the vocabulary, float32."""
        return self.output_table.project(hidden)

    def encode(
        self,
        source_tokens: Int[Array, "batch source_length"],
        source_segment_ids: Int[Array, "batch source_length"],
        source_positions: Int[Array, "batch source_length"],
        deterministic: bool = True,
    ) -> Float[Array, "batch source_length embed"]:
        """The encoder's output, after its final norm; values at padding (segment 0) mean nothing."""
        if not self.config.has_encoder:
            raise UserError(
                "encoder_layers is 0: this is a language model, which scores texts and translates none; where a run "
                "decodes, set EvaluationConfig.max_lines = 0 and give no test corpora"
            )
        deterministic = self._deterministic(deterministic)
        x = self._embed(self.source_table, source_tokens, source_positions, deterministic)
        mask = _segment_mask(source_segment_ids, source_segment_ids)
        x, _ = self.encoder(lambda layer, x, _: (layer(x, mask, deterministic), None), x, deterministic=deterministic)
        return self.encoder.normalize(x)

    def cross_memory(self, encoded: Float[Array, "batch source_length embed"]) -> KeyValue:
        """Keys and values of cross-attention, [layers, batch, source_length, heads, head_dim] with N layers."""
        _, memory = self.decoder(lambda layer, carry, _: (carry, layer(encoded, method="cross_memory")), None)
        return memory

    def empty_cache(self, rows: int, max_length: int) -> KeyValue:
        """A cache for `max_length` target positions, [layers, rows, max_length, heads, head_dim] in the compute dtype.

        One slot per decoder position, N and not M: positions that share a parameter set see different inputs.
        """
        config = self.config
        shape = (config.decoder_layers, rows, max_length, config.num_heads, config.head_dim)
        axes = (None, "batch", None, "heads", None)
        empty = self.placement.activation(jnp.zeros(shape, compute_dtype(config)), axes)
        return KeyValue(empty, empty)

    def decode_step(
        self,
        tokens: Int[Array, " rows"],
        position: Int[Array, ""],
        cache: KeyValue,
        memory: KeyValue,
        source_mask: Bool[Array, "rows source_length"],
    ) -> tuple[Float[Array, "rows vocab"], KeyValue]:
        """One step of incremental decoding.

        Args:
          tokens: decoder input at `position`; EOS at position 0.
          position: the same for all rows; positions before it are in the cache.
          cache: from `empty_cache` or the step before.
          memory: from `cross_memory`, rows aligned with `tokens`.
          source_mask: True where the source has a token.

        Returns:
          Scores of the next token, float32, and the cache with this position written.
        """
        positions = jnp.broadcast_to(position, (tokens.shape[0], 1))
        x = self._embed(self.target_table, tokens[:, None], positions, deterministic=True)
        x, new = self.decoder(
            lambda layer, x, own: layer(x, *own, position, source_mask[:, None], method="step"), x, (cache, memory)
        )
        cache = jax.tree.map(lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, position, 2), cache, new)
        return self.project(self.decoder.normalize(x)[:, 0]), cache

    def _deterministic(self, deterministic: bool) -> bool:
        return deterministic or not self.has_rng("dropout")

    def _embed(self, table: Embedding, tokens: Array, positions: Array, deterministic: bool) -> Array:
        x = table(tokens)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.embed_dim)
        x = x + self.positions(positions, self.config.embed_dim).astype(x.dtype)
        return self.dropout(self.placement.activation(x, ("batch", "length", "embed")), deterministic)


_TABLES = {
    "all": ("embedding", "embedding", "embedding"),
    "decoder": ("source_embedding", "target_embedding", "target_embedding"),
    "none": ("source_embedding", "target_embedding", "output_embedding"),
}
"""Names of the tables for source, target and output."""


def init_params(config: TransformerConfig, key: Array) -> Params:
    """The parameters of a new model: nested dictionaries of float32 arrays. Traceable by `jit` and `eval_shape`."""
    return jax.jit(lambda key: meta.unbox(_init_boxed(config, key)))(key)


def logical_axes(config: TransformerConfig) -> PyTree:
    """The parameter tree with a tuple of logical axis names (`contracts.AXIS_NAMES`) for each array.

    Nothing is allocated. The leaves are tuples: map over the result with `is_leaf=lambda x: isinstance(x, tuple)`.
    """
    boxed = jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=meta.is_axis_metadata)


def _init_boxed(config: TransformerConfig, key: Array) -> PyTree:
    token = jnp.zeros((1, 1), jnp.int32)
    return EncoderDecoder(config).init(key, dict.fromkeys(TranslationBatch.__annotations__, token))["params"]


def _segment_mask(
    queries: Int[Array, "batch length"], keys: Int[Array, "batch memory_length"]
) -> Bool[Array, "batch length memory_length"]:
    """True where query and key belong to the same example and the key is not padding."""
    return (queries[:, :, None] == keys[:, None, :]) & (keys[:, None, :] > 0)
