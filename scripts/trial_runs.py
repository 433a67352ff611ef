"""Runs of seconds, in processes of their own, that bench_resume.py and bench_faults.py kill and damage."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5x_ext.checkpoints import CheckpointStore

TIMEOUT_SECONDS = 300
"""No run here takes so long, unless it hangs."""

GIN = """
from __gin__ import dynamic_registration
from t5x_ext import corpora
from t5x_ext import data
from t5x_ext import decode
from t5x_ext import models
from t5x_ext import optim
from t5x_ext import tasks
from t5x_ext import train

train.Run:
    task = @tasks.Translation()
    optimizer = @optim.adam()
    steps = {steps}
    num_microbatches = {num_microbatches}
    ema_decay = 0.9
    log_every = 1
    tensorboard = False
    evaluation = @train.EvaluationConfig()
    checkpoints = @train.CheckpointConfig()
tasks.Translation:
    data = @data.DataConfig()
    model = @models.TransformerConfig()
    max_lines = 0
optim.adam.learning_rate = 0.003
models.TransformerConfig:
    embed_dim = 32
    mlp_dim = 64
    num_heads = 2
    encoder_layers = 2
    decoder_layers = 2
    dropout = 0.1
    attention_dropout = 0.1
data.DataConfig:
    train = (@train/corpora.CldrCorpus(),)
    valid = (@valid/corpora.CldrCorpus(),)
    bidirectional = True
    tags = @data.TagPolicy()
    subword = @data.SubwordSampling()
    vocabulary = @data.VocabularyConfig()
    batch = @data.BatchConfig()
corpora.CldrCorpus:
    num_tuples = 2500
    valid_per_family = 2
    test_per_family = 2
train/corpora.CldrCorpus.split = 'train'
valid/corpora.CldrCorpus.split = 'valid'
data.TagPolicy.decoder = 'target'
data.SubwordSampling.variants = 2
data.VocabularyConfig.size = 400
data.BatchConfig:
    rows = 8
    source_length = 48
    target_length = 48
train.EvaluationConfig:
    every = {evaluate_every}
train.CheckpointConfig:
    every = {save_every}
    keep_last = 3
"""
"""Dropout, packing, sampled subwords, an average of the weights, two directions: whatever a restart might get wrong."""

_SAME = ("step", "loss", "nll", "accuracy", "gradient_norm", "target_tokens", "skipped_updates")
"""What a line of metrics says of the training itself; the rest are times. `valid/...` belongs to it, too."""


class Trial:
    """A folder with the gin file of a small run, and the processes that train on it."""

    def __init__(
        self, folder: Path, steps: int = 60, save_every: int = 5, evaluate_every: int = 20, extra_gin: str = ""
    ):
        """Writes the gin file; `extra_gin` may import modules that lie in the folder."""
        self.folder, self.steps = folder, steps
        num_microbatches = 1 if extra_gin else 2
        text = GIN.format(
            steps=steps, save_every=save_every, evaluate_every=evaluate_every, num_microbatches=num_microbatches
        )
        (folder / "trial.gin").write_text(text + extra_gin, encoding="utf-8")

    def command(self, run_dir: str, *flags: str) -> list[str]:
        """The command that trains; to be run in the folder."""
        return [
            *(sys.executable, "-m", "t5x_ext", "train", "--gin_file=trial.gin"),
            *(f"--run_dir={run_dir}", "--cache_dir=caches", "--compile_cache_dir=programs", *flags),
        ]

    def environment(self) -> dict[str, str]:
        """The environment in which it is run."""
        return {**os.environ, "JAX_PLATFORMS": "cpu"}

    def start(self, run_dir: str, *flags: str) -> subprocess.Popen[bytes]:
        """Starts training; what it says is added to `RUN_DIR.log`."""
        with (self.folder / f"{run_dir}.log").open("ab") as log:
            return subprocess.Popen(
                self.command(run_dir, *flags), cwd=self.folder, env=self.environment(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def train(self, run_dir: str, *flags: str) -> int:
        """Trains to the end; the exit code."""
        return self.start(run_dir, *flags).wait(TIMEOUT_SECONDS)

    def said(self, run_dir: str) -> str:
        """Everything that the processes of a run have printed."""
        return (self.folder / f"{run_dir}.log").read_text(encoding="utf-8", errors="replace")

    def lines(self, run_dir: str) -> list[dict[str, Any]]:
        """The lines of metrics, without times; a line that is being written is left out."""
        path = self.folder / run_dir / "metrics.jsonl"
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                found.append(_without_times(json.loads(line)))
            except ValueError:
                continue
        return [line for line in found if len(line) > 1]

    def updates(self, run_dir: str) -> int:
        """Updates that the metrics tell of; cheap enough to ask all the time."""
        path = self.folder / run_dir / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 4096, 0))
            whole = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b'{"step"')]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def checkpoints(self, run_dir: str) -> Path:
        """The folder of the checkpoints."""
        return self.folder / run_dir / "checkpoints"

    def weights(self, run_dir: str) -> str:
        """SHA-256 of the last weights and of their average, as bytes."""
        digest = hashlib.sha256()
        with CheckpointStore(self.checkpoints(run_dir)) as store:
            for part in ("params", "ema"):
                for leaf in jax.tree.leaves(store.restore_params("last", part)):
                    digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()

    def until(self, process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> bool:
        """Waits until something has happened; False when the process ended before it."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while not happened():
            if process.poll() is not None:
                return False
            if time.monotonic() > end:
                process.kill()
                raise TimeoutError(f"nothing happened in {TIMEOUT_SECONDS} s; {self.folder} says what was printed")
            time.sleep(0.002)
        return True

    def differences(self, run_dir: str, other: str) -> str | None:
        """Where two runs differ, in a few words; None when metrics and weights are the same, bit for bit."""
        ours, theirs = self.lines(run_dir), self.lines(other)
        for one, two in zip(ours, theirs):
            if one != two:
                return f"{one} is not {two}"
        if len(ours) != len(theirs):
            return f"{len(ours)} lines of metrics, not {len(theirs)}"
        return None if self.weights(run_dir) == self.weights(other) else "other weights at the end"


def _without_times(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name in _SAME or name.startswith("valid/")}
