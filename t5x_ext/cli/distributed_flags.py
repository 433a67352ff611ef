"""Flags by which the processes of one run find each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from t5x_ext.parallel import DistributedConfig

_KINDS = ("none", "auto", "tpu", "gke", "slurm", "explicit")


def define_distributed_flags(values: flags.FlagValues) -> None:
    """Declares the flags of a command that can run on several processes."""
    flags.DEFINE_enum(
        "distributed", "none", _KINDS,
        "how processes find each other: alone; as found; Cloud TPU, Kubernetes (GKE) or Slurm; by the next three flags",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0; by default as the cluster says", flag_values=values
    )
    flags.DEFINE_integer("num_processes", None, "processes of the run", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0, flag_values=values)
    flags.DEFINE_integer(
        "initialization_timeout", 300, "seconds to wait for processes that do not come", lower_bound=1,
        flag_values=values,
    )  # fmt: skip


def distributed_from_flags(values: flags.FlagValues) -> DistributedConfig:
    """What the flags say."""
    from t5x_ext.parallel import DistributedConfig

    return DistributedConfig(
        values.distributed,
        values.coordinator_address,
        values.num_processes,
        values.process_id,
        values.initialization_timeout,
    )
