"""Where a run begins: at its newest checkpoint, at the weights of another run, or at random weights."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_ext.checkpoints import CheckpointStore, RunFolder
from t5x_ext.contracts import Params, UserError
from t5x_ext.data import PreparedData
from t5x_ext.models import init_params
from t5x_ext.train.goodput import Clock
from t5x_ext.train.loop import Loop
from t5x_ext.train.program import Program
from t5x_ext.train.records import check_data
from t5x_ext.train.state import TrainState, create_state

logger = logging.getLogger(__name__)


class InitFrom(NamedTuple):
    """A run to start from, for fine-tuning; from its average of the weights, where it kept one."""

    run_dir: str
    checkpoint: str | int = "best"  # "best", "last" or a step
    keep_optimizer: bool = False  # go on with its weights, their average and its optimizer state, else begin afresh


def first_loop(
    program: Program, data: PreparedData, store: CheckpointStore, init_from: InitFrom | None, clock: Clock
) -> Loop:
    """The newest whole checkpoint of this run; else the weights of another run; else random weights.

    Raises:
      UserError: where the checkpoint is of other data.
    """
    with clock.section("start"):
        if store.steps():
            state, extra = store.restore(program.template)
            check_data(store, extra["data"], data.description)
            data.plan.remember(extra.get("known_rows", ()))
            clock.add(extra.get("clock", {}))
            logger.info("going on from step %d", int(state.step))
            skipped = [(start, stop) for start, stop in extra.get("skipped", ())]
            position = int(state.step), extra["batches_consumed"], extra["memory"], skipped
            return Loop(state, *position, evaluation=extra.get("evaluation", {}), clock=clock)
        state = _random_state(program) if init_from is None else _state_from(init_from, program)
    return Loop(state, 0, 0, clock=clock)


def _random_state(program: Program) -> TrainState:
    run = program.run

    def create(key: jax.Array) -> TrainState:
        return create_state(init_params(program.config, key), run.optimizer, with_ema=run.ema_decay is not None)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.template)
    return jax.jit(create, out_shardings=shardings)(jax.random.key(run.seed))


def _state_from(init_from: InitFrom, program: Program) -> TrainState:
    """A state with the weights of another run, its counters at zero."""
    run, template = program.run, program.template
    with CheckpointStore(RunFolder(init_from.run_dir).checkpoints) as store:
        step = None if isinstance(init_from.checkpoint, str) else init_from.checkpoint
        if init_from.checkpoint == "best":
            step = store.best_step()
        if init_from.keep_optimizer:
            state, _ = store.restore(template, step)
            return state._replace(step=jax.device_put(np.int32(0), template.step.sharding))
        which = init_from.checkpoint if step is None else step
        params = placed_weights(program, store, which, f"--init_from={init_from.run_dir}")
    create = partial(create_state, optimizer=run.optimizer, with_ema=run.ema_decay is not None)
    return jax.jit(create, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, template))(params)


def placed_weights(program: Program, store: CheckpointStore, which: Any, where: str) -> Params:
    """The weights of a checkpoint (`best`, `last` or a step) on the program's mesh, their average where there is one.

    Raises:
      UserError: beginning with `where`, if they are of another model.
    """
    return jax.tree.map(partial(_placed, where), program.template.params, store.evaluation_params(which))


def _placed(where: str, template: jax.ShapeDtypeStruct, weight: np.ndarray) -> jax.Array:
    if template.shape != weight.shape:
        raise UserError(f"{where}: its model has a weight of shape {weight.shape} where this one has {template.shape}")
    return jax.make_array_from_callback(weight.shape, template.sharding, lambda index: weight[index])
