"""What the learning rate of an optimizer is at an update, for logs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from t5x_ext.contracts import PyTree


class Scheduled(optax.GradientTransformationExtraArgs):
    """A transformation that knows its learning rate, a constant or an `optax.Schedule`: the attribute `schedule`."""

    schedule: Any


def with_learning_rate(optimizer: optax.GradientTransformation, learning_rate: Any) -> optax.GradientTransformation:
    """The same transformation, which now tells its learning rate to `learning_rate_of`.

    Args:
      optimizer: any transformation.
      learning_rate: a constant or an `optax.Schedule`; or another optimizer, whose learning rate this one's is.
    """
    if isinstance(learning_rate, optax.GradientTransformation):
        if not isinstance(learning_rate, Scheduled):
            return optimizer
        learning_rate = learning_rate.schedule
    scheduled = Scheduled(*optimizer)
    scheduled.schedule = learning_rate
    return scheduled


def learning_rate_of(optimizer: optax.GradientTransformation, state: PyTree) -> Float[Array, ""] | float | None:
    """The learning rate of the next update; None if the optimizer does not tell.

    Those of this package do (`with_learning_rate`), and any under `optax.inject_hyperparams` with a hyperparameter
    `learning_rate`. A schedule is asked for the largest counter called `count` in the state.

    Args:
      optimizer: a transformation.
      state: its state before the update.
    """
    injected = optax.tree.get_all_with_path(state, "learning_rate")
    if injected:
        return injected[0][1]
    schedule = getattr(optimizer, "schedule", None)
    if not callable(schedule):
        return schedule
    counts = [value for _, value in optax.tree.get_all_with_path(state, "count") if jnp.ndim(value) == 0]
    return schedule(jnp.max(jnp.stack(counts))) if counts else None
