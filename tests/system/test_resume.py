"""A run that is killed and started again ends as if nothing had happened: bit for bit, on one CPU."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import jax
import numpy as np

from t5x_ext.checkpoints import CheckpointStore

HANG = '''
import os
import time


class Hang:
    """Stops the process in its tracks, so that it can be killed at a known update."""

    def after_step(self, loop):
        if os.environ.get("HANG_AT") == str(loop.step):
            time.sleep(600)

    def at_end(self, loop):
        pass
'''

RUN = """
from __gin__ import dynamic_registration
import hang
from t5x_ext import data
from t5x_ext import models
from t5x_ext import train

include 'tiny.gin'

train.Run:
    steps = 24
    ema_decay = 0.9
    hooks = (@hang.Hang(),)
models.TransformerConfig:
    dropout = 0.1
    attention_dropout = 0.1
    activation_dropout = 0.1
data.DataConfig:
    bidirectional = True
    tags = @data.TagPolicy()
    subword = @data.SubwordSampling()
data.TagPolicy.decoder = 'target'
data.SubwordSampling.variants = 3
train.CheckpointConfig.every = 4
"""

TIMES = re.compile(r"seconds|time/.*|\w+_per_second")


def metrics(run_dir):
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def what_was_learned(run_dir):
    """Metrics but for timing, and all weights as bytes."""
    lines = [{name: value for name, value in line.items() if not TIMES.fullmatch(name)} for line in metrics(run_dir)]
    with CheckpointStore(Path(run_dir) / "checkpoints") as store:
        trees = [store.restore_params("last", part) for part in ("params", "ema")]
    return lines, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees)]


def test_killed_and_resumed_equals_uninterrupted(place, write_tiny, start, finish):
    (place / "hang.py").write_text(HANG)
    (place / "resume.gin").write_text(RUN)
    train = ["-m", "t5x_ext", "train", "--gin_file=resume.gin", *write_tiny(place, train=200)]

    hang_at = random.randint(9, 23)  # the save after update 8 has waited for that after update 4
    print("killed in update", hang_at + 1)
    process = start(*train, "--run_dir=killed", HANG_AT=str(hang_at))
    try:
        while len(metrics("killed")) < hang_at - 2:  # a line is written when the update after it is under way
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    finally:
        process.kill()
    process.communicate()
    assert not (place / "killed/results.json").exists()
    before = metrics("killed")
    output = finish(*train, "--run_dir=killed")
    began = int(re.search(r"resuming from step (\d+)", output)[1])
    assert 4 <= began <= hang_at
    assert began % 4 == 0

    finish(*train, "--run_dir=whole")
    lines, weights = what_was_learned("killed")
    expected_lines, expected_weights = what_was_learned("whole")
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert lines == expected_lines
    assert weights == expected_weights
    assert [line["loss"] for line in before] == [line["loss"] for line in lines[: len(before)]]
    # The run is worth comparing: it learned, in several epochs, and its average is not its last weights.
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    half = len(weights) // 2
    assert weights[:half] != weights[half:]
