"""Curvature of the likelihood: gradients at labels sampled from the model, and squared gradients of single examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import Batch, Likelihood, Params, PyTree, UserError
from t5x_ext.train.microbatches import Inputs, split_rows


def _likelihood(inputs: Inputs) -> Likelihood:
    """The objective of a step, which an optimizer asks for curvature.

    Raises:
      UserError: if it is not a likelihood over labels.
    """
    objective = getattr(inputs.objective, "whole", inputs.objective)
    if not isinstance(objective, Likelihood):
        raise UserError(
            f"the optimizer asks for curvature, which {type(objective).__name__} does not have: an objective needs the "
            "methods logits, labels, label_weights and single_examples (contracts.Likelihood)"
        )
    return inputs.objective  # type: ignore[return-value]


def curvature_gradients(inputs: Inputs, params: Params) -> PyTree:
    """sqrt(N) times the mean gradient of log-likelihood at labels sampled from the model, N labels in the batch.

    Its outer product estimates the generalised Gauss-Newton matrix of the mean loss without bias. Labels are not
    smoothed and no z-loss is added: the likelihood is the model's own. Labels are sampled for the whole batch, so that
    without dropout neither microbatches nor devices change them. At the weights of the loss, with a single microbatch
    and outside of `lax.cond`, the compiler finds that the forward pass is that of the loss.
    """
    objective, totals = _likelihood(inputs), inputs.totals()

    def add(carry: PyTree, inputs_of_one: PyTree) -> tuple[PyTree, None]:
        total, count = carry
        number, microbatch, uniforms = inputs_of_one
        context = inputs.context(number, totals)
        scores, pull = jax.vjp(lambda params: objective.logits(params, microbatch, context), params)
        counts = objective.label_weights(microbatch, context)
        # The gradient of -log p[label] is p less one at the label. Written out, the scores are exponentiated once.
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        probabilities = weights / jnp.sum(weights, axis=-1, keepdims=True)
        (grads,) = pull((probabilities - _one_hot(_sample(weights, uniforms), scores)) * counts[..., None])
        return (jax.tree.map(jnp.add, total, grads), count + jnp.sum(counts)), None

    shape = objective.labels(inputs.batch).shape
    uniforms = jax.random.uniform(jax.random.fold_in(inputs.key, _LABELS), (*shape, 2))
    initial = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    microbatches = (*inputs.microbatches(), split_rows(uniforms, inputs.num_microbatches))
    (total, count), _ = jax.lax.scan(add, initial, microbatches)
    return jax.tree.map(lambda g: g / jnp.sqrt(jnp.maximum(count, 1.0)), total)


_LABELS = 2**32 - 1
"""Folded into the key of a step for sampled labels; no microbatch has this number."""

_GROUPS = 128
"""Groups of the vocabulary in `_sample`; a multiple of the devices that a vocabulary is sharded over."""


def _sample(weights: Float[Array, "*labels vocab"], uniforms: Float[Array, "*labels 2"]) -> Int[Array, "*labels"]:
    """Labels sampled in proportion to weights by inverting their cumulative sum, from two numbers in [0, 1) each.

    The first picks one of the groups that the vocabulary is split into, the second a label of the group. That takes two
    random numbers a label where Gumbel noise takes one a score; and sums are of some hundred terms, so that the tail is
    sampled as often as it should be, as far as float32 holds it.
    """
    width = -(-weights.shape[-1] // _GROUPS)
    padding = [(0, 0)] * (weights.ndim - 1) + [(0, _GROUPS * width - weights.shape[-1])]
    grouped = jnp.pad(weights, padding).reshape(*weights.shape[:-1], _GROUPS, width)
    group = _invert(jnp.sum(grouped, axis=-1), uniforms[..., 0])
    # A masked sum instead of a gather: the groups may be on several devices.
    members = jnp.sum(jnp.where(jnp.arange(_GROUPS)[:, None] == group[..., None, None], grouped, 0.0), axis=-2)
    return group * width + _invert(members, uniforms[..., 1])


def _invert(weights: Float[Array, "*labels n"], uniform: Float[Array, "*labels"]) -> Int[Array, "*labels"]:
    """The first entry at which the cumulative sum of weights exceeds its part `uniform`; never one of weight zero."""
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    # Rounded sums need not grow to the last one; below the largest there is always an entry above uniform < 1 of it.
    return jnp.argmax(cumulative > uniform[..., None] * jnp.max(cumulative, axis=-1, keepdims=True), axis=-1)


def _one_hot(labels: Int[Array, "*labels"], scores: Float[Array, "*labels vocab"]) -> Bool[Array, "*labels vocab"]:
    return jnp.arange(scores.shape[-1]) == labels[..., None]


def fisher(inputs: Inputs, params: Params, num_examples: int) -> PyTree:
    """Mean over single examples of the squared gradient of the log-likelihood of their labels, float32.

    One example after another, in a row of its own: the mean of squares is not to be had from gradients of sums, and
    this way it takes the memory of one gradient. Devices that share the rows of a batch all compute the same row.
    """
    objective = _likelihood(inputs)
    examples, found = objective.single_examples(inputs.batch, num_examples)

    def log_likelihood(params: Params, example: Batch, number: Array) -> Array:
        context = inputs.context(number)
        scores = objective.logits(params, example, context)
        log_probs = jnp.where(_one_hot(objective.labels(example), scores), jax.nn.log_softmax(scores), 0.0)
        return jnp.sum(log_probs * objective.label_weights(example, context)[..., None])

    def add(total: PyTree, numbered: PyTree) -> tuple[PyTree, None]:
        number, example = numbered
        grads = jax.grad(log_likelihood)(params, example, number)
        return jax.tree.map(lambda t, g: t + jnp.square(g.astype(jnp.float32)), total, grads), None

    initial = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    total, _ = jax.lax.scan(add, initial, (jnp.arange(num_examples), examples))
    return jax.tree.map(lambda t: t / jnp.maximum(found, 1), total)
