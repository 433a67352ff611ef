"""From a `Run` to a finished run folder: data, state, loop, final test."""

from __future__ import annotations

import dataclasses
import errno
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from t5x_ext.checkpoints import CheckpointStore, Retention, RunFolder, trees
from t5x_ext.contracts import Batch, BatchSource, UserError
from t5x_ext.data import batch_iterator
from t5x_ext.parallel import global_batch, hardware_of, host_rows, is_primary, make_mesh, primary_first
from t5x_ext.storage.files import write_json
from t5x_ext.storage.locks import Lock
from t5x_ext.storage.remote import is_remote
from t5x_ext.train import hooks
from t5x_ext.train.budget import Spent, StopAtBudget, spent_by
from t5x_ext.train.compilation import compiling
from t5x_ext.train.goodput import Clock, describe_split
from t5x_ext.train.init_from import InitFrom
from t5x_ext.train.intervals import in_steps
from t5x_ext.train.log import JsonLines, Log, cut_log
from t5x_ext.train.loop import Hook, Loop, Session, train
from t5x_ext.train.preemption import StopOnSignal
from t5x_ext.train.profiling import Profile
from t5x_ext.train.program import check_rows, make_program
from t5x_ext.train.recovery import BadUpdates, Diverged, position_of, skipped_after
from t5x_ext.train.report import draw_learning_curve, read_metrics
from t5x_ext.train.restore import first_loop, placed_weights, read_frozen
from t5x_ext.train.run import Run
from t5x_ext.train.run_records import check_config, environment_changes, read_results, write_records
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
    """Trains a run, or resumes one that was interrupted, and tests it.

    With several processes all of them call it with the same arguments; process 0 writes the records.

    Args:
      run: what to train.
      run_dir: the run folder, which all processes see; made if there is none.
      config_text: the resolved configuration, one `name = value` a line; kept as a record, and compared on restart.
      cache_dir: where token caches are kept; None keeps them in the run folder.
      init_from: weights to start from instead of `run.init_from`.

    Returns:
      What is in `results.json`; nothing if the run was interrupted.

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
        hint = f"--init_from={run_dir} starts another --run_dir from its weights"
        print(f"{run_dir} is finished, with {done['steps']:,} updates; {hint}", file=sys.stderr)
        return done
    try:
        with _locked(folder):
            return _Execution(run, folder, config_text, cache_dir, init_from).result()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{error.filename or run_dir}: {error.strerror}; make room, then rerun the same command to resume"
        ) from error


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """Keeps other runs out of the folder; one that this call has made and left empty is removed again.

    Raises:
      UserError: if another process trains there, naming it.
    """
    if is_remote(folder.path) or not is_primary():
        yield
        return
    path = Path(folder.path)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with Lock.of_folder(path):
            yield
    finally:
        if is_new:
            with suppress(OSError):
                path.rmdir()


class _Execution:
    """One call of `execute`: the parts of a run that exist only once there are data and devices."""

    def __init__(
        self, run: Run, folder: RunFolder, config_text: str, cache_dir: str | None, init_from: InitFrom | None
    ):
        """Prepares data and program."""
        init_from = init_from or run.init_from
        self.run, self.folder, self.config_text, self.init_from = run, folder, config_text, init_from
        self.clock = Clock()
        with self.clock.section("start"):
            mesh = make_mesh(run.mesh)
            check_rows(run, mesh)
            task = run.task
            if init_from is not None and hasattr(task, "starting_from"):
                task = task.starting_from(RunFolder(init_from.run_dir))
            with primary_first("data"):
                self.prepared = task.prepare(folder, cache_dir, run.seed)
            self.frozen, self.references = read_frozen(run, folder)
            self.program = make_program(run, self.prepared.sizes, mesh, self.frozen)

    def result(self) -> dict[str, Any]:
        """Trains and tests."""
        run, folder = self.run, self.folder
        retention = Retention(
            keep_last=run.checkpoints.keep_last,
            keep_best=run.checkpoints.keep_best,
            metric=run.evaluation.metric,
            mode="max" if run.evaluation.higher_is_better else "min",
            keep=run.checkpoints.keep,
        )
        with CheckpointStore(folder.checkpoints, retention) as store:
            loop = self._first_loop(store, self.clock)
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
                    print(f"{stopped}; rerun the same command to resume", file=sys.stderr)
                return {}
            return self._finish(loop)

    def _first_loop(self, store: CheckpointStore, clock: Clock) -> Loop:
        return first_loop(
            self.program, self.prepared, self.folder, store, self.init_from, self.frozen, self.references, clock
        )

    def _open_folder(self, loop: Loop) -> None:
        """Writes the records, and takes back what a crash left in the log after the newest checkpoint."""
        changes = environment_changes(self.folder) if loop.step else []
        if changes:
            logger.warning(
                "resuming with %s: the same batches follow, results are equal to rounding", "; ".join(changes)
            )
        write_records(self.folder, self.prepared, self.config_text)
        since_line = loop.clock.earlier - sum(loop.memory.log.clock.values())
        lost = cut_log(self.folder.metrics_jsonl, loop.step) - since_line
        loop.clock.add({"lost": max(lost, 0.0)})

    def _train(self, loop: Loop, store: CheckpointStore) -> Loop:
        """Compiles the step and runs the loop, again from an earlier checkpoint where losses stay infinite."""
        folder = self.folder
        with compiling(loop.clock, "training step"):
            train_step = self.program.compile()
        with StopOnSignal() as stop, Profile(folder.path, looks=is_primary()) as profile:
            attempts = _Attempts(self, store, train_step, stop, profile)
            session = Session(self.program, self.prepared, store, loop)
            for hook in attempts.before_log:
                if hasattr(hook, "begin"):  # hooks of earlier versions have none
                    hook.begin(session)
            while True:
                try:
                    attempts.train(loop)
                    break
                except Diverged as error:
                    loop = self._rewound(error, loop, store)
                    attempts.save.save(loop)
            if loop.interrupted and stop.received_at is not None and is_primary():
                seconds = time.time() - stop.received_at
                logger.info("%s; update %d is on disk %.1f s later", loop.stop, loop.step, seconds)
                JsonLines(folder.metrics_jsonl).append({"step": loop.step, "preemption_seconds": round(seconds, 3)})
        if loop.stop is not None and not loop.interrupted:
            logger.info("stopped at step %d: %s", loop.step, loop.stop)
        return loop

    def _rewound(self, error: Diverged, loop: Loop, store: CheckpointStore) -> Loop:
        """The loop at the newest checkpoint from before a bad range of updates, the data up to its end skipped.

        Raises:
          UserError: if the run was rewound too often.
        """
        run, folder = self.run, self.folder
        rewinds = loop.memory.rewinds + 1
        if rewinds > run.max_rewinds:
            raise UserError(
                f"{error}, after going back {run.max_rewinds} times; their examples are in "
                f"{folder.skipped_examples_jsonl}; lower the learning rate, clip gradients, or clean the data"
            )
        del loop.state, loop.in_flight  # there need not be room for two
        store.wait()  # for the checkpoint that may be under way
        # Skipped updates change no weights: if nothing older was kept, a checkpoint of the bad range will do.
        good = [step for step in store.steps() if step < error.first]
        store.discard_after(max(good, default=min(store.steps(), default=0)))
        again = self._first_loop(store, Clock(loop.clock.now))
        batches = self.prepared.batches.skipping(loop.skipped)
        again.skipped = skipped_after(batches, loop.skipped, again.batches_consumed, position_of(loop, error.last))
        again.memory = dataclasses.replace(
            again.memory, rewinds=rewinds, skipped_updates=loop.memory.skipped_updates, skipped_in_row=0
        )
        again.clock.add({"lost": loop.clock.total() - again.clock.earlier})
        if is_primary():
            cut_log(folder.metrics_jsonl, again.step)
            logger.warning(
                "%s: going back to step %d, and on after the batches of update %d (%d of %d times)",
                *(error, again.step, error.last, rewinds, run.max_rewinds),
            )
        return again

    def _finish(self, loop: Loop) -> dict[str, Any]:
        """Tests the best checkpoint, and writes `results.json`."""
        run, memory = self.run, loop.memory
        split = loop.clock.split()
        seconds, training = loop.clock.total(), max(split.get("data", 0.0) + split.get("step", 0.0), 1e-9)
        sizes = {name: leaf.size for name, leaf in trees.flatten(self.program.params).items()}
        results: dict[str, Any] = {
            "steps": loop.step,
            "spent": spent_by(loop)._asdict(),
            "parameters": sum(sizes.values()),
            "train_seconds": round(seconds, 2),
            "target_tokens_per_second": round(memory.target_tokens / max(seconds, 1e-9), 1),
            "model_flops_per_second": memory.model_flops / training,
            "goodput": describe_split(split),
        }
        if run.trainable:
            results["trained_parameters"] = sum(size for name, size in sizes.items() if self.program.is_trainable(name))
        hardware = hardware_of(jax.devices()[0].device_kind)
        if hardware:
            results["mfu"] = results["model_flops_per_second"] / (hardware.peak_flops * self.program.mesh.size)
        counts = {"skipped_updates": memory.skipped_updates, "rewinds": memory.rewinds}
        results |= {name: count for name, count in counts.items() if count}
        if run.evaluation.patience is not None:
            results["evaluations_without_gain"] = hooks.evaluations_without_gain(memory)
        if self.prepared.has_test:
            results |= self.prepared.test(self.program, placed_weights(self.program, self.folder, "best"))
        if is_primary():
            lines = read_metrics(self.folder.metrics_jsonl)
            preemptions = [line["preemption_seconds"] for line in lines if "preemption_seconds" in line]
            results |= {"preemption_seconds": preemptions} if preemptions else {}
            write_json(self.folder.results_json, results)
        return results


class _Attempts:
    """The loop with its hooks, which is run again after a rewind."""

    def __init__(
        self, execution: _Execution, store: CheckpointStore, train_step: TrainStep, stop: StopOnSignal, profile: Profile
    ):
        run, prepared = execution.run, execution.prepared
        program = execution.program._replace(check_interrupt=stop.check)
        self._run, self._folder, self._program, self._train_step = run, execution.folder, program, train_step
        self._batches = prepared.batches
        evaluation, checkpoints = run.evaluation, run.checkpoints
        evaluators = [*prepared.evaluators(program), *run.evaluators]
        intervals = [evaluation.every if one.every is None else one.every for one in evaluators]
        evaluate = hooks.Evaluate(
            [(one, in_steps(every, prepared.batches)) for one, every in zip(evaluators, intervals)],
            steps=run.steps,
            whole=program.whole,
            show=is_primary(),
        )
        # What ends a run comes before its last evaluation.
        budget = [StopAtBudget(run.budget)] if run.budget else []
        self.before_log: list[Hook] = [stop, profile, *budget, evaluate, *run.hooks]
        if evaluation.patience is not None:
            early_stop = hooks.EarlyStop(
                evaluation.metric,
                higher_is_better=evaluation.higher_is_better,
                patience=evaluation.patience,
                select_from=evaluation.select_from,
            )
            self.before_log.append(early_stop)
        self.save = hooks.Save(
            store,
            every=in_steps(checkpoints.every, prepared.batches),
            data=prepared.batches.description,
            metric=evaluation.metric,
            data_memory=prepared.batches.memory,
            evaluate=evaluate,
            select_from=evaluation.select_from,
        )

    def train(self, loop: Loop) -> None:
        """Runs the loop to its end.

        Raises:
          Diverged: if too many updates in a row were skipped.
        """
        run, folder, mesh = self._run, self._folder, self._program.mesh
        batches = self._batches.skipping(loop.skipped)
        path = folder.skipped_examples_jsonl if is_primary() else None
        bad = BadUpdates(path, batches.unskipped, batches.examples, run.max_skipped_updates)
        hardware = hardware_of(jax.devices()[0].device_kind)
        log = Log(
            folder.metrics_jsonl if is_primary() else None,
            folder.tensorboard if is_primary() and run.tensorboard and not is_remote(folder.path) else None,
            every=run.log_every,
            steps=run.steps,
            start=loop.step,
            batch_flops=batches.work,
            peak_flops=hardware.peak_flops * mesh.size if hardware else None,
        )
        chain = [*self.before_log, log, self.save]
        loop.observers = (bad.observe, log.observe)
        with closing(log):
            if hooks.is_owed(loop):
                for hook in chain:
                    hook.after_step(loop)
            train(loop, self._train_step, self._device_batches(batches, loop), steps=run.steps, hooks=chain)

    def _device_batches(self, batches: BatchSource, loop: Loop) -> Iterator[Batch]:
        """Global batches from the loop's position on; this host reads its own rows only."""
        mesh, specs = self._program.mesh, self._program.definition.batch
        sharded = {name for name, spec in specs.items() if spec.sharded}
        rows = host_rows(mesh, batches.rows) if sharded else (0, batches.rows)
        host_batches = batch_iterator(batches, loop.batches_consumed, *rows)
        while True:
            try:
                batch = next(host_batches)
            except Exception:
                # The weights are good. Several processes cannot save them: the others wait for this one's rows.
                if jax.process_count() == 1 and loop.in_flight is not None:
                    loop.settle()
                    self.save.at_end(loop)
                raise
            yield global_batch(mesh, batch, sharded)


def _is_over(run: Run, steps: int, evaluations_without_gain: int, spent: Spent) -> bool:
    patience = run.evaluation.patience
    return (
        steps >= run.steps
        or (patience is not None and evaluations_without_gain >= patience)
        or (run.budget is not None and run.budget.reached(spent) is not None)
    )
