"""Where a run begins: at its newest checkpoint, at the weights of another run, or at random weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from t5x_ext.checkpoints import (
    BASE,
    CheckpointStore,
    Reference,
    RunFolder,
    read_references,
    run_params,
    trees,
    write_references,
)
from t5x_ext.contracts import Params, PyTree, UserError
from t5x_ext.parallel import is_primary
from t5x_ext.train.goodput import Clock
from t5x_ext.train.init_from import InitFrom, read_weights
from t5x_ext.train.loop import Loop
from t5x_ext.train.memory import Memory
from t5x_ext.train.program import Program
from t5x_ext.train.run import Run
from t5x_ext.train.run_records import check_data
from t5x_ext.train.state import TrainState
from t5x_ext.train.subset import split_params
from t5x_ext.train.task import Prepared

logger = logging.getLogger(__name__)


def read_frozen(run: Run, folder: RunFolder) -> tuple[dict[str, PyTree], dict[str, Reference]]:
    """Parameters of other runs that this one only reads (`Run.frozen`), as NumPy arrays, and how to find them again.

    Raises:
      UserError: if they are not there, or are no longer those that the run began with.
    """
    known = read_references(folder)
    found, references = {}, {}
    for name, init_from in run.frozen.items():
        leaves, reference = read_weights(init_from, f"Run.frozen[{name!r}]")
        if reference is None:
            raise UserError(f"Run.frozen[{name!r}]: transform is for weights that are trained; convert the run instead")
        if name in known and known[name].digest != reference.digest:
            raise UserError(
                f"Run.frozen[{name!r}]: step {reference.step} of {reference.run_dir} is not what {folder.path} was "
                "trained with; restore it"
            )
        found[name], references[name] = trees.nested(leaves), reference
    return found, references


def first_loop(
    program: Program,
    prepared: Prepared,
    folder: RunFolder,
    store: CheckpointStore,
    init_from: InitFrom | None,
    frozen: Mapping[str, PyTree],
    references: Mapping[str, Reference],
    clock: Clock,
) -> Loop:
    """The newest whole checkpoint of this run; else the weights of another run; else random weights.

    Args:
      program: of the run.
      prepared: its data.
      folder: its folder, where what the run only reads is recorded.
      store: its checkpoints.
      init_from: weights to start from.
      frozen: from `read_frozen`.
      references: from `read_frozen`.
      clock: of the run.

    Raises:
      UserError: if the checkpoint is of other data, or weights do not fit.
    """
    with clock.section("start"):
        placed = {name: _place_tree(tree, program.frozen[name]) for name, tree in frozen.items()}
        if store.steps():
            state, extra = store.restore(program.template)
            check_data(store, extra["data"], prepared.batches.description)
            prepared.batches.remember(extra.get("known_rows", ()))
            clock.add(extra.get("clock", {}))
            logger.info("resuming from step %d", int(state.step))
            if program.run.trainable:
                placed[BASE] = _base(program, folder)
            skipped = [(start, stop) for start, stop in extra.get("skipped", ())]
            memory, evaluation = Memory.from_json(extra["memory"]), extra.get("evaluation", {})
            consumed = extra["batches_consumed"]
            return Loop(state, int(state.step), consumed, placed, memory, skipped, evaluation=evaluation, clock=clock)
        state, rest, reference = _first_state(program, init_from)
        known = dict(references)
        if program.run.trainable:
            placed[BASE] = rest
            known[BASE] = reference or _keep_base(program, rest, folder)
        if is_primary():
            write_references(folder, known)
    return Loop(state, 0, 0, placed, clock=clock)


def _first_state(program: Program, init_from: InitFrom | None) -> tuple[TrainState, Params, Reference | None]:
    """The state before the first update, the parameters that are not trained, and where those came from."""
    run, shardings = program.run, jax.tree.map(lambda leaf: leaf.sharding, program.template)
    if init_from is not None and init_from.keep_optimizer:
        return _with_optimizer(program, init_from), {}, None
    if init_from is None:
        leaves, reference = dict[str, Any](), None
    else:
        where = f"--init_from={init_from.run_dir}"
        leaves, reference = read_weights(init_from, where)
        _check_leaves(program, leaves, init_from, where)
    names = trees.flatten(program.params)
    if leaves.keys() == names.keys():
        params = _place_tree(trees.nested(leaves), program.params)
    else:
        places = jax.tree.map(lambda leaf: leaf.sharding, program.params)
        params = jax.jit(program.definition.init, out_shardings=places)(jax.random.key(run.seed))
        given = {name: _place(leaf, names[name]) for name, leaf in leaves.items()}
        params = trees.nested(trees.flatten(params) | given)
    _, rest = split_params(params, program.is_trainable)
    state = jax.jit(program.create, out_shardings=shardings)(params)
    # Frozen parameters without a source of their own cannot be found again by reference.
    complete = trees.flatten(rest).keys() <= leaves.keys()
    return state, rest, reference if complete else None


def _with_optimizer(program: Program, init_from: InitFrom) -> TrainState:
    if init_from.only or init_from.rename or init_from.transform or program.run.trainable:
        raise UserError("keep_optimizer takes a whole state: without only, rename, transform and Run.trainable")
    with CheckpointStore(RunFolder(init_from.run_dir).checkpoints) as store:
        state, _ = store.restore(program.template, store.step_of(init_from.checkpoint))
    return state._replace(step=jax.device_put(np.int32(0), program.template.step.sharding))


def _check_leaves(program: Program, leaves: Mapping[str, Any], init_from: InitFrom, where: str) -> None:
    """Refuses weights that this model does not have, frozen ones that are missing, and other shapes."""
    names = trees.flatten(program.params)
    for name, leaf in leaves.items():
        if name in names and names[name].shape != leaf.shape:
            raise UserError(f"{where}: {name} has the shape {leaf.shape} there, {names[name].shape} in this model")
    trainable = set() if not program.run.trainable else {name for name in names if program.is_trainable(name)}
    unknown = sorted(leaves.keys() - names.keys())
    missing = sorted(names.keys() - leaves.keys() - trainable)
    if unknown:
        hint = "name those that are wanted in InitFrom.only, or rename them"
        raise UserError(f"{where}: this model has no parameter {unknown[0]} ({len(unknown)} such); {hint}")
    if missing and not init_from.only:
        hint = "is this the same architecture? InitFrom.only takes a part and leaves the rest random"
        raise UserError(f"{where}: it has no parameter {missing[0]} ({len(missing)} such); {hint}")


def _keep_base(program: Program, rest: Params, folder: RunFolder) -> Reference:
    """Writes frozen parameters that no other run has into the run folder, once."""
    target = RunFolder(folder.base)
    with CheckpointStore(target.checkpoints) as store:
        if not store.steps():
            store.save(0, {"params": rest})
            store.wait()
    return Reference.to_run(target, 0)[0]


def _base(program: Program, folder: RunFolder) -> Params:
    """The parameters that a resumed run does not train, where they came from."""
    reference = read_references(folder).get(BASE)
    if reference is None:
        raise UserError(f"{folder.frozen_json} does not say where the frozen weights of this run are; restore it")
    wanted = trees.flatten(program.frozen[BASE])
    leaves = {name: leaf for name, leaf in reference.params().items() if name in wanted}
    return _place_tree(trees.nested(leaves), program.frozen[BASE])


def placed_weights(program: Program, folder: RunFolder, which: str | int) -> Params:
    """All weights of a checkpoint of this run on its mesh: their EMA where it kept one.

    Raises:
      UserError: if there is no such checkpoint.
    """
    return _place_tree(run_params(folder, which), program.params)


def _place_tree(tree: PyTree, template: PyTree) -> PyTree:
    return jax.tree.map(_place, tree, template)


def _place(weight: np.ndarray, template: jax.ShapeDtypeStruct) -> jax.Array:
    weight = np.asarray(weight, template.dtype)
    return jax.make_array_from_callback(weight.shape, template.sharding, lambda index: weight[index])
