"""Objectives of models that write all tokens at once and predict the target's length: plain, and with glancing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import Batch, Context, Loss, Params, UserError
from t5x_ext.objectives.cross_entropy import LabelSmoothedCrossEntropy, chunks_of_positions, positions_of_a_chunk
from t5x_ext.objectives.packed import single_examples

# Constants that are folded into the key of a microbatch: dropout of the decoder, and which tokens are revealed.
_DECODER, _REVEAL = 1, 2

_Pair = tuple[Float[Array, ""], Float[Array, ""]]


@dataclass(frozen=True)
class ParallelCrossEntropy:
    """Label-smoothed cross-entropy of all tokens at once, and of the target's length (`contracts.Likelihood`).

    mean over labels of the cross-entropy + length_weight * mean over examples of -log p(length). The decoder is given
    the target's true length. This is the vanilla model of Gu et al. (arXiv 1711.02281) with the length head and the
    weights of ParaGen (bytedance/ParaGen @ 4e33a90).

    The loss is a sum over labels: with several microbatches, the mean length term of each is weighted by its labels.

    `loss.metrics` holds `nll` and `accuracy` of labels as in `LabelSmoothedCrossEntropy`, and `length_nll` and
    `length_accuracy` of examples.

    Attributes:
      model: a `models.ParallelDecoder` with a length head.
      label_smoothing: share of the uniform distribution in the labels, in [0, 1); lengths are not smoothed.
      length_weight: weight of the length's cross-entropy.
      chunk_tokens: see `LabelSmoothedCrossEntropy`.

    Raises:
      UserError: for values out of range, and for a model without a length head.
    """

    model: Any
    label_smoothing: float = 0.1
    length_weight: float = 0.05
    chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        name = type(self).__name__
        if getattr(getattr(self.model, "config", None), "max_target_length", None) is None:
            raise UserError(f"{name} needs the model of a models.ParallelConfig; the task is tasks.ParallelTranslation")
        if self.model.config.upsample is not None:
            raise UserError(f"{name}: the model has no length head (ParallelConfig.upsample); take objectives.Ctc")
        if self.length_weight < 0:
            raise UserError(f"{name}.length_weight is {self.length_weight}; it must be 0 or more")
        self._tokens  # noqa: B018  checks the other values

    def __call__(self, params: Params, batch: Batch, context: Context) -> Loss:
        """The loss of a batch as sums; dropout is on in training."""
        encoded, inputs = self._encoded(params, batch, context), self._inputs(params, batch)
        revealed = self._revealed(params, batch, context, encoded, inputs)
        if revealed is not None:
            inputs = jnp.where(revealed[:, :, None], self._apply(params, "embed_targets", self.labels(batch)), inputs)
        labels_there = self.label_weights(batch, context)
        weights = labels_there if revealed is None else labels_there * ~revealed
        hidden = self._decode(params, batch, context, encoded, inputs)
        loss, nll, hits = self._tokens.sums(params, hidden, self.labels(batch), weights)
        counted, labels = jnp.sum(weights), jnp.sum(labels_there)
        # Where everything is revealed, the other terms are still there.
        weight = jnp.where(labels > 0, jnp.maximum(counted, 1.0), 0.0)
        metrics: dict[str, _Pair] = {"nll": (nll, counted), "accuracy": (hits, counted)}
        length_nll, length_hits, examples = self._length_sums(params, batch, encoded)
        metrics |= {"length_nll": (length_nll, examples), "length_accuracy": (length_hits, examples)}
        loss = loss + self.length_weight * weight * length_nll / jnp.maximum(examples, 1.0)
        if revealed is not None:
            metrics["revealed"] = (jnp.sum(labels_there * revealed), labels)
        more, more_metrics = self._more(params, batch, context, encoded)
        return Loss(loss + weight * more, weight, {**metrics, **more_metrics})

    def logits(self, params: Params, batch: Batch, context: Context) -> Float[Array, "batch length vocab"]:
        """Scores of every label position given the target's length, float32; nothing is revealed."""
        encoded, inputs = self._encoded(params, batch, context), self._inputs(params, batch)
        scores: Any = self._apply(params, "project", self._decode(params, batch, context, encoded, inputs))
        return scores

    def labels(self, batch: Batch) -> Int[Array, "batch length"]:
        """The tokens of the target, end of sentence included."""
        return batch["target_labels"]

    def label_weights(self, batch: Batch, context: Context) -> Float[Array, "batch length"]:
        """1 where there is a label, 0 where it is padding."""
        return (batch["target_segment_ids"] > 0).astype(jnp.float32)

    def single_examples(self, batch: Batch, count: int) -> tuple[Batch, Int[Array, ""]]:
        """`count` evenly spaced examples of a packed batch, see `packed.single_examples`."""
        return single_examples(batch, count, batch["target_segment_ids"])

    def _revealed(
        self, params: Params, batch: Batch, context: Context, encoded: Array, inputs: Array
    ) -> Bool[Array, "batch length"] | None:
        """Where the decoder reads the label itself; None: nowhere."""
        return None

    def _more(
        self, params: Params, batch: Batch, context: Context, encoded: Array
    ) -> tuple[Float[Array, ""] | float, Mapping[str, _Pair]]:
        """A further mean loss, and its metrics."""
        return 0.0, {}

    @cached_property
    def _tokens(self) -> LabelSmoothedCrossEntropy:
        return LabelSmoothedCrossEntropy(self.model, self.label_smoothing, chunk_tokens=self.chunk_tokens)

    def _apply(self, params: Params, method: str, *args: Any, rngs: Any = None) -> Any:
        return self.model.apply({"params": params}, *args, method=method, rngs=rngs)

    def _encoded(self, params: Params, batch: Batch, context: Context) -> Float[Array, "batch source_length embed"]:
        source = [batch[f"source_{name}"] for name in ("tokens", "segment_ids", "positions")]
        return self._apply(params, "encode", *source, not context.train, rngs=context.rngs)

    def _inputs(self, params: Params, batch: Batch) -> Float[Array, "batch length embed"]:
        return self._apply(params, "decoder_inputs", batch)

    def _decode(
        self, params: Params, batch: Batch, context: Context, encoded: Array, inputs: Array, method: str = "decode"
    ) -> Float[Array, "batch length embed"]:
        """The output of a decoder; two calls drop the same activations."""
        rngs = context.rngs and {"dropout": jax.random.fold_in(context.rngs["dropout"], _DECODER)}
        return self._apply(params, method, encoded, batch, inputs, not context.train, rngs=rngs)

    def _length_sums(
        self, params: Params, batch: Batch, encoded: Array
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """Negative log-likelihood of the lengths, hits, and examples; one for the first source token of each."""
        source_ids, target_ids = batch["source_segment_ids"], batch["target_segment_ids"]
        scores = self._apply(params, "length_logits", encoded, source_ids)
        tokens = jnp.sum((source_ids[:, :, None] == target_ids[:, None, :]) & (target_ids > 0)[:, None, :], axis=-1)
        label = jnp.minimum(tokens, scores.shape[-1] - 1)
        first = ((source_ids > 0) & (batch["source_positions"] == 0) & (tokens > 0)).astype(jnp.float32)
        # Finite in the place of the impossible length 0, which is the label of padding.
        finite = jnp.maximum(jax.nn.log_softmax(scores), -1e9)
        log_prob = jnp.take_along_axis(finite, label[:, :, None], axis=-1)[:, :, 0]
        hits = jnp.argmax(scores, axis=-1) == label
        return -jnp.sum(first * log_prob), jnp.sum(first * hits), jnp.sum(first)


@dataclass(frozen=True)
class Glancing(ParallelCrossEntropy):
    """Glancing training of a parallel decoder, GLAT (Qian et al., arXiv 2008.07905).

    In training the decoder runs twice. The first pass, without gradient, writes a translation of the true length, of
    which d tokens are wrong. Then n = floor(p d) of the example's tokens, chosen uniformly among all of them, right or
    wrong, are revealed: the second pass, with the same dropout, reads their embeddings, and the loss is that of
    `ParallelCrossEntropy` over the other tokens. The share p falls linearly from `first_share` to `last_share` over
    `total_steps` updates. In evaluation nothing is revealed, so that held-out losses compare to the plain objective's.

    The encoder runs once and serves both passes: with the same dropout in both, two runs would give the same.

    With a model that has an auxiliary decoder (`ParallelConfig.auxiliary_layers`), its mean cross-entropy over all
    labels is added, `auxiliary_weight` times: it reads the inputs as they were before tokens were revealed (ParaGen's
    GLAT-aux, with weights 0.5 and a `length_weight` of 0.1).

    Metrics are those of `ParallelCrossEntropy`, `nll` and `accuracy` over tokens that are not revealed, and `revealed`,
    the share of labels that are; `auxiliary_nll` with an auxiliary decoder.

    `logits` and `label_weights` are those of the plain objective, for what needs a likelihood.

    Attributes:
      total_steps: updates after which the share stays at `last_share`.
      first_share: p at the first update.
      last_share: p from update `total_steps` on.
      auxiliary_weight: of the auxiliary decoder's loss.

    The other attributes, and errors, are those of `ParallelCrossEntropy`.
    """

    total_steps: int = 300_000
    first_share: float = 0.5
    last_share: float = 0.3
    auxiliary_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_steps < 1:
            raise UserError(f"Glancing.total_steps is {self.total_steps}; it must be 1 or more")
        for name in ("first_share", "last_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"Glancing.{name} is {getattr(self, name)}; it must be in [0, 1]")
        if self.auxiliary_weight < 0:
            raise UserError(f"Glancing.auxiliary_weight is {self.auxiliary_weight}; it must be 0 or more")

    def share(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """p, of the wrong tokens' number, after `step` updates."""
        progress = jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / self.total_steps)
        return self.first_share + (self.last_share - self.first_share) * progress

    def _revealed(
        self, params: Params, batch: Batch, context: Context, encoded: Array, inputs: Array
    ) -> Bool[Array, "batch length"] | None:
        if not context.train or context.key is None:
            return None
        fixed, encoded, inputs = jax.lax.stop_gradient((params, encoded, inputs))
        predicted = self._best_tokens(fixed, self._decode(fixed, batch, context, encoded, inputs))
        key = jax.random.fold_in(context.key, _REVEAL)
        return reveal(key, predicted != self.labels(batch), batch["target_segment_ids"], self.share(context.step))

    def _best_tokens(self, params: Params, hidden: Float[Array, "batch length embed"]) -> Int[Array, "batch length"]:
        """The best token of each position, without the scores of a whole batch at once."""
        rows, length, _ = hidden.shape
        chunks = chunks_of_positions(hidden, positions_of_a_chunk(rows, length, self.chunk_tokens))
        best = jax.lax.map(lambda chunk: jnp.argmax(self._apply(params, "project", chunk), axis=-1), chunks)
        return jnp.moveaxis(best, 0, 1).reshape(rows, -1)[:, :length]

    def _more(
        self, params: Params, batch: Batch, context: Context, encoded: Array
    ) -> tuple[Float[Array, ""] | float, Mapping[str, _Pair]]:
        if not self.model.config.auxiliary_layers:
            return 0.0, {}
        weights = self.label_weights(batch, context)
        inputs = self._inputs(params, batch)
        hidden = self._decode(params, batch, context, encoded, inputs, "auxiliary_hidden")
        loss, nll, _ = self._tokens.sums(params, hidden, self.labels(batch), weights)
        count = jnp.sum(weights)
        return self.auxiliary_weight * loss / jnp.maximum(count, 1.0), {"auxiliary_nll": (nll, count)}


def reveal(
    key: Array,
    wrong: Bool[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    share: Float[Array, ""] | float,
) -> Bool[Array, "batch length"]:
    """Chooses floor(share * wrong tokens) tokens of each example, uniformly among all of its tokens.

    Args:
      key: random key.
      wrong: where the prediction is not the label; padding does not count.
      segment_ids: number of each position's example in its row; 0 at padding.
      share: of the wrong tokens' number, in [0, 1].
    """
    together = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None, :]
    distance = jnp.sum(together & wrong[:, None, :], axis=-1)
    # A float32 product may be just below the whole number that it should be.
    count = jnp.floor(share * distance + 1e-4)
    draws = jax.random.uniform(key, segment_ids.shape)
    earlier = jnp.arange(draws.shape[1])[None, :] < jnp.arange(draws.shape[1])[:, None]
    before = (draws[:, None, :] < draws[:, :, None]) | ((draws[:, None, :] == draws[:, :, None]) & earlier)
    rank = jnp.sum(together & before, axis=-1)
    return (rank < count) & (segment_ids > 0)
