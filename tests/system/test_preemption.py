"""Two processes, of which one is told to stop: both save after the same update, and one process alone goes on."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from pathlib import Path

from t5x_ext.checkpoints import CheckpointStore


def metrics(run_dir):
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_signal_to_one_process_stops_all_after_the_same_update(place, write_tiny, start, finish):
    flags = write_tiny(place, train=200)
    train = ["-m", "t5x_ext", "train", "--gin_file=tiny.gin", *flags, "--run_dir=out"]
    together = ["--distributed=explicit", f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
    processes = [start(*train, "--steps=100000", *together, f"--process_id={number}") for number in (0, 1)]
    try:
        while len(metrics("out")) < 8:
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGUSR1)  # as Slurm sends it, to whichever task it likes
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [130, 130], outputs
    stopped = int(re.search(r"SIGUSR1 received; update (\d+) is on disk \d+\.\d s later", outputs[0])[1])
    assert stopped >= 8
    assert "on disk" not in outputs[1]  # process 0 speaks for both
    with CheckpointStore("out/checkpoints") as store:
        assert store.steps() == [stopped]
    assert metrics("out")[-1] == {"step": stopped, "preemption_seconds": metrics("out")[-1]["preemption_seconds"]}

    output = finish(*train, f"--steps={stopped + 3}")
    assert f"resuming from step {stopped}" in output
    assert "processes 1 (was 2)" in output
    assert [line["step"] for line in metrics("out") if "loss" in line] == list(range(1, stopped + 4))
    results = json.loads(Path("out/results.json").read_text())
    assert 0 < results["preemption_seconds"][0] < 25
