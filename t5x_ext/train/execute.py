"""From a `Run` to a finished run folder: data, state, loop, final test."""

from __future__ import annotations

import dataclasses
import errno
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import jax

from t5x_ext.checkpoints import CheckpointStore, Retention, RunFolder, write_json
from t5x_ext.contracts import Batch, UserError
from t5x_ext.data import PackedBatches, VocabularyConfig, batch_iterator, prepare
from t5x_ext.parallel import global_batch, hardware_of, host_rows, is_primary, make_mesh, primary_first
from t5x_ext.train import hooks
from t5x_ext.train.beginning import InitFrom, first_loop, placed_weights
from t5x_ext.train.budget import Spent, StopAtBudget, spent_by
from t5x_ext.train.compilation import compiling
from t5x_ext.train.evaluation import HeldOut, run_test
from t5x_ext.train.goodput import Clock, describe_split
from t5x_ext.train.log import JsonLines, Log, cut_log, is_remote
from t5x_ext.train.loop import Hook, Loop, train
from t5x_ext.train.preemption import StopOnSignal
from t5x_ext.train.profiling import Profile
from t5x_ext.train.program import check_rows, make_program
from t5x_ext.train.records import check_config, environment_changes, read_results, write_records
from t5x_ext.train.recovery import BadUpdates, Diverged, position_of, skipped_after
from t5x_ext.train.report import draw_learning_curve, read_metrics
from t5x_ext.train.run import Run
from t5x_ext.train.step import TrainStep

logger = logging.getLogger(__name__)


def execute(
    run: Run,
    run_dir: str,
    *,
    config_text: str = "",
    cache_dir: str | None = None,
    init_from: InitFrom | None = None,
) -> dict[str, Any]:
    """Trains a run, or goes on with one that was interrupted, and tests it.

    With several processes all of them call it with the same arguments; process 0 writes the records.

    Args:
      run: what to train.
      run_dir: the run folder, which all processes see; made if there is none.
      config_text: the resolved configuration, one `name = value` a line; kept as a record, and compared on restart.
      cache_dir: where token caches live; None keeps them in the run folder.
      init_from: weights to start from; None starts from random ones.

    Returns:
      What stands in `results.json`; nothing where the run was interrupted.

    Raises:
      UserError: for inputs that do not fit, a folder that holds a run with other settings, a disk that is full, or a
        loss that stays infinite.
    """
    folder = RunFolder(run_dir)
    check_config(folder, config_text)
    done = read_results(run_dir)
    if done is not None and _is_over(
        run, done["steps"], done.get("evaluations_without_gain", 0), Spent(**done.get("spent", {}))
    ):
        hint = f"--init_from={run_dir} goes on from its weights in another --run_dir"
        print(f"{run_dir} is finished, with {done['steps']:,} updates; {hint}", file=sys.stderr)
        return done
    try:
        return _Execution(run, folder, config_text, cache_dir, init_from).result()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{error.filename or run_dir}: {error.strerror}; make room, the same command goes on"
        ) from error


