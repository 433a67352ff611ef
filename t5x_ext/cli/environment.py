"""What a process takes over from those before it that worked on the same results, so that these end with the same bits.

Sums depend on how they are cut among threads. XLA reads NPROC and XLA_FLAGS when its first client is made, which is
before anything is computed.
"""

from __future__ import annotations

import json
import os

from absl import flags

from t5x_ext.cli.messages import UsageError

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def define_deterministic_flag(values: flags.FlagValues) -> None:
    """Declares `--deterministic`."""
    flags.DEFINE_boolean(
        "deterministic", False, "on GPUs, only kernels that always give the same bits, so that a run that was "
        "interrupted equals one that was not bit by bit, not only to rounding; slower; CPUs and TPUs need it not",
        flag_values=values,
    )  # fmt: skip


def restore_environment(folder: str, deterministic: bool = False) -> None:
    """Goes on with as many CPU threads as were used before, and with deterministic kernels if they were.

    Args:
      folder: where `environment.json` says so, if there is one: a run folder, or that of a pipeline.
      deterministic: whether deterministic kernels are asked for now.
    """
    from etils import epath

    path = epath.Path(folder) / "environment.json"
    try:
        recorded = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        recorded = None
    if not isinstance(recorded, dict):
        raise UsageError(f"{path}: not a record of ours; delete it, and this machine's threads and kernels are taken")
    if "NPROC" not in os.environ and "cpu_threads" in recorded:
        os.environ["NPROC"] = str(recorded["cpu_threads"])
    given = os.environ.get("XLA_FLAGS", "")
    wanted = deterministic or _DETERMINISTIC in recorded.get("xla_flags", "")
    if wanted and _DETERMINISTIC not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_DETERMINISTIC}".strip()
