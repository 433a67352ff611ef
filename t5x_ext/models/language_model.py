"""The language model: scores of each token given those before it."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Batch
from t5x_ext.models.config import DecoderConfig
from t5x_ext.models.sublayers import Aux, Dropout
from t5x_ext.models.transformer import TABLES, Transformer, causal_mask, one_token, under


class LanguageModel(Transformer):
    """A decoder without cross-attention over packed rows; see `Transformer` for its attributes.

    Reads of a batch the target side of `contracts.TranslationBatch`: `target_inputs`, `target_segment_ids` and
    `target_positions`. Side outputs are under `decoder/`.
    """

    config: DecoderConfig

    def setup(self) -> None:
        """Creates tables and the stack."""
        config = self.config
        self.target_table, self.output_table = self._tables(*TABLES[config.tied_embeddings][1:])
        self.dropout = Dropout(config.dropout)
        self.decoder = self._stack(config.layers, config.sharing)

    def __call__(self, batch: Batch, deterministic: bool = True) -> Float[Array, "batch length vocab"]:
        """Scores of every label given the labels before it, float32."""
        return self.project(self.hidden(batch, deterministic))

    def hidden_and_aux(
        self, batch: Batch, deterministic: bool = True
    ) -> tuple[Float[Array, "batch length embed"], Aux]:
        """The decoder's output and its side outputs, see `Transformer.hidden_and_aux`."""
        deterministic = self._deterministic(deterministic)
        mask = causal_mask(batch["target_segment_ids"])
        vectors = self._scaled(self.target_table(batch["target_inputs"]))
        x = self._dropped(vectors + self._position_vectors(batch["target_positions"]), deterministic)
        x, aux = self.decoder(lambda layer, x, _: layer(x, mask, deterministic), x, deterministic=deterministic)
        return self.decoder.normalize(x), under("decoder", aux)

    def project(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Scores of every token of the vocabulary, float32."""
        return self.output_table.project(hidden)

    @nn.nowrap
    def dummy_batch(self) -> dict[str, Int[Array, "1 1"]]:
        """The arrays that the model reads, with one row and one token."""
        return one_token(*(f"target_{name}" for name in ("inputs", "segment_ids", "positions")))
