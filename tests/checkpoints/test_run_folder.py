"""Names in a run folder, and what a reader says of folders that are none."""

from __future__ import annotations

import json

import pytest

from t5x_ext.checkpoints import ModelRecord, RunFolder
from t5x_ext.contracts import UserError


def test_names(tmp_path):
    folder = RunFolder(tmp_path)
    names = {name: path.name for name, path in vars(folder).items() if name != "path"}
    assert names == {
        "config_gin": "config.gin",
        "environment_json": "environment.json",
        "model_json": "model.json",
        "metrics_jsonl": "metrics.jsonl",
        "skipped_examples_jsonl": "skipped_examples.jsonl",
        "results_json": "results.json",
        "learning_curve_png": "learning_curve.png",
        "frozen_json": "frozen.json",
        "base": "base",
        "vocabulary": "vocabulary",
        "checkpoints": "checkpoints",
        "tensorboard": "tensorboard",
        "cache": "cache",
    }
    assert list(tmp_path.iterdir()) == []


def test_model_record_round_trip(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.write_model(
        {"embed_dim": 8, "encoder_sharing": {"scheme": "cycle"}}, {"encoder": "target"}, ["en-de"], "f00d"
    )
    record = {
        "format": 1,
        "model": {"embed_dim": 8, "encoder_sharing": {"scheme": "cycle"}},
        "tags": {"encoder": "target"},
        "directions": ["en-de"],
        "vocabulary": "f00d",
    }
    assert json.loads(folder.model_json.read_text()) == record
    assert folder.read_model() == ModelRecord(record["model"], record["tags"], ("en-de",), "f00d")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a model record"),
        ("[]", "is not a model record"),
        ("{}", "is not a model record: KeyError"),
        ('{"format": 2}', "has format 2; this version reads format 1"),
        ('{"format": 1, "model": {}}', "is incomplete: KeyError"),
        ('{"format": 1, "model": 3, "tags": {}, "directions": [], "vocabulary": ""}', "is incomplete: TypeError"),
    ],
)
def test_a_record_that_is_none_is_refused_in_one_line(tmp_path, content, message):
    folder = RunFolder(tmp_path)
    folder.model_json.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        folder.read_model()
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; give the --run_dir"):
        RunFolder(tmp_path / "nowhere").read_model()
    with pytest.raises(UserError, match=r"is not the folder of a run: it has no model\.json"):
        RunFolder(tmp_path).read_model()
