"""A loop without a model: steps that only report, and a clock that tests turn by hand; and tiny runs with one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from t5x_ext.contracts import Loss
from t5x_ext.corpora import ParallelText
from t5x_ext.data import BatchConfig, DataConfig, VocabularyConfig, train_vocabulary
from t5x_ext.models import TransformerConfig
from t5x_ext.optim import adam
from t5x_ext.tasks import Translation
from t5x_ext.train import CheckpointConfig, Clock, EvaluationConfig, Run, execute
from t5x_ext.train.loop import Hook, Loop, train
from t5x_ext.train.state import TrainState
from t5x_ext.train.step import StepMetrics


class Seconds:
    """A clock that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def new_loop(seconds: Seconds) -> Callable[..., Loop]:
    """A loop after `step` updates, whose state is the counter alone."""

    def make(step: int = 0, **fields: Any) -> Loop:
        return Loop(TrainState(np.int32(step), {}, (), (), ()), step, step, clock=Clock(seconds), **fields)

    return make


@pytest.fixture
def report() -> Callable[..., StepMetrics]:
    """What a step reports: the summed loss over `labels` labels, of which `hits` were right."""

    def make(loss: float = 1.0, labels: float = 1.0, hits: float = 0.0, norm: float = 1.0, finite: bool = True) -> Any:
        sums = Loss(np.float32(loss), np.float32(labels), {"accuracy": (np.float32(hits), np.float32(labels))})
        return StepMetrics(sums, np.float32(norm), np.bool_(finite), {})

    return make


@pytest.fixture
def run_loop(seconds: Seconds) -> Callable[..., Loop]:
    """Runs the loop from where it stands to the last of the reports, that of update n being `reports[n - 1]`.

    A batch is its own number and takes half a second to come; a step takes two.
    """

    def run(loop: Loop, reports: Sequence[StepMetrics], *hooks: Hook, steps: int | None = None) -> Loop:
        def batches() -> Any:
            for number in range(loop.batches_consumed, len(reports)):
                seconds.now += 0.5
                yield number

        def step(state: TrainState, frozen: Any, batch: int) -> tuple[TrainState, StepMetrics]:
            seconds.now += 2.0
            return state._replace(step=state.step + 1), reports[batch]

        loop.observers = tuple(hook.observe for hook in hooks if hasattr(hook, "observe"))
        return train(loop, step, batches(), steps=steps or len(reports), hooks=hooks)

    return run


_WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "red": "rot", "tree": "Baum", "house": "Haus"}


@dataclass(frozen=True)
class Place:
    """A folder with aligned files `train`, `valid` and `test` in English and German, and their vocabulary."""

    path: Path

    def run(self, run_dir: Path | str, **changes: Any) -> dict[str, Any]:
        """Trains `tiny_run` with these changes; token caches are shared."""
        options = {name: changes.pop(name) for name in ("config_text", "init_from") if name in changes}
        return execute(self.tiny_run(**changes), str(run_dir), cache_dir=str(self.path / "caches"), **options)

    def tiny_run(self, **changes: Any) -> Run:
        """Six updates of a model with one layer a stack; `dropout` and fields of `Translation` may be given, too."""
        model = TransformerConfig(
            embed_dim=16, mlp_dim=32, num_heads=2, encoder_layers=1, decoder_layers=1,
            dropout=changes.pop("dropout", 0.0),
        )  # fmt: skip
        task: dict[str, Any] = {"data": self.data(), "model": model, "max_lines": 0}
        task |= {item.name: changes.pop(item.name) for item in fields(Translation) if item.name in changes}
        values: dict[str, Any] = {
            "task": Translation(**task),
            "optimizer": adam(0.01),
            "steps": 6,
            "log_every": 1,
            "tensorboard": False,
            "evaluation": EvaluationConfig(every=0),
            "checkpoints": CheckpointConfig(every=0),
        }
        return Run(**{**values, **changes})

    def data(self, valid: bool = False, test: bool = False) -> DataConfig:
        return DataConfig(
            train=(self.corpus("train"),),
            valid=(self.corpus("valid"),) if valid else (),
            test=(self.corpus("test"),) if test else (),
            vocabulary=VocabularyConfig(path=str(self.path / "vocabulary")),
            batch=BatchConfig(rows=8, source_length=16, target_length=16),
        )

    def corpus(self, role: str) -> ParallelText:
        return ParallelText(str(self.path / f"{role}.en"), str(self.path / f"{role}.de"), "en", "de")


def write_texts(folder: Path, role: str, lines: int, seed: int) -> None:
    """Word-for-word translations of random words."""
    draw = random.Random(seed)
    sources = [draw.choices(list(_WORDS), k=draw.randint(1, 4)) for _ in range(lines)]
    for code, words in (("en", sources), ("de", [[_WORDS[word] for word in line] for line in sources])):
        (folder / f"{role}.{code}").write_text("".join(" ".join(line) + "\n" for line in words))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    for seed, (role, lines) in enumerate({"train": 200, "valid": 12, "test": 8}.items()):
        write_texts(folder, role, lines, seed)
    text = [line for code in ("en", "de") for line in (folder / f"train.{code}").read_text().splitlines()]
    train_vocabulary(text, 290, ("en", "de")).save(str(folder / "vocabulary"))
    return Place(folder)


@pytest.fixture(scope="session")
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that one test has compiled are loaded by the next one."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
