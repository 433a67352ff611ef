"""The task from text files to scores: trained, opened, translated and evaluated through the ordinary doors."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest

import t5x_ext
from t5x_ext.cli.main import main
from t5x_ext.contracts import UserError
from t5x_ext.corpora import ParallelText
from t5x_ext.data import BatchConfig, DataConfig, VocabularyConfig, train_vocabulary
from t5x_ext.decode import CtcGreedy, DecodeConfig, LengthBeam
from t5x_ext.models import ParallelConfig, ParallelDecoder
from t5x_ext.objectives import Ctc, Glancing
from t5x_ext.optim import adam
from t5x_ext.tasks import ParallelTranslation
from t5x_ext.train import CheckpointConfig, EvaluationConfig, Run, execute

WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "red": "rot", "tree": "Baum", "house": "Haus"}
MODEL = ParallelConfig(
    embed_dim=16, mlp_dim=32, num_heads=2, encoder_layers=1, decoder_layers=1, dropout=0.1, max_target_length=16
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Word-for-word translations, and their vocabulary."""
    path = tmp_path_factory.mktemp("texts")
    for role, lines in (("train", 60), ("valid", 6), ("test", 4)):
        draw = random.Random(role)
        sources = [draw.choices(list(WORDS), k=draw.randint(1, 4)) for _ in range(lines)]
        for code, texts in (("en", sources), ("de", [[WORDS[word] for word in line] for line in sources])):
            (path / f"{role}.{code}").write_text("".join(" ".join(line) + "\n" for line in texts))
    text = [line for code in ("en", "de") for line in (path / f"train.{code}").read_text().splitlines()]
    train_vocabulary(text, 290, ("en", "de")).save(str(path / "vocabulary"))
    return path


@pytest.fixture(scope="module")
def new_run(folder):
    """A run of three updates."""

    def make(model=MODEL, objective=lambda model: Glancing(model, total_steps=3), packing=True, **task):
        corpus = lambda role: ParallelText(str(folder / f"{role}.en"), str(folder / f"{role}.de"), "en", "de")
        data = DataConfig(
            train=(corpus("train"),),
            valid=(corpus("valid"),),
            test=(corpus("test"),),
            vocabulary=VocabularyConfig(path=str(folder / "vocabulary")),
            batch=BatchConfig(rows=8, source_length=16, target_length=16, packing=packing),
        )
        return Run(
            task=ParallelTranslation(data, model, max_lines=2, **task),
            optimizer=adam(0.01),
            objective=objective,
            steps=3,
            log_every=1,
            tensorboard=False,
            evaluation=EvaluationConfig(every=0),
            checkpoints=CheckpointConfig(every=0),
        )

    return make


CTC = {
    "model": dataclasses.replace(MODEL, upsample=2),
    "objective": Ctc,
    "packing": False,
    "decode": DecodeConfig(CtcGreedy()),
    "test_decode": DecodeConfig(CtcGreedy()),
}


@pytest.mark.parametrize(("options", "search"), [({}, LengthBeam()), (CTC, CtcGreedy())], ids=["glancing", "ctc"])
def test_a_run_is_trained_opened_and_scored(new_run, folder, tmp_path, options, search, capsys):
    run_dir = str(tmp_path / "run")
    results = execute(new_run(**options), run_dir, cache_dir=str(tmp_path / "caches"))
    assert np.isfinite(results["mean_bleu"])
    record = json.loads((tmp_path / "run" / "model.json").read_text())
    assert record["task"] == "parallel_translation"
    assert record["model"]["kind"] == "parallel"
    assert record["model"]["unk_id"] == 2

    translator = t5x_ext.load(run_dir)
    assert isinstance(translator.model, ParallelDecoder)
    assert translator.default_config.search == search
    lines = ["one red tree", "", "two"]
    found = translator.translate(lines)
    assert len(found) == 3
    assert found[1] == ""
    assert found == translator.translate(lines, config=DecodeConfig(search))

    output = tmp_path / "test.out"
    flags = [f"--run_dir={run_dir}", f"--source={folder / 'test.en'}", f"--reference={folder / 'test.de'}"]
    capsys.readouterr()
    assert main(["evaluate", *flags, f"--output={output}", "--json_out=-"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["bleu"] <= 100
    assert len(output.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CTC | {"packing": True}, "packing = False"),
        (CTC | {"decode": DecodeConfig(LengthBeam())}, "decode searches with LengthBeam, but the model is upsampled"),
        ({"test_decode": DecodeConfig(CtcGreedy())}, "test_decode searches with CtcGreedy"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(new_run, options, message):
    with pytest.raises(UserError, match=message):
        new_run(**options)


def test_planning_knows_no_unknown_token():
    task = ParallelTranslation(
        DataConfig(train=(ParallelText("a", "b", "en", "de"),)), dataclasses.replace(MODEL, unk_id=5)
    )
    assert task.sized({"vocab_size": 40}).unk_id == 5
    assert task.sized({"vocab_size": 40, "unk_id": 2}) == dataclasses.replace(MODEL, vocab_size=40, unk_id=2)
