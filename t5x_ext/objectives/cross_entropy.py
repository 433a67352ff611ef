"""Label-smoothed cross-entropy over a large vocabulary, in chunks so that the scores of a batch never exist at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Batch, Context, Loss, Params, UserError


@dataclass(frozen=True)
class LabelSmoothedCrossEntropy:
    """Cross-entropy against labels mixed with the uniform distribution, summed over labels (`contracts.Objective`).

    Per label, with log-probabilities log p over V pieces and smoothing e, in the form of fairseq and ParaGen:
    (1 - e) * (-log p[label]) + e * mean_V(-log p), plus z_loss * logsumexp(scores)^2, which keeps scores from
    drifting (Mesh-TensorFlow; used by T5X). The gradient of z_loss is counted in the loss, not in the metrics.

    `loss.metrics` holds `nll`, the unsmoothed cross-entropy in nats, and `accuracy`, the share of labels that no other
    piece outscores; weights are numbers of labels.

    Attributes:
      model: any module with methods `hidden(batch, deterministic)` -> [batch, length, embed] and
        `project(hidden)` -> float32 [..., vocab].
      label_smoothing: e, in [0, 1).
      z_loss: weight of the squared log-normaliser; 0 turns it off.
      chunk_tokens: target positions of a batch (padding included) whose scores are held at once. Larger batches go
        through in chunks, whose scores are computed again in the backward pass.

    Raises:
      UserError: for values out of range.
    """

    model: nn.Module
    label_smoothing: float = 0.1
    z_loss: float = 0.0
    chunk_tokens: int = 8192

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"LabelSmoothedCrossEntropy.label_smoothing is {self.label_smoothing}; it must be in [0, 1)"
            )
        if self.z_loss < 0:
            raise UserError(f"LabelSmoothedCrossEntropy.z_loss is {self.z_loss}; it must be 0 or more")
        if self.chunk_tokens < 1:
            raise UserError(f"LabelSmoothedCrossEntropy.chunk_tokens is {self.chunk_tokens}; it must be 1 or more")

    def __call__(self, params: Params, batch: Batch, context: Context) -> Loss:
        """The loss of a batch as sums; dropout is on when the context has rngs."""
        hidden = self._hidden(params, batch, context)
        labels, weights = batch["target_labels"], self.label_weights(batch)

        def sums(hidden: Array, labels: Array, weights: Array) -> Float[Array, " sums"]:
            return self._sums(self._project(params, hidden), labels, weights)

        rows, length = labels.shape
        positions = max(1, self.chunk_tokens // rows)
        if positions >= length:
            total = sums(hidden, labels, weights)
        else:
            chunks = [_chunks_of_positions(a, positions) for a in (hidden, labels, weights)]
            add = jax.checkpoint(lambda total, chunk: (total + sums(*chunk), None), prevent_cse=False)
            total, _ = jax.lax.scan(add, jnp.zeros(3, jnp.float32), tuple(chunks))
        weight = jnp.sum(weights)
        return Loss(total[0], weight, {"nll": (total[1], weight), "accuracy": (total[2], weight)})

    def logits(self, params: Params, batch: Batch, context: Context) -> Float[Array, "batch length vocab"]:
        """Scores of every label position, float32."""
        return self._project(params, self._hidden(params, batch, context))

    def label_weights(self, batch: Batch) -> Float[Array, "batch length"]:
        """1 where a label counts, 0 where it is padding."""
        return (batch["target_segment_ids"] > 0).astype(jnp.float32)

    def _hidden(self, params: Params, batch: Batch, context: Context) -> Float[Array, "batch length embed"]:
        rngs = None if context.rngs is None else dict(context.rngs)
        hidden: Any = self.model.apply({"params": params}, batch, rngs is None, method="hidden", rngs=rngs)
        return hidden

    def _project(self, params: Params, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        scores: Any = self.model.apply({"params": params}, hidden, method="project")
        return scores

    def _sums(
        self,
        scores: Float[Array, "batch length vocab"],
        labels: Int[Array, "batch length"],
        weights: Float[Array, "batch length"],
    ) -> Float[Array, " sums"]:
        """Weighted sums of loss, negative log-likelihood and hits."""
        best = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
        log_normaliser = best + jnp.log(jnp.sum(jnp.exp(scores - best[..., None]), axis=-1))
        # A masked sum instead of a gather: its gradient fuses with that of the normaliser, a gather's is a scatter.
        is_label = jnp.arange(scores.shape[-1]) == labels[..., None]
        label_score = jnp.sum(jnp.where(is_label, scores, 0.0), axis=-1)
        nll = log_normaliser - label_score
        loss = nll + self.z_loss * log_normaliser**2
        if self.label_smoothing:
            loss = loss + self.label_smoothing * (label_score - jnp.mean(scores, axis=-1))
        hits = label_score >= best
        return jnp.stack([jnp.sum(weights * term) for term in (loss, jax.lax.stop_gradient(nll), hits)])


def _chunks_of_positions(a: Array, positions: int) -> Array:
    """[batch, length, ...] as [chunks, batch, positions, ...], zeros at the end.

    Chunks are cut along the length, so that a batch split over devices stays split.
    """
    padding = -a.shape[1] % positions
    a = jnp.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], -1, positions, *a.shape[2:]), 1, 0)
