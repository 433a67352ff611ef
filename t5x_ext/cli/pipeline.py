"""Runs a pipeline of stages, from raw text to scores; rerun the same command to resume an interrupted one.

Finished stages are not run again. A stage whose configuration or inputs have changed is refused with the difference,
unless --stages names it: then it is rebuilt. --audit computes every digest of a finished pipeline again, from its
scores back to the texts it began with, and ends with exit code 1 if something does not match.

Processes of one command (--distributed, as for t5x_ext train) share training, decoding and scoring; process 0 does the
rest. All of them see the folder under the same path. It cannot be a bucket; a mounted bucket works if a new file is
visible to all processes at once and renaming is atomic.

example: t5x_ext pipeline --gin_file=runs/vega_mt_tiny.gin --output_dir=out
example: srun t5x_ext pipeline --gin_file=runs/vega_mt_tiny.gin --output_dir=/shared/out --distributed=slurm
example: t5x_ext pipeline --gin_file=runs/vega_mt_tiny.gin --output_dir=out --stages=finetune,test,scores
example: t5x_ext pipeline --output_dir=out --audit
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from t5x_ext.cli.compile_cache import define_compile_cache_flag, keep_compiled_programs
from t5x_ext.cli.distributed_flags import define_distributed_flags, join_processes
from t5x_ext.cli.environment import define_deterministic_flag, restore_environment
from t5x_ext.cli.files import check_folder, check_writable, report
from t5x_ext.cli.flags import require
from t5x_ext.cli.languages import known_language
from t5x_ext.cli.messages import UsageError
from t5x_ext.storage.remote import is_remote

if TYPE_CHECKING:
    from t5x_ext.pipeline import Artefact, Pipeline, StageAudit, Status


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext pipeline`."""
    flags.DEFINE_string("output_dir", None, "folder for all that the stages make; required", flag_values=values)
    flags.DEFINE_multi_string("gin_file", [], "the pipeline; required unless --audit is given", flag_values=values)
    flags.DEFINE_multi_string(
        "gin", [], "one binding that overrides those of the files, as --gin.Train.provenance=True", flag_values=values
    )
    flags.DEFINE_list(
        "stages", [], "run only these, separated by commas, and rebuild them if they have changed",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean("dry_run", False, "print the state of each stage, and do nothing", flag_values=values)
    flags.DEFINE_boolean("audit", False, "check every file against its recorded digest", flag_values=values)
    flags.DEFINE_string("json_out", None, "file for the findings as JSON; - is standard output", flag_values=values)
    define_deterministic_flag(values)
    define_compile_cache_flag(values)
    define_distributed_flags(values)


def main(values: flags.FlagValues) -> int:
    """Runs `t5x_ext pipeline`; 1 if an audit finds something, 130 if a signal ended it early."""
    require(values, "output_dir")
    check_writable(values.json_out, "--json_out")
    if is_remote(values.output_dir):
        raise UsageError(f"--output_dir={values.output_dir}: give a local path")
    if values.distributed != "none" and (values.audit or values.dry_run):
        raise UsageError("--audit and --dry_run are for one process: remove --distributed")
    check_folder(values.output_dir, "--output_dir")
    if values.audit:
        if values.stages or values.dry_run:
            raise UsageError("--audit goes with neither --stages nor --dry_run: it reads what is there")
        return _audit(values)
    require(values, "gin_file")
    # Before anything touches a device.
    restore_environment(values.output_dir, values.deterministic)
    primary = join_processes(values)
    keep_compiled_programs(values)

    from t5x_ext.parallel import barrier, failing_together

    with failing_together():
        pipeline, texts = pipeline_from_flags(values)

    from t5x_ext.pipeline import Interrupted, execute, statuses

    if values.dry_run:
        found = statuses(pipeline, values.output_dir, texts)
        report(_plan(pipeline, found), [status._asdict() for status in found], values.json_out)
        return 0
    try:
        artefacts = execute(pipeline, values.output_dir, configurations=texts, only=values.stages)
    except Interrupted as error:
        print(f"{error} was interrupted; rerun the same command to resume", file=sys.stderr)
        return 130
    if primary:
        summary = {name: artefact.to_json() for name, artefact in artefacts.items()}
        report(_summary(values.output_dir, artefacts), summary, values.json_out)
    barrier("end")  # the first to leave would wait for the last for seconds only
    return 0


def pipeline_from_flags(values: flags.FlagValues) -> tuple[Pipeline, dict[str, str]]:
    """The pipeline that the flags describe, and the resolved gin text of each stage.

    Raises:
      UserError: for a mistake in gin or in a value.
      UsageError: for an unknown language.
    """
    from t5x_ext.cli.gin_config import build_parts
    from t5x_ext.pipeline import Pipeline

    pipeline, parts = build_parts("stages", values.gin_file, values.gin, root=Pipeline)
    for stage in pipeline.stages:
        for corpus in stage.sources():
            for language in corpus.languages:
                known_language(language)
    return pipeline, {stage.name: text for stage, text in zip(pipeline.stages, parts)}


def _plan(pipeline: Pipeline, found: list[Status]) -> str:
    from t5x_ext.evaluate.table import align_rows

    rows = [
        [stage.name, type(stage).__name__, status.state, ", ".join(stage.inputs()) or "-", status.difference]
        for stage, status in zip(pipeline.stages, found)
    ]
    return "\n".join(align_rows(["stage", "kind", "state", "reads", "what has changed"], rows))


def _summary(output_dir: str, artefacts: dict[str, Artefact]) -> str:
    """What is printed at the end: a line for each stage, and the tables of scores."""
    lines = []
    for name, artefact in artefacts.items():
        lines.append(f"{name:<16} {artefact.kind:<8} {_counts(artefact)}".rstrip())
    for name, artefact in artefacts.items():
        table = Path(output_dir, name, "scores.txt")
        if artefact.kind == "scores" and table.exists():
            lines += ["", f"{name}:", table.read_text(encoding="utf-8").rstrip()]
    manifest = os.path.join(output_dir, "manifest.json")
    return "\n".join([*lines, "", f"what was made from what  {manifest}"])


def _counts(artefact: Artefact) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in artefact.counts.items() if isinstance(value, int))


def _audit(values: flags.FlagValues) -> int:
    from t5x_ext.pipeline import audit

    found = audit(values.output_dir)
    report(
        "\n".join(line for stage in found for line in _finding(stage)), [vars(one) for one in found], values.json_out
    )
    return int(any(stage.problems for stage in found))


def _finding(stage: StageAudit) -> list[str]:
    made_from: list[Any] = [*stage.inputs, *(f"text {name}" for name in stage.sources)]
    state = "does not match" if stage.problems else "as recorded"
    head = f"{stage.stage} ({stage.kind}): {stage.checked} digests, {state}; from {', '.join(made_from) or 'nothing'}"
    return [head, *(f"  {problem}" for problem in stage.problems)]
