"""From a `Study` to finished runs, what was measured of them, and a report; killed anywhere, it resumes.

A study's folder:

    OUT/arms/ARM/seed_N/                 the run, a run folder (or a pipeline's); what is beside it: see `jobs.Job`
    OUT/tuning/ARM/choice_K/seed_N/      runs that chose settings
    OUT/cache/                           token caches that runs share
    OUT/table.json, table.md             all values, means, standard errors and tests
    OUT/figures/NAME.png                 pictures
    OUT/report.html                      all of it in one page that needs no other file
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5x_ext.contracts import UserError
from t5x_ext.study.jobs import CACHE, Job, Selection, path_of, reported_jobs, select, tuning_jobs
from t5x_ext.study.measurements import MeasuredRun, Measurement, Recorded
from t5x_ext.study.processes import INTERRUPTED, Outcome, Process, run_all
from t5x_ext.study.records import Measured, Record, read_measured, read_record, write_measured, write_record
from t5x_ext.study.report import write_report
from t5x_ext.study.study import Arm, Study
from t5x_ext.study.table import Choice, Results, RunResult

logger = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "t5x_ext")


class Configured(NamedTuple):
    """What the arguments of a command come to."""

    text: str  # resolved configuration; runs that were made from another one are made again
    config: Any  # the `train.Run` or `pipeline.Pipeline`


Configure = Callable[[Sequence[str]], Configured]
"""Builds what a command would run, without running it; raises UserError for what the command would refuse at once."""


class Ended(NamedTuple):
    """How a call of `execute` has ended."""

    code: int  # 0: every run has what the study asks for; 2: one has not; 130: a signal has stopped it
    results: Results | None  # None after a signal


@dataclass(frozen=True)
class Options:
    """How runs are made, which decides nothing about what they find.

    Attributes:
      processes: runs at a time.
      program: what the arguments of a command are given to.
      measure: the arguments of a command that measures one run, whose path follows as `--measure=PATH`; it must call
        `measure` of this module. Empty: runs are measured in this process.
    """

    processes: int = 1
    program: tuple[str, ...] = PROGRAM
    measure: tuple[str, ...] = ()


def execute(
    study: Study,
    output_dir: str,
    configure: Configure,
    *,
    arms: Collection[str] = (),
    seeds: Collection[int] = (),
    options: Options | None = None,
) -> Ended:
    """Runs what has not run yet, measures it, and writes table, pictures and report.

    Args:
      study: what to run.
      output_dir: its folder; made if it is missing.
      configure: how arguments are understood.
      arms: names of the arms to run now; empty: all. The report has all that have run.
      seeds: likewise.
      options: how.

    Raises:
      UserError: before anything runs, for arms and seeds that the study does not have, and for settings that a run
        would refuse.
    """
    selection = select(study, arms, seeds)
    check(study, output_dir, configure)
    work = _Work(study, output_dir, configure, options or Options())
    if work.run(job for _, _, job in tuning_jobs(study, output_dir, selection)):
        return Ended(INTERRUPTED, None)
    choices = work.choices()
    chosen = {name: choice.settings for name, choice in choices.items()}
    if work.run(reported_jobs(study, output_dir, selection, chosen)):
        return Ended(INTERRUPTED, None)
    jobs = list(reported_jobs(study, output_dir, select(study), chosen))
    selected = {path_of(study.arm(arm), seed) for arm in selection.arms for seed in selection.seeds}
    if work.measure(job for job in jobs if job.path in selected):
        return Ended(INTERRUPTED, None)
    results = work.results(jobs, choices)
    write_report(results, Path(output_dir))
    return Ended(2 if results.errors(selection) else 0, results)


def check(study: Study, output_dir: str, configure: Configure, selection: Selection | None = None) -> list[Job]:
    """Builds the runs of every arm and choice; those for which nothing is chosen yet with the first choice.

    Args:
      study: the study.
      output_dir: its folder.
      configure: how arguments are understood.
      selection: of its runs; None: all.

    Returns:
      The runs in the order in which they are made.

    Raises:
      UserError: for the first that cannot be built, naming its arm.
    """
    selection = selection or select(study)
    found = _Work(study, output_dir, configure, Options()).choices()
    settings = {name: choice.settings or choice.tried[0][0] for name, choice in found.items()}
    jobs = [job for _, _, job in tuning_jobs(study, output_dir, selection)]
    jobs += reported_jobs(study, output_dir, selection, settings)
    # Seeds are numbers that every run takes: one of each arm and choice is enough.
    for job in {job.path.rpartition("/")[0]: job for job in jobs}.values():
        try:
            configure(job.arguments)
        except UserError as error:
            raise UserError(f"arm {job.arm!r}: {error}") from error
    return jobs


def status(job: Job, output_dir: str, configure: Configure) -> str:
    """The state of a run: `finished`, or one in which it is to be run: `new`, `failed`, `unfinished`, `changed`."""
    record = read_record(Path(output_dir), job.path)
    if record is None:
        return "new"
    if record.state != "finished":
        return record.state
    is_same = record.configuration == configure(job.arguments).text and Path(output_dir, job.path).is_dir()
    return "finished" if is_same else "changed"


def measure(study: Study, output_dir: str, configure: Configure, path: str) -> None:
    """Measures the run of that path for all arms that share it, and keeps what it found.

    Raises:
      UserError: if the study has no such run, or it cannot be measured.
    """
    chosen = _Work(study, output_dir, configure, Options()).choices()
    jobs = reported_jobs(study, output_dir, select(study), {name: choice.settings for name, choice in chosen.items()})
    job = next((job for job in jobs if job.path == path), None)
    if job is None:
        raise UserError(f"--measure={path}: the study has no such run")
    config = configure(job.arguments).config
    found: dict[str, Measured] = {}
    for arm in study.arms:
        if path_of(arm, job.seed) == path:
            run = MeasuredRun(Path(output_dir, path), arm, job.seed, config, f"{output_dir}/{CACHE}")
            found[arm.name] = _measured(_computed(study), run)
    write_measured(Path(output_dir), path, _key(study), found)


def _computed(study: Study) -> list[Measurement]:
    """Measurements that are more than reading a value."""
    return [one for one in study.measurements if not isinstance(one, str | Recorded)]


def _recorded(study: Study) -> list[Recorded]:
    named = (Recorded(one) if isinstance(one, str) else one for one in study.measurements)
    return [one for one in named if isinstance(one, Recorded)]


def _key(study: Study) -> str:
    """What the kept measurements are of, so that others are made when a study asks for others."""
    describe = lambda one: getattr(one, "__qualname__", repr(one))
    return repr([describe(one) for one in _computed(study)])


def _measured(measurements: Iterable[Measurement], run: MeasuredRun) -> Measured:
    values: dict[str, float] = {}
    lines: dict[str, np.ndarray] = {}
    for measurement in measurements:
        values |= measurement(run)
        if hasattr(measurement, "lines"):
            lines |= measurement.lines(run)
    return Measured(values, lines)


class _Work:
    """One call of `execute`: the study with its folder, and how to run things."""

    def __init__(self, study: Study, output_dir: str, configure: Configure, options: Options):
        self.study, self.output_dir, self.configure, self.options = study, output_dir, configure, options
        self.folder = Path(output_dir)

    def run(self, jobs: Iterable[Job]) -> bool:
        """Makes the runs that are not finished; True if a signal has stopped them."""
        todo: dict[Process, tuple[Job, str]] = {}
        for job in jobs:
            if status(job, self.output_dir, self.configure) != "finished":
                process = Process(_name(job), (*self.options.program, *job.arguments), self._beside(job, "log"))
                todo[process] = job, self.configure(job.arguments).text

        def ended(process: Process, outcome: Outcome) -> None:
            job, text = todo[process]
            state = "finished" if outcome.code == 0 else "unfinished" if outcome.interrupted else "failed"
            before = read_record(self.folder, job.path)
            seconds = outcome.seconds + (before.seconds if before else 0.0)
            write_record(self.folder, job.path, Record(state, outcome.error, round(seconds, 1), job.command, text))
            _say(process, outcome)

        return run_all(list(todo), self.options.processes, ended)

    def measure(self, jobs: Iterable[Job]) -> bool:
        """Measures the finished runs of which it has not been done; True if a signal has stopped it."""
        if not _computed(self.study):
            return False
        todo: dict[Process, Job] = {}
        for job in jobs:
            record = read_record(self.folder, job.path)
            kept = read_measured(self.folder, job.path, _key(self.study))
            if record is None or record.state != "finished" or (kept is not None and not kept.error):
                continue
            if self.options.measure:
                command = (*self.options.program, *self.options.measure, f"--measure={job.path}")
                todo[Process(f"{_name(job)}, measuring", command, self._beside(job, "log"))] = job
            else:
                with suppress(UserError):
                    self._measure_here(job)

        def ended(process: Process, outcome: Outcome) -> None:
            if outcome.code not in (0, INTERRUPTED):
                write_measured(self.folder, todo[process].path, _key(self.study), {}, outcome.error)
            _say(process, outcome)

        return run_all(list(todo), self.options.processes, ended)

    def _measure_here(self, job: Job) -> None:
        try:
            measure(self.study, self.output_dir, self.configure, job.path)
        except UserError as error:
            write_measured(self.folder, job.path, _key(self.study), {}, str(error))
            logger.error("%s, measuring: %s", _name(job), error)

    def choices(self) -> dict[str, Choice]:
        """What tuning has found, by the name of the arm that is tuned."""
        tuning = self.study.tuning
        values: dict[str, list[float]] = {}
        new: set[str] = set()
        for arm, _, job in tuning_jobs(self.study, self.output_dir, select(self.study)):
            values.setdefault(arm.name, []).append(self._tuning_value(arm, job))
            if read_record(self.folder, job.path) is None:
                new.add(arm.name)
        found = {}
        for name, measured in values.items():
            assert tuning is not None
            means = np.reshape(measured, (-1, len(tuning.seeds))).mean(axis=1)
            tried = tuple(zip(self.study.arm(name).choices, map(float, means)))
            found[name] = Choice(tried, tuning.higher_is_better, has_run=name not in new)
        return found

    def _tuning_value(self, arm: Arm, job: Job) -> float:
        """NaN of a run that failed or has not run."""
        assert self.study.tuning is not None
        record = read_record(self.folder, job.path)
        if record is None or record.state != "finished":
            return math.nan
        name = self.study.tuning.measurement
        with suppress(UserError):
            return Recorded(name)(MeasuredRun(self.folder / job.path, arm, job.seed, None, ""))[name]
        return math.nan

    def results(self, jobs: Sequence[Job], choices: Mapping[str, Choice]) -> Results:
        """All that is known of all runs."""
        by_path = {job.path: job for job in jobs}
        runs: dict[str, dict[int, RunResult]] = {}
        for arm in self.study.arms:
            own = runs[arm.name] = {}
            for seed in self.study.seeds:
                path = path_of(arm, seed)
                job = by_path.get(path)
                own[seed] = self._result(arm, job) if job else self._without_choice(arm, path, choices)
        return Results(self.study, runs, choices)

    def _without_choice(self, arm: Arm, path: str, choices: Mapping[str, Choice]) -> RunResult:
        """An arm whose settings are not chosen has no runs."""
        chooser = self.study.chooser_of(arm)
        if chooser is None or not choices[chooser.name].has_run:
            return RunResult(path, "new")
        return RunResult(path, "failed", f"none of the choices of {chooser.name} could be trained")

    def _result(self, arm: Arm, job: Job) -> RunResult:
        record = read_record(self.folder, job.path)
        if record is None:
            return RunResult(job.path, "new", command=job.command)
        state = status(job, self.output_dir, self.configure)
        error = "made with other settings; run it again" if state == "changed" else record.error
        result = RunResult(job.path, state, error, record.command, record.seconds)
        if state != "finished":
            return result
        kept = read_measured(self.folder, job.path, _key(self.study)) if _computed(self.study) else None
        values: dict[str, float] = {}
        error = kept.error if kept else ""
        run = MeasuredRun(self.folder / job.path, arm, job.seed, None, "")
        for recorded in _recorded(self.study):
            try:
                values |= recorded(run)
            except UserError as problem:
                error = error or str(problem)
        own = kept.by_arm.get(arm.name, Measured({}, {})) if kept else Measured({}, {})
        return result._replace(error=error, values={**values, **own.values}, lines=own.lines)

    def _beside(self, job: Job, ending: str) -> Path:
        return self.folder / f"{job.path}.{ending}"


def _name(job: Job) -> str:
    return job.path.replace("/seed_", ", seed ").removeprefix("arms/")


def _say(process: Process, outcome: Outcome) -> None:
    if outcome.code == 0:
        logger.info("%s: finished in %.0f s", process.name, outcome.seconds)
    else:
        logger.error("%s: %s", process.name, outcome.error)
