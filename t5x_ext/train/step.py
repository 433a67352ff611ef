"""One update of the weights: objective, microbatches, accumulator, optimizer, moving average."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import Accumulator, Batch, Context, Likelihood, Loss, Params, PyTree
from t5x_ext.train.state import TrainState


class StepMetrics(NamedTuple):
    """What a step reports: sums, so that steps add up; scalars on the device."""

    loss: Loss
    gradient_norm: Float[Array, ""]
    finite: Bool[Array, ""]  # False where the update was left out


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def split_rows(batch: PyTree, num_microbatches: int) -> PyTree:
    """Cuts the rows of a batch into microbatches: [rows, ...] to [num_microbatches, rows / num_microbatches, ...].

    Row r goes to microbatch r mod num_microbatches, so that rows split over devices stay on their devices.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % num_microbatches:
        raise ValueError(f"{rows} rows do not divide into {num_microbatches} microbatches")
    return jax.tree.map(
        lambda x: x.reshape(rows // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )


class _Inputs(NamedTuple):
    """What every gradient of a step is computed from, at whatever weights."""

    objective: Likelihood
    state: TrainState
    batch: Batch
    num_microbatches: int
    key: Array

    def context(self, number: Array) -> Context:
        """For one of the pieces that are computed one after another: each has a dropout key of its own."""
        dropout_key = jax.random.fold_in(self.key, number)
        return Context(self.state.step, dropout_key, train=True, mutable=self.state.mutable)

    def microbatches(self) -> tuple[Array, PyTree]:
        """Their numbers, and the microbatches."""
        return jnp.arange(self.num_microbatches), split_rows(self.batch, self.num_microbatches)


def _gradients(inputs: _Inputs, accumulator: Accumulator, params: Params) -> tuple[PyTree, Loss]:
    """Gradient of the mean loss over all microbatches, and the summed loss."""

    def loss_sum(params: Params, microbatch: Batch, number: Array) -> tuple[Array, Loss]:
        loss = inputs.objective(params, microbatch, inputs.context(number))
        return loss.sum, loss

    def add(carry: PyTree, piece: PyTree) -> tuple[PyTree, None]:
        accumulated, total = carry
        number, microbatch = piece
        (_, loss), grads = jax.value_and_grad(loss_sum, has_aux=True)(params, microbatch, number)
        return (accumulator.add(accumulated, grads, loss.weight), jax.tree.map(jnp.add, total, loss)), None

    numbers, microbatches = inputs.microbatches()
    first = jax.tree.map(lambda x: x[0], microbatches)
    _, loss_shape = jax.eval_shape(loss_sum, params, first, numbers[0])
    zero_loss = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), loss_shape)
    initial = (accumulator.init(params, inputs.state.step), zero_loss)
    (accumulated, loss), _ = jax.lax.scan(add, initial, (numbers, microbatches))
    return accumulator.finish(accumulated), loss


def _curvature_gradients(inputs: _Inputs, params: Params) -> PyTree:
    """sqrt(N) times the mean gradient of log-likelihood at labels drawn from the model, N labels in the batch.

    Its outer product estimates the generalised Gauss-Newton matrix of the mean loss without bias. Labels are not
    smoothed and no z-loss is added: the likelihood is the model's own. What is random in a label is drawn for the whole
    batch, so that without dropout neither microbatches nor devices change it. At the weights of the loss, with a single
    microbatch and outside of `lax.cond`, the compiler finds that the forward pass is that of the loss.
    """
    objective = inputs.objective

    def add(carry: PyTree, piece: PyTree) -> tuple[PyTree, None]:
        total, count = carry
        number, microbatch, uniforms = piece
        context = inputs.context(number)
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
    pieces = (*inputs.microbatches(), split_rows(uniforms, inputs.num_microbatches))
    (total, count), _ = jax.lax.scan(add, initial, pieces)
    return jax.tree.map(lambda g: g / jnp.sqrt(jnp.maximum(count, 1.0)), total)


_LABELS = 2**32 - 1
"""Folded into the key of a step for sampled labels; no microbatch has this number."""

_GROUPS = 128
"""Groups of the vocabulary in `_sample`; a multiple of the devices that a vocabulary is cut over."""


