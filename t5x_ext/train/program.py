"""What a run computes, as shapes and shardings: the one description that training compiles and planning examines."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh

from t5x_ext.contracts import Batch, Likelihood, PyTree, TranslationBatch, UserError
from t5x_ext.models import EncoderDecoder, TransformerConfig, init_params, logical_axes
from t5x_ext.parallel import BATCH_AXES, MeshPlacement, batch_devices, state_shardings, tree_shardings
from t5x_ext.parallel.batches import batch_sharding
from t5x_ext.train.run import Run
from t5x_ext.train.state import create_state
from t5x_ext.train.step import TrainStep, make_train_step


class Program(NamedTuple):
    """A run on a mesh before anything is allocated; the devices of the mesh need not exist here."""

    run: Run
    config: TransformerConfig  # with the size of the vocabulary in use
    mesh: Mesh
    model: EncoderDecoder
    objective: Likelihood
    template: PyTree  # a TrainState of ShapeDtypeStructs with shardings
    batch: Batch  # of ShapeDtypeStructs with shardings

    def step(self) -> TrainStep:
        """The update, not compiled."""
        run = self.run
        return make_train_step(
            self.objective,
            run.optimizer,
            run.accumulator,
            seed=run.seed,
            num_microbatches=run.num_microbatches,
            ema_decay=run.ema_decay,
        )

    def lower(self) -> jax.stages.Lowered:
        """The update, traced for the shapes of the run; it destroys the state it is given."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.template)
        step = jax.jit(self.step(), donate_argnums=0, out_shardings=(shardings, None))
        return step.lower(self.template, self.batch)

    def compile(self) -> TrainStep:
        """The update, compiled for the devices of the mesh."""
        return self.lower().compile()


def check_rows(run: Run, mesh: Mesh) -> None:
    """Refuses a batch that devices and microbatches do not cut evenly.

    Raises:
      UserError: naming a multiple that does.
    """
    devices = batch_devices(mesh)
    step = devices * run.num_microbatches
    if run.data.batch.rows % step:
        raise UserError(
            f"BatchConfig.rows is {run.data.batch.rows}; {devices} devices ({' x '.join(BATCH_AXES)}) with "
            f"{run.num_microbatches} microbatches need a multiple of {step}"
        )


def make_program(run: Run, vocab_size: int, mesh: Mesh) -> Program:
    """The program of a run whose vocabulary has `vocab_size` pieces."""
    config = dataclasses.replace(run.model, vocab_size=vocab_size)
    model = EncoderDecoder(config, placement=MeshPlacement(mesh, run.axis_rules))
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    axes = logical_axes(config)
    shardings = tree_shardings(mesh, run.axis_rules, axes, params)
    state = jax.eval_shape(partial(create_state, optimizer=run.optimizer, with_ema=run.ema_decay is not None), params)
    template = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(mesh, state, params, shardings, axes),
    )
    return Program(
        run, config, mesh, model, cast(Likelihood, run.objective(model)), template, _batch_template(run, mesh)
    )


def _batch_template(run: Run, mesh: Mesh) -> Batch:
    shape = run.data.batch
    lengths = {"source": shape.source_length, "target": shape.target_length}
    sharding = batch_sharding(mesh)
    shapes = {name: (shape.rows, lengths[name.split("_")[0]]) for name in TranslationBatch.__annotations__}
    return cast(Batch, {name: jax.ShapeDtypeStruct(s, np.int32, sharding=sharding) for name, s in shapes.items()})
