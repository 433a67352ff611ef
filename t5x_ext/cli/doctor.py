"""Checks this machine: versions against the range that t5x_ext was tested with, devices, gin files, write access.

Ends with exit code 1 where something keeps t5x_ext from working.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import platform
import re
import shutil
from importlib import metadata, util
from pathlib import Path
from typing import Literal, NamedTuple

from absl import flags

from t5x_ext.cli.files import check_writable, report
from t5x_ext.storage.remote import is_remote

_MODULES = {
    "absl-py": "absl",
    "gin-config": "gin",
    "orbax-checkpoint": "orbax.checkpoint",
    "protobuf": "google.protobuf",
    "tensorboardx": "tensorboardX",
}
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[.*?\])?(?P<range>[^;]*)(?P<marker>;.*)?")


class Finding(NamedTuple):
    """One line of the diagnosis."""

    state: Literal["ok", "untested", "absent", "broken"]
    name: str
    text: str


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext doctor`."""
    flags.DEFINE_string("run_dir", ".", "folder that runs will be written to", flag_values=values)
    flags.DEFINE_string("json_out", None, "file for the result as JSON; - is standard output", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Runs `t5x_ext doctor`; where JAX itself is broken it still says so, since nothing here needs JAX."""
    check_writable(values.json_out, "--json_out")
    findings = [python(), *packages(), devices(), tensorflow(), gin_files(), write_access(values.run_dir)]
    broken = [finding for finding in findings if finding.state == "broken"]
    lines = [f"{finding.state:<9} {finding.name:<17} {finding.text}" for finding in findings]
    lines.append(f"{len(broken)} broken" if broken else "nothing is broken")
    result = {"ok": not broken, "findings": [finding._asdict() for finding in findings]}
    report("\n".join(lines), result, values.json_out)
    return 1 if broken else 0


def python() -> Finding:
    """The interpreter against the range that the package declares."""
    try:
        tested = metadata.metadata("t5x_ext")["Requires-Python"]
    except metadata.PackageNotFoundError:
        return Finding(
            "untested", "python", f"{platform.python_version()}; t5x_ext is not installed, ranges are unknown"
        )
    return _judged("python", platform.python_version(), tested)


def packages() -> list[Finding]:
    """Every core dependency: installed, importable, within its tested range; jaxlib as jax wants it."""
    try:
        required = metadata.requires("t5x_ext") or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for requirement in (_REQUIREMENT.match(text) for text in required):
        if requirement and not requirement["marker"]:
            found.append(_package(requirement["name"], requirement["range"].strip()))
    return [*found, _jaxlib()]


def devices() -> Finding:
    """What JAX computes on."""
    try:
        jax = importlib.import_module("jax")
        kinds = [device.device_kind for device in jax.devices()]
    except Exception as error:
        return Finding("broken", "devices", _reason(error))
    text = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        return Finding("untested", "devices", f"{text}; a GPU is here but JAX does not see it: install t5x_ext[cuda]")
    return Finding("ok", "devices", f"{text}; {os.cpu_count()} CPU cores")


def tensorflow() -> Finding:
    """TensorFlow is only needed for seqio tasks."""
    if util.find_spec("tensorflow") is None:
        return Finding("absent", "tensorflow", "only needed to read seqio or TFDS tasks: install t5x_ext[seqio]")
    return Finding("ok", "tensorflow", f"{metadata.version('tensorflow')}; used for seqio tasks only")


def gin_files() -> Finding:
    """The gin files that come with the package."""
    try:
        root = importlib.import_module("t5x_ext.cli.gin_read").gin_root()
    except Exception as error:
        return Finding("broken", "gin files", _reason(error))
    count = len(list(root.rglob("*.gin")))
    return Finding("ok" if count else "broken", "gin files", f"{count} in {root}")


def write_access(run_dir: str) -> Finding:
    """Whether a run folder could be made there, and how much room there is."""
    if is_remote(run_dir):
        return Finding("ok", "run folder", f"{run_dir} is remote: not tried")
    folder = Path(run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding("broken", "run folder", f"{folder} cannot be written to")
    return Finding(
        "ok", "run folder", f"{folder} can be written to, {shutil.disk_usage(folder).free / 1e9:,.0f} GB free"
    )


def _package(name: str, tested: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("broken", name, f"is not installed; needed: {tested}")
    try:
        # What a package prints while it is imported is no part of the diagnosis.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
    except Exception as error:
        return Finding("broken", name, f"{version} cannot be imported: {_reason(error)}; tested: {tested}")
    return _judged(name, version, tested)


def _jaxlib() -> Finding:
    try:
        jax, jaxlib = metadata.version("jax"), metadata.version("jaxlib")
    except metadata.PackageNotFoundError as error:
        return Finding("broken", "jaxlib", f"{error.name} is not installed")
    same = _numbers(jax)[:2] == _numbers(jaxlib)[:2]
    return Finding("ok" if same else "broken", "jaxlib", jaxlib if same else f"{jaxlib} does not belong to jax {jax}")


def _judged(name: str, version: str, tested: str) -> Finding:
    bounds = dict(re.findall(r"(<|>=)([\d.]+)", tested))
    too_old = ">=" in bounds and _numbers(version) < _numbers(bounds[">="])
    too_new = "<" in bounds and _numbers(version) >= _numbers(bounds["<"])
    if too_old or too_new:
        return Finding("untested", name, f"{version} is too {'old' if too_old else 'new'}; tested: {tested}")
    return Finding("ok", name, version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
