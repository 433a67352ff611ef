"""Which process this is, and the address of process 0, from Slurm, Kubernetes or the Cloud TPU metadata server.

The variables are those that `jax.distributed.initialize` reads. It does not return what it finds, but processes must be
able to name one that never arrives, so the variables are read here.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from t5x_ext.contracts import UserError

TPU_PORT = 8482
"""Port of process 0 on TPU hosts, as in JAX."""

GPU_PORT = 6002
"""Port of process 0 in a Kubernetes job on GPUs, unless `JAX_COORDINATOR_PORT` names another; as in XPK."""

_METADATA = "computeMetadata/v1/instance/attributes"
_EPHEMERAL = 65536 - 4096  # first port of the range from which JAX also picks one by job number

Environment = Mapping[str, str]
Metadata = Callable[[str], str | None]


class Place(NamedTuple):
    """One process among those of a run."""

    coordinator: str  # host:port of process 0
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None  # None: all devices of the host


def from_slurm(environment: Environment) -> Place | None:
    """The place of a task that `srun` started; None outside a job step.

    Tasks on one node get equal shares of its GPUs, unless Slurm has divided them already.
    """
    if not {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NODELIST"} <= environment.keys():
        return None
    host = first_slurm_node(environment["SLURM_STEP_NODELIST"])
    port = _EPHEMERAL + int(environment["SLURM_JOB_ID"]) % 4096
    tasks = max(map(int, re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))))
    ids = _share_of_gpus(environment, tasks, int(environment.get("SLURM_LOCALID", "0")))
    return Place(f"{host}:{port}", int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"]), ids)


def first_slurm_node(nodes: str) -> str:
    """The first host of a Slurm node list.

    >>> [first_slurm_node(nodes) for nodes in ("gpu7", "a1,b2", "node[007-012,20],x1", "rack[1,3]-gpu")]
    ['gpu7', 'a1', 'node007', 'rack1-gpu']
    """
    match = re.match(r"(?P<prefix>[^,\[]+)(\[(?P<number>\d+)[^\]]*\](?P<suffix>[^,\[]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} names no host; give --coordinator_address")
    return "".join(match[part] or "" for part in ("prefix", "number", "suffix"))


def _share_of_gpus(environment: Environment, tasks: int, task: int) -> tuple[int, ...] | None:
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    on_node = int(environment.get("SLURM_GPUS_ON_NODE", len(visible)))
    if tasks == 1 or on_node < tasks or (visible and len(visible) < on_node):
        return None
    share = on_node // tasks
    return tuple(range(task * share, (task + 1) * share))


def from_gke(environment: Environment) -> Place | None:
    """The place of a pod on Google Kubernetes Engine: of a TPU slice, or of an indexed job on GPUs; None elsewhere."""
    workers = environment.get("TPU_WORKER_HOSTNAMES", "")
    if "TPU_WORKER_ID" in environment and workers:
        return _on_slices(workers.split(","), int(environment["TPU_WORKER_ID"]), environment.get)
    rank = environment.get("NODE_RANK", environment.get("JOB_COMPLETION_INDEX"))
    if rank is None or not {"JAX_COORDINATOR_ADDRESS", "NNODES"} <= environment.keys():
        return None
    address = environment["JAX_COORDINATOR_ADDRESS"]
    if ":" not in address:
        address += f":{environment.get('JAX_COORDINATOR_PORT', GPU_PORT)}"
    return Place(address, int(environment["NNODES"]), int(rank))


def from_tpu_vm(metadata: Metadata) -> Place | None:
    """The place of a Cloud TPU VM, from its metadata server; None if there is none or it knows of no TPU."""
    number, endpoints = metadata("agent-worker-number"), metadata("worker-network-endpoints")
    if number is None or endpoints is None:
        return None
    # Each is a host name or, on older machines, name:id:address.
    workers = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]
    lines = (line.partition(":") for line in (metadata("tpu-env") or "").splitlines())
    settings = {name.strip(): value.strip().strip("'") for name, _, value in lines}
    return _on_slices(workers, int(number), lambda name: os.environ.get(name, settings.get(name)))


def _on_slices(workers: list[str], worker: int, setting: Callable[[str], str | None]) -> Place:
    """Processes are counted slice by slice; process 0 is the first worker of the first slice."""
    slices, index = int(setting("MEGASCALE_NUM_SLICES") or 1), int(setting("MEGASCALE_SLICE_ID") or 0)
    host = (setting("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).split(":")[0]
    return Place(f"{host}:{TPU_PORT}", slices * len(workers), index * len(workers) + worker)


def read_metadata(name: str) -> str | None:
    """An attribute of this machine from Google Cloud's metadata server; None if the server does not answer."""
    if not any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")):
        return None
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{host}/{_METADATA}/{name}", headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return str(response.read(), "utf-8")
    except (urllib.error.URLError, TimeoutError):
        return None
