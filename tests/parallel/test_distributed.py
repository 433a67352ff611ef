"""Processes that find each other, and say which of them are missing."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.parallel import DistributedConfig, initialize_distributed
from t5x_ext.parallel.clusters import Place, from_gke, from_slurm, from_tpu_vm
from t5x_ext.parallel.distributed import find_place
from t5x_ext.parallel.rendezvous import meet


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def outcomes(address, num_processes, processes, seconds, late=()):
    """What each of these processes is told: an error, or None."""

    def one(process):
        if process in late:
            time.sleep(0.3)
        try:
            return meet(address, num_processes, process, seconds)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


@pytest.mark.parametrize("late", [(0,), (1, 2)])
def test_all_go_on_when_the_last_has_come(address, late):
    assert outcomes(address, 4, [0, 1, 2, 3], 20, late) == [None] * 4


def test_everyone_hears_who_is_missing(address):
    told = f"process 3 of 4 did not arrive within 3 s (coordinator {address}); arrived: 0, 1, 2"
    assert outcomes(address, 4, [0, 1, 2], 3.0) == [told] * 3
    told = f"processes 1, 3-7 of 8 did not arrive within 3 s (coordinator {address}); arrived: 0, 2"
    assert outcomes(address, 8, [0, 2], 3.0) == [told] * 2


def test_a_coordinator_that_is_missing_is_named(address):
    told = f"process 0 at {address} (the coordinator) did not answer process 2 of 3 within 0.4 s; is it running there?"
    assert outcomes(address, 3, [2], 0.4) == [told]


def test_the_others_wait_by_the_clock_of_process_0(address):
    """Process 1 came long before process 0; it is told about process 2 when process 0 gives up."""
    told = outcomes(address, 3, [0, 1], 4.0, late=(0,))
    assert all("process 2 of 3 did not arrive" in message for message in told)


def test_processes_that_disagree_are_refused(address):
    with ThreadPoolExecutor(1) as pool:
        zero = pool.submit(outcomes, address, 3, [0], 3.0)
        assert outcomes(address, 2, [1], 3.0) == ["process 0 was told of 3 processes, process 1 of 2"]
        told = outcomes(address, 3, [2, 2], 3.0)
        assert "two processes say they are process 2 of 3; each needs its own id" in told
        assert "process 1 of 3 did not arrive" in zero.result()[0]


def test_strangers_and_processes_that_hang_up_do_not_count(address):
    host, port = address.split(":")

    def disturb():
        time.sleep(0.2)
        for data in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": 7, "of": 3}\n', b'{"process": 1, "of": 3}\n', b""):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(data)

    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(disturb)
        assert outcomes(address, 3, [0], 3.0) == [
            f"processes 1, 2 of 3 did not arrive within 3 s (coordinator {address}); arrived: 0"
        ]
        disturbed.result()


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert outcomes(f"127.0.0.1:{port}", 2, [0], 3.0)[0].startswith(f"process 0 cannot listen on port {port}")


def test_places_in_slurm():
    environment = {
        "SLURM_JOB_ID": "4097", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    assert from_slurm(environment) == Place("gpu03:61441", 8, 5, (2, 3))
    # Slurm itself has given each task its own.
    assert from_slurm(environment | {"CUDA_VISIBLE_DEVICES": "0,1"}) == Place("gpu03:61441", 8, 5)
    assert from_slurm(environment | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}) == Place("gpu03:61441", 8, 5)
    assert from_slurm({"SLURM_JOB_ID": "4097"}) is None


def test_places_in_kubernetes():
    hosts = {"TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc", "TPU_WORKER_ID": "1"}
    assert from_gke(hosts) == Place("a-0.svc:8482", 2, 1)
    slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "b-0.svc:8080"}
    assert from_gke(hosts | slices) == Place("b-0.svc:8482", 6, 5)
    job = {"JAX_COORDINATOR_ADDRESS": "run-0.run", "NNODES": "4", "JOB_COMPLETION_INDEX": "3"}
    assert from_gke(job) == Place("run-0.run:6002", 4, 3)
    assert from_gke(job | {"NODE_RANK": "2", "JAX_COORDINATOR_PORT": "99"}) == Place("run-0.run:99", 4, 2)
    assert from_gke({"JOB_COMPLETION_INDEX": "3"}) is None


def test_places_on_tpu_machines():
    metadata = {"agent-worker-number": "1", "worker-network-endpoints": "w:0:10.0.0.2,w:1:10.0.0.3"}
    assert from_tpu_vm(metadata.get) == Place("10.0.0.2:8482", 2, 1)
    metadata["tpu-env"] = "NAME: 'x'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    metadata["tpu-env"] += "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8081'\n"
    assert from_tpu_vm(metadata.get) == Place("10.0.0.9:8482", 4, 3)
    assert from_tpu_vm({}.get) is None


@pytest.fixture
def alone(monkeypatch):
    """No cluster around this test, wherever it runs."""
    for name in ("SLURM_JOB_ID", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("t5x_ext.parallel.clusters.read_metadata", lambda name: None)


@pytest.mark.usefixtures("alone")
def test_what_is_given_goes_before_what_is_found(monkeypatch):
    assert find_place(DistributedConfig("auto")) is None
    assert find_place(DistributedConfig("explicit", "h:1", 2, 1)) == Place("h:1", 2, 1)
    for name, value in {"JOB_ID": "1", "PROCID": "0", "NTASKS": "2", "STEP_NODELIST": "n1,n2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for kind in ("auto", "slurm"):
        assert find_place(DistributedConfig(kind, coordinator="n1:7")) == Place("n1:7", 2, 0)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "kubernetes"}, "kind is 'kubernetes'; use one of none, auto"),
        ({"kind": "explicit", "coordinator": "h:1"}, "needs num_processes, process_id too"),
        ({"kind": "explicit", "coordinator": "h", "num_processes": 2, "process_id": 0}, "'h' is not HOST:PORT"),
        ({"kind": "explicit", "coordinator": "h:1", "num_processes": 2, "process_id": 2}, "no process 2 of 2"),
        ({"num_processes": 2}, "num_processes set, but the kind of cluster is none"),
        ({"kind": "slurm"}, "not a process of a slurm cluster: SLURM_PROCID and SLURM_NTASKS are not set"),
        ({"kind": "auto", "timeout_seconds": 0}, "timeout_seconds is 0"),
    ],
)
def test_descriptions_that_do_not_make_sense(fields, message):
    with pytest.raises(UserError, match=message):
        initialize_distributed(DistributedConfig(**fields))
