"""Flags that say who does the work on text: processes of this machine, or a runner of Apache Beam."""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from t5x_ext.cli.messages import UsageError

if TYPE_CHECKING:
    from t5x_ext.corpora import BeamRunner


def define_runner_flags(values: flags.FlagValues, work: str) -> None:
    """Declares the flags that `runner_from_flags` reads, and --num_processes; `work` is what is done, as "tokenize"."""
    flags.DEFINE_integer(
        "num_processes", None, "worker processes; by default by size", lower_bound=1, flag_values=values
    )
    flags.DEFINE_enum(
        "runner", None, ["DirectRunner", "FlinkRunner", "SparkRunner", "DataflowRunner"],
        f"{work} on Apache Beam (extra beam) instead of with worker processes", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_string(
        "runner_option", [], "a pipeline option of Beam, as --runner_option=--direct_num_workers=4", flag_values=values
    )


def check_runner_flags(values: flags.FlagValues) -> None:
    """Raises UsageError for flags that do not go together; loads nothing."""
    if values.runner_option and values.runner is None:
        raise UsageError("--runner_option goes with --runner, which is not given")
    if values.runner is not None and values.num_processes is not None:
        raise UsageError("--num_processes is for work without --runner; give the runner its own options")


def runner_from_flags(values: flags.FlagValues) -> BeamRunner | None:
    """The runner that the flags name; None for worker processes."""
    from t5x_ext.corpora import BeamRunner

    return BeamRunner(values.runner, tuple(values.runner_option)) if values.runner is not None else None
