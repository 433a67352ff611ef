"""From a `Run` to a finished run folder: data, state, loop, final test."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import t5x_ext
from t5x_ext.checkpoints import CheckpointStore, Retention, RunFolder, write_json
from t5x_ext.contracts import Batch, PyTree, UserError
from t5x_ext.data import PreparedData, VocabularyConfig, batch_iterator, prepare
from t5x_ext.models import TransformerConfig, init_params
from t5x_ext.parallel import BATCH_AXES, batch_devices, global_batch, host_rows, make_mesh
from t5x_ext.train import hooks
from t5x_ext.train.evaluation import HeldOut, run_test
from t5x_ext.train.loop import Hook, Loop, train
from t5x_ext.train.processes import is_primary, primary_first
from t5x_ext.train.program import Program, make_program
from t5x_ext.train.report import draw_learning_curve
from t5x_ext.train.run import EvaluationConfig, Run
from t5x_ext.train.state import TrainState, create_state

logger = logging.getLogger(__name__)

_MAY_CHANGE = (
    *("Run.steps", "Run.log_every", "Run.tensorboard", "Run.evaluation", "Run.checkpoints"),
    *("EvaluationConfig.", "CheckpointConfig.", "DecodeConfig."),
)
"""Settings that a restart may change: they do not touch what has been learned so far."""


class InitFrom(NamedTuple):
    """A run to start from, for fine-tuning; from its average of the weights, where it kept one."""

    run_dir: str
    checkpoint: str | int = "best"  # "best", "last" or a step
    keep_optimizer: bool = False  # go on with its weights, their average and its optimizer state, else begin afresh


def execute(
    run: Run,
    run_dir: str,
    *,
    config_text: str = "",
    cache_dir: str | None = None,
    init_from: InitFrom | None = None,
) -> dict[str, Any]:
    """Trains a run, or goes on with one that was interrupted, and tests it.

    Args:
      run: what to train.
      run_dir: the run folder; made if there is none.
      config_text: the resolved configuration, one `name = value` a line; kept as a record, and compared on restart.
      cache_dir: where token caches live; None keeps them in the run folder.
      init_from: weights to start from; None starts from random ones.

    Returns:
      What stands in `results.json`.

    Raises:
      UserError: for inputs that do not fit, or a folder that holds a run with other settings.
    """
    folder = RunFolder(run_dir)
    _check_config(folder, config_text)
    done = read_results(run_dir)
    if done is not None and _is_over(run, done["steps"], done.get("evaluations_without_gain", 0)):
        hint = f"--init_from={run_dir} goes on from its weights in another --run_dir"
        print(f"{run_dir} is finished, with {done['steps']:,} updates; {hint}", file=sys.stderr)
        return done
    mesh = make_mesh(run.mesh)
    _check_rows(run, mesh)
    data_config = run.data
    if init_from is not None:
        vocabulary = str(RunFolder(init_from.run_dir).vocabulary)
        data_config = dataclasses.replace(data_config, vocabulary=VocabularyConfig(path=vocabulary))
    with primary_first("data"):
        data = prepare(data_config, run_dir, cache_dir or str(folder.cache), run.seed)
    program = make_program(run, data.vocabulary.size, mesh)
    model_config = program.config
    retention = Retention(
        keep_last=run.checkpoints.keep_last,
        keep_best=run.checkpoints.keep_best,
        metric=run.evaluation.metric,
        mode="max" if run.evaluation.higher_is_better else "min",
    )
    with CheckpointStore(folder.checkpoints, retention) as store:
        loop = _first_state(run, model_config, data, program.template, store, init_from)
        if is_primary():
            _write_records(folder, run, data, model_config, config_text)
        if not _is_over(run, loop.step, hooks.evaluations_without_gain(loop.memory)):
            held_out = HeldOut(run, data, program.model, program.objective, mesh)
            _train(program, folder, loop, data, store, held_out)
    if is_primary():
        draw_learning_curve(folder.metrics_jsonl, folder.learning_curve_png, folder.path.name)
    if loop.interrupted:
        print(f"stopped at step {loop.step:,} of {run.steps:,}: {loop.stop}; the same command goes on", file=sys.stderr)
        return {}
    return _finish(run, folder, loop, data, model_config)


def _train(
    program: Program, folder: RunFolder, loop: Loop, data: PreparedData, store: CheckpointStore, held_out: HeldOut
) -> None:
    """Compiles the step and runs the loop with the run's hooks."""
    run = program.run
    with loop.clock.section("compile"):
        train_step = program.compile()
    evaluation = run.evaluation
    stop_on_signal = hooks.StopOnSignal()
    chain: list[Hook] = [
        stop_on_signal,
        hooks.Evaluate(held_out, every=evaluation.every, steps=run.steps),
        *run.hooks,
        *_early_stop(evaluation),
        hooks.Save(store, every=run.checkpoints.every, data=data.description, metric=evaluation.metric),
    ]
    if is_primary():
        chain.append(
            hooks.Log(
                folder.metrics_jsonl,
                folder.tensorboard if run.tensorboard else None,
                every=run.log_every,
                steps=run.steps,
                start=loop.step,
                max_skipped=run.max_skipped_updates,
            )
        )
    with stop_on_signal:
        train(
            loop,
            train_step,
            _device_batches(run, data, program.mesh, loop.batches_consumed),
            steps=run.steps,
            hooks=chain,
        )
    if loop.stop is not None:
        logger.info("stopped at step %d: %s", loop.step, loop.stop)


