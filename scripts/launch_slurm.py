#!/usr/bin/env python3
"""Trains on GPU nodes of a Slurm cluster: writes a batch script and, with --submit, submits it.

  scripts/launch_slurm.py --nodes=2 --gpus_per_node=8 --time=24:00:00 --partition=gpu \
      --gin_file=runs/vega_mt_4b7_h100.gin --run_dir=/shared/runs/vega --submit

One task a GPU, as JAX expects under Slurm. Before the time limit, and where a job of higher priority takes the nodes,
the run saves and ends with exit code 130; the job then queues again and goes on from the checkpoint. The package must
be installed where the job finds it (--setup); the run folder must be in a bucket or on a file system that all share.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path, PurePosixPath

from absl import flags
from launch_common import Training, define_flags, launch, run_script, training

from t5x_ext.cli.flags import require
from t5x_ext.cli.messages import UsageError
from t5x_ext.storage.remote import is_remote

_TIME = re.compile(r"\d+(:\d{2}){0,2}|\d+-\d{1,2}(:\d{2}){0,2}")
_OF_ONE_NODE = ("/tmp", "/var/tmp", "/dev/shm")

_SCRIPT = """\
#!/usr/bin/env bash
{options}
set -euo pipefail
{setup}
# The first node of the job tells all others where they are; the number of the job keeps two jobs of a node apart.
coordinator=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((61440 + SLURM_JOB_ID % 4096))

# --wait: where a task has died, the others wait for it in vain; told to stop, all end, but not at the same moment.
status=0
srun --kill-on-bad-exit=0 --wait={wait} {command} \\
  --distributed=slurm --coordinator_address="$coordinator:$port" || status=$?

# 130: saved after a signal, here the one before the time limit. scancel ends this script as well.
if [ "$status" -eq 130 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def define(values: flags.FlagValues) -> None:
    """Declares this launcher's flags."""
    define_flags(values, cache_dir=None)
    flags.DEFINE_integer("nodes", 1, "nodes", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("gpus_per_node", 8, "GPUs, and so tasks, of a node", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("cpus_per_task", None, "CPU cores of a task; by default the cluster's rule", lower_bound=1,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_string("time", None, "time limit of one stretch, as 24:00:00 or 2-00:00:00; required",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_string("partition", None, "Slurm partition; by default the cluster's", flag_values=values)
    flags.DEFINE_string("account", None, "Slurm account; by default yours", flag_values=values)
    flags.DEFINE_multi_string("sbatch_option", [], "another option, as --sbatch_option=--constraint=h100",
                              flag_values=values)  # fmt: skip
    flags.DEFINE_string("setup", None, "shell line before training, as '. /shared/env/bin/activate'",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_integer("save_seconds", 120, "seconds before the time limit at which the run is told to save",
                         lower_bound=1, flag_values=values)  # fmt: skip
    flags.DEFINE_string("out", None, "the script; by default NAME.sbatch", flag_values=values)
    flags.DEFINE_boolean("submit", False, "also submit it", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Writes the script, or prints it."""
    require(values, "time")
    if not _TIME.fullmatch(values.time):
        raise UsageError(f"--time={values.time}: give minutes, HH:MM:SS or D-HH:MM:SS")
    for option in values.sbatch_option:
        if not option.startswith("--") or not option.isprintable():
            raise UsageError(f"--sbatch_option={option}: give one option of sbatch, as --constraint=h100")
    run = training(values, values.nodes * values.gpus_per_node)
    _check_run_dir(values)
    script = batch_script(values, run)
    out = Path(values.out or f"{values.name}.sbatch")
    return launch(out, script, ["sbatch", str(out)] if values.submit else None, dry_run=values.dry_run)


def batch_script(values: flags.FlagValues, run: Training) -> str:
    """The script for sbatch."""
    options = [
        f"--job-name={values.name}",
        f"--nodes={values.nodes}",
        f"--ntasks-per-node={values.gpus_per_node}",
        f"--gpus-per-node={values.gpus_per_node}",
        *([f"--cpus-per-task={values.cpus_per_task}"] if values.cpus_per_task else []),
        f"--time={values.time}",
        *([f"--partition={values.partition}"] if values.partition else []),
        *([f"--account={values.account}"] if values.account else []),
        # To the tasks, not to this script, which then sees how they ended.
        f"--signal=USR1@{values.save_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={values.name}-%j.log",
        *values.sbatch_option,
    ]
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in options),
        setup=f"\n{values.setup}\n" if values.setup else "",
        wait=values.save_seconds,
        command=shlex.join(["t5x_ext", *run.arguments]),
        max_restarts=values.max_restarts,
    )


def _check_run_dir(values: flags.FlagValues) -> None:
    """Refuses a run folder that only one node can see."""
    run_dir = PurePosixPath(values.run_dir)
    if is_remote(values.run_dir):
        if not values.cache_dir:
            raise UsageError("--cache_dir is missing: a run folder in a bucket cannot hold token caches")
        return
    if not run_dir.is_absolute():
        raise UsageError(f"--run_dir={run_dir}: give an absolute path, which means the same on every node")
    if values.nodes > 1 and any(run_dir.is_relative_to(folder) for folder in _OF_ONE_NODE):
        raise UsageError(
            f"--run_dir={run_dir} is on the disk of one node; give a folder that all {values.nodes} nodes share"
        )


if __name__ == "__main__":
    sys.exit(run_script(define, main, "launch_slurm.py", __doc__, sys.argv[1:]))
