"""The gin files that come with the package: each builds, and says what it is for."""

from __future__ import annotations

import json
import re

import pytest

from t5x_ext.cli.flags import parse
from t5x_ext.cli.gin_config import build_run
from t5x_ext.cli.gin_read import gin_root
from t5x_ext.cli.main import main
from t5x_ext.cli.run_flags import define_run_flags, run_from_flags
from t5x_ext.models import model_from_json, num_params

FILES = sorted(path.relative_to(gin_root()).as_posix() for path in gin_root().rglob("*.gin"))
# Not pipelines, which are many runs, and not those of tasks that read other files.
OTHERS = re.compile("include 'pipelines/|Pipeline.stages|tasks.(Node)?Classification")
RUNS = [
    name for name in FILES if name.startswith("runs/") and not OTHERS.search((gin_root() / name).read_text("utf-8"))
]
MODELS = [name for name in FILES if name.startswith("models/")]
CORPORA = [
    *(f"--{role}_{side}={role}.{side}" for role in ("train", "valid", "test") for side in ("source", "target")),
    "--source_language=en",
    "--target_language=de",
]


@pytest.mark.parametrize("name", RUNS)
def test_every_run_builds_with_text_files_of_ones_own(name, folder, tmp_path):
    flags = [f"--gin_file={name}", *CORPORA, "--steps=2", "--seed=5", "--vocab_size=300", "--bidirectional"]
    run, text = run_from_flags(parse(define_run_flags, flags))
    assert (run.steps, run.seed, run.task.data.vocabulary.size, run.task.data.bidirectional) == (2, 5, 300, True)
    assert [corpus.name for corpus in run.task.data.valid] == ["valid.source.en-de"]
    (tmp_path / "resolved.gin").write_text(text)
    assert build_run(["resolved.gin"])[1] == text


def test_without_a_gin_file_bindings_apply_to_the_packaged_default(folder):
    run, _ = run_from_flags(parse(define_run_flags, [*CORPORA, "--gin.Run.log_every=7"]))
    assert run.log_every == 7
    assert run.task.data.train[0].languages == ("en", "de")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_file_names_a_model(name, folder, capsys):
    assert main(["info", f"--gin_file={name}", "--json_out=-"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["parameters"] == num_params(model_from_json(described["model"]))


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_is(name):
    text = (gin_root() / name).read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "from __gin__ import dynamic_registration" in text
    if name in RUNS:
        assert "# Command: " in text
