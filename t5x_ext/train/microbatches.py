"""A batch in microbatches: gradients of all of them at any weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from t5x_ext.contracts import Accumulator, Batch, Context, Frozen, Loss, Objective, Params, PyTree
from t5x_ext.train.state import TrainState
from t5x_ext.train.subset import totals_of


def split_rows(batch: PyTree, num_microbatches: int) -> PyTree:
    """Splits the rows of a batch into microbatches: [rows, ...] to [num_microbatches, rows / num_microbatches, ...].

    Row r goes to microbatch r mod num_microbatches, so that rows sharded over devices stay on their devices. One
    microbatch is the whole batch, which then need not have rows at all.
    """
    if num_microbatches == 1:
        return jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % num_microbatches:
        raise ValueError(f"{rows} rows do not divide into {num_microbatches} microbatches")
    return jax.tree.map(
        lambda x: x.reshape(rows // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )


class Inputs(NamedTuple):
    """What every gradient of a step is computed from, at any weights."""

    objective: Objective
    state: TrainState
    frozen: Frozen
    batch: Batch
    num_microbatches: int
    key: Array

    def context(self, number: Array | int, totals: PyTree = ()) -> Context:
        """For one of the microbatches or examples that are computed in turn: each has a random key of its own."""
        key = jax.random.fold_in(self.key, number)
        return Context(self.state.step, key, True, self.frozen, self.state.mutable, totals)

    def totals(self) -> PyTree:
        """What the objective computes once over the whole batch."""
        return totals_of(self.objective, self.batch, self.context(TOTALS_KEY))

    def microbatches(self) -> tuple[Array, PyTree]:
        """Their numbers, and the microbatches."""
        return jnp.arange(self.num_microbatches), split_rows(self.batch, self.num_microbatches)


TOTALS_KEY = 2**32 - 2
"""Folded into the key of a step for what is computed over the whole batch; no microbatch has this number."""


def gradients(inputs: Inputs, accumulator: Accumulator, params: Params) -> tuple[PyTree, Loss]:
    """Gradient of the mean loss over all microbatches, and the summed loss.

    Mutable state goes from one microbatch to the next; `Loss.mutable` is its value after the last one.
    """
    totals = inputs.totals()

    def loss_sum(params: Params, microbatch: Batch, number: Array, mutable: PyTree) -> tuple[Array, Loss]:
        context = inputs.context(number, totals)._replace(mutable=mutable)
        loss = inputs.objective(params, microbatch, context)
        if not jax.tree.leaves(loss.mutable):
            loss = loss._replace(mutable=mutable)  # () keeps it
        return loss.sum, loss

    def add(carry: PyTree, inputs: PyTree) -> tuple[PyTree, None]:
        accumulated, total, mutable = carry
        number, microbatch = inputs
        (_, loss), grads = jax.value_and_grad(loss_sum, has_aux=True)(params, microbatch, number, mutable)
        accumulated = accumulator.add(accumulated, grads, loss.weight)
        return (accumulated, jax.tree.map(jnp.add, total, loss._replace(mutable=())), loss.mutable), None

    numbers, microbatches = inputs.microbatches()
    mutable = inputs.state.mutable
    first = jax.tree.map(lambda x: x[0], microbatches)
    _, loss_shape = jax.eval_shape(loss_sum, params, first, numbers[0], mutable)
    zero_loss = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), loss_shape._replace(mutable=()))
    initial = (accumulator.init(params, inputs.state.step), zero_loss, mutable)
    (accumulated, loss, mutable), _ = jax.lax.scan(add, initial, (numbers, microbatches))
    return accumulator.finish(accumulated), loss._replace(mutable=mutable)
