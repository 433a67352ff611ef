"""One plugin of each kind, in a module outside the package that nothing registers, named by a gin file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_ext.checkpoints import CheckpointStore, RunFolder
from t5x_ext.cli.main import run
from t5x_ext.models import config_from_json, init_params

MODULE = '''
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from t5x_ext.contracts import Accumulator, Loss
from t5x_ext.decode import Hypotheses, require_methods
from t5x_ext.models import TransformerConfig


@dataclass(frozen=True)
class Counting:
    """A corpus: numbers, in letters."""

    lines: int
    name = "counting"
    languages = ("en", "xh")

    def pairs(self):
        for number in range(self.lines):
            yield " ".join("ab"[int(bit)] for bit in f"{number:b}"), " ".join("xy"[int(bit)] for bit in f"{number:b}")

    def families(self):
        return ["odd" if number % 2 else "even" for number in range(self.lines)]

    def fingerprint(self):
        return f"counting to {self.lines}"


@dataclass(frozen=True)
class Minute(TransformerConfig):
    """A preset."""

    embed_dim: int = 8
    mlp_dim: int = 8
    num_heads: int = 1
    encoder_layers: int = 1
    decoder_layers: int = 1


@dataclass(frozen=True)
class SquaredScores:
    """An objective."""

    model: object
    factor: float = 1.0

    def logits(self, params, batch, context):
        return self.model.apply({"params": params}, batch)

    def label_weights(self, batch, context=None):
        return (batch["target_segment_ids"] > 0).astype(jnp.float32)

    def __call__(self, params, batch, context):
        weights = self.label_weights(batch)
        squares = jnp.mean(self.logits(params, batch, context) ** 2, axis=-1)
        total = self.factor * jnp.sum(squares * weights)
        return Loss(total, jnp.sum(weights), {"largest_step": (context.step * jnp.ones(()), jnp.ones(()))})


def ones():
    """An accumulator: every gradient is one, whatever the microbatches say."""
    return Accumulator(
        init=lambda params, step: jax.tree.map(jnp.ones_like, params),
        add=lambda state, grads, weight: state,
        finish=lambda state: state,
    )


def rising(first):
    """A learning-rate schedule: `first`, twice as much, three times as much."""
    return lambda step: first * (step + 1)


@dataclass(frozen=True)
class Echo:
    """A search without a decoder: one pass of the encoder, and the source is its own translation."""

    times: int = 1
    n_best: int = 1
    rows_per_source = 1

    def __call__(self, model, params, inputs):
        require_methods(self, model, ("encode",))
        source, lengths, forced = inputs.source, inputs.source_lengths, inputs.prefix.shape[1]
        positions = jnp.broadcast_to(jnp.arange(source.shape[1]), source.shape)
        own = positions < lengths[:, None]
        encoded = model.apply({"params": params}, source, 1 * own, positions, method="encode")
        words = jnp.where(own, source, inputs.eos_id)
        words = jnp.pad(words, ((0, 0), (0, inputs.max_length)), constant_values=inputs.eos_id)
        tokens = jnp.concatenate([inputs.prefix, words], axis=1)[:, : inputs.max_length]
        lengths = jnp.minimum(lengths + forced, inputs.max_length)
        return Hypotheses(
            *(jnp.repeat(found[:, None], self.n_best, axis=1) for found in (tokens, lengths, encoded.mean((1, 2))))
        )


@dataclass
class Notes:
    """A hook: its metric picks the best checkpoint, what it remembers is in it."""

    best: int

    def begin(self, session):
        self.first = session.loop.step

    def after_step(self, loop):
        loop.memory.hooks.setdefault("notes", []).append(loop.step)
        if loop.evaluation:
            loop.evaluation["notes/nearness"] = -abs(loop.step - self.best)

    def at_end(self, loop):
        loop.memory.hooks["notes"].append("end")
'''

GIN = """
from __gin__ import dynamic_registration
import optax
import outside_plugin
from t5x_ext import data
from t5x_ext import decode
from t5x_ext import tasks
from t5x_ext import train

train.Run:
    task = @tasks.Translation()
    objective = @outside_plugin.SquaredScores
    optimizer = @optax.sgd()
    accumulator = @outside_plugin.ones()
    hooks = (@outside_plugin.Notes(),)
    steps = 2
    num_microbatches = 2
    log_every = 1
    tensorboard = False
    evaluation = @train.EvaluationConfig()
tasks.Translation:
    data = @data.DataConfig()
    model = @outside_plugin.Minute()
    max_lines = 0
    test_decode = @decode.DecodeConfig()
outside_plugin.SquaredScores.factor = 3.0
outside_plugin.Notes.best = 1
optax.sgd.learning_rate = @outside_plugin.rising()
outside_plugin.rising.first = 0.125
outside_plugin.Echo.times = 2
data.DataConfig:
    train = (@outside_plugin.Counting(),)
    valid = (@few/outside_plugin.Counting(),)
    test = (@few/outside_plugin.Counting(),)
    vocabulary = @data.VocabularyConfig()
    batch = @data.BatchConfig()
outside_plugin.Counting.lines = 64
few/outside_plugin.Counting.lines = 4
data.VocabularyConfig.size = 280
data.BatchConfig:
    rows = 4
    source_length = 16
    target_length = 16
train.EvaluationConfig:
    every = 1
    metric = 'notes/nearness'
    higher_is_better = True
decode.DecodeConfig:
    search = @outside_plugin.Echo()
    max_length_ratio = 1.0
    max_length_extra = 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, as that of a user with a module and a gin file in it."""
    (tmp_path / "outside_plugin.py").write_text(MODULE)
    (tmp_path / "plugins.gin").write_text(GIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "outside_plugin", raising=False)
    return tmp_path


@pytest.mark.usefixtures("compile_once")
def test_a_plugin_of_each_kind_trains_through_the_command(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["t5x_ext", "train", "--gin_file=plugins.gin", "--run_dir=out"])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 0

    results = json.loads(Path("out/results.json").read_text())
    assert results["steps"] == 2
    assert set(results["families"]) == {"even", "odd"}
    assert all(sample["translation"] == sample["source"] for sample in results["samples"])
    model = config_from_json(RunFolder("out").read_model().model)
    assert (model.embed_dim, model.num_heads) == (8, 1)

    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["largest_step"] for line in lines if "largest_step" in line] == [0, 1]
    measured = {line["step"]: line for line in lines if "notes/nearness" in line}
    assert {"valid/loss", "valid/largest_step"} <= set(measured[1])

    with CheckpointStore("out/checkpoints") as store:
        assert store.best_step() == 1
        trained = store.restore_params("last")
    # Gradients of one at rates 1/8 and 2/8.
    start = init_params(model, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a - b, -0.375, atol=1e-6), trained, start)
    assert "outside_plugin.SquaredScores.factor = 3.0" in Path("out/config.gin").read_text()
