"""Programs that a command has compiled are there for the next one, which computes the same bits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_ext.checkpoints import CheckpointStore


@pytest.fixture
def train(place, write_tiny, finish):
    """Trains in a process of its own; what it said, and its weights."""
    files = ["-m", "t5x_ext", "train", "--gin_file=tiny.gin", *write_tiny(place, train=200)]

    def run(name, *flags, **environment):
        said = finish(*files, f"--run_dir={name}", *flags, **environment)
        with CheckpointStore(f"{name}/checkpoints") as store:
            return said, store.restore_params("last")

    return run


def test_programs_and_threads_are_those_of_the_first_start_and_give_the_same_bits(train):
    """A run on three threads, gone on with by programs from the folder, against one that compiles all by itself."""
    first, _ = train("parts", "--compile_cache_dir=programs", NPROC="3")
    assert re.search(r"training step compiled in \d+\.\d s \(cache: hits 0, misses 1\)", first)
    second, weights = train("parts", "--compile_cache_dir=programs", "--steps=4")
    assert "resuming from step 2" in second
    assert re.search(r"training step compiled in \d+\.\d s \(cache: hits 1, misses 0\)", second)
    assert not re.search("warning|error|equal to rounding", second.lower())
    assert json.loads(Path("parts/environment.json").read_text())["cpu_threads"] == 3
    (folder,) = Path("programs").iterdir()
    assert "-3-" in folder.name

    said, expected = train("whole", "--compile_cache_dir=", "--steps=4", NPROC="3")
    assert "(cache: off)" in said
    jax.tree.map(np.testing.assert_array_equal, weights, expected)
