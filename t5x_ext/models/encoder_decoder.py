"""The encoder-decoder Transformer: teacher-forced scores, and the steps of incremental decoding."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import Batch, Params, PyTree, TranslationBatch, UserError
from t5x_ext.models.config import TransformerConfig
from t5x_ext.models.layers import Layer
from t5x_ext.models.parts import LayerParts
from t5x_ext.models.placement import UNPLACED, Placement
from t5x_ext.models.stack import Materialise, Stack, as_stored
from t5x_ext.models.sublayers import (
    Aux,
    Dropout,
    KeyValue,
    Positions,
    compute_dtype,
    einsum_float32,
    named_axes,
    sinusoidal_positions,
)


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
      positions: `(positions int [...], embed_dim) -> float [..., embed_dim]`, added to the embeddings.
      placement: where arrays are stored on a mesh of devices.
      parts: what the layers are made of.
      materialise: turns the stored parameters of one layer into arrays, see `Stack`.
    """

    config: TransformerConfig
    positions: Positions = sinusoidal_positions
    placement: Placement = UNPLACED
    parts: LayerParts = LayerParts()
    materialise: Materialise = as_stored

    def setup(self) -> None:
        """Creates tables and stacks."""
        config = self.config
        names = _TABLES[config.tied_embeddings]
        tables = {name: Embedding(config, self.placement, name=name) for name in dict.fromkeys(names)}
        self.source_table, self.target_table, self.output_table = (tables[name] for name in names)
        self.dropout = Dropout(config.dropout)
        common = (self.parts, self.placement, self.materialise)
        if config.has_encoder:
            self.encoder = Stack(config, config.encoder_layers, config.encoder_sharing, Layer, *common)
        layer_type = functools.partial(Layer, with_cross_attention=config.has_encoder)
        self.decoder = Stack(config, config.decoder_layers, config.decoder_sharing, layer_type, *common)

    def __call__(self, batch: Batch, deterministic: bool = True) -> Float[Array, "batch length vocab"]:
        """Scores of every label given the labels before it, float32."""
        return self.project(self.hidden(batch, deterministic))

    def hidden(self, batch: Batch, deterministic: bool = True) -> Float[Array, "batch length embed"]:
        """The decoder's output, after its final norm, in the compute dtype; `project` turns it into scores."""
        return self.hidden_and_aux(batch, deterministic)[0]

    def hidden_and_aux(
        self, batch: Batch, deterministic: bool = True
    ) -> tuple[Float[Array, "batch length embed"], Aux]:
        """As `hidden`, and the side outputs of all layers by name, stacked over the N positions of a stack.

        A layer's part that gives `{"balance_loss": array}` as a decoder's feed-forward sub-layer is found as
        `decoder/feed_forward/balance_loss` [N, ...]. The parts of `LayerParts()` give none.
        """
        source_ids, target_ids = batch["source_segment_ids"], batch["target_segment_ids"]
        length = target_ids.shape[1]
        self_mask = _segment_mask(target_ids, target_ids) & jnp.tril(jnp.ones((length, length), bool))
        reads: tuple[Array, ...] = ()
        encoder_aux: Aux = {}
        if self.config.has_encoder:
            source = (batch["source_tokens"], source_ids, batch["source_positions"])
            encoded, encoder_aux = self._encode(*source, deterministic)
            reads = (encoded, _segment_mask(target_ids, source_ids))
        deterministic = self._deterministic(deterministic)
        x = self._embed(self.target_table, batch["target_inputs"], batch["target_positions"], deterministic)
        call = lambda layer, x, _: layer(x, self_mask, deterministic, *reads)
        x, decoder_aux = self.decoder(call, x, deterministic=deterministic)
        aux = {f"encoder/{name}": value for name, value in encoder_aux.items()}
        return self.decoder.normalize(x), aux | {f"decoder/{name}": value for name, value in decoder_aux.items()}

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
        return self._encode(source_tokens, source_segment_ids, source_positions, deterministic)[0]

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
            lambda layer, x, own: layer(x, own[0], position, own[1], source_mask[:, None], method="step"),
            x,
            (cache, memory),
        )
        cache = jax.tree.map(lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, position, 2), cache, new)
        return self.project(self.decoder.normalize(x)[:, 0]), cache

    def _encode(self, tokens: Array, segment_ids: Array, positions: Array, deterministic: bool) -> tuple[Array, Aux]:
        deterministic = self._deterministic(deterministic)
        x = self._embed(self.source_table, tokens, positions, deterministic)
        mask = _segment_mask(segment_ids, segment_ids)
        x, aux = self.encoder(lambda layer, x, _: layer(x, mask, deterministic), x, deterministic=deterministic)
        return self.encoder.normalize(x), aux

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
