"""Flags by which the processes of one run find each other."""

from __future__ import annotations

import logging

from absl import flags

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


def join_processes(values: flags.FlagValues) -> bool:
    """Joins the other processes of the command, where there are any; whether this is the one that speaks for all.

    Raises:
      UserError: for flags that describe no place among processes, or others that do not come.
    """
    from t5x_ext.parallel import DistributedConfig, initialize_distributed, is_primary

    initialize_distributed(
        DistributedConfig(
            values.distributed,
            values.coordinator_address,
            values.num_processes,
            values.process_id,
            values.initialization_timeout,
        )
    )
    if not is_primary():
        logging.getLogger("t5x_ext").setLevel(logging.WARNING)
    return is_primary()
