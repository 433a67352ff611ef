"""GKE: the manifest, against the JobSet, Job and Pod types of their APIs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import launch_gke
import pytest
import yaml
from launching import Programs, launch

from t5x_ext.cli import train
from t5x_ext.cli.flags import parse

RUN = ("--gin_file=runs/vega_mt_4b7.gin", "--run_dir=gs://bucket/run", "--image=registry/t5x_ext:1")
TPU = ("--topology=v5e:8x8", "--num_slices=2", *RUN)
GPU = ("--gpu=nvidia-h100-80gb", "--num_nodes=3", "--gpus_per_node=8", *RUN)

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""RFC 1123: names of objects that become host names."""

# The fields that launchers may use, by name and type; a trailing ! marks those that the API requires. From
# kubernetes-sigs/jobset api/jobset/v1alpha2/jobset_types.go and the Kubernetes API reference (batch/v1, core/v1).
MAP = {"*": str}
METADATA = {"name!": LABEL, "namespace": LABEL, "annotations": MAP, "labels": MAP}
CONTAINER = {
    "name!": LABEL,
    "image!": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str}],
    "ports": [{"containerPort!": int, "name": str, "protocol": str}],
    "resources": {"limits": {"*": (int, str)}, "requests": {"*": (int, str)}},
    "volumeMounts": [{"name!": LABEL, "mountPath!": str, "readOnly": bool}],
}
POD = {
    "restartPolicy": re.compile("Never|OnFailure"),
    "terminationGracePeriodSeconds": int,
    "nodeSelector": MAP,
    "serviceAccountName": str,
    "hostNetwork": bool,
    "dnsPolicy": str,
    "containers!": [CONTAINER],
    "volumes": [{"name!": LABEL, "configMap": {"name!": str}, "emptyDir": {"medium": str, "sizeLimit": str}}],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": re.compile("Indexed|NonIndexed"),
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "podFailurePolicy": {
        "rules!": [
            {
                "action!": re.compile("FailJob|FailIndex|Ignore|Count"),
                "onExitCodes": {
                    "containerName": str,
                    "operator!": re.compile("In|NotIn"),
                    "values!": [int],
                },
                "onPodConditions": [{"type!": str, "status": str}],
            }
        ]
    },
    "template!": {"metadata": METADATA, "spec!": POD},
}
JOB_SET = {
    "apiVersion!": re.compile("jobset.x-k8s.io/v1alpha2"),
    "kind!": re.compile("JobSet"),
    "metadata!": METADATA,
    "spec!": {
        "replicatedJobs": [{"name!": LABEL, "replicas": int, "template!": {"metadata": METADATA, "spec!": JOB}}],
        "network": {"enableDNSHostnames": bool, "subdomain": LABEL, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": re.compile("Recreate|BlockingRecreate"),
            "rules": [
                {
                    "name!": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
                    "action!": re.compile("FailJobSet|RestartJobSet|RestartJobSetAndIgnoreMaxRestarts"),
                    "onJobFailureReasons": [
                        re.compile(
                            "BackoffLimitExceeded|DeadlineExceeded|FailedIndexes|MaxFailedIndexesExceeded|PodFailurePolicy"
                        )
                    ],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "successPolicy": {"operator!": re.compile("All|Any"), "targetReplicatedJobs": [str]},
        "ttlSecondsAfterFinished": int,
        "suspend": bool,
    },
}
CONFIG_MAP = {
    "apiVersion!": re.compile("v1"),
    "kind!": re.compile("ConfigMap"),
    "metadata!": METADATA,
    "data": {"*": str},
}


def check(value: Any, schema: Any, where: str = "") -> None:
    """Fails where a value has a field that the schema lacks, lacks one that it requires, or has one of another type."""
    if isinstance(schema, dict):
        assert type(value) is dict, f"{where} is no mapping"
        fields = {name.rstrip("!"): kind for name, kind in schema.items()}
        for name, item in value.items():
            assert name in fields or "*" in fields, f"{where}.{name} is no field"
            check(item, fields.get(name, fields.get("*")), f"{where}.{name}")
        for name in schema:
            assert not name.endswith("!") or name[:-1] in value, f"{where}.{name[:-1]} is missing"
    elif isinstance(schema, list):
        assert type(value) is list, f"{where} is no list"
        for index, item in enumerate(value):
            check(item, schema[0], f"{where}[{index}]")
    elif isinstance(schema, re.Pattern):
        assert isinstance(value, str), f"{where} is no text"
        assert schema.fullmatch(value), f"{where}: {value}"
    else:
        kinds = schema if isinstance(schema, tuple) else (schema,)
        assert type(value) in kinds, f"{where}: {value!r} is no {kinds}"


def manifest(capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    """The objects that a dry run prints, checked."""
    assert launch(launch_gke, *flags, "--dry_run") == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    for document in documents:
        check(document, JOB_SET if document["kind"] == "JobSet" else CONFIG_MAP, document["kind"])
    return documents


def parts(job_set: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The replicated job, the job, the pod and the container."""
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return replicated, job, pod, container


@pytest.mark.parametrize(
    ("topology", "slices", "accelerator", "hosts", "chips"),
    [
        ("v5e:8x8", 2, "tpu-v5-lite-podslice", 16, 4),
        ("v4:4x4x4", 1, "tpu-v4-podslice", 16, 4),
        ("v5p:4x4x8", 3, "tpu-v5p-slice", 32, 4),
        ("v6e:1x1", 1, "tpu-v6e-slice", 1, 1),
    ],
)
def test_every_host_of_every_slice_gets_a_pod(
    topology: str, slices: int, accelerator: str, hosts: int, chips: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (job_set,) = manifest(capsys, f"--topology={topology}", f"--num_slices={slices}", *RUN)
    replicated, job, pod, container = parts(job_set)
    assert replicated["replicas"] == slices
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (hosts, hosts, "Indexed")
    assert container["resources"] == {"limits": {"google.com/tpu": chips}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
    }
    assert job_set["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def test_an_interrupted_set_starts_again_and_a_mistake_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    (job_set,) = manifest(capsys, *TPU, "--max_restarts=5", "--save_seconds=40")
    _, job, pod, container = parts(job_set)
    policy = job_set["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    assert (job["backoffLimit"], pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == (0, "Never", 40)
    # Exit code 2 fails the job for the reason PodFailurePolicy, which in turn fails the set.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]


def test_gpu_nodes_find_the_first_pod(capsys: pytest.CaptureFixture[str]) -> None:
    (job_set,) = manifest(capsys, *GPU, "--name=mt")
    replicated, job, pod, container = parts(job_set)
    assert (replicated["replicas"], job["completions"]) == (1, 3)
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert "annotations" not in job_set["metadata"]
    # JobSet calls a pod SET-JOB-REPLICA-INDEX, in a subdomain of the set's name.
    assert job_set["spec"]["network"] == {"enableDNSHostnames": True}
    assert container["command"][-4:] == [
        "--distributed=explicit",
        f"--coordinator_address=mt-{replicated['name']}-0-0.mt:8482",
        "--num_processes=3",
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]


def test_a_pod_trains_as_told(capsys: pytest.CaptureFixture[str]) -> None:
    (job_set,) = manifest(capsys, *TPU, "--gin.VocabularyConfig.path='a$(HOME)'", "--train_flag=seed=3")
    *_, container = parts(job_set)
    # Kubernetes turns $$( into $( and would replace $(HOME).
    command = [argument.replace("$$(", "$(") for argument in container["command"]]
    assert command == [
        *("t5x_ext", "train", "--gin_file=runs/vega_mt_4b7.gin", "--run_dir=gs://bucket/run"),
        *(
            "--cache_dir=/tmp/t5x_ext_cache",
            "--gin.VocabularyConfig.path='a$(HOME)'",
            "--seed=3",
            "--gin.MeshConfig.slices=2",
            "--distributed=gke",
        ),
    ]
    assert "$$(HOME)" in container["command"][5]
    parse(train.define_flags, command[2:])
    parse(train.define_flags, [*command[2:-1], *parts(manifest(capsys, *GPU)[0])[3]["command"][-4:-1]])


def test_gin_files_of_ones_own_travel_in_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.gin"
    mine.write_text("# Grüße: \"x\"\ninclude 'runs/vega_mt_4b7.gin'\n", encoding="utf-8")
    flags = ["--topology=v5e:8x8", *RUN[1:], f"--gin_file={mine}", "--namespace=team"]
    config_map, job_set = manifest(capsys, *flags)
    assert config_map["data"] == {"mine.gin": mine.read_text(encoding="utf-8")}
    *_, pod, container = parts(job_set)
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert f"--gin_file={mount['mountPath']}/mine.gin" in container["command"]
    assert {document["metadata"]["namespace"] for document in (config_map, job_set)} == {"team"}


def test_capacity_and_account(capsys: pytest.CaptureFixture[str]) -> None:
    pod = parts(manifest(capsys, *TPU, "--spot", "--service_account=trainer")[0])[2]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["serviceAccountName"] == "trainer"
    pod = parts(manifest(capsys, *TPU, "--reservation=mine")[0])[2]
    assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "mine"


def test_what_is_written_and_applied_is_what_was_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.add("kubectl")
    assert launch(launch_gke, *TPU, "--apply", "--dry_run") == 0
    said = capsys.readouterr()
    assert programs.called == []
    assert not (tmp_path / "t5x-ext.yaml").exists()
    assert launch(launch_gke, *TPU, "--apply") == 0
    assert (tmp_path / "t5x-ext.yaml").read_text() == said.out
    assert programs.called == [["kubectl", "apply", "--filename=t5x-ext.yaml"]]
    assert said.err == "would write t5x-ext.yaml and run: kubectl apply --filename=t5x-ext.yaml\n"


def test_the_check_finds_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    (job_set,) = manifest(capsys, *TPU)
    replicated, job, pod, _ = parts(job_set)
    for place, field, value in (
        (replicated, "replica", 2),
        (job, "completions", "16"),
        (pod, "restartPolicy", "Always"),
        (job_set, "apiVersion", "v1"),
    ):
        before = dict(place)
        place[field] = value
        with pytest.raises(AssertionError):
            check(job_set, JOB_SET)
        place.clear()
        place.update(before)
    del job["template"]
    with pytest.raises(AssertionError, match="template is missing"):
        check(job_set, JOB_SET)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (RUN, "give --topology for TPUs or --gpu"),
        ([*TPU, "--gpu=nvidia-l4"], "give --topology for TPUs or --gpu"),
        (TPU[:-1], "--image is missing"),
        ([*TPU, "--topology=v4:8x8"], "v4 has the shapes"),
        ([*TPU, "--run_dir=/mnt/run"], "give a bucket"),
        ([*TPU, "--spot", "--reservation=mine"], "exclude each other"),
        ([*TPU, "--name=a_b"], "lower-case"),
        ([*TPU, "--gin_file=nowhere.gin"], "there is no gin file"),
        ([*TPU, "extra"], "unexpected argument"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(launch_gke, *flags) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("launch_gke.py: ")
    assert what in line
    assert said.out == ""
