"""What a run folder tells of its run, and what a resumed run must have in common with it."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

import jax

from t5x_ext.checkpoints import CheckpointStore, RunFolder
from t5x_ext.contracts import UserError
from t5x_ext.parallel import cpu_threads
from t5x_ext.storage.files import write_json
from t5x_ext.train.task import Prepared

_MAY_CHANGE = (
    *("Run.steps", "Run.budget", "Budget.", "Run.log_every", "Run.tensorboard", "Run.evaluation", "Run.evaluators"),
    *("Run.checkpoints",),
    *("Run.max_skipped_updates", "Run.max_rewinds", "EvaluationConfig.", "CheckpointConfig.", "DecodeConfig."),
    *("Run.mesh", "Run.axis_rules", "MeshConfig.", "AxisRules."),
    *(".decode", ".test_decode", ".max_lines", "Beam.", "Greedy.", "Sample.", "LengthBeam."),
    *("MinimumLength.", "ForbidTokens.", "NoRepeatNgrams."),
)
"""Settings that a restart may change: they do not touch what has been learned so far. Devices may be others, too."""

MOVED = {
    "Run.data": "Translation.data",
    "Run.model": "Translation.model",
    "EvaluationConfig.max_lines": "Translation.max_lines",
    "EvaluationConfig.decode": "Translation.decode",
    "EvaluationConfig.test_decode": "Translation.test_decode",
}
"""Settings of the first edition, and what they are called now."""

_ADDED = {
    "Run.task": "@Translation()",
    "Run.step": "<function make_train_step>",
    "Run.trainable": "()",
    "Run.frozen": "{}",
    "Run.init_from": "None",
    "Run.budget": "None",
    "adam.l2": "0.0",
    **{f"{model}.activation": "'relu'" for model in ("TransformerConfig", "Base", "Big", "VegaTiny", "Vega4B7")},
}
"""Settings that runs of the first edition did not have, with the value that they had in effect."""


def write_records(folder: RunFolder, prepared: Prepared, config_text: str) -> None:
    """Writes what a reader needs (`model.json`), and what a person wants to know later (configuration, environment)."""
    folder.write_record(prepared.record())
    folder.config_gin.write_text(config_text)
    write_json(folder.environment_json, environment())


def environment() -> dict[str, Any]:
    """What decides the last bit of a result, beside the configuration: versions, devices, threads."""
    packages = ("t5x_ext", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    versions = {name: metadata.version(name) for name in packages}
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "cpu_threads": cpu_threads(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def environment_changes(folder: RunFolder) -> list[str]:
    """What is no longer as when the run was last started and may change the last bits, in words."""
    if not folder.environment_json.exists():
        return []
    before, now = _exactness(json.loads(folder.environment_json.read_text())), _exactness(environment())
    return [f"{name} {now[name]} (was {before[name]})" for name in now if now[name] != before[name]]


def _exactness(record: Mapping[str, Any]) -> dict[str, str]:
    devices = record["devices"]
    parts = {
        "jaxlib": record["packages"]["jaxlib"],
        "devices": f"{len(devices)} x {devices[0]}",
        "processes": str(record["processes"]),
        "XLA_FLAGS": repr(" ".join(sorted(record["xla_flags"].split()))),
    }
    return parts | ({"threads": str(record["cpu_threads"])} if devices[0] == "cpu" else {"threads": ""})


def check_config(folder: RunFolder, config_text: str) -> None:
    """Refuses to resume a run whose settings have changed; before its first checkpoint there is nothing to resume.

    Raises:
      UserError: naming the first difference.
    """
    with CheckpointStore(folder.checkpoints) as store:
        if not store.steps() or not folder.config_gin.exists():
            return
    before, now = (settings(text, _MAY_CHANGE) for text in (folder.config_gin.read_text(), config_text))
    names = sorted(before.keys() | now.keys())
    changed = [name for name in names if before.get(name, _ADDED.get(name.split("/")[-1])) != now.get(name)]
    if changed:
        name = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder.path} holds a run with {name} = {before.get(name, 'unset')}, now it is "
            f"{now.get(name, 'unset')}{more}; give the settings it was started with, or another --run_dir"
        )


def check_data(store: CheckpointStore, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to resume with other data: the position in it would mean something else.

    Raises:
      UserError: naming the parts that differ.
    """
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise UserError(
            f"{store.directory} was trained on other data ({', '.join(changed)} changed); restore it, or take another "
            "--run_dir with --init_from"
        )


def settings(config_text: str, may_change: Collection[str] = ()) -> dict[str, str]:
    """The values in a resolved gin text, by scope, class and parameter.

    Modules are skipped, since classes may move; settings of the first edition are under their present names.

    Args:
      config_text: the text, one setting a line.
      may_change: parts of names; settings whose name contains one of them are skipped.

    >>> settings("x/t5x_ext.train.Run.steps = 3\\nRun.mesh = None", may_change=("Run.mesh",))
    {'x/Run.steps': '3'}
    """
    lines = (line.split(" = ", 1) for line in config_text.splitlines() if " = " in line and not line.startswith("#"))
    named = ((_present_name(name), _MODULES.sub(r"\1", value)) for name, value in lines)
    return {name: value for name, value in named if not any(part in name for part in may_change)}


_MODULES = re.compile(r"(@(?:\w+/)*)(?:\w+\.)+(?=\w)")
"""The modules before the name of a class or function in a reference."""


def _present_name(name: str) -> str:
    *scopes, path = name.split("/")
    setting = ".".join(path.split(".")[-2:])
    return "/".join((*scopes, MOVED.get(setting, setting)))


def read_results(run_dir: str) -> dict[str, Any] | None:
    """The results of a finished run; None where there are none yet.

    Raises:
      UserError: if they are damaged.
    """
    path = RunFolder(run_dir).results_json
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text())
        int(results["steps"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error!r}); delete it, and the run is tested again") from error
    return results
