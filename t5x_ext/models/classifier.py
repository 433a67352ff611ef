"""An encoder with a head that scores classes of examples."""

from __future__ import annotations

from typing import Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Batch, UserError
from t5x_ext.models.encoder import Encoder
from t5x_ext.models.sublayers import compute_dtype, einsum_float32, named_axes
from t5x_ext.models.transformer import one_token

Pooling = Literal["first", "mean"]
"""The vector of an example: that of its first token (BERT's [CLS]), or the mean over its tokens."""


class Classifier(Encoder):
    """Scores of classes for each example of padded or packed rows.

    Reads what an `Encoder` reads, and `starts`, int32 [batch, examples]: where in its row each example begins; example
    k of a row has the segment id k + 1. Parameters are those of the encoder and `head/{kernel,bias}`.

    Attributes:
      classes: number of classes.
      pooling: the vector of an example.
    """

    classes: int = 2
    pooling: Pooling = "first"

    def setup(self) -> None:
        """Creates encoder and head."""
        super().setup()
        if self.pooling not in get_args(Pooling):
            raise UserError(f"pooling is {self.pooling!r}; it must be one of {', '.join(get_args(Pooling))}")
        self.head = Head(self.config.embed_dim, self.classes)

    def hidden(self, batch: Batch, deterministic: bool = True) -> Float[Array, "batch examples embed"]:
        """A vector for each example, in the compute dtype, with dropout; `project` turns it into scores."""
        deterministic = self._deterministic(deterministic)
        vectors = pooled(self.hidden_and_aux(batch, deterministic)[0], batch, self.pooling)
        return self.dropout(vectors, deterministic)

    def project(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch classes"]:
        """Scores of every class, float32."""
        scores: Array = self.head(hidden.astype(compute_dtype(self.config)))
        return scores

    def __call__(self, batch: Batch, deterministic: bool = True) -> Float[Array, "batch examples classes"]:
        """Scores of every class for each example, float32."""
        return self.project(self.hidden(batch, deterministic))

    @nn.nowrap
    def dummy_batch(self) -> dict[str, Int[Array, "1 1"]]:
        """The arrays that the model reads, with one row, one example and one token."""
        return super().dummy_batch() | one_token("starts")


class Head(nn.Module):
    """A linear map to scores, normal with deviation 0.02.

    Attributes:
      width: of its input.
      classes: of its output.
    """

    width: int
    classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch classes"]:
        """The scores, float32."""
        init = named_axes(nn.initializers.normal(0.02), ("embed", None))
        kernel = self.param("kernel", init, (self.width, self.classes))
        bias = self.param("bias", named_axes(nn.initializers.zeros, (None,)), (self.classes,))
        return einsum_float32("...e,ec->...c", x, kernel.astype(x.dtype)) + bias


def pooled(
    vectors: Float[Array, "batch length embed"], batch: Batch, pooling: Pooling
) -> Float[Array, "batch examples embed"]:
    """A vector for each example of packed rows; zero, or that of a row's first token, where there is none."""
    starts = batch["starts"]
    if pooling == "first":
        return jnp.take_along_axis(vectors, starts[..., None], axis=1)
    numbers = jnp.arange(1, starts.shape[1] + 1)[:, None]
    inside = (batch["segment_ids"][:, None] == numbers).astype(jnp.float32)
    shares = inside / jnp.maximum(jnp.sum(inside, axis=-1, keepdims=True), 1.0)
    return jnp.einsum("bel,bld->bed", shares, vectors.astype(jnp.float32)).astype(vectors.dtype)
