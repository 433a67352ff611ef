"""Label-smoothed cross-entropy over a large vocabulary, in chunks so that the scores of a batch never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Batch, Context, Loss, Params, UserError
from t5x_ext.objectives.packed import single_examples


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
      chunk_tokens: target positions of a batch (padding included) whose scores are held at once. A thousand keeps a
        CPU's cache warm; accelerators want more.

    Raises:
      UserError: for values out of range.
    """

    model: nn.Module
    label_smoothing: float = 0.1
    z_loss: float = 0.0
    chunk_tokens: int = 1024

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
        """The loss of a batch as sums; dropout is on in training."""
        weights = self.label_weights(batch, context)
        total = self.sums(params, self._hidden(params, batch, context), batch["target_labels"], weights)
        weight = jnp.sum(weights)
        return Loss(total[0], weight, {"nll": (total[1], weight), "accuracy": (total[2], weight)})

    def sums(
        self,
        params: Params,
        hidden: Float[Array, "batch length embed"],
        labels: Int[Array, "batch length"],
        weights: Float[Array, "batch length"],
    ) -> Float[Array, " sums"]:
        """Weighted sums of loss, negative log-likelihood and hits, from the output of the model's last layer.

        The loss alone has a gradient.
        """

        def sums(hidden: Array, labels: Array, weights: Array) -> Float[Array, " sums"]:
            return self._sums(self._project(params, hidden), labels, weights)

        rows, length = labels.shape
        positions = positions_of_a_chunk(rows, length, self.chunk_tokens)
        chunks = tuple(chunks_of_positions(a, positions) for a in (hidden, labels, weights))
        # What `sums` takes from the parameters becomes an argument, so that its gradient can be asked for by name.
        sums_of, used = jax.closure_convert(sums, *(chunk[0] for chunk in chunks))
        return _sum_over_chunks(sums_of, tuple(used), *chunks)

    def logits(self, params: Params, batch: Batch, context: Context) -> Float[Array, "batch length vocab"]:
        """Scores of every label position, float32."""
        return self._project(params, self._hidden(params, batch, context))

    def labels(self, batch: Batch) -> Int[Array, "batch length"]:
        """The decoder's labels."""
        return batch["target_labels"]

    def label_weights(self, batch: Batch, context: Context) -> Float[Array, "batch length"]:
        """1 where a label counts, 0 where it is padding."""
        return (batch["target_segment_ids"] > 0).astype(jnp.float32)

    def single_examples(self, batch: Batch, count: int) -> tuple[Batch, Int[Array, ""]]:
        """`count` evenly spaced examples of a packed batch, see `packed.single_examples`."""
        return single_examples(batch, count, batch["target_segment_ids"])

    def _hidden(self, params: Params, batch: Batch, context: Context) -> Float[Array, "batch length embed"]:
        hidden: Any = self.model.apply({"params": params}, batch, not context.train, method="hidden", rngs=context.rngs)
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_chunks(
    sums_of: Callable[..., Array], used: tuple[Array, ...], hidden: Array, labels: Array, weights: Array
) -> Float[Array, " sums"]:
    """The sums of all chunks. Only the first sum, the loss, has a gradient.

    The gradient is computed chunk by chunk together with the value: the scores of a chunk are used while they are
    there, instead of being kept or computed again (as in Liger's fused linear cross-entropy, arXiv 2410.10989).
    """

    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + sums_of(*chunk, *used), None

    return jax.lax.scan(add, jnp.zeros(3, jnp.float32), (hidden, labels, weights))[0]


def _sum_with_gradients(
    sums_of: Callable[..., Array], used: tuple[Array, ...], hidden: Array, labels: Array, weights: Array
) -> tuple[Array, tuple[tuple[Array, ...], Array]]:
    def add(carry: tuple[Array, tuple[Array, ...]], chunk: tuple[Array, Array, Array]) -> Any:
        total, used_gradients = carry
        chunk_hidden, *rest = chunk

        def loss(hidden: Array, used: tuple[Array, ...]) -> tuple[Array, Array]:
            sums = sums_of(hidden, *rest, *used)
            return sums[0], sums

        gradients, sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(chunk_hidden, used)
        return (total + sums, jax.tree.map(jnp.add, used_gradients, gradients[1])), gradients[0]

    initial = (jnp.zeros(3, jnp.float32), jax.tree.map(jnp.zeros_like, used))
    (total, used_gradients), hidden_gradients = jax.lax.scan(add, initial, (hidden, labels, weights))
    return total, (used_gradients, hidden_gradients)


def _scale_gradients(
    sums_of: Callable[..., Array], gradients: tuple[tuple[Array, ...], Array], cotangent: Float[Array, " sums"]
) -> tuple[tuple[Array, ...], Array, None, None]:
    used, hidden = jax.tree.map(lambda g: (g * cotangent[0]).astype(g.dtype), gradients)
    return used, hidden, None, None


_sum_over_chunks.defvjp(_sum_with_gradients, _scale_gradients)


def positions_of_a_chunk(rows: int, length: int, chunk_tokens: int) -> int:
    """Label positions of a row that are in a chunk: as even as they come, since what is missing is padded."""
    chunks = -(-length // max(1, chunk_tokens // rows))
    return -(-length // chunks)


def chunks_of_positions(a: Array, positions: int) -> Array:
    """[batch, length, ...] as [chunks, batch, positions, ...], zeros at the end.

    Chunks are cut along the length, so that a batch split over devices stays split.
    """
    padding = -a.shape[1] % positions
    a = jnp.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], -1, positions, *a.shape[2:]), 1, 0)
