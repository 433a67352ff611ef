"""What a run computes, as shapes and shardings: the one description that training compiles and planning examines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ext.checkpoints import BASE
from t5x_ext.contracts import Frozen, Objective, Params, PyTree, UserError, path_predicate
from t5x_ext.parallel import BATCH_AXES, MeshPlacement, batch_devices, state_shardings, tree_shardings
from t5x_ext.parallel.batches import batch_sharding
from t5x_ext.train.run import Run
from t5x_ext.train.state import TrainState, create_state
from t5x_ext.train.step import TrainStep
from t5x_ext.train.subset import SubsetObjective, check_patterns, merge_params, split_params
from t5x_ext.train.task import ArraySpec, Definition


class Program(NamedTuple):
    """A run on a mesh before anything is allocated; the devices of the mesh need not exist here."""

    run: Run
    mesh: Mesh
    definition: Definition
    objective: Objective  # over all parameters of the model
    params: Params  # all parameters of the model, ShapeDtypeStructs with shardings
    template: PyTree  # a TrainState of ShapeDtypeStructs with shardings; of the trainable parameters alone
    frozen: Frozen  # what the update only reads, ShapeDtypeStructs with shardings
    batch: Mapping[str, Any]  # of ShapeDtypeStructs with shardings
    check_interrupt: Callable[[], None] = lambda: None  # raises `Interrupted` once the run is told to stop

    @property
    def model(self) -> Any:
        """The model of the task."""
        return self.definition.model

    def is_trainable(self, name: str) -> bool:
        """Whether updates change the parameter of that name."""
        return not self.run.trainable or path_predicate(*self.run.trainable)(name)

    def whole(self, params: Params, frozen: Frozen) -> Params:
        """All parameters of the model from the trained ones and the frozen ones; nothing is copied."""
        return merge_params(params, frozen[BASE]) if BASE in frozen else params

    def create(self, params: Params) -> TrainState:
        """The state before the first update from all parameters of the model; traceable."""
        part, _ = split_params(params, self.is_trainable)
        return _create(self.run, self.objective, part, params)

    def step(self) -> TrainStep:
        """The update, not compiled."""
        run = self.run
        return run.step(
            SubsetObjective(self.objective) if run.trainable else self.objective,
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
        return step.lower(self.template, self.frozen, self.batch)

    def compile(self) -> TrainStep:
        """The update, compiled for the devices of the mesh."""
        return self.lower().compile()


def check_rows(run: Run, mesh: Mesh) -> None:
    """Refuses a batch that devices and microbatches do not split evenly.

    Raises:
      UserError: naming a multiple that does.
    """
    if run.task.rows == 1:
        return  # replicated
    devices = batch_devices(mesh)
    step = devices * run.num_microbatches
    if run.task.rows % step:
        raise UserError(
            f"BatchConfig.rows is {run.task.rows}; {devices} devices ({' x '.join(BATCH_AXES)}) with "
            f"{run.num_microbatches} microbatches need a multiple of {step}"
        )


def make_program(
    run: Run, sizes: Mapping[str, int], mesh: Mesh, frozen: Mapping[str, PyTree] = MappingProxyType({})
) -> Program:
    """The program of a run.

    Args:
      run: what to train.
      sizes: what the task takes from its data, as `{"vocab_size": 32000}`.
      mesh: the devices.
      frozen: parameters of other runs, arrays or shapes, by the names of `run.frozen`.

    Raises:
      UserError: for patterns of `Run.trainable` in which no parameter is found.
    """
    definition = run.task.define(sizes, MeshPlacement(mesh, run.axis_rules))
    abstract = definition.abstract_params()
    check_patterns(abstract, run.trainable, "Run.trainable")
    shardings = tree_shardings(mesh, run.axis_rules, definition.axes, abstract)
    objective = run.objective(definition.model)
    trainable = path_predicate(*run.trainable) if run.trainable else lambda name: True
    part, rest = split_params(abstract, trainable)
    if run.trainable and not rest:
        raise UserError("Run.trainable: all parameters are trained; leave it empty")
    state = jax.eval_shape(partial(_create, run, objective), part, abstract)
    read_only = {**frozen, **({BASE: rest} if run.trainable else {})}

    def placed(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            state_shardings(mesh, tree, abstract, shardings, definition.axes),
        )

    batch = {name: _batch_template(spec, mesh) for name, spec in definition.batch.items()}
    return Program(run, mesh, definition, objective, placed(abstract), placed(state), placed(read_only), batch)


def _create(run: Run, objective: Objective, part: Params, params: Params) -> TrainState:
    init_mutable = getattr(objective, "init_mutable", None)
    mutable = () if init_mutable is None else init_mutable(params)
    return create_state(part, run.optimizer, with_ema=run.ema_decay is not None, mutable=mutable)


def _batch_template(spec: ArraySpec, mesh: Mesh) -> jax.ShapeDtypeStruct:
    sharding = batch_sharding(mesh) if spec.sharded else NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
