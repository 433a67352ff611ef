"""What a training run carries from one step to the next."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from t5x_ext.contracts import Params, PyTree


class TrainState(NamedTuple):
    """Everything that a checkpoint must hold to continue; random keys are derived from (seed, step)."""

    step: Int[Array, ""]  # updates done, int32
    params: Params  # float32
    optimizer_state: PyTree
    ema: Params | tuple[()]  # exponential moving average of params, () when it is off
    mutable: PyTree  # an objective's masks and statistics, () when it has none

    @property
    def evaluation_params(self) -> Params:
        """The weights to decode with: the moving average where one is kept."""
        return self.ema if self.ema != () else self.params


def create_state(
    params: Params, optimizer: optax.GradientTransformation, *, with_ema: bool, mutable: PyTree = ()
) -> TrainState:
    """The state before the first update; jit-able and `eval_shape`-able."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer_state=optimizer.init(params),
        ema=params if with_ema else (),
        mutable=mutable,
    )
