"""A pipeline on two processes: what one makes, a mistake that ends both, and killed processes that go on."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from t5x_ext.cli.main import main

PIPELINE = """
from __gin__ import dynamic_registration
from t5x_ext import corpora
from t5x_ext import data
from t5x_ext import decode
from t5x_ext import train
from t5x_ext import pipeline
from t5x_ext import vega_mt
from t5x_ext.corpora import noise
include 'tiny.gin'
pipeline.Pipeline.stages = [
    @bitext/pipeline.Texts(), @model/pipeline.Train(), @average/pipeline.Average(), @round/vega_mt.Synthesize(),
]
bitext/pipeline.Texts.name = 'bitext'
bitext/pipeline.Texts.corpora = [@corpora.ParallelText()]
corpora.ParallelText:
    source_path = 'train.en'
    target_path = 'train.es'
    source_language = 'en'
    target_language = 'es'
model/pipeline.Train:
    name = 'model'
    run = @train.Run()
    corpora = ['bitext']
data.DataConfig.train = [@corpora.ParallelText()]
train.CheckpointConfig.every = 1
average/pipeline.Average:
    name = 'average'
    model = 'model'
    last = 2
round/vega_mt.Synthesize:
    name = 'round'
    model = 'average'
    texts = ['bitext']
    forward = @forward/decode.DecodeConfig()
    backward = @backward/decode.DecodeConfig()
    noise = @noise.WordNoise()
forward/decode.DecodeConfig.search = @decode.Greedy()
backward/decode.DecodeConfig.search = @decode.Sample()
"""
RUN = ("pipeline", "--gin_file=pipeline.gin")


@pytest.fixture
def begin(place, write_tiny, start):
    """Starts the command on two processes."""
    write_tiny(place, train=20)
    (place / "pipeline.gin").write_text(PIPELINE)

    def run(*flags):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        joining = ("--distributed=explicit", f"--coordinator_address={address}", "--num_processes=2")
        settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
        command = ("-m", "t5x_ext", *RUN, *flags, *joining)
        return [start(*command, f"--process_id={number}", **settings) for number in (0, 1)]

    return run


def finish(processes):
    """Return codes, and what was printed."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def read_losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def check_made_by_two(folder, expected):
    """Text is the same byte for byte, losses to rounding; who has decoded is recorded."""
    texts = sorted(path.name for path in (expected / "bitext").iterdir() if path.name.startswith("train"))
    assert len(texts) == 2
    for name in texts:
        assert (folder / "bitext" / name).read_bytes() == (expected / "bitext" / name).read_bytes()
    np.testing.assert_allclose(*(read_losses(out / "model/run") for out in (folder, expected)), rtol=1e-5)
    made = [json.loads((out / "round/artefact.json").read_text())["artefact"] for out in (folder, expected)]
    assert [text["files"] for text in made[0]["corpora"]] == [text["files"] for text in made[1]["corpora"]]
    assert made[0]["counts"] == made[1]["counts"]
    record = json.loads((folder / "round/record.json").read_text())
    assert record["decoding"]["translated"]["processes"] == record["environment"]["processes"] == 2
    assert not list(folder.rglob("*.parts"))


def test_two_processes_make_what_one_makes_and_a_mistake_ends_both(place, begin):
    codes, outputs = finish(begin("--output_dir=two"))
    assert codes == [0, 0], "\n".join(outputs)
    assert "round            corpora  lines 40" in outputs[0]
    assert "lines" not in outputs[1]
    assert main([*RUN, "--output_dir=one"]) == 0
    check_made_by_two(Path("two"), Path("one"))

    codes, outputs = finish(begin("--output_dir=two", "--gin.Texts.stop=9"))
    assert codes == [2, 2], "\n".join(outputs)
    assert "stage 'bitext' in two was made from something else" in outputs[0].splitlines()[-1]
    place_of_it, mistake = outputs[1].splitlines()
    assert place_of_it.startswith("process 1 of 2")
    assert mistake.startswith("t5x_ext pipeline: process 0: stage 'bitext'")


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on(place, begin):
    for last in ("model/run/checkpoints/00000001/digests.json", "round/record.json"):
        processes = begin("--output_dir=two")
        while not Path("two", last).exists():
            assert processes[0].poll() is None, finish(processes)
            time.sleep(0.05)
        for process in processes:
            process.kill()
        assert finish(processes)[0] == [-signal.SIGKILL] * 2
    codes, outputs = finish(begin("--output_dir=two"))
    assert codes == [0, 0], "\n".join(outputs)
    assert main([*RUN, "--output_dir=one"]) == 0
    check_made_by_two(Path("two"), Path("one"))
