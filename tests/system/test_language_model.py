"""A decoder alone, trained by the same loop on text whose entropy is known."""

from __future__ import annotations

import numpy as np
import pytest

from t5x_ext.cli.main import main
from t5x_ext.contracts import UserError
from t5x_ext.decode import Translator, perplexity

LETTERS = "abcdefgh"
LENGTH = 9
# A first letter of eight, then eight times one of two; where a line ends is certain.
NATS_A_LINE = np.log(8) + (LENGTH - 1) * np.log(2)


def chains(count: int, seed: int) -> list[str]:
    """Lines in which each letter is followed by one of two, both equally probable."""
    rng = np.random.default_rng(seed)
    states = [rng.integers(len(LETTERS), size=count)]
    for _ in range(LENGTH - 1):
        states.append((2 * states[-1] + 3 + rng.integers(2, size=count)) % len(LETTERS))
    return [" ".join(LETTERS[state] for state in line) for line in np.stack(states, axis=1)]


GIN = """
from __gin__ import dynamic_registration
from t5x_ext import corpora
from t5x_ext import data
from t5x_ext import models
from t5x_ext import objectives
from t5x_ext import optim
from t5x_ext import tasks
from t5x_ext import train

include 'models/lm_tiny.gin'
include 'optim/adam.gin'

STEPS = 250
optim.linear_decay.peak = 1e-2
optim.linear_decay.warmup_steps = 20
models.DecoderConfig.embed_dim = 32
models.DecoderConfig.mlp_dim = 64
models.DecoderConfig.layers = 1
models.DecoderConfig.dropout = 0.0
tasks.LanguageModeling.data = @data.DataConfig()
data.DataConfig.train = [@corpora.monolingual_text()]
corpora.monolingual_text.path = 'train.en'
corpora.monolingual_text.language = 'en'
data.DataConfig.tags = @data.TagPolicy()
data.TagPolicy.decoder = 'target'
data.DataConfig.vocabulary = @data.VocabularyConfig()
data.VocabularyConfig.size = 300
data.DataConfig.batch = @data.BatchConfig()
data.BatchConfig.rows = 16
data.BatchConfig.source_length = 48
data.BatchConfig.target_length = 48
train.Run.objective = @objectives.LabelSmoothedCrossEntropy
objectives.LabelSmoothedCrossEntropy.label_smoothing = 0.0
train.Run.evaluation = @train.EvaluationConfig()
"""


def test_a_language_model_learns_the_entropy_of_its_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.en").write_text("".join(f"{line}\n" for line in chains(4000, seed=0)), encoding="utf-8")
    (tmp_path / "lm.gin").write_text(GIN, encoding="utf-8")
    assert main(["train", "--gin_file=lm.gin", "--run_dir=lm"]) == 0
    model = Translator.from_run("lm", "last")
    held_out = chains(300, seed=1)
    scores = model.score(held_out, held_out, "en", "en")
    mean = np.mean([score.log_prob for score in scores])
    deviation = np.std([score.log_prob for score in scores]) / np.sqrt(len(scores))
    # Nobody can do better than the entropy, but for the luck of these lines.
    assert -1.05 * NATS_A_LINE < mean < -NATS_A_LINE + 4 * deviation
    tokens = LENGTH + 2  # with the tag and the end
    assert perplexity(scores) == pytest.approx(np.exp(-mean / tokens))
    # What stands on the other side is not read.
    assert model.score(["zzz"] * 2, held_out[:2], "en", "en") == model.score(held_out[:2], held_out[:2], "en", "en")
    with pytest.raises(UserError, match="cannot search with LanguageModel, which has no encode"):
        model.translate(held_out[:1], "en", "en")
