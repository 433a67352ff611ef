"""Connectionist temporal classification: labels without an alignment, summed over all alignments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import Batch, Context, Loss, Params, UserError
from t5x_ext.objectives.cross_entropy import chunks_of_positions, positions_of_a_chunk

IMPOSSIBLE = -1e30
"""Logarithm of the probability of nothing: finite, so that gradients are."""


@dataclass(frozen=True)
class Ctc:
    """CTC of a parallel decoder with several positions a source token (Libovicky and Helcl, arXiv 1811.04719).

    -log of the probability of all outputs that, with runs of a token merged and then blanks dropped, are the labels.
    The blank is the unknown token. An example with fewer positions than labels plus repetitions has no such output and
    adds nothing to the sum. As ParaGen's, the loss is mixed with the cross-entropy against the uniform distribution,
    (1 - e) * CTC + e * sum over positions of mean_V(-log p), and divided by the number of labels.

    Batches have one example a row (`BatchConfig.packing = False`): alignments of a packed row would have to be kept
    apart. `loss.metrics` holds `nll`, the CTC loss over the labels of examples that have an output, and `possible`, the
    share of labels that belong to these.

    Attributes:
      model: a `models.ParallelDecoder` with `ParallelConfig.upsample`.
      label_smoothing: e, in [0, 1).
      chunk_tokens: decoder positions of a batch whose scores are held at once.

    Raises:
      UserError: for values out of range, and for a model that is not upsampled.
    """

    model: Any
    label_smoothing: float = 0.1
    chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        if getattr(getattr(self.model, "config", None), "upsample", None) is None:
            raise UserError("Ctc needs the model of a models.ParallelConfig with upsample, such as upsample = 2")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"Ctc.label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if self.chunk_tokens < 1:
            raise UserError(f"Ctc.chunk_tokens is {self.chunk_tokens}; it must be 1 or more")

    def __call__(self, params: Params, batch: Batch, context: Context) -> Loss:
        """The loss of a batch as sums; dropout is on in training."""
        labels, label_lengths = batch["target_labels"], jnp.sum(batch["target_segment_ids"] > 0, axis=1)
        lengths = self.model.config.upsample * jnp.sum(batch["source_segment_ids"] > 0, axis=1)
        scores = self._frame_scores(params, batch, context)
        nll = -ctc_log_likelihood(scores.blank, scores.labels, labels, lengths, label_lengths)
        possible = is_possible(labels, lengths, label_lengths) & (label_lengths > 0)
        there = jnp.arange(scores.blank.shape[1]) < lengths[:, None]
        uniform = jnp.sum(jnp.where(there, scores.uniform, 0.0), axis=1)
        mixed = (1 - self.label_smoothing) * nll + self.label_smoothing * uniform
        weight = jnp.sum(label_lengths).astype(jnp.float32)
        counted = jnp.sum(jnp.where(possible, label_lengths, 0)).astype(jnp.float32)
        total = jnp.sum(jnp.where(possible, mixed, 0.0))
        nll_sum = jax.lax.stop_gradient(jnp.sum(jnp.where(possible, nll, 0.0)))
        return Loss(total, weight, {"nll": (nll_sum, counted), "possible": (counted, weight)})

    def _frame_scores(self, params: Params, batch: Batch, context: Context) -> FrameScores:
        """What the loss needs of the log-probabilities of every position, which never exist all at once."""
        hidden: Any = self.model.apply({"params": params}, batch, not context.train, method="hidden", rngs=context.rngs)
        labels, blank = batch["target_labels"], self.model.config.unk_id

        @partial(jax.checkpoint, prevent_cse=False)
        def scores_of(chunk: Float[Array, "batch positions embed"]) -> FrameScores:
            scores: Any = self.model.apply({"params": params}, chunk, method="project")
            log_probs = jax.nn.log_softmax(scores)
            index = jnp.broadcast_to(labels[:, None, :], (*log_probs.shape[:2], labels.shape[1]))
            of_labels = jnp.take_along_axis(log_probs, index, axis=-1)
            return FrameScores(log_probs[:, :, blank], of_labels, -jnp.mean(log_probs, axis=-1))

        rows, length, _ = hidden.shape
        chunks = chunks_of_positions(hidden, positions_of_a_chunk(rows, length, self.chunk_tokens))
        joined = lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(rows, -1, *leaf.shape[3:])[:, :length]
        return jax.tree.map(joined, jax.lax.map(scores_of, chunks))


class FrameScores(NamedTuple):
    """Log-probabilities at every decoder position, float32."""

    blank: Float[Array, "batch frames"]
    labels: Float[Array, "batch frames length"]  # of each label of the row
    uniform: Float[Array, "batch frames"]  # minus the mean over the vocabulary


def is_possible(
    labels: Int[Array, "batch length"], lengths: Int[Array, " batch"], label_lengths: Int[Array, " batch"]
) -> Bool[Array, " batch"]:
    """Whether there are positions enough for the labels: a blank must part equal neighbours."""
    inside = jnp.arange(1, labels.shape[1]) < label_lengths[:, None]
    repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1)
    return label_lengths + repeats <= lengths


def ctc_log_likelihood(
    blank: Float[Array, "batch frames"],
    label_scores: Float[Array, "batch frames length"],
    labels: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    label_lengths: Int[Array, " batch"],
) -> Float[Array, " batch"]:
    """Log-probability of the labels, summed over all alignments (Graves et al., ICML 2006, section 4.1).

    The forward recursion over states blank, label 1, blank, label 2, ..., blank, in log space: state s at a position is
    reached from s and s - 1 at the one before, and from s - 2 where s is a label that differs from the label before.

    Args:
      blank: log-probability of the blank at every position.
      label_scores: log-probability at every position of each label of the row.
      labels: the labels, padded with anything.
      lengths: positions of each row, 1 or more.
      label_lengths: labels of each row.

    Returns:
      About `IMPOSSIBLE` where no output fits.
    """
    rows, length = labels.shape
    differs = jnp.pad(labels[:, 1:] != labels[:, :-1], [(0, 0), (1, 0)])
    # Odd states are labels, even ones blanks, from where nothing is skipped.
    can_skip = jnp.zeros((rows, 2 * length + 1), bool).at[:, 1::2].set(differs)
    emissions = jnp.zeros((*blank.shape, 2 * length + 1)).at[:, :, 1::2].set(label_scores)
    emissions = emissions.at[:, :, ::2].set(blank[:, :, None])

    def step(alpha: Array, frame: tuple[Array, Array]) -> tuple[Array, None]:
        emission, index = frame
        before = lambda states: jnp.pad(alpha[:, :-states], [(0, 0), (states, 0)], constant_values=IMPOSSIBLE)
        skipped = jnp.where(can_skip, before(2), IMPOSSIBLE)
        reached = jnp.logaddexp(jnp.logaddexp(alpha, before(1)), skipped) + emission
        return jnp.where((index < lengths)[:, None], reached, alpha), None

    start = jnp.where(jnp.arange(2 * length + 1) < 2, emissions[:, 0], IMPOSSIBLE)
    frames = jnp.moveaxis(emissions[:, 1:], 1, 0), jnp.arange(1, blank.shape[1])
    alpha, _ = jax.lax.scan(step, start, frames)
    at = lambda state: jnp.take_along_axis(alpha, jnp.maximum(state, 0)[:, None], axis=1)[:, 0]
    last_label = jnp.where(label_lengths > 0, at(2 * label_lengths - 1), IMPOSSIBLE)
    return jnp.logaddexp(at(2 * label_lengths), last_label)
