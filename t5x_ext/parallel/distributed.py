"""Joining the processes of a run. Barriers and doing things in order are in `storage.processes`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import jax

from t5x_ext.contracts import UserError
from t5x_ext.parallel import clusters
from t5x_ext.parallel.clusters import Place
from t5x_ext.parallel.rendezvous import meet, split_address

logger = logging.getLogger(__name__)

_DETECTED: dict[str, Callable[[], Place | None]] = {
    "gke": lambda: clusters.from_gke(os.environ),
    "slurm": lambda: clusters.from_slurm(os.environ),
    "tpu": lambda: clusters.from_tpu_vm(clusters.read_metadata),
}
_WHERE = {
    "gke": "TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, or JAX_COORDINATOR_ADDRESS, NNODES and NODE_RANK, are not set",
    "slurm": "SLURM_PROCID and SLURM_NTASKS are not set: start it with srun",
    "tpu": "this machine is no Cloud TPU VM",
}
_LEAVING = 30  # seconds that a process which ends waits for the others, and they for one that failed


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other.

    Attributes:
      kind: `none`: there is one process; `tpu`, `gke` and `slurm`: ask the Cloud TPU metadata server, Kubernetes or
        Slurm; `explicit`: the next three fields; `auto`: the first of these that applies.
      coordinator: `host:port` of process 0; if set, it overrides what was detected, as do the next two.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      timeout_seconds: how long to wait for the other processes.
    """

    kind: Literal["none", "auto", "tpu", "gke", "slurm", "explicit"] = "none"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout_seconds: int = 300

    def __post_init__(self) -> None:
        kinds = get_args(get_type_hints(DistributedConfig)["kind"])
        if self.kind not in kinds:
            raise UserError(f"DistributedConfig.kind is {self.kind!r}; use one of {', '.join(kinds)}")
        if self.timeout_seconds < 1:
            raise UserError(f"DistributedConfig.timeout_seconds is {self.timeout_seconds}: at least 1")
        if self.coordinator is not None:
            split_address(self.coordinator)

    @property
    def given(self) -> dict[str, Any]:
        """The fields of a `Place` that are set."""
        fields = {name: getattr(self, name) for name in ("coordinator", "num_processes", "process_id")}
        return {name: value for name, value in fields.items() if value is not None}


def initialize_distributed(config: DistributedConfig) -> None:
    """Joins the processes of a run, so that `jax.devices()` are those of all. Must be called before any use of JAX.

    Raises:
      UserError: if processes did not arrive in time, naming them, in every process that did arrive; or if the
        configuration is incomplete or wrong.
    """
    place = find_place(config)
    if place is None:
        return
    if not 0 <= place.process_id < place.num_processes:
        raise UserError(f"there is no process {place.process_id} of {place.num_processes}: ids count from 0")
    if place.num_processes > 1:
        meet(place.coordinator, place.num_processes, place.process_id, config.timeout_seconds)
    # JAX's preemption service would catch SIGTERM; the training loop handles it, and its processes agree where to stop.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=config.timeout_seconds,
        shutdown_timeout_seconds=_LEAVING,
    )
    logger.info("process %d of %d, coordinator %s", place.process_id, place.num_processes, place.coordinator)


def find_place(config: DistributedConfig) -> Place | None:
    """The place of this process among those of a run; None if it runs alone.

    Raises:
      UserError: naming what is missing.
    """
    if config.kind == "none":
        if config.given:
            raise UserError(
                f"{', '.join(config.given)} set, but the kind of cluster is none: explicit, or another kind"
            )
        return None
    missing = [name for name in ("coordinator", "num_processes", "process_id") if name not in config.given]
    if config.kind == "explicit" and missing:
        raise UserError(f"an explicit description of the processes needs {', '.join(missing)} too")
    if not missing:
        return Place(**config.given)
    for kind in (config.kind,) if config.kind != "auto" else _DETECTED:
        found = _DETECTED[kind]()
        if found is not None:
            return found._replace(**config.given)
        if config.kind == kind:
            raise UserError(f"not a process of a {kind} cluster: {_WHERE[kind]}")
    logger.info("no cluster found: one process")
    return None
