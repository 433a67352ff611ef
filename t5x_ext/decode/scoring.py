"""Forced log-probabilities: how probable the model finds given translations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Params, TranslationBatch, UserError
from t5x_ext.decode.batching import encoder_inputs, mesh_of
from t5x_ext.decode.ensemble import Ensemble
from t5x_ext.decode.steps import log_prob_of
from t5x_ext.parallel import batch_devices


class Score(NamedTuple):
    """The log-probability of one translation, natural logarithm."""

    token_log_probs: tuple[float, ...]  # one for each label: the forced prefix, the tokens, and the end of sentence

    @property
    def log_prob(self) -> float:
        """The sum over the tokens."""
        return math.fsum(self.token_log_probs)

    @property
    def num_tokens(self) -> int:
        """Labels that were scored."""
        return len(self.token_log_probs)

    @property
    def perplexity(self) -> float:
        """`exp(-log_prob / num_tokens)`."""
        return perplexity([self])


def perplexity(scores: Sequence[Score]) -> float:
    """Perplexity of a corpus: `exp` of minus the mean log-probability over all its tokens; nan for an empty corpus.

    >>> perplexity([Score((math.log(0.5),)), Score((math.log(0.125),))])
    4.0
    """
    tokens = sum(score.num_tokens for score in scores)
    total = math.fsum(score.log_prob for score in scores)
    return math.exp(-total / tokens) if tokens else math.nan


@partial(jax.jit, static_argnames=("model", "eos_id"))
def label_log_probs(
    model: nn.Module | Ensemble,
    params: Params,
    source: Int[Array, "rows source_length"],
    source_lengths: Int[Array, " rows"],
    labels: Int[Array, "rows length"],
    label_lengths: Int[Array, " rows"],
    eos_id: int,
) -> Float[Array, "rows length"]:
    """Log-probability of every label given the source and the labels before it, float32; 0 beyond a row's length.

    The vocabulary projection is made for one row of each device at a time, so that no [rows, length, vocab] array
    exists.

    Args:
      model: any module with the methods `hidden` and `project`.
      params: its parameters.
      source: encoder input, tag and end of sentence included, padded with anything.
      source_lengths: real tokens of each row.
      labels: forced prefix, tokens and end of sentence.
      label_lengths: real labels of each row.
      eos_id: the decoder's first input.

    Raises:
      UserError: for a model that does not score labels one by one, as one that is trained with CTC.
    """
    source_segment_ids, source_positions = encoder_inputs(source, source_lengths)
    segment_ids, positions = encoder_inputs(labels, label_lengths)
    batch = TranslationBatch(
        source_tokens=source,
        source_segment_ids=source_segment_ids,
        source_positions=source_positions,
        target_inputs=jnp.roll(labels, 1, axis=1).at[:, 0].set(eos_id),
        target_labels=labels,
        target_segment_ids=segment_ids,
        target_positions=positions,
    )
    hidden: Any = model.apply({"params": params}, batch, method="hidden")
    if hidden.shape[-2] != labels.shape[1]:  # an ensemble has an axis of members before it
        raise UserError("this model does not score labels one by one: it has other positions than the target's tokens")

    def row_log_probs(row: tuple[Float[Array, "length embed"], Int[Array, " length"]]) -> Float[Array, " length"]:
        return log_prob_of(jnp.asarray(model.apply({"params": params}, row[0], method="project")), row[1])

    # What is mapped over must not be what is sharded over devices.
    mesh = mesh_of(model)
    devices = 1 if mesh is None else batch_devices(mesh)
    split = lambda leaf: jnp.swapaxes(leaf.reshape(devices, -1, *leaf.shape[1:]), 0, 1)
    log_probs = jax.lax.map(jax.vmap(row_log_probs), (split(hidden), split(labels)))
    return jnp.where(segment_ids > 0, jnp.swapaxes(log_probs, 0, 1).reshape(labels.shape), 0.0)
