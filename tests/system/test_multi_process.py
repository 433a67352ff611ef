"""One run on any mesh and any number of processes: the same losses, weights and batches, and one run folder."""

from __future__ import annotations

import json
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
    """20 updates on 8 devices and on 2 processes with 2 each give one device's losses, weights and moments.

    Layers are shared, rows packed, dropout and two microbatches are on. Each process also compares the global batch
    with that of one host. The other presets on 2 processes are in the next test, which takes longer.
    """
    presets = ("data_parallel", "fsdp", "fsdp_tensor", "multislice")
    expected = train_on("one_device", processes=1, devices=1)["one_device"]
    for name, arrays in train_on(*presets, processes=1, devices=8).items():
        print(name, "on one process")
        check_equal(arrays, expected)
    for name, arrays in train_on("multislice", processes=2, devices=2).items():
        print(name, "on two processes")
        check_equal(arrays, expected)


@pytest.mark.slow
def test_every_preset_trains_as_one_device_on_two_processes(train_on):
    presets = ("data_parallel", "fsdp", "fsdp_tensor", "tensor")
    expected = train_on("one_device", processes=1, devices=1)["one_device"]
    for name, arrays in train_on(*presets, processes=2, devices=2).items():
        print(name)
        check_equal(arrays, expected)


@pytest.fixture
def train(place, write_tiny, together, new_address):
    """Trains a tiny run to its test by `t5x_ext train`, on one process or two; what they printed."""
    texts = write_tiny(place, train=60, valid=6, test=4)
    command = ("-m", "t5x_ext", "train", "--gin_file=tiny.gin", *texts)

    def run(run_dir, *flags, processes, steps=2):
        once = (*command, f"--run_dir={run_dir}", f"--gin.Run.steps={steps}", *flags)
        commands = [once]
        if processes == 2:
            joining = ("--distributed=explicit", f"--coordinator_address={new_address()}", "--num_processes=2")
            commands = [(*once, *joining, f"--process_id={number}") for number in (0, 1)]
        codes, outputs = together(*commands, devices=2 if processes == 2 else 1)
        assert codes == [0] * processes, "\n".join(outputs)
        return outputs

    return run


def read_losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_run_moves_between_one_process_and_two(place, train):
    """2 updates on two processes, 2 more on one, 2 more on two: one run folder, as that of one process in one go."""
    train("alone", processes=1, steps=6)
    flags = ("--gin_file=parallel/multislice.gin", "--gin.Translation.max_lines=4")
    outputs = train("moved", *flags, processes=2, steps=2)
    assert "exact %" in outputs[0]
    assert "step 1" not in outputs[1]
    train("moved", processes=1, steps=4)
    train("moved", *flags, processes=2, steps=6)

    losses, expected = read_losses(place / "moved"), read_losses(place / "alone")
    assert [step for step, _ in losses] == [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(losses, expected, rtol=LOSS_TOLERANCE)
    results = [json.loads((place / name / "results.json").read_text()) for name in ("moved", "alone")]
    assert [result["steps"] for result in results] == [6, 6]
    assert results[0]["directions"] == results[1]["directions"]
    assert results[0]["samples"] == results[1]["samples"]


def test_a_process_that_never_comes_is_named(place, write_tiny, together, new_address):
    """Two of three processes wait a second, name the third and leave with the code of a user's mistake."""
    address = new_address()
    command = ("-m", "t5x_ext", "train", "--gin_file=tiny.gin", *write_tiny(place, train=4), "--run_dir=out")
    joining = ("--distributed=explicit", f"--coordinator_address={address}", "--num_processes=3")
    seconds = "--initialization_timeout=2"
    codes, outputs = together(*((*command, *joining, seconds, f"--process_id={number}") for number in (0, 2)))
    told = f"t5x_ext train: process 1 of 3 did not arrive within 2 s (coordinator {address}); arrived: 0, 2\n"
    assert codes == [2, 2]
    assert all(output.endswith(told) for output in outputs)
