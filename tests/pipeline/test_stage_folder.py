"""A stage's folder is read once, and nothing in it or outside is hashed twice."""

from __future__ import annotations

import collections
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from stand_ins import Given, Lines

from t5x_ext.contracts import UserError
from t5x_ext.pipeline import (
    Artefact,
    Pipeline,
    PipelineFolder,
    StageFolder,
    Texts,
    Workspace,
    audit,
    execute,
    stage_folder,
    statuses,
)

PAIRS = (("one", "eins"), ("two", "zwei"))


@dataclass(frozen=True)
class Counted(Lines):
    """Counts how often it is hashed."""

    hashed: collections.Counter[str] = field(default_factory=collections.Counter, compare=False)

    def fingerprint(self) -> str:
        self.hashed[self.name] += 1
        return super().fingerprint()


@dataclass(frozen=True)
class Copy:
    """Reads all texts of several stages."""

    name: str
    of: tuple[str, ...]

    def inputs(self):
        return self.of

    def sources(self):
        return ()

    def make(self, workspace: Workspace) -> Artefact:
        return Artefact("corpora", tuple(workspace.corpora(self.of)))


@pytest.fixture
def corpus() -> Counted:
    return Counted("a", ("en", "de"), PAIRS)


@pytest.fixture
def reads(monkeypatch) -> collections.Counter[str]:
    """How often each record that exists was read, and each file hashed, by its path."""
    counts: collections.Counter[str] = collections.Counter()

    def counted(read):
        def count(path):
            found = read(path)
            counts[str(path)] += 1
            return found

        return count

    monkeypatch.setattr(Path, "read_bytes", counted(Path.read_bytes))
    monkeypatch.setattr(stage_folder, "file_digest", counted(stage_folder.file_digest))
    return counts


def pipeline(corpus) -> Pipeline:
    stages = (Texts("texts", (corpus,)), Texts("more", (corpus,), side="source"))
    return Pipeline((*stages, Copy("copy", ("texts", "more")), Copy("again", ("texts", "copy"))))


def test_everything_is_read_and_hashed_once_while_a_pipeline_runs(corpus, reads, tmp_path):
    execute(pipeline(corpus), tmp_path / "out")
    assert corpus.hashed == {"a": 2}  # two stages have it
    records = {f"{name}/{kind}.json" for name in ("texts", "more", "copy", "again") for kind in ("record", "artefact")}
    texts = {"texts/a.en-de.en", "texts/a.en-de.de", "more/a.en-de.en"}
    assert {path.removeprefix(f"{tmp_path}/out/") for path in reads} == records | texts
    assert set(reads.values()) == {1}


def test_of_a_finished_one_every_record_is_read_once(corpus, reads, tmp_path):
    execute(pipeline(corpus), tmp_path / "out")
    reads.clear()
    corpus.hashed.clear()
    execute(pipeline(corpus), tmp_path / "out")
    assert corpus.hashed == {"a": 2}
    assert len(reads) == 8
    assert set(reads.values()) == {1}
    reads.clear()
    found = statuses(pipeline(corpus), tmp_path / "out")
    assert {status.state for status in found} == {"finished"}
    assert len(reads) == 8
    assert set(reads.values()) == {1}


def test_of_stages_that_are_new_no_source_is_hashed(corpus, tmp_path):
    assert [status.state for status in statuses(pipeline(corpus), tmp_path)] == ["new"] * 4
    assert not corpus.hashed


def test_the_audit_reads_every_record_and_file_once(corpus, reads, tmp_path):
    execute(pipeline(corpus), tmp_path / "out")
    reads.clear()
    assert not any(stage.problems for stage in audit(tmp_path / "out"))
    assert set(reads.values()) == {1}


def test_what_it_has_written_it_knows(tmp_path):
    folder = StageFolder(tmp_path, "a")
    assert (folder.record, folder.artefact, folder.digest, list(folder.missing())) == (None, None, None, [])
    record = {"format": 1, "configuration": "", "inputs": {}, "sources": []}
    folder.begin(record)
    assert folder.record == record
    assert folder.artefact is None
    artefact = Artefact("notes", files=("a/n", "a/n"), counts={"lines": 1})
    (tmp_path / "a/n").write_text("one\n")
    folder.finish(record | {"seconds": 1.0}, folder.describe(artefact))
    assert folder.record["seconds"] == 1.0
    assert folder.artefact == artefact
    assert folder.digest == hashlib.sha256((tmp_path / "a/artefact.json").read_bytes()).hexdigest()
    assert folder.described["outputs"] == {"a/n": hashlib.sha256(b"one\n").hexdigest()}
    assert StageFolder(tmp_path, "a").artefact == artefact
    (tmp_path / "a/n").unlink()
    assert list(folder.missing()) == ["its file a/n"] * 2
    folder.discard()
    assert (folder.record, folder.artefact, folder.digest) == (None, None, None)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_someone_else_is_not_begun(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(UserError, match="exists and does not belong to a pipeline"):
        StageFolder(tmp_path, "a").begin({})
    assert (tmp_path / "a").read_text() == "a file"


def test_a_pipelines_folder_has_one_object_for_a_stage(tmp_path):
    folder = PipelineFolder(str(tmp_path))
    assert folder.stage("a") is folder.stage("a")
    assert folder.stage("a").path == tmp_path / "a"
    execute(Pipeline((Given("a", texts=(("t", ("en",), (("x",),)),)),)), tmp_path)
    assert folder.stage("a").artefact.corpora[0].lines == 1
