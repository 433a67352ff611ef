"""A Transformer that writes all tokens of a translation at once: its decoder has no order of time.

What an autoregressive decoder reads (the tokens before) is not there, so the decoder reads the source again, copied to
the length of the target. That length is predicted by the encoder, or is a multiple of the source's where the objective
aligns outputs with labels by itself (CTC).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import AnyArray, Batch
from t5x_ext.models.config import ParallelConfig
from t5x_ext.models.sequence_to_sequence import SequenceToSequence
from t5x_ext.models.sharing import LayerSharing
from t5x_ext.models.sublayers import Aux, compute_dtype, einsum_float32, named_axes
from t5x_ext.models.transformer import one_token, segment_mask, under


class ParallelDecoder(SequenceToSequence):
    """An encoder-decoder that scores all target positions at once; see `Transformer` for its attributes.

    Reads of a batch what `EncoderDecoder` reads but `target_inputs`; with `upsample` only the source. Rows may be
    packed: an example reads and copies its own tokens alone. Names of parameters are those of `EncoderDecoder`, and
    `length/kernel` and `auxiliary`.
    """

    config: ParallelConfig

    def setup(self) -> None:
        """Creates tables, stacks and the length head."""
        super().setup()
        config = self.config
        if config.upsample is None:
            self.length = LengthHead(config)
        if config.auxiliary_layers:
            self.auxiliary = self._stack(config.auxiliary_layers, LayerSharing(), with_cross_attention=True)

    def __call__(self, batch: Batch, deterministic: bool = True) -> Float[Array, "batch length vocab"]:
        """Scores of every position, float32; with `upsample` [batch, upsample * source_length, vocab]."""
        scores = self.project(self.hidden(batch, deterministic))
        if self.is_initializing():
            encoded = self.encode(batch["source_tokens"], batch["source_segment_ids"], batch["source_positions"])
            if self.config.upsample is None:
                self.length_logits(encoded, batch["source_segment_ids"])
            if self.config.auxiliary_layers:
                self.auxiliary_hidden(encoded, batch, self.decoder_inputs(batch))
        return scores

    def hidden_and_aux(
        self, batch: Batch, deterministic: bool = True
    ) -> tuple[Float[Array, "batch length embed"], Aux]:
        """The decoder's output for the target's true length, and side outputs, see `Transformer.hidden_and_aux`."""
        encoded, encoder_aux = self._encode(
            batch["source_tokens"], batch["source_segment_ids"], batch["source_positions"], deterministic
        )
        hidden, decoder_aux = self._decode("decoder", encoded, batch, self.decoder_inputs(batch), deterministic)
        return hidden, under("encoder", encoder_aux) | under("decoder", decoder_aux)

    def length_logits(
        self,
        encoded: Float[Array, "batch source_length embed"],
        source_segment_ids: Int[AnyArray, "batch source_length"],
    ) -> Float[Array, "batch source_length max_target_length"]:
        """Scores of the target's length, float32; at each source position those of the example that it belongs to.

        They are a projection, without bias, of the mean of the example's encoder outputs. Class 0 is impossible (-inf).
        (ParaGen reads the output at a special first token instead, which packed rows do not have.)
        """
        mask = segment_mask(source_segment_ids, source_segment_ids).astype(encoded.dtype)
        mean = jnp.einsum("bqk,bke->bqe", mask, encoded) / jnp.maximum(mask.sum(-1, keepdims=True), 1)
        return self.length(mean)

    def decoder_inputs(self, batch: Batch) -> Float[Array, "batch length embed"]:
        """What the decoder reads, without positions and dropout: `decode` adds them, after tokens were revealed."""
        config = self.config
        target_ids, _ = self.target_layout(batch)
        if config.decoder_input == "unknown":
            return self.embed_targets(jnp.full(target_ids.shape, config.unk_id, jnp.int32))
        source = self._scaled(self.source_table(batch["source_tokens"]))
        if config.upsample is not None:
            return jnp.repeat(source, config.upsample, axis=1)
        index = uniform_copy(batch["source_segment_ids"], target_ids, batch["target_positions"])
        return jnp.take_along_axis(source, index[:, :, None], axis=1)

    def embed_targets(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length embed"]:
        """Embeddings of target tokens as `decoder_inputs` scales them: what glancing reveals."""
        return self._scaled(self.target_table(tokens))

    def target_layout(self, batch: Batch) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
        """Segment ids and positions of the decoder's rows: the batch's own, or the source's upsampled."""
        times = self.config.upsample
        if times is None:
            return jnp.asarray(batch["target_segment_ids"]), jnp.asarray(batch["target_positions"])
        positions = batch["source_positions"][:, :, None] * times + jnp.arange(times)
        segment_ids = jnp.repeat(batch["source_segment_ids"], times, axis=1)
        return segment_ids, positions.reshape(segment_ids.shape)

    def decode(
        self,
        encoded: Float[Array, "batch source_length embed"],
        batch: Batch,
        inputs: Float[Array, "batch length embed"],
        deterministic: bool = True,
    ) -> Float[Array, "batch length embed"]:
        """The decoder's output, after its final norm, in the compute dtype.

        Args:
          encoded: from `encode`.
          batch: gives segment ids and positions; tokens are not read.
          inputs: from `decoder_inputs`, some of them perhaps replaced by those of `embed_targets`.
          deterministic: False turns dropout on.
        """
        return self._decode("decoder", encoded, batch, inputs, deterministic)[0]

    def auxiliary_hidden(
        self,
        encoded: Float[Array, "batch source_length embed"],
        batch: Batch,
        inputs: Float[Array, "batch length embed"],
        deterministic: bool = True,
    ) -> Float[Array, "batch length embed"]:
        """The output of the second decoder; arguments as those of `decode`."""
        return self._decode("auxiliary", encoded, batch, inputs, deterministic)[0]

    @nn.nowrap
    def dummy_batch(self) -> dict[str, Int[Array, "1 1"]]:
        """The arrays that the model reads, with one row and one token."""
        return one_token(
            *(f"source_{name}" for name in ("tokens", "segment_ids", "positions")),
            *(f"target_{name}" for name in ("segment_ids", "positions")),
        )

    def _decode(
        self, stack: str, encoded: Array, batch: Batch, inputs: Array, deterministic: bool
    ) -> tuple[Array, Aux]:
        deterministic = self._deterministic(deterministic)
        segment_ids, positions = self.target_layout(batch)
        masks = segment_mask(segment_ids, segment_ids), segment_mask(segment_ids, batch["source_segment_ids"])
        x = self._dropped(inputs + self._position_vectors(positions), deterministic)
        layers = getattr(self, stack)
        call = lambda layer, x, _: layer(x, masks[0], deterministic, encoded, masks[1])
        x, aux = layers(call, x, deterministic=deterministic)
        return layers.normalize(x), aux


