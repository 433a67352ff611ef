"""Objectives as one program: run operation by operation, they would be compiled operation by operation."""

from __future__ import annotations

import jax

from t5x_ext.contracts import Batch, Context, Loss, Objective, Params

TRAINING = Context(0, jax.random.key(1), train=True)


def loss_of(objective: Objective, params: Params, batch: Batch, context: Context = TRAINING) -> Loss:
    return jax.jit(lambda params, batch: objective(params, batch, context))(params, batch)


def gradient_of(objective: Objective, params: Params, batch: Batch) -> Params:
    return jax.jit(jax.grad(lambda params, batch: objective(params, batch, TRAINING).sum))(params, batch)
