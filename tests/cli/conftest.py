from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

TOY = '''
"""A toy configuration tree, as a user's module outside the package would define it."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from t5x_ext.contracts import UserError


@dataclass(frozen=True)
class Model:
    width: int = 8
    norm: Literal["pre", "post"] = "pre"
    dropout: float = 0.1

    def __post_init__(self):
        if self.width % 2:
            raise UserError(f"width {self.width} is odd; it must be even")


@dataclass(frozen=True)
class Small(Model):
    width: int = 4


@dataclass(frozen=True)
class Text:
    path: str
    language: str | None = None


@dataclass(frozen=True)
class Data:
    train: tuple[Text, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0


def decay(peak: float, warmup_steps: int = 10) -> Callable[[int], float]:
    return lambda step: peak / max(step, warmup_steps)


@dataclass(frozen=True)
class Optimizer:
    peak: float
    momentum: float


def adam(learning_rate: Any = 0.1, momentum: float = 0.9) -> Optimizer:
    return Optimizer(learning_rate(1) if callable(learning_rate) else learning_rate, momentum)


def sgd(learning_rate: float = 0.1) -> Optimizer:
    return Optimizer(learning_rate, 0.0)


def loss(model: Any, smoothing: float = 0.1) -> tuple[Any, float]:
    return model, smoothing


@dataclass(frozen=True)
class Run:
    model: Model
    optimizer: Optimizer = Optimizer(1.0, 0.0)
    objective: Callable[..., Any] = loss
    data: Data = Data()
    steps: int = 100
    name: str = "toy"
    notes: tuple[str, ...] = ()
    bidirectional: bool = False
'''


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> types.ModuleType:
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "toy_plugin.py").write_text(TOY)
    sys.path.append(str(folder))
    import toy_plugin

    return toy_plugin


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


TINY = """
from __gin__ import dynamic_registration
from t5x_ext import data
from t5x_ext import models
from t5x_ext import optim
from t5x_ext import tasks
from t5x_ext import train

STEPS = 12
tasks.Translation:
    data = @data.DataConfig()
    model = @models.VegaTiny()
train.Run:
    task = @tasks.Translation()
    optimizer = @optim.adam()
    steps = %STEPS
    log_every = 4
    tensorboard = False
    evaluation = @train.EvaluationConfig()
    checkpoints = @train.CheckpointConfig()
data.DataConfig:
    vocabulary = @data.VocabularyConfig()
    batch = @data.BatchConfig()
    tags = @data.TagPolicy()
data.TagPolicy.decoder = 'target'
data.VocabularyConfig.size = 320
data.BatchConfig:
    rows = 8
    source_length = 32
    target_length = 32
models.VegaTiny:
    embed_dim = 32
    mlp_dim = 64
    num_heads = 2
optim.adam.learning_rate = @optim.inverse_sqrt()
optim.inverse_sqrt.peak = 0.003
optim.inverse_sqrt.warmup_steps = 4
tasks.Translation.max_lines = 4
train.EvaluationConfig.every = 6
train.CheckpointConfig:
    every = 4
    keep_last = 3
"""

_WORDS = {"one": "eins", "two": "zwei", "three": "drei", "red": "rot", "green": "grün", "tree": "Baum", "house": "Haus"}


def write_pair(folder: Path, name: str, lines: int, seed: int = 0) -> tuple[str, str]:
    """Writes `name.en` and `name.de`: word-for-word translations."""
    import random

    draw = random.Random(seed)
    sources = [draw.choices(list(_WORDS), k=draw.randint(1, 6)) for _ in range(lines)]
    (folder / f"{name}.en").write_text("".join(" ".join(words) + "\n" for words in sources), encoding="utf-8")
    targets = [" ".join(_WORDS[word] for word in words) for words in sources]
    (folder / f"{name}.de").write_text("".join(line + "\n" for line in targets), encoding="utf-8")
    return f"{name}.en", f"{name}.de"


def corpus_flags(*roles: str) -> list[str]:
    """The flags of `train` for files `ROLE.en` and `ROLE.de` in the current folder."""
    files = [f"--{role}_{side}={role}.{code}" for role in roles for side, code in (("source", "en"), ("target", "de"))]
    return [*files, "--source_language=en", "--target_language=de"]


@pytest.fixture
def bare_folder(folder: Path) -> Path:
    """A current folder with the gin file and none of its texts."""
    (folder / "tiny.gin").write_text(TINY)
    return folder


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text files, a gin file, and `out`: a run of a few updates; tests only read it."""
    import contextlib

    from t5x_ext.cli.main import main

    place = tmp_path_factory.mktemp("workplace")
    (place / "tiny.gin").write_text(TINY)
    for role, lines in {"train": 300, "valid": 20, "test": 12}.items():
        write_pair(place, role, lines, seed=lines)
    with contextlib.chdir(place):
        assert main(["train", "--gin_file=tiny.gin", *corpus_flags("train", "valid", "test"), "--run_dir=out"]) == 0
    return place


@pytest.fixture
def in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workplace as the current folder."""
    monkeypatch.chdir(workplace)
    return workplace
