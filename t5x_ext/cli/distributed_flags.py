"""Flags by which the processes of one run find each other."""

from __future__ import annotations

import logging

from absl import flags

from t5x_ext.cli.field_flags import FieldFlag, define_field_flags, field_values

_FLAGS = {
    "kind": FieldFlag(
        "how processes find each other: alone; as found; Cloud TPU, Kubernetes (GKE) or Slurm; by the next three flags",
        name="distributed",
    ),
    "coordinator": FieldFlag("HOST:PORT of process 0; by default as the cluster says", name="coordinator_address"),
    "num_processes": FieldFlag("processes of the run", lower_bound=1),
    "process_id": FieldFlag("number of this process, from 0", lower_bound=0),
    "timeout_seconds": FieldFlag(
        "seconds to wait for processes that do not come", name="initialization_timeout", lower_bound=1
    ),
}


def define_distributed_flags(values: flags.FlagValues) -> None:
    """Declares the flags of a command that can run on several processes: the fields of `DistributedConfig`."""
    define_field_flags(values, "parallel.distributed", "DistributedConfig", _FLAGS)


def join_processes(values: flags.FlagValues) -> bool:
    """Joins the other processes of the command, where there are any; whether this is the one that speaks for all.

    Raises:
      UserError: for flags that describe no place among processes, or others that do not come.
    """
    from t5x_ext.parallel import DistributedConfig, initialize_distributed, is_primary

    initialize_distributed(DistributedConfig(**field_values(values, _FLAGS)))
    if not is_primary():
        logging.getLogger("t5x_ext").setLevel(logging.WARNING)
    return is_primary()
