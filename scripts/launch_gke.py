#!/usr/bin/env python3
"""Trains on Google Kubernetes Engine: writes a JobSet manifest for TPU slices or GPU nodes; --apply applies it.

  scripts/launch_gke.py --topology=v5e:8x8 --num_slices=2 --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/t5x_ext \
      --gin_file=runs/vega_mt_4b7_v5e_8x8.gin --run_dir=gs://my-bucket/run --apply
  scripts/launch_gke.py --gpu=nvidia-h100-80gb --num_nodes=2 --gpus_per_node=8 --image=... --gin_file=... --run_dir=gs://...

The cluster needs node pools of that kind and JobSet (https://jobset.sigs.k8s.io); the image needs Python with
`pip install 't5x_ext[tpu,gcs]'` (or cuda instead of tpu). Gin files of your own travel in the manifest. A pod that is
evicted gets SIGTERM and time to save; the whole set then starts again and goes on from the checkpoint. A mistake (exit
code 2) is not tried again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from absl import flags
from launch_common import Training, define_flags, launch, require_bucket, run_script, training

from t5x_ext.cli.flags import require
from t5x_ext.cli.messages import UsageError
from t5x_ext.parallel.tpu_names import TpuSlice, tpu_slice

_GIN_FOLDER = "/etc/t5x_ext"
_COORDINATOR_PORT = 8482
_TPU_PORT = 8471
_MISTAKE = 2
_CONFIG_MAP_BYTES = 1 << 20


def define(values: flags.FlagValues) -> None:
    """Declares this launcher's flags."""
    define_flags(values, cache_dir="/tmp/t5x_ext_cache")
    flags.DEFINE_string("topology", None, "TPUs: generation and shape of a slice, as v5e:8x8", flag_values=values)
    flags.DEFINE_integer("num_slices", 1, "TPUs: slices, joined by the data-center network", lower_bound=1,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_string("gpu", None, "GPUs: the node label cloud.google.com/gke-accelerator, as nvidia-h100-80gb",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_integer("num_nodes", 1, "GPUs: nodes", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("gpus_per_node", 8, "GPUs: of a node, all driven by one process", lower_bound=1,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_string("image", None, "container image with the package; required", flag_values=values)
    flags.DEFINE_string("namespace", None, "Kubernetes namespace; by default kubectl's", flag_values=values)
    flags.DEFINE_string("service_account", None, "Kubernetes service account that may write to the bucket",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_boolean("spot", False, "take nodes that may be taken back", flag_values=values)
    flags.DEFINE_string("reservation", None, "take nodes of this reservation", flag_values=values)
    flags.DEFINE_integer("save_seconds", 120, "seconds between SIGTERM and the end of a pod, for saving",
                         lower_bound=1, flag_values=values)  # fmt: skip
    flags.DEFINE_string("out", None, "the manifest; by default NAME.yaml", flag_values=values)
    flags.DEFINE_boolean("apply", False, "also kubectl apply it", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Writes the manifest, or prints it."""
    require(values, "image")
    if bool(values.topology) == bool(values.gpu):
        raise UsageError("give --topology for TPUs or --gpu for GPUs")
    if values.spot and values.reservation:
        raise UsageError("--spot and --reservation exclude each other")
    slice_ = tpu_slice(values.topology) if values.topology else None
    if slice_ is None:
        run = training(values, values.num_nodes * values.gpus_per_node, own_folder=_GIN_FOLDER)
    else:
        run = training(values, slice_.chips * values.num_slices, values.num_slices, own_folder=_GIN_FOLDER)
    require_bucket(values.run_dir, "the disk of a pod goes with it, and the others cannot read it")
    manifest = yaml.safe_dump_all(documents(values, slice_, run), sort_keys=False, width=120)
    out = Path(values.out or f"{values.name}.yaml")
    apply = ["kubectl", "apply", f"--filename={out}"]
    return launch(out, manifest, apply if values.apply else None, dry_run=values.dry_run)


def documents(values: flags.FlagValues, slice_: TpuSlice | None, run: Training) -> list[dict[str, Any]]:
    """The Kubernetes objects: a ConfigMap with the user's own gin files, where there are any, and the JobSet."""
    metadata: dict[str, Any] = {"name": values.name}
    if values.namespace:
        metadata["namespace"] = values.namespace
    pod = _pod(values, slice_, run)
    job = _job(values.num_nodes if slice_ is None else slice_.hosts, pod)
    job_set: dict[str, Any] = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": dict(metadata),
        "spec": {
            "failurePolicy": {
                "maxRestarts": values.max_restarts,
                "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [
                {"name": "train", "replicas": 1 if slice_ is None else values.num_slices, "template": {"spec": job}}
            ],
        },
    }
    if slice_ is not None:
        # One slice is one node pool: the machines of a job must not come from two.
        placement = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        job_set["metadata"]["annotations"] = placement
    if not run.own_files:
        return [job_set]
    data = {path.name: path.read_text(encoding="utf-8") for path in run.own_files}
    if sum(map(len, data.values())) > _CONFIG_MAP_BYTES:
        raise UsageError(f"--gin_file: your files are larger than {_CONFIG_MAP_BYTES:,} bytes; put them in the image")
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": dict(metadata), "data": data}, job_set]


def _job(pods: int, pod: dict[str, Any]) -> dict[str, Any]:
    return {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        # The JobSet starts all pods again, since none can go on without the others.
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": [_MISTAKE]},
                }
            ]
        },
        "template": {"spec": pod},
    }


def _pod(values: flags.FlagValues, slice_: TpuSlice | None, run: Training) -> dict[str, Any]:
    chips = values.gpus_per_node if slice_ is None else slice_.chips_per_host
    ports = (_COORDINATOR_PORT,) if slice_ is None else (_COORDINATOR_PORT, _TPU_PORT)
    container: dict[str, Any] = {
        "name": "train",
        "image": values.image,
        "command": ["t5x_ext", *(_escaped(argument) for argument in run.arguments), *_distributed(values, slice_)],
        "ports": [{"containerPort": port} for port in ports],
        "resources": {"limits": {"nvidia.com/gpu" if slice_ is None else "google.com/tpu": chips}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": values.save_seconds,
        "nodeSelector": _nodes(values, slice_),
        "containers": [container],
    }
    if values.service_account:
        pod["serviceAccountName"] = values.service_account
    volumes: list[tuple[dict[str, Any], str]] = []
    if slice_ is None:
        # The 64 MiB that a container gets are too few for NCCL.
        volumes.append(({"name": "shm", "emptyDir": {"medium": "Memory"}}, "/dev/shm"))
    if run.own_files:
        volumes.append(({"name": "gin", "configMap": {"name": values.name}}, _GIN_FOLDER))
    if volumes:
        container["volumeMounts"] = [{"name": volume["name"], "mountPath": path} for volume, path in volumes]
        pod["volumes"] = [volume for volume, _ in volumes]
    return pod


def _nodes(values: flags.FlagValues, slice_: TpuSlice | None) -> dict[str, str]:
    labels = (
        {"cloud.google.com/gke-accelerator": values.gpu}
        if slice_ is None
        else {
            "cloud.google.com/gke-tpu-accelerator": slice_.gke_accelerator,
            "cloud.google.com/gke-tpu-topology": slice_.shape,
        }
    )
    if values.spot:
        labels["cloud.google.com/gke-spot"] = "true"
    if values.reservation:
        labels["cloud.google.com/reservation-name"] = values.reservation
    return labels


def _distributed(values: flags.FlagValues, slice_: TpuSlice | None) -> list[str]:
    """How a process finds the others: GKE tells a TPU pod; a GPU pod knows the first pod's name and its own number."""
    if slice_ is not None:
        return ["--distributed=gke"]
    return [
        "--distributed=explicit",
        f"--coordinator_address={values.name}-train-0-0.{values.name}:{_COORDINATOR_PORT}",
        f"--num_processes={values.num_nodes}",
        # Kubernetes puts in the variable that it gives to every pod of an indexed job.
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]


def _escaped(argument: str) -> str:
    """Kubernetes replaces `$(NAME)` in a command; a doubled sign stays."""
    return argument.replace("$(", "$$(")


if __name__ == "__main__":
    sys.exit(run_script(define, main, "launch_gke.py", __doc__, sys.argv[1:]))
