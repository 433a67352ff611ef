"""A pipeline's folder of the first edition: it audits clean, and its stages count as finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from old_stages import ANSWERS, CONFIGURATIONS, PIPELINE
from stand_ins import StandIn

from t5x_ext.pipeline import audit, execute, status_of

OLD = Path(__file__).parent / "old_folder"
CHECKED = {"raw": 4, "clean": 3, "some": 3, "runs": 4, "mean": 4, "lines": 3, "plain": 3, "test": 3, "scores": 3}


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Path("made")


def test_it_audits_clean_down_to_weights_and_texts(made):
    found = audit(made)
    assert [stage.problems for stage in found] == [()] * len(CHECKED)
    assert {stage.stage: stage.checked for stage in reversed(found)} == CHECKED
    assert [stage.kind for stage in found] == ["scores", *["corpora"] * 3, *["models"] * 2, *["corpora"] * 3]


def test_its_stages_have_finished_and_nothing_is_written_differently(made):
    states = {status_of(stage, made, CONFIGURATIONS[stage.name]).state for stage in PIPELINE.stages}
    assert states == {"finished"}
    files = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    artefacts = execute(PIPELINE, made, configurations=CONFIGURATIONS)
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == files
    for name, artefact in artefacts.items():
        # The manifest keeps the digest of these bytes, so that fields and their order must stay.
        described = json.loads((made / name / "artefact.json").read_text())["artefact"]
        assert json.dumps(artefact.to_json()) == json.dumps(described)


def test_made_again_its_artefacts_are_described_in_the_same_way(made):
    """Down to the digests of texts and weights; model.json has got more fields since, and scores name versions."""
    model = StandIn(lambda source, target, line: ANSWERS[line])
    execute(PIPELINE, "again", configurations=CONFIGURATIONS, opener=lambda folder, opened: model)
    for name in CHECKED.keys() - {"scores"}:
        new, old = (json.loads((folder / name / "artefact.json").read_text()) for folder in (Path("again"), made))
        for described in (new, old):
            described["outputs"].pop(f"{name}/run/model.json", None)
        assert json.dumps(new) == json.dumps(old)
