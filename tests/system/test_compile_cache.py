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


def test_the_second_run_compiles_nothing_and_learns_the_same(train):
    first, weights = train("first", "--compile_cache_dir=programs")
    second, again = train("second", "--compile_cache_dir=programs")
    assert re.search(r"training step compiled in \d+\.\d s \(cache: hits 0, misses 1\)", first)
    assert re.search(r"training step compiled in \d+\.\d s \(cache: hits 1, misses 0\)", second)
    jax.tree.map(np.testing.assert_array_equal, weights, again)
    assert "warning" not in second.lower()
    assert "error" not in second.lower()


def test_a_run_goes_on_with_the_threads_of_its_start_and_with_programs_for_them(train):
    train("run", "--compile_cache_dir=programs", NPROC="3")
    said, _ = train("run", "--compile_cache_dir=programs", "--steps=4")
    assert "going on from step 2" in said
    assert json.loads(Path("run/environment.json").read_text())["cpu_threads"] == 3
    assert "equal to rounding" not in said
    assert "hits 1" in said
    (folder,) = Path("programs").iterdir()
    assert "-3-" in folder.name


def test_an_empty_folder_keeps_nothing(train):
    assert "(cache: off)" in train("run", "--compile_cache_dir=")[0]
