"""Lets the tests of optimizers share the table of what every optimizer is checked on, and compile quickly."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).resolve().parent))


@pytest.fixture(scope="module")
def compile_quickly():
    """For tests in which compiling takes most of the time."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
