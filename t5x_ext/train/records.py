"""What a run folder tells of its run, and what a run that goes on must have in common with it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

import t5x_ext
from t5x_ext.checkpoints import CheckpointStore, RunFolder, write_json
from t5x_ext.contracts import UserError
from t5x_ext.data import PreparedData
from t5x_ext.models import TransformerConfig
from t5x_ext.parallel import cpu_threads
from t5x_ext.train.run import Run

_MAY_CHANGE = (
    *("Run.steps", "Run.budget", "Budget.", "Run.log_every", "Run.tensorboard", "Run.evaluation", "Run.checkpoints"),
    *("Run.max_skipped_updates", "Run.max_rewinds", "EvaluationConfig.", "CheckpointConfig.", "DecodeConfig."),
    *("Run.mesh", "Run.axis_rules", "MeshConfig.", "AxisRules."),
)
"""Settings that a restart may change: they do not touch what has been learned so far. Devices may be others, too."""


def write_records(folder: RunFolder, run: Run, data: PreparedData, config: TransformerConfig, config_text: str) -> None:
    """Writes what a reader needs (`model.json`), and what a person wants to know later (configuration, environment)."""
    folder.write_model(
        config.to_json(), dataclasses.asdict(run.data.tags), data.directions, data.vocabulary.fingerprint()
    )
    folder.config_gin.write_text(config_text)
    write_json(folder.environment_json, environment())


def environment() -> dict[str, Any]:
    """What decides the last bit of a result, beside the configuration: versions, devices, threads."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}
    return {
        "python": platform.python_version(),
        "packages": {"t5x_ext": t5x_ext.__version__, **versions},
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
    """Refuses to go on with a run whose settings have changed; before its first checkpoint there is none to go on with.

    Raises:
      UserError: naming the first difference.
    """
    with CheckpointStore(folder.checkpoints) as store:
        if not store.steps() or not folder.config_gin.exists():
            return
    before, now = _settings(folder.config_gin.read_text()), _settings(config_text)
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder.path} holds a run with {name} = {before.get(name, 'unset')}, now it is "
            f"{now.get(name, 'unset')}{more}; give the settings it was started with, or another --run_dir"
        )


def check_data(store: CheckpointStore, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with other data: the position in it would mean something else.

    Raises:
      UserError: naming the parts that differ.
    """
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise UserError(
            f"{store.directory} was trained on other data ({', '.join(changed)} changed); restore it, or take another "
            "--run_dir with --init_from"
        )


def _settings(config_text: str) -> dict[str, str]:
    lines = (line.split(" = ", 1) for line in config_text.splitlines() if " = " in line and not line.startswith("#"))
    return {name: value for name, value in lines if not any(part in name for part in _MAY_CHANGE)}


def read_results(run_dir: str) -> dict[str, Any] | None:
    """The results of a finished run; None where there are none yet."""
    path = RunFolder(run_dir).results_json
    return json.loads(path.read_text()) if path.exists() else None