def _early_stop(config: EvaluationConfig) -> Iterator[hooks.EarlyStop]:
    if config.patience is not None:
        yield hooks.EarlyStop(config.metric, higher_is_better=config.higher_is_better, patience=config.patience)


def _check_rows(run: Run, mesh: Mesh) -> None:
    """Refuses a batch that devices and microbatches do not cut evenly.

    Raises:
      UserError: naming a multiple that does.
    """
    devices = batch_devices(mesh)
    if run.data.batch.rows % (devices * run.num_microbatches):
        raise UserError(
            f"BatchConfig.rows is {run.data.batch.rows}; {devices} devices ({' x '.join(BATCH_AXES)}) with "
            f"{run.num_microbatches} microbatches need a multiple of {devices * run.num_microbatches}"
        )


def _is_over(run: Run, steps: int, evaluations_without_gain: int) -> bool:
    patience = run.evaluation.patience
    return steps >= run.steps or (patience is not None and evaluations_without_gain >= patience)


def _device_batches(run: Run, data: PreparedData, mesh: Mesh, start: int) -> Iterator[Batch]:
    """Global batches from position `start` on; this host reads its own rows only."""
    rows = host_rows(mesh, run.data.batch.rows)
    for batch in batch_iterator(data.batches, start, *rows):
        yield global_batch(mesh, batch)


def _first_state(
    run: Run,
    config: TransformerConfig,
    data: PreparedData,
    template: PyTree,
    store: CheckpointStore,
    init_from: InitFrom | None,
) -> Loop:
    """The newest checkpoint of this run; else the weights of another run; else random weights."""
    if store.steps():
        state, extra = store.restore(template)
        _check_data(store, extra["data"], data.description)
        memory = extra["memory"]
        memory["seconds_before"] = memory.pop("seconds")
        logger.info("going on from step %d", int(state.step))
        return Loop(state, int(state.step), extra["batches_consumed"], memory)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)

    def create(key: jax.Array) -> TrainState:
        return create_state(init_params(config, key), run.optimizer, with_ema=run.ema_decay is not None)

    if init_from is None:
        state = jax.jit(create, out_shardings=shardings)(jax.random.key(run.seed))
    else:
        state = _state_from(init_from, run, template)
    return Loop(state, 0, 0)


