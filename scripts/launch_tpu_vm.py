#!/usr/bin/env python3
"""Trains on a Cloud TPU VM pod slice, or on several slices, through a queued resource.

  scripts/launch_tpu_vm.py --topology=v5e:8x8 --zone=us-west4-a --spot --delete_after \
      --gin_file=runs/vega_mt_4b7_v5e_8x8.gin --run_dir=gs://my-bucket/run

Builds the package, asks for the TPU and waits, copies and installs the package on every machine, trains, and prints
what the machines print. After a preemption it asks again and goes on from the last checkpoint; so does the same command
given again, as after a lost connection. It needs gcloud, and gcloud's key in ssh-agent
(`ssh-add ~/.ssh/google_compute_engine`). Exit code 0: trained to the end.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from absl import flags
from launch_common import Training, define_flags, require_bucket, run_script, training

import t5x_ext
from t5x_ext.cli.flags import require
from t5x_ext.cli.messages import UsageError
from t5x_ext.parallel.tpu_names import TpuSlice, tpu_slice

_REPOSITORY = Path(__file__).resolve().parent.parent
_LOST = ("", "FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
_MISTAKE = 2

# TPU VM images come with Python 3.10, which is too old; uv brings its own.
_INSTALL = (
    "python3 -m pip install --quiet --user uv"
    " && ~/.local/bin/uv venv --quiet --allow-existing --python=3.11 ~/t5x_ext_env"
    ' && ~/.local/bin/uv pip install --quiet --python="$HOME/t5x_ext_env/bin/python"'
    " --reinstall-package=t5x_ext {wheel}"
)
# A connection that broke leaves its process behind, which holds the TPU; told to stop, it saves first.
_TRAIN = (
    "pid=$(cat t5x_ext.pid 2>/dev/null);"
    ' if grep -qs t5x_ext "/proc/${{pid:-none}}/cmdline"; then kill "$pid";'
    ' while kill -0 "$pid" 2>/dev/null; do sleep 1; done; fi;'
    " echo $$ > t5x_ext.pid; exec ~/t5x_ext_env/bin/t5x_ext {arguments}"
)


class Step(NamedTuple):
    """One command, and when it runs."""

    when: str
    command: list[str]


class Steps(NamedTuple):
    """All commands of a launch, in the order of their first run."""

    build: Step
    state: Step
    create: Step
    copy: Step
    install: Step
    train: Step
    delete: Step


def define(values: flags.FlagValues) -> None:
    """Declares this launcher's flags."""
    define_flags(values, cache_dir="/tmp/t5x_ext_cache")
    flags.DEFINE_string("topology", None, "generation and shape of a slice, as v5e:8x8; required", flag_values=values)
    flags.DEFINE_integer("num_slices", 1, "slices, joined by the data-center network", lower_bound=1,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_string("zone", None, "zone of the TPU, as us-west4-a; required", flag_values=values)
    flags.DEFINE_string("project", None, "Google Cloud project; by default gcloud's", flag_values=values)
    flags.DEFINE_boolean("spot", False, "take capacity that may be taken back", flag_values=values)
    flags.DEFINE_boolean("reserved", False, "take capacity out of a reservation", flag_values=values)
    flags.DEFINE_string("service_account", None, "account of the machines; it must write to the bucket",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_string("runtime_version", None, "system image; by default the one for the generation",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_string("wheel", None, "the package to install; by default built from this checkout",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_float("poll_seconds", 30.0, "seconds between two looks at the request", lower_bound=0.0,
                       flag_values=values)  # fmt: skip
    flags.DEFINE_boolean("delete_after", False, "give the TPU back at the end, also after a failure",
                         flag_values=values)  # fmt: skip


def main(values: flags.FlagValues) -> int:
    """Launches, or prints the commands."""
    require(values, "topology", "zone")
    if values.spot and values.reserved:
        raise UsageError("--spot and --reserved exclude each other")
    if values.wheel and not Path(values.wheel).is_file():
        raise UsageError(f"--wheel={values.wheel}: no such file")
    slice_ = tpu_slice(values.topology)
    run = training(values, slice_.chips * values.num_slices, values.num_slices, own_folder=".")
    require_bucket(values.run_dir, "a disk of a TPU VM goes with it, and the others cannot read it")
    steps = plan(values, slice_, run)
    if values.dry_run:
        for step in steps:
            if step.command:
                print(f"# {step.when}\n{shlex.join(step.command)}")
        return 0
    try:
        return launch(steps, values.max_restarts, values.poll_seconds)
    finally:
        if values.delete_after:
            _run(steps.delete)


def plan(values: flags.FlagValues, slice_: TpuSlice, run: Training) -> Steps:
    """The commands, for printing and for running."""
    gcloud = ["gcloud", "compute", "tpus", "queued-resources"]
    where = [f"--zone={values.zone}", *([f"--project={values.project}"] if values.project else []), "--quiet"]
    everywhere = [*where, "--worker=all", "--node=all"]
    wheel = values.wheel or f"dist/t5x_ext-{t5x_ext.__version__}-py3-none-any.whl"
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir=dist", str(_REPOSITORY)]
    install = _INSTALL.format(wheel=shlex.quote(f"./{Path(wheel).name}[tpu,gcs]"))
    arguments = shlex.join([*run.arguments, "--distributed=tpu"])
    nodes = (
        [f"--node-id={values.name}"]
        if values.num_slices == 1
        else [f"--node-count={values.num_slices}", f"--node-prefix={values.name}"]
    )
    create = [
        *(*gcloud, "create", values.name, *where, *slice_.gcloud_flags),
        f"--runtime-version={values.runtime_version or slice_.runtime_version}",
        *nodes,
        *(["--spot"] if values.spot else []),
        *(["--reserved"] if values.reserved else []),
        *([f"--service-account={values.service_account}"] if values.service_account else []),
    ]
    copied = [wheel, *map(str, run.own_files)]
    return Steps(
        build=Step("first: build the package", [] if values.wheel else build),
        state=Step(
            f"every {values.poll_seconds:g} s until it says ACTIVE, and after a failure",
            [*gcloud, "describe", values.name, *where, "--format=value(state.state)"],
        ),
        create=Step(
            f"where there is no such request: ask for {values.num_slices} x {slice_.hosts} machines with "
            f"{slice_.chips_per_host} chips each",
            create,
        ),
        copy=Step("once the TPU is there", [*gcloud, "scp", *copied, f"{values.name}:", *everywhere]),
        install=Step("then", [*gcloud, "ssh", values.name, *everywhere, f"--command={install}"]),
        train=Step(
            f"then, and again after an interruption, at most {values.max_restarts} times",
            # All machines must start together; gcloud would start 64 at a time.
            [*gcloud, "ssh", values.name, *everywhere, "--batch-size=all",
             f"--command={_TRAIN.format(arguments=arguments)}"],
        ),
        delete=Step(
            "before asking again after a preemption" + ("; and at the end" if values.delete_after else ""),
            [*gcloud, "delete", values.name, *where, "--force"],
        ),
    )  # fmt: skip


def launch(steps: Steps, max_restarts: int, poll_seconds: float) -> int:
    """Runs the commands until training is done, or may not be started again.

    Returns:
      0 when trained to the end, else the exit code of what failed last.
    """
    if steps.build.command and (status := _run(steps.build)):
        return status
    for restarts in range(max_restarts + 1):
        if restarts:
            print(f"launch_tpu_vm: restart {restarts} of at most {max_restarts}", file=sys.stderr)
        status = _acquire(steps, poll_seconds) or _run(steps.copy) or _run(steps.install) or _run(steps.train)
        # Another try would end in the same mistake.
        if status in (0, _MISTAKE):
            break
        time.sleep(poll_seconds)
    return status


def _acquire(steps: Steps, poll_seconds: float) -> int:
    """Waits for the TPU, asking for it where it is not asked for or lost; 0 when it is there."""
    state = _state(steps)
    if state in _LOST:
        if state:
            _run(steps.delete)
        if _run(steps.create):
            raise UsageError("gcloud refused the request for the TPU; its message is above")
        state = _state(steps)
    while state != "ACTIVE":
        if state in _LOST:
            print(f"launch_tpu_vm: the request for the TPU is {state or 'gone'}", file=sys.stderr)
            return 1
        time.sleep(poll_seconds)
        state = _state(steps)
    return 0


def _state(steps: Steps) -> str:
    """State of the queued resource; empty where there is none."""
    done = subprocess.run(steps.state.command, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _run(step: Step) -> int:
    print(f"+ {shlex.join(step.command)}", file=sys.stderr, flush=True)
    return subprocess.run(step.command, check=False).returncode


if __name__ == "__main__":
    sys.exit(run_script(define, main, "launch_tpu_vm.py", __doc__, sys.argv[1:]))