def _sample(weights: Float[Array, "*labels vocab"], uniforms: Float[Array, "*labels 2"]) -> Int[Array, "*labels"]:
    """Labels drawn in proportion to weights by inverting their cumulative sum, from two numbers in [0, 1) each.

    The first picks one of the groups that the vocabulary is cut into, the second a label of the group. That takes two
    random numbers a label where Gumbel noise takes one a score; and sums are of some hundred terms, so that the tail is
    drawn as often as it should be, as far as float32 holds it.
    """
    width = -(-weights.shape[-1] // _GROUPS)
    padding = [(0, 0)] * (weights.ndim - 1) + [(0, _GROUPS * width - weights.shape[-1])]
    grouped = jnp.pad(weights, padding).reshape(*weights.shape[:-1], _GROUPS, width)
    group = _invert(jnp.sum(grouped, axis=-1), uniforms[..., 0])
    # A masked sum instead of a gather: the groups may lie on several devices.
    members = jnp.sum(jnp.where(jnp.arange(_GROUPS)[:, None] == group[..., None, None], grouped, 0.0), axis=-2)
    return group * width + _invert(members, uniforms[..., 1])


def _invert(weights: Float[Array, "*labels n"], uniform: Float[Array, "*labels"]) -> Int[Array, "*labels"]:
    """The first entry at which the cumulative sum of weights exceeds its part `uniform`; never one of weight zero."""
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    # Rounded sums need not grow to the last one; below the largest there is always an entry above uniform < 1 of it.
    return jnp.argmax(cumulative > uniform[..., None] * jnp.max(cumulative, axis=-1, keepdims=True), axis=-1)


def _one_hot(labels: Int[Array, "*labels"], scores: Float[Array, "*labels vocab"]) -> Bool[Array, "*labels vocab"]:
    return jnp.arange(scores.shape[-1]) == labels[..., None]


def _fisher(inputs: _Inputs, params: Params, num_examples: int) -> PyTree:
    """Mean over single examples of the squared gradient of the log-likelihood of their labels, float32.

    One example after another, in a row of its own: the mean of squares is not to be had from gradients of sums, and
    this way it takes the memory of one gradient. Devices that share the rows of a batch all compute the same row.
    """
    objective = inputs.objective
    examples, found = objective.single_examples(inputs.batch, num_examples)

    def log_likelihood(params: Params, example: Batch, number: Array) -> Array:
        context = inputs.context(number)
        scores = objective.logits(params, example, context)
        log_probs = jnp.where(_one_hot(objective.labels(example), scores), jax.nn.log_softmax(scores), 0.0)
        return jnp.sum(log_probs * objective.label_weights(example, context)[..., None])

    def add(total: PyTree, piece: PyTree) -> tuple[PyTree, None]:
        number, example = piece
        grads = jax.grad(log_likelihood)(params, example, number)
        return jax.tree.map(lambda t, g: t + jnp.square(g.astype(jnp.float32)), total, grads), None

    initial = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    total, _ = jax.lax.scan(add, initial, (jnp.arange(num_examples), examples))
    return jax.tree.map(lambda t: t / jnp.maximum(found, 1), total)


def accepted_arguments(update: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered extra arguments that an optimizer's update takes (`optax.contrib.sam` refuses others)."""
    parameters = inspect.signature(update).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return offered
    names = {p.name for p in parameters}
    return {name: value for name, value in offered.items() if name in names}


def make_train_step(
    objective: Likelihood,
    optimizer: optax.GradientTransformation,
    accumulator: Accumulator,
    *,
    seed: int,
    num_microbatches: int = 1,
    ema_decay: float | None = None,
    fisher_examples: int = 32,
) -> TrainStep:
    """Builds `(state, batch) -> (state, metrics)`, a pure function to be compiled with the state donated.

    The optimizer is offered three callables as extra arguments and calls those it needs; what it does not call, or
    calls in a branch of `lax.cond` that is not taken, is not computed:

    - `grad_fn(params, index=0)`: the gradient at other weights with the same batch, microbatches, dropout keys and
      accumulator (`index` is there because `optax.contrib.sam` passes one);
    - `curvature_grad_fn(params)`: sqrt(N) times the mean gradient at N labels drawn from the model. It holds the scores
      of a microbatch, [labels, vocab] in float32;
    - `fisher_fn(params)`: the mean over `fisher_examples` single examples (not rows: those hold several) of the squared
      gradient of the log-likelihood of all their labels, neither smoothed nor averaged; float32. Examples are taken at
      equal distances from those of the batch, and dropout is on as in training.

    An update is left out if its loss or gradient is not finite, or what an optimizer makes of a gradient that it called
    for: weights, optimizer state and moving average stay, the step counter goes on, so that the next batch and the next
    random key follow.

    Args:
      objective: what is minimised; its value and gradient are summed over microbatches and divided by the labels.
      optimizer: an Optax transformation.
      accumulator: how gradients of microbatches add up.
      seed: root of every random key; the key of a step is `fold_in(key(seed), step)`.
      num_microbatches: pieces that the rows of a batch are cut into.
      ema_decay: decay per step of the moving average of the weights; None keeps none.
      fisher_examples: examples of a batch of which `fisher_fn` squares the gradients, all if it holds fewer. They are
        computed one by one, each in a row of its own, so this is also what a call costs.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        inputs = _Inputs(objective, state, batch, num_microbatches, key)
        called = []

        def grad_fn(params: Params, index: int = 0) -> PyTree:
            called.append("grad_fn")
            return _gradients(inputs, accumulator, params)[0]

        def curvature_grad_fn(params: Params) -> PyTree:
            called.append("curvature_grad_fn")
            return _curvature_gradients(inputs, params)

        def fisher_fn(params: Params) -> PyTree:
            called.append("fisher_fn")
            return _fisher(inputs, params, fisher_examples)

        grads, loss = _gradients(inputs, accumulator, state.params)
        offered = {"grad_fn": grad_fn, "curvature_grad_fn": curvature_grad_fn, "fisher_fn": fisher_fn}
        extra = accepted_arguments(optimizer.update, offered)
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params, **extra)
        gradient_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss.sum) & jnp.isfinite(gradient_norm)
        if called:  # Known while tracing: others need not hold all updates at once for their norm.
            finite &= jnp.isfinite(optax.tree.norm(updates))
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
        moved = TrainState(state.step, params, optimizer_state, ema, state.mutable)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        return kept._replace(step=state.step + 1), StepMetrics(loss, gradient_norm, finite)

    return train_step


def make_evaluation_step(objective: Likelihood) -> Callable[[Params, Batch], Loss]:
    """Builds `(params, batch) -> Loss` without dropout: the loss on held-out data."""

    def evaluation_step(params: Params, batch: Batch) -> Loss:
        return objective(params, batch, Context(step=0))

    return evaluation_step