def _state_from(init_from: InitFrom, run: Run, template: TrainState) -> TrainState:
    """A state with the weights of another run, its counters at zero."""
    with CheckpointStore(RunFolder(init_from.run_dir).checkpoints) as store:
        step = None if isinstance(init_from.checkpoint, str) else init_from.checkpoint
        if init_from.checkpoint == "best":
            step = store.best_step()
        if init_from.keep_optimizer:
            state, _ = store.restore(template, step)
            return state._replace(step=jax.device_put(np.int32(0), template.step.sharding))
        which: Any = init_from.checkpoint if step is None else step
        try:
            weights = store.restore_params(which, subtree="ema")
        except UserError:
            # Most runs keep no average; where it is the checkpoint that is missing, this says so.
            weights = store.restore_params(which)
    where = f"--init_from={init_from.run_dir}"
    params = jax.tree.map(partial(_placed, where), template.params, weights)
    create = partial(create_state, optimizer=run.optimizer, with_ema=run.ema_decay is not None)
    return jax.jit(create, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, template))(params)


def _placed(where: str, template: jax.ShapeDtypeStruct, weight: np.ndarray) -> jax.Array:
    if template.shape != weight.shape:
        raise UserError(f"{where}: its model has a weight of shape {weight.shape} where this one has {template.shape}")
    return jax.device_put(weight, template.sharding)


def _finish(run: Run, folder: RunFolder, loop: Loop, data: PreparedData, config: TransformerConfig) -> dict[str, Any]:
    """Decodes and scores the test set with the best checkpoint, and writes `results.json`."""
    seconds = loop.memory.get("seconds_before", 0.0) + sum(loop.clock.seconds.values())
    results: dict[str, Any] = {
        "steps": loop.step,
        "parameters": config.num_params(),
        "train_seconds": round(seconds, 2),
        "target_tokens_per_second": round(loop.memory.get("target_tokens", 0.0) / max(seconds, 1e-9), 1),
    }
    if run.evaluation.patience is not None:
        results["evaluations_without_gain"] = hooks.evaluations_without_gain(loop.memory)
    if data.test:
        results |= run_test(str(folder.path), data.test, run.evaluation)
    if is_primary():
        write_json(folder.results_json, results)
    return results


def _write_records(
    folder: RunFolder, run: Run, data: PreparedData, config: TransformerConfig, config_text: str
) -> None:
    """What a reader needs (`model.json`), and what a person wants to know later (configuration, environment)."""
    folder.write_model(
        config.to_json(), dataclasses.asdict(run.data.tags), data.directions, data.vocabulary.fingerprint()
    )
    folder.config_gin.write_text(config_text)
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}
    environment = {
        "python": platform.python_version(),
        "packages": {"t5x_ext": t5x_ext.__version__, **versions},
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "cpu_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    write_json(folder.environment_json, environment)


def _check_config(folder: RunFolder, config_text: str) -> None:
    """Refuses to go on with a run whose settings have changed; before its first checkpoint there is none to go on with.

    Raises:
      UserError: naming the first difference.
    """
    with CheckpointStore(folder.checkpoints) as store:
        if not store.steps() or not folder.config_gin.exists():
            return
    before, now = _settings(folder.config_gin.read_text()), _settings(config_text)
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder.path} holds a run with {name} = {before.get(name, 'unset')}, now it is "
            f"{now.get(name, 'unset')}{more}; give the settings it was started with, or another --run_dir"
        )


def _check_data(store: CheckpointStore, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with other data: the position in it would mean something else.

    Raises:
      UserError: naming the parts that differ.
    """
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise UserError(
            f"{store.directory} was trained on other data ({', '.join(changed)} changed); restore it, or take another "
            "--run_dir with --init_from"
        )


def _settings(config_text: str) -> dict[str, str]:
    lines = (line.split(" = ", 1) for line in config_text.splitlines() if " = " in line and not line.startswith("#"))
    return {name: value for name, value in lines if not any(part in name for part in _MAY_CHANGE)}


def read_results(run_dir: str) -> dict[str, Any] | None:
    """The results of a finished run; None where there are none yet."""
    path = RunFolder(run_dir).results_json
    return json.loads(path.read_text()) if path.exists() else None
