"""What system tests share: a small text in two invented languages, and commands in processes of their own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

NUMBERS = dict(
    zip(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"),
    )
)

TINY = """
from __gin__ import dynamic_registration
from t5x_ext import data
from t5x_ext import decode
from t5x_ext import models
from t5x_ext import optim
from t5x_ext import tasks
from t5x_ext import train

train.Run:
    task = @tasks.Translation()
    optimizer = @optim.adam()
    steps = 2
    log_every = 1
    tensorboard = False
    evaluation = @train.EvaluationConfig()
    checkpoints = @train.CheckpointConfig()
tasks.Translation:
    data = @data.DataConfig()
    model = @models.TransformerConfig()
    max_lines = 0
    test_decode = @decode.DecodeConfig()
optim.adam.learning_rate = 0.003
models.TransformerConfig:
    embed_dim = 16
    mlp_dim = 32
    num_heads = 2
    encoder_layers = 1
    decoder_layers = 1
data.DataConfig:
    vocabulary = @data.VocabularyConfig()
    batch = @data.BatchConfig()
data.VocabularyConfig.size = 300
data.BatchConfig:
    rows = 8
    source_length = 32
    target_length = 32
train.EvaluationConfig:
    every = 0
decode.DecodeConfig.max_length_extra = 4
train.CheckpointConfig.every = 0
"""


def reversed_numbers(source: str) -> str:
    """The translation of a line: its words in the other language, from the last to the first."""
    return " ".join(NUMBERS[word] for word in reversed(source.split()))


@pytest.fixture(scope="session")
def write_tiny() -> Callable[..., list[str]]:
    """Writes `tiny.gin`, and so many distinct lines for each role as are asked for; gives the flags to train on them.

    A line is three to six numbers; none is in two roles.
    """

    def write(folder: Path, **counts: int) -> list[str]:
        (folder / "tiny.gin").write_text(TINY)
        draw, known, flags = random.Random(0), set(), ["--source_language=en", "--target_language=es"]
        for role, count in counts.items():
            lines: list[str] = []
            while len(lines) < count:
                line = " ".join(draw.choices(list(NUMBERS), k=draw.randint(3, 6)))
                if line not in known:
                    known.add(line)
                    lines.append(line)
            (folder / f"{role}.en").write_text("".join(f"{line}\n" for line in lines))
            (folder / f"{role}.es").write_text("".join(f"{reversed_numbers(line)}\n" for line in lines))
            flags += [f"--{role}_source={role}.en", f"--{role}_target={role}.es"]
        return flags

    return write


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; commands started from it compile quickly."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    return tmp_path


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Starts Python in a process of its own with these arguments."""

    def run(*arguments: str, python: str = sys.executable, **environment: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        return subprocess.Popen([python, *arguments], env={**os.environ, **environment}, text=True, **pipes)

    return run


@pytest.fixture(scope="session")
def finish(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Runs Python to its end, which must be a good one; what it printed."""

    def run(*arguments: str, **options: str) -> str:
        process = start(*arguments, **options)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output

    return run
