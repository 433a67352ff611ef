"""Cross-entropy of the classes of nodes, over the nodes of a graph that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Batch, Context, Loss, Params


@dataclass(frozen=True)
class NodeCrossEntropy:
    """Cross-entropy summed over nodes (`contracts.Likelihood`).

    Batches hold `labels` int [1, nodes] and `label_weights` float [1, nodes], 1 for the nodes that count, beside what
    the model reads. `loss.metrics` holds `accuracy`, the part of those nodes whose label no other class outscores.

    Attributes:
      model: any module that is called with `(batch, deterministic)` and gives float32 logits [1, nodes, classes].
    """

    model: nn.Module

    def __call__(self, params: Params, batch: Batch, context: Context) -> Loss:
        """The loss of a batch as sums; dropout is on in training."""
        logits, labels = self.logits(params, batch, context), self.labels(batch)
        weights = self.label_weights(batch, context)
        log_probs = jax.nn.log_softmax(logits)
        label_log_probs = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        hits = label_log_probs >= jnp.max(log_probs, axis=-1)
        weight = jnp.sum(weights)
        return Loss(-jnp.sum(label_log_probs * weights), weight, {"accuracy": (jnp.sum(hits * weights), weight)})

    def logits(self, params: Params, batch: Batch, context: Context) -> Float[Array, "1 nodes classes"]:
        """Scores of every class, float32."""
        scores: Any = self.model.apply({"params": params}, batch, not context.train, rngs=context.rngs)
        return scores

    def labels(self, batch: Batch) -> Int[Array, "1 nodes"]:
        """The classes; -1 where a node has none, whose weight must be 0."""
        return batch["labels"]

    def label_weights(self, batch: Batch, context: Context) -> Float[Array, "1 nodes"]:
        """1 where a node counts."""
        return batch["label_weights"]

    def single_examples(self, batch: Batch, count: int) -> tuple[Batch, Int[Array, ""]]:
        """`count` evenly spaced nodes that count, each as the graph in which it alone counts.

        Returns:
          The arrays [count, 1, ...], and how many nodes were found; of further graphs no node counts.
        """
        counted = batch["label_weights"][0] > 0
        total = jnp.sum(counted)
        found = jnp.minimum(count, total)
        order = jnp.arange(count)
        numbers = order * total // jnp.maximum(found, 1)
        alone = (jnp.cumsum(counted) - 1 == numbers[:, None]) & counted & (order < found)[:, None]
        repeated = {name: jnp.broadcast_to(value, (count, *value.shape)) for name, value in batch.items()}
        return repeated | {"label_weights": alone[:, None].astype(jnp.float32)}, found
