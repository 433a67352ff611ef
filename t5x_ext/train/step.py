"""One update of the weights: objective, microbatches, accumulator, optimizer, EMA."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from t5x_ext.contracts import Accumulator, Batch, Context, Frozen, Loss, Objective, Params, PyTree, UserError
from t5x_ext.optim import learning_rate_of
from t5x_ext.train.curvature import curvature_gradients, fisher
from t5x_ext.train.microbatches import Inputs, gradients
from t5x_ext.train.state import TrainState
from t5x_ext.train.subset import totals_of


class StepMetrics(NamedTuple):
    """What a step reports: sums, so that steps add up; scalars on the device."""

    loss: Loss  # its `mutable` is empty
    gradient_norm: Float[Array, ""]
    finite: Bool[Array, ""]  # False where the update was skipped
    extra: Mapping[str, Float[Array, ""]]  # by name, as `learning_rate`; logs show their mean over updates


TrainStep = Callable[[TrainState, Frozen, Batch], tuple[TrainState, StepMetrics]]
"""`(state, frozen, batch) -> (state, metrics)`, to be compiled with the state donated."""


class StepFactory(Protocol):
    """How the update of a run is made: the value of `Run.step`."""

    def __call__(
        self,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        accumulator: Accumulator,
        *,
        seed: int,
        num_microbatches: int,
        ema_decay: float | None,
    ) -> TrainStep:
        """See `make_train_step`, which is the default."""
        ...


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulator: Accumulator,
    *,
    seed: int,
    num_microbatches: int = 1,
    ema_decay: float | None = None,
    fisher_examples: int = 32,
) -> TrainStep:
    """Builds `(state, frozen, batch) -> (state, metrics)`, a pure function to be compiled with the state donated.

    The optimizer is offered three callables as extra arguments and calls those it needs; what it does not call, or
    calls in a branch of `lax.cond` that is not taken, is not computed:

    - `grad_fn(params, index=0)`: the gradient at other weights with the same batch, microbatches, random keys and
      accumulator (`index` is there because `optax.contrib.sam` passes one);
    - `curvature_grad_fn(params)`: sqrt(N) times the mean gradient at N labels sampled from the model. It holds the
      scores of a microbatch, [labels, vocab] in float32;
    - `fisher_fn(params)`: the mean over `fisher_examples` single examples (not rows: those hold several) of the squared
      gradient of the log-likelihood of all their labels, neither smoothed nor averaged; float32. Examples are evenly
      spaced in the batch, and dropout is on as in training.

    An update is skipped if its loss or gradient is not finite, or what an optimizer makes of a gradient that it called
    for: weights, optimizer state, EMA and mutable state stay, the step counter advances, so that the next batch and the
    next random key follow.

    `StepMetrics.extra` holds `learning_rate` where the optimizer tells it (`optim.learning_rate_of`), `update_norm`,
    and the metrics of every state inside the optimizer's state that has a property `metrics`, a mapping of scalars.

    Args:
      objective: what is minimised; its value and gradient are summed over microbatches and divided by the labels.
      optimizer: an Optax transformation.
      accumulator: how gradients of microbatches add up.
      seed: root of every random key; the key of a step is `fold_in(key(seed), step)`.
      num_microbatches: microbatches that the rows of a batch are split into.
      ema_decay: decay per step of the EMA of the weights; None keeps none.
      fisher_examples: examples of a batch of which `fisher_fn` squares the gradients, all if it holds fewer. They are
        computed one by one, each in a row of its own, so this is also what a call costs.
    """

    def train_step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        inputs = Inputs(objective, state, frozen, batch, num_microbatches, key)
        called = []

        def grad_fn(params: Params, index: int = 0) -> PyTree:
            called.append("grad_fn")
            return gradients(inputs, accumulator, params)[0]

        def curvature_grad_fn(params: Params) -> PyTree:
            called.append("curvature_grad_fn")
            return curvature_gradients(inputs, params)

        def fisher_fn(params: Params) -> PyTree:
            called.append("fisher_fn")
            return fisher(inputs, params, fisher_examples)

        _refuse_multi_steps(state.optimizer_state)
        grads, loss = gradients(inputs, accumulator, state.params)
        offered = {"grad_fn": grad_fn, "curvature_grad_fn": curvature_grad_fn, "fisher_fn": fisher_fn}
        extra = accepted_arguments(optimizer.update, offered)
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params, **extra)
        gradient_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
        finite = jnp.isfinite(loss.sum) & jnp.isfinite(gradient_norm)
        if called:
            finite &= jnp.isfinite(update_norm)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
        moved = TrainState(state.step, params, optimizer_state, ema, loss.mutable)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        told = {"update_norm": update_norm, **_learning_rate(optimizer, state), **_reported(kept.optimizer_state)}
        metrics = StepMetrics(loss._replace(mutable=()), gradient_norm, finite, told)
        return kept._replace(step=state.step + 1), metrics

    return train_step


def make_evaluation_step(objective: Objective) -> Callable[..., Loss]:
    """Builds `(params, frozen, mutable, step, batch) -> Loss` without dropout: the loss on held-out data."""

    def evaluation_step(params: Params, frozen: Frozen, mutable: PyTree, step: Array, batch: Batch) -> Loss:
        context = Context(step, jax.random.key(0), False, frozen, mutable)
        context = context._replace(totals=totals_of(objective, batch, context))
        return objective(params, batch, context)._replace(mutable=())

    return evaluation_step


def accepted_arguments(update: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered extra arguments that an optimizer's update takes (`optax.contrib.sam` refuses others)."""
    parameters = inspect.signature(update).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return offered
    names = {p.name for p in parameters}
    return {name: value for name, value in offered.items() if name in names}


def _refuse_multi_steps(optimizer_state: PyTree) -> None:
    """Inside `optax.MultiSteps` an optimizer would pull gradients of the last of its batches only."""
    is_multi_steps = lambda node: isinstance(node, optax.MultiStepsState)
    pulls = lambda node: hasattr(type(node), "pulls_gradients")
    around = [node for node in jax.tree.leaves(optimizer_state, is_leaf=is_multi_steps) if is_multi_steps(node)]
    inside = [leaf for node in around for leaf in jax.tree.leaves(node.inner_opt_state, is_leaf=pulls)]
    if any(map(pulls, inside)):
        raise UserError(
            "an optimizer that asks for gradients cannot be inside optax.MultiSteps: it would get those of the last of "
            "its batches only; set Run.num_microbatches instead"
        )


def _learning_rate(optimizer: optax.GradientTransformation, state: TrainState) -> dict[str, Array]:
    rate = learning_rate_of(optimizer, state.optimizer_state)
    return {} if rate is None else {"learning_rate": jnp.asarray(rate, jnp.float32)}


def _reported(optimizer_state: PyTree) -> dict[str, Array]:
    """What states inside an optimizer's state tell of themselves."""
    reports = lambda node: isinstance(getattr(type(node), "metrics", None), property)
    found = (node for node in jax.tree.leaves(optimizer_state, is_leaf=reports) if reports(node))
    return {name: jnp.asarray(value, jnp.float32) for node in found for name, value in node.metrics.items()}