class LengthHead(nn.Module):
    """A projection, without bias, of a vector for each example to the classes of target lengths.

    Attributes:
      config: gives width, classes and dtype.
    """

    config: ParallelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch max_target_length"]:
        """Scores of 0, 1, 2, ... tokens, float32; that of 0 is -inf."""
        config = self.config
        shape = (config.embed_dim, config.max_target_length)
        kernel = self.param("kernel", named_axes(nn.initializers.lecun_normal(), ("embed", None)), shape)
        dtype = compute_dtype(config)
        scores = einsum_float32("...e,el->...l", x.astype(dtype), kernel.astype(dtype))
        return jnp.where(jnp.arange(config.max_target_length) == 0, -jnp.inf, scores)


def uniform_copy(
    source_segment_ids: Int[AnyArray, "batch source_length"],
    target_segment_ids: Int[AnyArray, "batch length"],
    target_positions: Int[AnyArray, "batch length"],
) -> Int[Array, "batch length"]:
    """The position of the row's source that each target position copies: round(t (S - 1) / (T - 1 + 1e-4)) of its own.

    S and T are the tokens of its example on both sides: the first copies the first, the last the last, and for S = T
    each its own (ParaGen, as Gu et al., arXiv 1711.02281, section 3.3).
    """
    of_example = segment_mask(target_segment_ids, source_segment_ids)
    source_lengths = of_example.sum(-1)
    target_lengths = segment_mask(target_segment_ids, target_segment_ids).sum(-1)
    ratio = (source_lengths - 1) / (target_lengths - 1 + 1e-4)
    own = jnp.round(target_positions * ratio).astype(jnp.int32)
    last = source_segment_ids.shape[1] - 1
    return jnp.clip(jnp.argmax(of_example, axis=-1) + own, 0, last).astype(jnp.int32)
