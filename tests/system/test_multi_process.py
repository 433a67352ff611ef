"""One run on any mesh and any number of processes: the same losses, weights and batches, and one run folder."""

from __future__ import annotations

import socket

import numpy as np
import pytest

# What only the order of sums decides is 5e-7 here. A ReLU whose input is zero but for rounding may open on one mesh and
# not on another, and moves its own weights by up to 4e-5.
MEAN_TOLERANCE, TOLERANCE, LOSS_TOLERANCE = 5e-6, 1e-4, 1e-5


@pytest.fixture
def new_address():
    """Addresses at which process 0 can listen."""

    def find():
        with socket.create_server(("127.0.0.1", 0)) as server:
            return f"127.0.0.1:{server.getsockname()[1]}"

    return find


@pytest.fixture
def together(start):
    """Runs Python with each of these argument lists at the same time; return codes and what was printed."""

    def run(*commands, devices=2, **environment):
        # Two devices, and the programs of two processes, share what cores there are.
        flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
        settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment}
        processes = [start(*command, **settings) for command in commands]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        return [process.returncode for process in processes], outputs

    return run


@pytest.fixture
def train_on(place, write_tiny, together, new_address, request):
    """Trains the run of `exactness.py` on meshes; the arrays of each."""
    write_tiny(place, train=400)
    script = str(request.path.with_name("exactness.py"))

    def run(*names, processes, devices):
        command = (script, str(place), str(place), ",".join(names))
        if processes == 1:
            commands = [command]
        else:
            address = new_address()
            commands = [(*command, address, str(processes), str(number)) for number in range(processes)]
        codes, outputs = together(*commands, devices=devices)
        assert codes == [0] * processes, "\n".join(outputs)
        return {name: dict(np.load(place / f"{name}.npz")) for name in names}

    return run


def check_equal(arrays, expected):
    np.testing.assert_allclose(arrays["losses"], expected["losses"], rtol=LOSS_TOLERANCE)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], atol=TOLERANCE, err_msg=name)
        assert np.abs(array - expected[name]).mean() < MEAN_TOLERANCE, name
    assert expected["losses"][-1] < expected["losses"][0] - 1.0


def test_every_preset_trains_as_one_device(train_on):
    """20 updates on 8 devices and on 2 processes with 2 each, from one device's losses, weights and moments.

    Layers are shared, rows packed, dropout and two microbatches are on. Each process also compares the global batch
    with that of one host.
    """
    presets = ("data_parallel", "fsdp", "fsdp_tensor", "multislice")
    expected = train_on("one_device", processes=1, devices=1)["one_device"]
    for name, arrays in train_on(*presets, processes=1, devices=8).items():
        print(name, "on one process")
        check_equal(arrays, expected)
    for name, arrays in train_on("multislice", "tensor", processes=2, devices=2).items():
        print(name, "on two processes")
        check_equal(arrays, expected)


@pytest.mark.slow
def test_every_preset_trains_as_one_device_on_two_processes(train_on):
    presets = ("data_parallel", "fsdp", "fsdp_tensor")
    expected = train_on("one_device", processes=1, devices=1)["one_device"]
    for name, arrays in train_on(*presets, processes=2, devices=2).items():
        print(name)
        check_equal(arrays, expected)
