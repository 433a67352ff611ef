"""One update of the weights: objective, microbatches, accumulator, optimizer, moving average."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from t5x_ext.contracts import Accumulator, Batch, Context, Loss, Objective, Params, PyTree
from t5x_ext.train.state import TrainState


class StepMetrics(NamedTuple):
    """What a step reports: sums, so that steps add up; scalars on the device."""

    loss: Loss
    gradient_norm: Float[Array, ""]
    finite: Bool[Array, ""]  # False where the update was left out


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def split_rows(batch: Batch, num_microbatches: int) -> PyTree:
    """Cuts the rows of a batch into microbatches: [rows, ...] to [num_microbatches, rows / num_microbatches, ...].

    Row r goes to microbatch r mod num_microbatches, so that rows split over devices stay on their devices.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % num_microbatches:
        raise ValueError(f"{rows} rows do not divide into {num_microbatches} microbatches")
    return jax.tree.map(
        lambda x: x.reshape(rows // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )


def _gradients(
    objective: Objective, accumulator: Accumulator, params: Params, microbatches: PyTree, state: TrainState, key: Array
) -> tuple[PyTree, Loss]:
    """Gradient of the mean loss over all microbatches, and the summed loss."""

    def loss_sum(params: Params, microbatch: Batch, index: Array) -> tuple[Array, Loss]:
        context = Context(state.step, {"dropout": jax.random.fold_in(key, index)}, mutable=state.mutable)
        loss = objective(params, microbatch, context)
        return loss.sum, loss

    def add(carry: PyTree, inputs: PyTree) -> tuple[PyTree, None]:
        accumulated, total = carry
        index, microbatch = inputs
        (_, loss), grads = jax.value_and_grad(loss_sum, has_aux=True)(params, microbatch, index)
        return (accumulator.add(accumulated, grads, loss.weight), jax.tree.map(jnp.add, total, loss)), None

    indices = jnp.arange(jax.tree.leaves(microbatches)[0].shape[0])
    first = jax.tree.map(lambda x: x[0], microbatches)
    _, loss_shape = jax.eval_shape(loss_sum, params, first, indices[0])
    zero_loss = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), loss_shape)
    initial = (accumulator.init(params, state.step), zero_loss)
    (accumulated, loss), _ = jax.lax.scan(add, initial, (indices, microbatches))
    return accumulator.finish(accumulated), loss


def _curvature_gradients(
    objective: Objective, params: Params, microbatches: PyTree, state: TrainState, key: Array
) -> PyTree:
    """sqrt(N) times the mean gradient of log-likelihood at labels drawn from the model, N labels in the batch.

    Its outer product estimates the generalised Gauss-Newton matrix of the mean loss without bias. Labels are not
    smoothed and no z-loss is added: the likelihood is the model's own.
    """

    def sampled_sum(params: Params, microbatch: Batch, index: Array) -> tuple[Array, Array]:
        dropout_key = jax.random.fold_in(key, index)
        context = Context(state.step, {"dropout": dropout_key}, mutable=state.mutable)
        log_probs = jax.nn.log_softmax(objective.logits(params, microbatch, context))
        labels = jax.random.categorical(jax.random.fold_in(dropout_key, 1), jax.lax.stop_gradient(log_probs))
        picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
        weights = objective.label_weights(microbatch)
        return -jnp.sum(picked * weights), jnp.sum(weights)

    def add(carry: PyTree, inputs: PyTree) -> tuple[PyTree, None]:
        total, count = carry
        index, microbatch = inputs
        grads, weight = jax.grad(sampled_sum, has_aux=True)(params, microbatch, index)
        return (jax.tree.map(jnp.add, total, grads), count + weight), None

    indices = jnp.arange(jax.tree.leaves(microbatches)[0].shape[0])
    initial = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    (total, count), _ = jax.lax.scan(add, initial, (indices, microbatches))
    return jax.tree.map(lambda g: g / jnp.sqrt(jnp.maximum(count, 1.0)), total)


def accepted_arguments(update: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered extra arguments that an optimizer's update takes (`optax.contrib.sam` refuses others)."""
    parameters = inspect.signature(update).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return offered
    names = {p.name for p in parameters}
    return {name: value for name, value in offered.items() if name in names}


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulator: Accumulator,
    *,
    seed: int,
    num_microbatches: int = 1,
    ema_decay: float | None = None,
) -> TrainStep:
    """Builds `(state, batch) -> (state, metrics)`, a pure function to be compiled with the state donated.

    The optimizer is offered two callables as extra arguments and calls those it needs: `grad_fn(params, index=0)`, the
    gradient at other weights with the same batch, microbatches, dropout keys and accumulator (`index` is there because
    `optax.contrib.sam` passes one), and `curvature_grad_fn(params)`, the sampled-label gradient scaled by sqrt(N).

    An update whose loss or gradient is not finite is left out: weights, optimizer state and moving average stay, the
    step counter goes on, so that the next batch and the next random key follow.

    Args:
      objective: what is minimised; its value and gradient are summed over microbatches and divided by the labels.
      optimizer: an Optax transformation.
      accumulator: how gradients of microbatches add up.
      seed: root of every random key; the key of a step is `fold_in(key(seed), step)`.
      num_microbatches: pieces that the rows of a batch are cut into.
      ema_decay: decay per step of the moving average of the weights; None keeps none.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        microbatches = split_rows(batch, num_microbatches)

        def grad_fn(params: Params, index: int = 0) -> PyTree:
            return _gradients(objective, accumulator, params, microbatches, state, key)[0]

        def curvature_grad_fn(params: Params) -> PyTree:
            return _curvature_gradients(objective, params, microbatches, state, key)

        grads, loss = _gradients(objective, accumulator, state.params, microbatches, state, key)
        extra = accepted_arguments(optimizer.update, {"grad_fn": grad_fn, "curvature_grad_fn": curvature_grad_fn})
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
        gradient_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss.sum) & jnp.isfinite(gradient_norm)
        moved = TrainState(state.step, params, optimizer_state, ema, state.mutable)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        return kept._replace(step=state.step + 1), StepMetrics(loss, gradient_norm, finite)

    return train_step


def make_evaluation_step(objective: Objective) -> Callable[[Params, Batch], Loss]:
    """Builds `(params, batch) -> Loss` without dropout: the loss on held-out data."""

    def evaluation_step(params: Params, batch: Batch) -> Loss:
        return objective(params, batch, Context(step=0))

    return evaluation_step
