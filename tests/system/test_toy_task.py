"""From two text files to translations, through what a user types: a task that can be learned completely.

The target says the numbers of the source in another language and in reverse order, so that the model must learn words,
to look at the whole source, and when to stop.
"""

from __future__ import annotations

import contextlib
import json
import math

import pytest

import t5x_ext
from t5x_ext.cli.main import main
from t5x_ext.decode import Beam, DecodeConfig

RUN = """
from __gin__ import dynamic_registration
from t5x_ext import data
from t5x_ext import models
from t5x_ext import objectives
from t5x_ext import optim
from t5x_ext import train

include 'tiny.gin'
include 'optim/adam.gin'

STEPS = 240
optim.linear_decay.peak = 0.005
optim.linear_decay.warmup_steps = 50
train.Run.objective = @objectives.LabelSmoothedCrossEntropy
train.Run.log_every = 100
objectives.LabelSmoothedCrossEntropy.label_smoothing = 0.0
models.TransformerConfig:
    embed_dim = 64
    mlp_dim = 128
    num_heads = 4
    dropout = 0.0
data.BatchConfig.rows = 32
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory, write_tiny):
    """The folder of the texts and of the trained run `out`."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.gin").write_text(RUN)
    with contextlib.chdir(folder):
        flags = write_tiny(folder, test=50, train=3000)
        assert main(["train", "--gin_file=toy.gin", *flags, "--run_dir=out"]) == 0
    return folder


def read(path):
    return path.read_text().splitlines()


def exact_match(hypotheses, references):
    return 100 * sum(map(str.__eq__, hypotheses, references)) / len(references)


def test_the_task_is_learned(toy):
    results = json.loads((toy / "out/results.json").read_text())
    assert results["mean_exact_match"] >= 90
    assert results["steps"] == 240
    assert results["directions"]["en-es"]["bleu"] > 90


def test_a_notebook_translates(toy):
    translations = t5x_ext.load(str(toy / "out")).translate(read(toy / "test.en"))
    assert exact_match(translations, read(toy / "test.es")) >= 90


def test_the_command_gives_a_line_for_each_line(toy, capsys):
    sources = ["one two three", "", "  ", "four\u2028five six", "seven", "\u1e9e\u2603 \U0001f600", "nine eight seven"]
    (toy / "odd.en").write_text("".join(f"{line}\n" for line in sources))
    assert main(["translate", f"--run_dir={toy}/out", f"--input={toy}/odd.en", f"--output={toy}/odd.es"]) == 0
    written = (toy / "odd.es").read_text()
    translations = written.removesuffix("\n").split("\n")
    assert written.endswith("\n")
    assert len(translations) == len(sources)
    assert (translations[0], translations[1], translations[2]) == ("tres dos uno", "", "")
    assert translations[-1] == "siete ocho nueve"
    assert translations == t5x_ext.load(str(toy / "out")).translate(sources)


def test_scores_agree_with_the_search_and_prefer_what_is_right(toy):
    translator = t5x_ext.load(str(toy / "out"))
    sources, references = read(toy / "test.en")[:16], read(toy / "test.es")[:16]
    config = DecodeConfig(Beam(alpha=0.5))
    found = [best[0] for best in translator.translate_n_best(sources, config=config)]
    scores = translator.score(sources, [hypothesis.text for hypothesis in found])
    for hypothesis, score in zip(found, scores, strict=True):
        assert score.num_tokens == hypothesis.num_tokens
        assert score.log_prob == pytest.approx(hypothesis.score * math.sqrt(hypothesis.num_tokens), abs=1e-4)
    right = translator.score(sources, references)
    wrong = translator.score(sources, [" ".join(reversed(line.split())) for line in references])
    assert all(a.log_prob > b.log_prob for a, b, line in zip(right, wrong, references) if line != line[::-1])
    perplexity = math.exp(-sum(score.log_prob for score in right) / sum(score.num_tokens for score in right))
    assert perplexity < 1.05
