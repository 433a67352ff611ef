"""Vectors of sentences by an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from t5x_ext.checkpoints import RunFolder, run_params
from t5x_ext.contracts import Batch, Params, UserError
from t5x_ext.data.labelled import Examples, RowConfig, in_order, where_examples_are
from t5x_ext.data.wordpiece import FILE, WordPiece
from t5x_ext.models import Encoder, Pooling, model_from_json, pooled


class SentenceEncoder:
    """An encoder that gives a vector of length 1 for each text."""

    def __init__(self, model: Encoder, params: Params, tokenizer: WordPiece, pooling: Pooling = "mean"):
        """Joins a model with its tokenizer.

        Args:
          model: the encoder.
          params: its parameters.
          tokenizer: of the texts.
          pooling: the vector of a text.
        """
        self._model, self._params, self._tokenizer = model, jax.tree.map(jnp.asarray, params), tokenizer
        self._pooling: Pooling = pooling

    @classmethod
    def from_run(cls, run_dir: epath.PathLike, checkpoint: str | int = "best") -> SentenceEncoder:
        """Opens a folder that `convert.import_encoder` wrote.

        Raises:
          UserError: if it is of another task or damaged.
        """
        folder = RunFolder(run_dir)
        record = folder.read_record()
        tokenizer = WordPiece.from_folder(folder.path)
        if tokenizer.fingerprint() != record["tokenizer"]:
            raise UserError(f"{folder.path / FILE} is not the tokenizer of this encoder; restore it")
        params = run_params(folder, checkpoint)
        return cls(model_from_json(record["model"]), params, tokenizer, record["pooling"])

    def encode(self, lines: Sequence[str], *, length: int = 256, rows: int = 16) -> Float[np.ndarray, "lines embed"]:
        """The vectors, float32, of Euclidean length 1.

        Args:
          lines: texts.
          length: tokens of a text that are read.
          rows: texts computed at a time.
        """
        if not lines:
            return np.zeros((0, self._model.config.embed_dim), np.float32)
        tokenized = self._tokenizer.encode([(line,) for line in lines], length)
        longest = max(len(text.ids) for text in tokenized)
        config = RowConfig(rows=min(rows, len(lines)), length=-(-longest // 32) * 32)
        examples = Examples(tokenized, np.zeros(len(lines), np.int32))
        found = np.zeros((len(lines), self._model.config.embed_dim), np.float32)
        for batch, (inside, numbers) in zip(
            in_order(examples, config), where_examples_are(examples, config), strict=True
        ):
            found[numbers] = np.asarray(_vectors(self._model, self._params, batch, self._pooling))[inside]
        return found


@partial(jax.jit, static_argnums=(0, 3))
def _vectors(model: Encoder, params: Params, batch: Batch, pooling: Pooling) -> Float[Array, "rows examples embed"]:
    tokens: Any = model.apply({"params": params}, batch)
    vectors = pooled(tokens.astype(jnp.float32), batch, pooling)
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
