"""The encoder alone: a vector for each token, which sees all tokens of its example."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Batch
from t5x_ext.models.config import EncoderConfig
from t5x_ext.models.sublayers import Aux, Dropout
from t5x_ext.models.transformer import Embedding, Transformer, one_token, segment_mask, under


class Encoder(Transformer):
    """An encoder over packed or padded rows (BERT, arXiv 1810.04805); see `Transformer` for its attributes.

    Reads of a batch `tokens`, `segment_ids` and `positions`, int32 [batch, length] as in `contracts.TranslationBatch`,
    and `token_types` if the config has any. Vectors at padding (segment 0) mean nothing. With `config.max_positions`
    the attribute `positions` is not used. Side outputs are under `encoder/`.
    """

    config: EncoderConfig

    def setup(self) -> None:
        """Creates tables and the stack."""
        config = self.config
        (self.table,) = self._tables("embedding")
        if config.max_positions is not None:
            self.position_embedding = Embedding(config, config.max_positions, None, self.placement)
        if config.token_types:
            self.type_embedding = Embedding(config, config.token_types, None, self.placement)
        if config.embedding_norm:
            self.embedding_norm = self.parts.norm(config)
        self.dropout = Dropout(config.dropout)
        self.encoder = self._stack(config.layers, config.sharing)

    def __call__(self, batch: Batch, deterministic: bool = True) -> Float[Array, "batch length embed"]:
        """A vector for each token, in the compute dtype; `project` turns it into scores of the vocabulary."""
        return self.hidden(batch, deterministic)

    def hidden_and_aux(
        self, batch: Batch, deterministic: bool = True
    ) -> tuple[Float[Array, "batch length embed"], Aux]:
        """The encoder's output and its side outputs, see `Transformer.hidden_and_aux`."""
        deterministic = self._deterministic(deterministic)
        mask = segment_mask(batch["segment_ids"], batch["segment_ids"])
        x = self._dropped(self._embed(batch), deterministic)
        x, aux = self.encoder(lambda layer, x, _: layer(x, mask, deterministic), x, deterministic=deterministic)
        return self.encoder.normalize(x), under("encoder", aux)

    def project(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Scores of every token of the vocabulary by the table of embeddings, float32: for masked language models."""
        return self.table.project(hidden)

    @nn.nowrap
    def dummy_batch(self) -> dict[str, Int[Array, "1 1"]]:
        """The arrays that the model reads, with one row and one token."""
        return one_token("tokens", "segment_ids", "positions", *(["token_types"] if self.config.token_types else ()))

    def _embed(self, batch: Batch) -> Float[Array, "batch length embed"]:
        config, positions = self.config, batch["positions"]
        x = self._scaled(self.table(batch["tokens"]))
        x = x + (
            self._position_vectors(positions) if config.max_positions is None else self.position_embedding(positions)
        )
        if config.token_types:
            x = x + self.type_embedding(batch["token_types"])
        return self.embedding_norm(x) if config.embedding_norm else x
