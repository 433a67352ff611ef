"""A run folder of the first edition: it is opened, resumed to the numbers it would have reached then, and its gin file
is told the new names.

`first_edition.tar.gz` holds the folder after 4 of 8 updates, its texts and gin file, and what that edition went on to:
losses of updates 5 to 8, and translations with scores.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest

import t5x_ext
from t5x_ext.cli.main import run
from t5x_ext.decode import Beam, DecodeConfig

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
    steps = 8
    num_microbatches = 2
    ema_decay = 0.9
    log_every = 1
    tensorboard = False
    evaluation = @train.EvaluationConfig()
    checkpoints = @train.CheckpointConfig()
tasks.Translation:
    data = @data.DataConfig()
    model = @models.TransformerConfig()
    max_lines = 3
    decode = @decode.DecodeConfig()
    test_decode = @decode.DecodeConfig()
optim.adam.learning_rate = 0.003
models.TransformerConfig:
    embed_dim = 16
    mlp_dim = 32
    num_heads = 2
    encoder_layers = 1
    decoder_layers = 1
data.DataConfig:
    train = (@train/corpora.ParallelText(),)
    valid = (@valid/corpora.ParallelText(),)
    test = (@test/corpora.ParallelText(),)
    bidirectional = True
    tags = @data.TagPolicy()
    vocabulary = @data.VocabularyConfig()
    batch = @data.BatchConfig()
data.TagPolicy.decoder = 'target'
corpora.ParallelText:
    source_language = 'en'
    target_language = 'de'
train/corpora.ParallelText.source_path = 'train.en'
train/corpora.ParallelText.target_path = 'train.de'
valid/corpora.ParallelText.source_path = 'valid.en'
valid/corpora.ParallelText.target_path = 'valid.de'
test/corpora.ParallelText.source_path = 'test.en'
test/corpora.ParallelText.target_path = 'test.de'
data.VocabularyConfig.size = 300
data.BatchConfig:
    rows = 8
    source_length = 16
    target_length = 16
train.EvaluationConfig.every = 2
decode.DecodeConfig:
    search = @decode.Greedy()
    max_length_extra = 2
    max_length_ratio = 1.0
train.CheckpointConfig.every = 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(Path(__file__).with_name("first_edition.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "new.gin").write_text(GIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["t5x_ext", *arguments])
    with pytest.raises(SystemExit) as ended:
        run()
    return int(ended.value.code or 0)


def test_its_model_translates_as_it_did(folder):
    expected = json.loads((folder / "expected.json").read_text())["translations"]
    lines = (folder / "test.en").read_text().splitlines()
    config = DecodeConfig(Beam(beam_size=3), max_length_ratio=1.0, max_length_extra=2)
    found = t5x_ext.load("run", "4").translate_n_best(lines, "en", "de", config)
    assert [hypotheses[0].text for hypotheses in found] == [text for text, _ in expected]
    assert [hypotheses[0].score for hypotheses in found] == pytest.approx([score for _, score in expected], abs=1e-4)


def test_it_is_resumed_to_the_numbers_of_its_time(folder, monkeypatch):
    assert command(monkeypatch, "train", "--gin_file=new.gin", "--run_dir=run") == 0
    expected = json.loads((folder / "expected.json").read_text())
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    losses = {str(line["step"]): line["loss"] for line in lines if "loss" in line}
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    valid = {str(line["step"]): line["valid/loss"] for line in lines if "valid/loss" in line}
    assert valid["6"] == pytest.approx(expected["valid"]["6"], rel=1e-5)
    assert valid["8"] == pytest.approx(expected["valid"]["8"], rel=1e-5)
    results = json.loads((folder / "run/results.json").read_text())
    for direction, scores in expected["results"].items():
        assert results["directions"][direction]["chrf"] == pytest.approx(scores["chrf"], abs=1e-6)


def test_other_settings_are_refused_as_before(folder, monkeypatch, capsys):
    assert command(monkeypatch, "train", "--gin_file=new.gin", "--gin.adam.b2=0.9", "--run_dir=run") == 2
    assert "holds a run with adam.b2 = 0.98, now it is 0.9" in capsys.readouterr().err


def test_its_gin_file_is_told_the_new_names(folder, monkeypatch, capsys):
    assert command(monkeypatch, "train", "--gin_file=old.gin", "--run_dir=other") == 2
    assert "'train.Run' has no parameter 'data'; use tasks.Translation.data" in capsys.readouterr().err
    assert not (folder / "other").exists()
