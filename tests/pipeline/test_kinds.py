"""Kinds of artefacts that the package does not know, made and read by stages of other packages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from stand_ins import Given

from t5x_ext.contracts import UserError
from t5x_ext.pipeline import (
    Artefact,
    Model,
    Pipeline,
    PipelineFolder,
    StageFolder,
    Translate,
    TypedStage,
    Weights,
    Workspace,
    audit,
    execute,
    status_of,
)

TEXTS = Given("texts", texts=(("a", ("en",), (("one",), ("three",))),))


@dataclass(frozen=True)
class Lengths:
    """Makes the kind `lengths`: a file for each text with the length of every line."""

    name: str
    of: str
    makes = "lengths"

    def inputs(self):
        return (self.of,)

    def reads(self):
        return {self.of: "corpora"}

    def sources(self):
        return ()

    def make(self, workspace: Workspace) -> Artefact:
        files = []
        for text in workspace.corpora([self.of]):
            files.append(workspace.own(f"{text.name}.lengths"))
            workspace.write_lines(files[-1], (str(len(line)) for line in workspace.lines(text.files[0])))
        return Artefact("lengths", files=tuple(files), counts={"files": len(files)})


@dataclass(frozen=True)
class Sum:
    """Reads the kind `lengths`."""

    name: str
    of: str
    makes = "scores"

    def inputs(self):
        return (self.of,)

    def reads(self):
        return {self.of: "lengths"}

    def sources(self):
        return ()

    def make(self, workspace: Workspace) -> Artefact:
        files = workspace.artefact(self.of, "lengths").files
        return Artefact("scores", scores={file: sum(map(int, workspace.lines(file))) for file in files})


def test_a_kind_of_its_own_is_made_read_recorded_and_audited(tmp_path):
    stages = (TEXTS, Lengths("lengths", "texts"), Sum("sum", "lengths"))
    assert isinstance(stages[1], TypedStage)
    made = execute(Pipeline(stages), tmp_path)
    assert made["sum"].scores == {"lengths/a.lengths": 3 + 5}
    assert StageFolder(tmp_path, "lengths").artefact == made["lengths"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    assert manifest["lengths"]["kind"] == "lengths"
    assert list(manifest["lengths"]["outputs"]) == ["lengths/a.lengths"]
    assert [(stage.kind, stage.problems) for stage in audit(tmp_path)][1] == ("lengths", ())
    (tmp_path / "lengths/a.lengths").write_text("3\n4\n")
    assert audit(tmp_path)[1].problems == ("lengths/a.lengths has changed",)
    (tmp_path / "lengths/a.lengths").unlink()
    assert audit(tmp_path)[1].problems == ("lengths/a.lengths is missing",)
    assert status_of(stages[1], tmp_path).difference == "its file lengths/a.lengths is missing"


def test_another_kind_is_refused_when_the_pipeline_is_built():
    lengths = Lengths("lengths", "texts")
    with pytest.raises(UserError, match="stage 'again' reads corpora of 'lengths', which makes lengths"):
        Pipeline((TEXTS, lengths, Lengths("again", "lengths")))
    with pytest.raises(UserError, match="stage 'sum' reads lengths of 'other', which makes scores"):
        Pipeline((TEXTS, lengths, Sum("other", "lengths"), Sum("sum", "other")))
    with pytest.raises(UserError, match="stage 'out' reads models of 'lengths', which makes lengths"):
        Pipeline((TEXTS, lengths, Translate("out", "lengths", ("texts",))))


def test_of_a_stage_that_says_no_kind_another_one_is_refused_when_it_is_read(tmp_path):
    with pytest.raises(UserError, match="stage 'sum' reads lengths of 'texts', which makes corpora"):
        execute(Pipeline((TEXTS, Sum("sum", "texts"))), tmp_path)
    assert not (tmp_path / "sum/artefact.json").exists()


def test_artefacts_without_other_files_are_written_as_before_there_were_any():
    artefact = Artefact("models", models=(Model(("en-de",), (Weights("a/run", 1), Weights("b/run", 2))),))
    assert list(artefact.to_json()) == ["kind", "corpora", "models", "scores", "counts"]
    for one in (artefact, Artefact("lengths", files=("lengths/a", "lengths/b"))):
        assert Artefact.from_json(json.loads(json.dumps(one.to_json()))) == one


@dataclass(frozen=True)
class Classify:
    """Opens a model that is no Translator."""

    name: str
    model: str

    def inputs(self):
        return (self.model,)

    def sources(self):
        return ()

    def make(self, workspace: Workspace) -> Artefact:
        model = workspace.models(self.model).model_for("sentiment")
        assert workspace.open(model) is workspace.open(model)
        return Artefact("scores", scores={"label": workspace.open(model)("a good line")})


def test_the_opener_gives_any_model(tmp_path):
    opened = []

    def opener(folder: Path, model: Model):
        opened.append((folder, model.directions))
        return lambda line: "good" if "good" in line else "bad"

    stages = (Given("classifier", directions=("sentiment",)), Classify("labels", "classifier"))
    assert execute(Pipeline(stages), tmp_path, opener=opener)["labels"].scores == {"label": "good"}
    assert opened == [(tmp_path, ("sentiment",))]


def test_a_workspace_is_of_a_pipelines_folder(tmp_path):
    workspace = Workspace(PipelineFolder(tmp_path), "sum")
    assert workspace.output_dir == tmp_path
    with pytest.raises(UserError, match="stage 'sum' needs 'lengths', which has not finished"):
        workspace.artefact("lengths")
