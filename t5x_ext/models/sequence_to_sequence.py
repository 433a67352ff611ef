"""What models with an encoder and a decoder share: tables, stacks, and the encoder's side."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from t5x_ext.contracts import AnyArray
from t5x_ext.models.config import TransformerConfig
from t5x_ext.models.sublayers import Aux, Dropout
from t5x_ext.models.transformer import TABLES, Embedding, Transformer, segment_mask


class SequenceToSequence(Transformer):
    """Base of models with an encoder and a decoder; see `Transformer` for its attributes."""

    config: TransformerConfig

    def setup(self) -> None:
        """Creates tables and stacks."""
        config = self.config
        self.source_table, self.target_table, self.output_table = self._tables(*TABLES[config.tied_embeddings])
        self.dropout = Dropout(config.dropout)
        self.encoder = self._stack(config.encoder_layers, config.encoder_sharing)
        self.decoder = self._stack(config.decoder_layers, config.decoder_sharing, with_cross_attention=True)

    def project(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Scores of every token of the vocabulary, float32."""
        return self.output_table.project(hidden)

    def encode(
        self,
        source_tokens: Int[AnyArray, "batch source_length"],
        source_segment_ids: Int[AnyArray, "batch source_length"],
        source_positions: Int[AnyArray, "batch source_length"],
        deterministic: bool = True,
    ) -> Float[Array, "batch source_length embed"]:
        """The encoder's output, after its final norm; values at padding (segment 0) mean nothing."""
        return self._encode(source_tokens, source_segment_ids, source_positions, deterministic)[0]

    def _encode(
        self, tokens: AnyArray, segment_ids: AnyArray, positions: AnyArray, deterministic: bool
    ) -> tuple[Array, Aux]:
        deterministic = self._deterministic(deterministic)
        x = self._embed(self.source_table, tokens, positions, deterministic)
        mask = segment_mask(segment_ids, segment_ids)
        x, aux = self.encoder(lambda layer, x, _: layer(x, mask, deterministic), x, deterministic=deterministic)
        return self.encoder.normalize(x), aux

    def _embed(self, table: Embedding, tokens: AnyArray, positions: AnyArray, deterministic: bool) -> Array:
        return self._dropped(self._scaled(table(tokens)) + self._position_vectors(positions), deterministic)