class _Execution:
    """One call of `execute`: the parts of a run that exist only once there are data and devices."""

    def __init__(
        self, run: Run, folder: RunFolder, config_text: str, cache_dir: str | None, init_from: InitFrom | None
    ):
        """Prepares data and program."""
        self.run, self.folder, self.config_text, self.init_from = run, folder, config_text, init_from
        self.clock = Clock()
        with self.clock.section("start"):
            mesh = make_mesh(run.mesh)
            check_rows(run, mesh)
            config = run.data
            if init_from is not None:
                vocabulary = VocabularyConfig(path=str(RunFolder(init_from.run_dir).vocabulary))
                config = dataclasses.replace(config, vocabulary=vocabulary)
            with primary_first("data"):
                self.data = prepare(config, str(folder.path), cache_dir or str(folder.cache), run.seed)
            self.program = make_program(run, self.data.vocabulary.size, mesh)

    def result(self) -> dict[str, Any]:
        """Trains and tests."""
        run, folder = self.run, self.folder
        retention = Retention(
            keep_last=run.checkpoints.keep_last,
            keep_best=run.checkpoints.keep_best,
            metric=run.evaluation.metric,
            mode="max" if run.evaluation.higher_is_better else "min",
        )
        with CheckpointStore(folder.checkpoints, retention) as store:
            loop = first_loop(self.program, self.data, store, self.init_from, self.clock)
            if is_primary():
                self._open_folder(loop)
            without_gain = hooks.evaluations_without_gain(loop.memory)
            if hooks.is_owed(loop) or not _is_over(run, loop.step, without_gain, spent_by(loop)):
                loop = self._train(loop, store)
            if is_primary():
                draw_learning_curve(folder.metrics_jsonl, folder.learning_curve_png, folder.path.name)
            if loop.interrupted:
                if is_primary():
                    stopped = f"stopped at step {loop.step:,} of {run.steps:,}: {loop.stop}"
                    print(f"{stopped}; the same command goes on", file=sys.stderr)
                return {}
            return self._finish(loop, store)

    def _open_folder(self, loop: Loop) -> None:
        """Writes the records, and takes back what a crash left in the log after the newest checkpoint."""
        changes = environment_changes(self.folder) if loop.step else []
        if changes:
            logger.warning(
                "going on with %s: the same batches follow, results are equal to rounding", "; ".join(changes)
            )
        write_records(self.folder, self.run, self.data, self.program.config, self.config_text)
        since_line = loop.clock.earlier - sum(loop.memory.get("log", {}).get("clock", {}).values())
        lost = cut_log(self.folder.metrics_jsonl, loop.step) - since_line
        loop.clock.add({"lost": max(lost, 0.0)})

    def _train(self, loop: Loop, store: CheckpointStore) -> Loop:
        """Compiles the step and runs the loop, again from an earlier checkpoint where losses stay infinite."""
        run, folder = self.run, self.folder
        with compiling(loop.clock, "training step"):
            train_step = self.program.compile()
        with StopOnSignal() as stop, Profile(folder.path, looks=is_primary()) as profile:
            held_out = HeldOut(self.program, self.data, stop.check)
            save = hooks.Save(
                store,
                every=run.checkpoints.every,
                data=self.data.description,
                metric=run.evaluation.metric,
                known_rows=self.data.plan.known_rows,
            )
            evaluate = hooks.Evaluate(held_out, every=run.evaluation.every, steps=run.steps, show=is_primary())
            budget = [StopAtBudget(run.budget)] if run.budget else []
            before_log: list[Hook] = [stop, profile, *budget, evaluate, *run.hooks, *_early_stop(run)]
            while True:
                try:
                    self._attempt(loop, train_step, before_log, save)
                    break
                except Diverged as error:
                    loop = self._go_back(error, loop, store)
                    save.save(loop)
            if loop.interrupted and stop.received_at is not None and is_primary():
                seconds = time.time() - stop.received_at
                logger.info("%s; update %d is on disk %.1f s later", loop.stop, loop.step, seconds)
                JsonLines(folder.metrics_jsonl).append({"step": loop.step, "preemption_seconds": round(seconds, 3)})
        if loop.stop is not None and not loop.interrupted:
            logger.info("stopped at step %d: %s", loop.step, loop.stop)
        return loop

    def _attempt(self, loop: Loop, train_step: TrainStep, before_log: list[Hook], save: hooks.Save) -> None:
        """Runs the loop to its end."""
        run, folder = self.run, self.folder
        batches = self.data.batches.skipping(loop.skipped)
        path = folder.skipped_examples_jsonl if is_primary() else None
        bad = BadUpdates(path, batches.plan.unskipped, batches.examples, run.max_skipped_updates)
        hardware = hardware_of(jax.devices()[0].device_kind)
        log = Log(
            folder.metrics_jsonl if is_primary() else None,
            folder.tensorboard if is_primary() and run.tensorboard and not is_remote(folder.path) else None,
            every=run.log_every,
            steps=run.steps,
            start=loop.step,
            batch_flops=lambda index: 3 * self.program.config.flops(*batches.example_lengths(index)),
            peak_flops=hardware.peak_flops * self.program.mesh.size if hardware else None,
        )
        chain = [*before_log, log, save]
        loop.observers = (bad.observe, log.observe)
        with closing(log):
            if hooks.is_owed(loop):
                for hook in chain:
                    hook.after_step(loop)
            device_batches = self._device_batches(batches, loop, save)
            train(loop, train_step, device_batches, steps=run.steps, hooks=chain)

    def _device_batches(self, batches: PackedBatches, loop: Loop, save: hooks.Save) -> Iterator[Batch]:
        """Global batches from the loop's position on; this host reads its own rows only."""
        mesh = self.program.mesh
        host_batches = batch_iterator(batches, loop.batches_consumed, *host_rows(mesh, self.run.data.batch.rows))
        while True:
            try:
                batch = next(host_batches)
            except Exception:
                # The weights are good. Several processes cannot save them: the others wait for this one's rows.
                if jax.process_count() == 1 and loop.in_flight is not None:
                    loop.settle()
                    save.at_end(loop)
                raise
            yield global_batch(mesh, batch)

    def _go_back(self, error: Diverged, loop: Loop, store: CheckpointStore) -> Loop:
        """The loop at the newest checkpoint from before a bad stretch, the data up to the stretch's end left out.

        Raises:
          UserError: if the run has gone back too often.
        """
        run, folder = self.run, self.folder
        rewinds = loop.memory.get("rewinds", 0) + 1
        if rewinds > run.max_rewinds:
            raise UserError(
                f"{error}, after going back {run.max_rewinds} times; their examples are in "
                f"{folder.skipped_examples_jsonl}; lower the learning rate, clip gradients, or clean the data"
            )
        del loop.state, loop.in_flight  # there need not be room for two
        store.wait()  # for the checkpoint that may be under way
        # Left-out updates change no weights: where nothing older was kept, a checkpoint of the stretch will do.
        good = [step for step in store.steps() if step < error.first]
        store.discard_after(max(good, default=min(store.steps(), default=0)))
        again = first_loop(self.program, self.data, store, self.init_from, Clock(loop.clock.now))
        plan = self.data.batches.plan.skipping(loop.skipped)
        again.skipped = skipped_after(plan, again.batches_consumed, position_of(loop, error.last))
        skipped_updates = loop.memory["skipped_updates"]
        again.memory |= {"rewinds": rewinds, "skipped_updates": skipped_updates, "skipped_in_row": 0}
        again.clock.add({"lost": loop.clock.total() - again.clock.earlier})
        if is_primary():
            cut_log(folder.metrics_jsonl, again.step)
            logger.warning(
                "%s: going back to step %d, and on after the batches of update %d (%d of %d times)",
                *(error, again.step, error.last, rewinds, run.max_rewinds),
            )
        return again

    def _finish(self, loop: Loop, store: CheckpointStore) -> dict[str, Any]:
        """Decodes and scores the test set with the best checkpoint, and writes `results.json`."""
        run, memory = self.run, loop.memory
        split = loop.clock.split()
        seconds, training = loop.clock.total(), max(split.get("data", 0.0) + split.get("step", 0.0), 1e-9)
        results: dict[str, Any] = {
            "steps": loop.step,
            "spent": spent_by(loop)._asdict(),
            "parameters": self.program.config.num_params(),
            "train_seconds": round(seconds, 2),
            "target_tokens_per_second": round(memory.get("target_tokens", 0.0) / max(seconds, 1e-9), 1),
            "model_flops_per_second": memory.get("model_flops", 0.0) / training,
            "goodput": describe_split(split),
        }
        hardware = hardware_of(jax.devices()[0].device_kind)
        if hardware:
            results["mfu"] = results["model_flops_per_second"] / (hardware.peak_flops * self.program.mesh.size)
        results |= {name: memory[name] for name in ("skipped_updates", "rewinds") if memory.get(name)}
        if run.evaluation.patience is not None:
            results["evaluations_without_gain"] = hooks.evaluations_without_gain(memory)
        if self.data.test:
            weights = placed_weights(self.program, store, "best", str(self.folder.path))
            results |= run_test(self.program, weights, self.data, show=is_primary())
        if is_primary():
            lines = read_metrics(self.folder.metrics_jsonl)
            preemptions = [line["preemption_seconds"] for line in lines if "preemption_seconds" in line]
            results |= {"preemption_seconds": preemptions} if preemptions else {}
            write_json(self.folder.results_json, results)
        return results


def _early_stop(run: Run) -> Iterator[hooks.EarlyStop]:
    config = run.evaluation
    if config.patience is not None:
        yield hooks.EarlyStop(config.metric, higher_is_better=config.higher_is_better, patience=config.patience)


def _is_over(run: Run, steps: int, evaluations_without_gain: int, spent: Spent) -> bool:
    patience = run.evaluation.patience
    return (
        steps >= run.steps
        or (patience is not None and evaluations_without_gain >= patience)
        or (run.budget is not None and run.budget.reached(spent) is not None)
    )
