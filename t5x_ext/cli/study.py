"""Runs a study: every arm with every seed, then a table, pictures and a report; rerun the same command to resume.

Each run is a process of its own, with low priority. Runs that have finished are skipped, those that were interrupted
resume, those that failed are tried again. A run that fails does not stop the others: its error is in the report, and
the exit code is 2.

example: t5x_ext study --gin_file=studies/optim_multi30k.gin --output_dir=out --gin.DATA_DIR=data/multi30k
example: t5x_ext study --gin_file=studies/optim_multi30k.gin --output_dir=out --arms=adam,sam --seeds=0 --processes=2
example: t5x_ext study --gin_file=studies/optim_multi30k.gin --output_dir=try --steps=2
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from t5x_ext.cli import pipeline, train
from t5x_ext.cli.compile_cache import define_compile_cache_flag, keep_compiled_programs
from t5x_ext.cli.files import check_folder, check_writable, report
from t5x_ext.cli.flags import parse, require
from t5x_ext.cli.messages import UsageError
from t5x_ext.cli.run_flags import run_from_flags

if TYPE_CHECKING:
    from t5x_ext.study import Configured, Study


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext study`."""
    flags.DEFINE_string("output_dir", None, "folder for everything the study makes; required", flag_values=values)
    flags.DEFINE_multi_string("gin_file", [], "the study; required", flag_values=values)
    flags.DEFINE_multi_string(
        "gin", [], "one binding over those of the files, as --gin.Study.seeds=[0]", flag_values=values
    )
    flags.DEFINE_list("arms", [], "make the runs of these arms only, separated by commas", flag_values=values)
    flags.DEFINE_list("seeds", [], "make the runs of these seeds only, separated by commas", flag_values=values)
    flags.DEFINE_integer(
        "steps", None, "updates of every run, in place of the study's budget: for a trial", lower_bound=1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "processes", 1, "runs at a time; each gets its share of the cores", lower_bound=1, flag_values=values
    )
    flags.DEFINE_boolean("dry_run", False, "show the state of each run and its command; do nothing", flag_values=values)
    flags.DEFINE_string(
        "measure", None, "measure this run of a finished study again, as arms/adam/seed_0, and do nothing else",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("json_out", None, "file for the table as JSON; - is standard output", flag_values=values)
    define_compile_cache_flag(values)


def main(values: flags.FlagValues) -> int:
    """Runs `t5x_ext study`; 2 where a run has failed, 130 when a signal ended it early."""
    require(values, "output_dir", "gin_file")
    check_writable(values.json_out, "--json_out")
    if "://" in values.output_dir:
        raise UsageError(f"--output_dir={values.output_dir}: give a local path")
    check_folder(values.output_dir, "--output_dir")
    seeds = [_seed(text) for text in values.seeds]
    study, configure = study_from_flags(values), make_configure()
    if values.measure:
        from t5x_ext.study import measure

        keep_compiled_programs(values)
        measure(study, values.output_dir, configure, values.measure)
        return 0
    # Runs need the devices; this process computes nothing.
    import jax

    jax.config.update("jax_platforms", "cpu")

    from t5x_ext.study import Options, check, execute, select, status

    if values.dry_run:
        jobs = check(study, values.output_dir, configure, select(study, values.arms, seeds))
        found = [(status(job, values.output_dir, configure), job.command) for job in jobs]
        rows = [{"state": state, "command": command} for state, command in found]
        report("\n".join(f"{state:<11}{command}" for state, command in found), rows, values.json_out)
        return 0
    options = Options(values.processes, measure=("study", *_flags_of(values)))
    ended = execute(study, values.output_dir, configure, arms=values.arms, seeds=seeds, options=options)
    if ended.results is None:
        return ended.code
    folder = Path(values.output_dir)
    text = (folder / "table.md").read_text(encoding="utf-8")
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    report(f"{text}\nreport   {folder / 'report.html'}\nvalues   {folder / 'table.json'}", table, values.json_out)
    return ended.code


def study_from_flags(values: flags.FlagValues) -> Study:
    """The study that the flags describe.

    Raises:
      UserError: for a mistake in gin or in a value.
    """
    from dataclasses import replace

    from t5x_ext.cli.gin_config import build_run
    from t5x_ext.study import Budget, Study

    study, _ = build_run(values.gin_file, values.gin, root=Study)
    if values.steps is None:
        return study
    budget = Budget(steps=values.steps)
    tuning = replace(study.tuning, budget=budget) if study.tuning else None
    return replace(study, budget=budget, tuning=tuning)


def make_configure() -> Callable[[Sequence[str]], Configured]:
    """What builds the run of a command from its arguments, as the command itself does; each once."""
    from t5x_ext.contracts import UserError
    from t5x_ext.study import Configured

    @cache
    def build(arguments: tuple[str, ...]) -> Configured:
        verb, *rest = arguments
        try:
            if verb == "train":
                run, text = run_from_flags(parse(train.define_flags, rest))
                return Configured(text, run)
            stages, texts = pipeline.pipeline_from_flags(parse(pipeline.define_flags, rest))
            return Configured("\n".join(texts.values()), stages)
        except UsageError as error:
            raise UserError(str(error)) from error

    return lambda arguments: build(tuple(arguments))


def _flags_of(values: flags.FlagValues) -> Iterator[str]:
    """The flags that describe the study, for the processes that measure its runs."""
    yield f"--output_dir={values.output_dir}"
    yield from (f"--gin_file={name}" for name in values.gin_file)
    yield from (f"--gin={binding}" for binding in values.gin)
    if values.steps is not None:
        yield f"--steps={values.steps}"


def _seed(text: str) -> int:
    if not text.strip().isdecimal():
        raise UsageError(f"--seeds: '{text}' is not a number from 0 on")
    return int(text)
