"""What the launchers share: flags of the run, the command that every machine executes, mistakes in one line."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from t5x_ext.cli import train
from t5x_ext.cli.flags import HELP, help_text, parse, require
from t5x_ext.cli.gin_read import find_gin_file, gin_root
from t5x_ext.cli.messages import UsageError, one_line
from t5x_ext.cli.run_flags import run_from_flags
from t5x_ext.contracts import UserError
from t5x_ext.storage.remote import is_remote

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


class Training(NamedTuple):
    """What `t5x_ext train` is to do, without the flags that tell a process its place among the others."""

    arguments: list[str]  # of `t5x_ext`, the verb first
    own_files: list[Path]  # gin files that are not in the package, which machines need a copy of


def define_flags(values: flags.FlagValues, cache_dir: str | None) -> None:
    """Declares the flags that all launchers have; `cache_dir` is the default of the flag of that name."""
    flags.DEFINE_string("name", "t5x-ext", "what the job is called there", flag_values=values)
    flags.DEFINE_string("run_dir", None, "run folder that every machine reaches; required", flag_values=values)
    flags.DEFINE_multi_string("gin_file", [], "the run: a packaged gin file or one of yours; required",
                              flag_values=values)  # fmt: skip
    flags.DEFINE_multi_string("gin", [], "one binding over those of the files, as --gin.Run.steps=100",
                              flag_values=values)  # fmt: skip
    flags.DEFINE_string("cache_dir", cache_dir, "folder of token caches, on the machines", flag_values=values)
    flags.DEFINE_multi_string("train_flag", [], "another flag of t5x_ext train, as --train_flag=steps=1000",
                              flag_values=values)  # fmt: skip
    flags.DEFINE_integer("max_restarts", 20, "how often an interrupted run is started again", lower_bound=0,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_boolean("dry_run", False, "print exactly what would be done, and do nothing", flag_values=values)


def training(values: flags.FlagValues, devices: int, slices: int = 1, own_folder: str | None = None) -> Training:
    """The training that the flags describe, checked as far as this machine can: not where every minute is paid for.

    Args:
      values: parsed flags.
      devices: how many there will be in total.
      slices: TPU slices among which they are divided.
      own_folder: where machines find the gin files that are not packaged; None: where they are here.

    Raises:
      UsageError: for a missing flag, one that `t5x_ext train` would refuse, or a mesh of another number of slices.
      UserError: for a mistake in gin, or a mesh that does not fit the devices.
    """
    require(values, "name", "run_dir", "gin_file")
    if not _NAME.fullmatch(values.name):
        raise UsageError(f"--name={values.name}: at most 40 lower-case letters, digits and hyphens, a letter first")
    names, own_files = [], []
    for name in values.gin_file:
        path = find_gin_file(name).resolve()
        if path.is_relative_to(gin_root().resolve()):
            names.append(path.relative_to(gin_root().resolve()).as_posix())
        else:
            own_files.append(path)
            names.append(f"{own_folder}/{path.name}" if own_folder else str(path))
    if len({path.name for path in own_files}) < len(own_files):
        raise UsageError("--gin_file: two files of yours have one name; they would overwrite each other")
    arguments = [
        f"--run_dir={values.run_dir}",
        *([f"--cache_dir={values.cache_dir}"] if values.cache_dir else []),
        *(f"--gin.{binding}" for binding in values.gin),
        *(f"--{flag.removeprefix('--')}" for flag in values.train_flag),
    ]
    arguments += _check([*(f"--gin_file={name}" for name in values.gin_file), *arguments], devices, slices)
    return Training(["train", *(f"--gin_file={name}" for name in names), *arguments], own_files)


def _check(arguments: Sequence[str], devices: int, slices: int) -> list[str]:
    """Builds the run as every process will.

    Returns:
      What is to be added to the arguments: as `t5x_ext check`, for a run that knows of one slice, how many there are.
    """
    mesh = run_from_flags(parse(train.define_flags, arguments))[0].mesh
    added = []
    if mesh.slices == 1 < slices:
        added = [f"--gin.MeshConfig.slices={slices}"]
        try:
            mesh = run_from_flags(parse(train.define_flags, [*arguments, *added]))[0].mesh
        except UserError:
            raise UsageError(
                f"--num_slices={slices}: the run configures no mesh; add --gin_file=parallel/multislice.gin"
            ) from None
    if slices > 1 and mesh.sizes(devices)[0] != slices:
        raise UsageError(
            f"--num_slices={slices}: the run has MeshConfig.slices={mesh.slices}; add --gin.MeshConfig.slices={slices}"
        )
    mesh.sizes(devices)
    return added


def require_bucket(run_dir: str, why: str) -> None:
    """Raises UsageError for a run folder on the disk of one machine."""
    if not is_remote(run_dir):
        raise UsageError(f"--run_dir={run_dir}: {why}; give a bucket, as --run_dir=gs://my-bucket/run")


def launch(out: Path, text: str, command: Sequence[str] | None, *, dry_run: bool) -> int:
    """Writes what describes a job and hands it over; in a dry run only says what would be done.

    Args:
      out: file to write.
      text: what goes into it.
      command: what hands the file over; None hands nothing over.
      dry_run: prints the text instead.

    Returns:
      The exit code of the command, 0 without one.
    """
    if dry_run:
        print(text, end="")
        print(f"would write {out}" + (f" and run: {shlex.join(command)}" if command else ""), file=sys.stderr)
        return 0
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}", file=sys.stderr)
    return subprocess.run(command, check=False).returncode if command else 0


def run_script(
    define: Callable[[flags.FlagValues], None],
    main: Callable[[flags.FlagValues], int],
    script: str,
    description: str,
    arguments: Sequence[str],
) -> int:
    """Parses a script's flags and runs it; a mistake is one line on standard error.

    Returns:
      The exit code: what `main` returns, 2 after a mistake, 130 when interrupted.
    """
    if any(argument in HELP for argument in arguments):
        print(help_text(script, description, define).replace("usage: t5x_ext ", "usage: scripts/", 1))
        return 0
    try:
        return main(parse(define, arguments))
    except (UsageError, UserError) as error:
        print(f"{script}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130
