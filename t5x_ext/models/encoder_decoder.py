"""The encoder-decoder Transformer: teacher-forced scores, and the steps of incremental decoding."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import AnyArray, Batch
from t5x_ext.models.sequence_to_sequence import SequenceToSequence
from t5x_ext.models.sublayers import Aux, KeyValue, compute_dtype
from t5x_ext.models.transformer import causal_mask, one_token, segment_mask, under


class EncoderDecoder(SequenceToSequence):
    """An encoder-decoder Transformer over packed rows (`contracts.Decodable`); see `Transformer` for its attributes.

    Reads of a batch `source_tokens`, `source_segment_ids`, `source_positions`, `target_inputs`, `target_segment_ids`
    and `target_positions`, see `contracts.TranslationBatch`. Side outputs are under `encoder/` and `decoder/`.
    """

    def __call__(self, batch: Batch, deterministic: bool = True) -> Float[Array, "batch length vocab"]:
        """Scores of every label given the labels before it, float32."""
        return self.project(self.hidden(batch, deterministic))

    def hidden_and_aux(
        self, batch: Batch, deterministic: bool = True
    ) -> tuple[Float[Array, "batch length embed"], Aux]:
        """The decoder's output, and the side outputs of both stacks, see `Transformer.hidden_and_aux`."""
        source_ids, target_ids = batch["source_segment_ids"], batch["target_segment_ids"]
        encoded, encoder_aux = self._encode(
            batch["source_tokens"], source_ids, batch["source_positions"], deterministic
        )
        deterministic = self._deterministic(deterministic)
        masks = causal_mask(target_ids), segment_mask(target_ids, source_ids)
        x = self._embed(self.target_table, batch["target_inputs"], batch["target_positions"], deterministic)
        call = lambda layer, x, _: layer(x, masks[0], deterministic, encoded, masks[1])
        x, decoder_aux = self.decoder(call, x, deterministic=deterministic)
        return self.decoder.normalize(x), under("encoder", encoder_aux) | under("decoder", decoder_aux)

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
        tokens: Int[AnyArray, " rows"],
        position: Int[Array, ""],
        cache: KeyValue,
        memory: KeyValue,
        source_mask: Bool[AnyArray, "rows source_length"],
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

    @nn.nowrap
    def dummy_batch(self) -> dict[str, Int[Array, "1 1"]]:
        """The arrays that the model reads, with one row and one token."""
        return one_token(
            *(f"source_{name}" for name in ("tokens", "segment_ids", "positions")),
            *(f"target_{name}" for name in ("inputs", "segment_ids", "positions")),
        )
