"""The controller: order, restart, refusals, records and the audit of them, with stages that cost nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from stand_ins import Given

from t5x_ext.contracts import UserError
from t5x_ext.corpora import ParallelText
from t5x_ext.parallel import AxisRules, MeshConfig
from t5x_ext.pipeline import (
    Artefact,
    Average,
    GreedyEnsemble,
    Interrupted,
    Model,
    Pipeline,
    Stage,
    TextFiles,
    Texts,
    Translate,
    Weights,
    Workspace,
    audit,
    execute,
    status_of,
    workspace,
)
from t5x_ext.pipeline.workspace import SCRATCH
from t5x_ext.storage import files
from t5x_ext.vega_mt import NoisyDev


@dataclass(frozen=True)
class Upper:
    """Upper case, in two steps, the first of which is kept when the second is interrupted."""

    name: str
    of: str
    ending: str = ""

    def inputs(self):
        return (self.of,)

    def sources(self):
        return ()

    def make(self, workspace: Workspace) -> Artefact:
        texts = []
        for text in workspace.corpora([self.of]):
            scratch = [workspace.scratch(f"{text.name}.{language}") for language in text.languages]
            files = [workspace.own(f"{text.name}.{language}") for language in text.languages]
            for source, draft in zip(text.files, scratch):
                if not os.path.exists(workspace.path(draft)):
                    workspace.write_lines(draft, (line.upper() for line in workspace.lines(source)))
            for draft, file in zip(scratch, files):
                workspace.write_lines(file, (line + self.ending for line in workspace.lines(draft)))
            texts.append(replace(text, files=tuple(files)))
        return Artefact("corpora", tuple(texts), counts={"lines": sum(text.lines for text in texts)})


@dataclass(frozen=True)
class Count:
    """Lines of a text, as a score."""

    name: str
    of: str

    def inputs(self):
        return (self.of,)

    def sources(self):
        return ()

    def make(self, workspace: Workspace) -> Artefact:
        scores = {text.name: text.lines for text in workspace.corpora([self.of])}
        workspace.write_lines(workspace.own("scores.txt"), [f"{name} {value}" for name, value in scores.items()])
        return Artefact("scores", scores=scores)


@pytest.fixture
def corpus(tmp_path: Path) -> ParallelText:
    (tmp_path / "a.en").write_text("one\ntwo\nthree\nfour\n")
    (tmp_path / "a.de").write_text("eins\nzwei\ndrei\nvier\n")
    return ParallelText(str(tmp_path / "a.en"), str(tmp_path / "a.de"), "en", "de")


def stages(corpus, ending="") -> Pipeline:
    return Pipeline((Texts("texts", (corpus,), stop=3), Upper("upper", "texts", ending), Count("count", "upper")))


def texts_for(**changes: str) -> dict[str, str]:
    """Configurations as gin would give them."""
    return {name: f"a.{name} = {changes.get(name, 1)}\nRun.log_every = {changes.get('log', 1)}\n" for name in NAMES}


NAMES = ("texts", "upper", "count")
TIME_AND_MACHINE = ("record.json", "manifest.json", "environment.json")


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a pipeline has made, but for time and machine."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in TIME_AND_MACHINE)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def whole(corpus, tmp_path) -> Path:
    execute(stages(corpus), tmp_path / "whole", configurations=texts_for())
    return tmp_path / "whole"


def test_stages_run_in_order_and_leave_text_records_and_a_manifest(whole):
    assert isinstance(Count("count", "upper"), Stage)
    assert (whole / "upper/a.en-de.de").read_text() == "EINS\nZWEI\nDREI\n"
    assert (whole / "texts/a.en-de.en").read_text() == "one\ntwo\nthree\n"
    assert not (whole / "upper/work").exists()
    manifest = json.loads((whole / "manifest.json").read_text())["stages"]
    assert list(manifest) == list(NAMES)
    assert manifest["upper"]["inputs"] == {"texts": manifest["texts"]["artefact"]}
    assert manifest["texts"]["sources"][0]["name"] == "a.en-de"
    assert set(manifest["upper"]["outputs"]) == {"upper/a.en-de.en", "upper/a.en-de.de"}
    assert manifest["upper"]["counts"] == {"lines": 3}
    assert manifest["count"]["configuration"].startswith("a.count")
    assert {"seconds", "environment"} <= set(manifest["count"])


def test_finished_stages_are_left_alone(whole, corpus, monkeypatch):
    monkeypatch.setattr(Upper, "make", None)
    artefacts = execute(stages(corpus), whole, configurations=texts_for())
    assert artefacts["count"].scores == {"a.en-de": 3}


class Killed(BaseException):
    """Not an Exception: nothing may catch it and tidy up."""


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_it_ends_with_the_same_artefacts(whole, corpus, tmp_path, monkeypatch, after):
    """Killed when the n-th file is about to get its name, or has just got it, for every n."""
    rename, left = os.replace, 0

    def interrupted(source, target):
        nonlocal left
        left -= 1
        if left == 0 and not after:
            raise Killed
        rename(source, target)
        if left == 0:
            raise Killed

    def run(folder: Path) -> bool:
        try:
            execute(stages(corpus), folder, configurations=texts_for())
        except Killed:
            return False
        return True

    monkeypatch.setattr(os, "replace", interrupted)
    monkeypatch.setattr(Path, "replace", interrupted)
    for number in range(1, 100):
        folder = tmp_path / f"killed_{number}"
        left = number
        whole_at_once = run(folder)
        left = 0
        assert run(folder)
        assert contents(folder) == contents(whole)
        if whole_at_once:
            break
    assert 15 < number < 99


KILL = """
import os, signal, sys
from pathlib import Path
from t5x_ext.pipeline import execute
sys.path.insert(0, {tests!r})
import importlib.util
spec = importlib.util.spec_from_file_location("test_pipeline_program", {file!r})
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
corpus = module.ParallelText({en!r}, {de!r}, "en", "de")
write = module.Workspace.write_aligned
def killed(self, files, rows):
    def until():
        for number, row in enumerate(rows):
            if self.stage == "upper" and number == 1 and "work" not in files[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row
    return write(self, files, until())
module.Workspace.write_aligned = killed
execute(module.stages(corpus), {out!r}, configurations=module.texts_for())
"""


def test_killed_by_the_system_inside_a_stage_it_goes_on(whole, corpus, tmp_path):
    out = tmp_path / "out"
    program = KILL.format(
        tests=str(Path(__file__).parent), file=__file__, en=corpus.source_path, de=corpus.target_path, out=str(out)
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (out / "upper/artefact.json").exists()
    assert [status_of(stage, out, texts_for()[stage.name]).state for stage in stages(corpus).stages] == [
        *("finished", "unfinished", "new")
    ]
    seen = []
    write = Workspace.write_lines
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Workspace, "write_lines", lambda self, file, lines: (seen.append(file), write(self, file, lines))[1]
        )
        execute(stages(corpus), out, configurations=texts_for())
    assert f"upper/{SCRATCH}/a.en-de.en" not in seen
    assert contents(out) == contents(whole)


def test_a_changed_configuration_is_refused_with_the_difference_until_it_is_named(whole, corpus):
    changed = texts_for(upper="2")
    with pytest.raises(UserError, match=r"stage 'upper' in .* a\.upper = 1, now 2; .* --stages=upper,count$"):
        execute(stages(corpus, "!"), whole, configurations=changed)
    assert (whole / "upper/a.en-de.en").read_text() == "ONE\nTWO\nTHREE\n"
    execute(stages(corpus, "!"), whole, configurations=changed, only=["upper"])
    assert (whole / "upper/a.en-de.en").read_text() == "ONE!\nTWO!\nTHREE!\n"
    with pytest.raises(UserError, match=r"stage 'count' .* another 'upper'; .* --stages=count$"):
        execute(stages(corpus, "!"), whole, configurations=changed)
    execute(stages(corpus, "!"), whole, configurations=changed, only=["count"])
    execute(stages(corpus, "!"), whole, configurations=changed)
    assert [stage.problems for stage in audit(whole)] == [(), (), ()]


def test_settings_of_devices_and_logs_may_change(whole, corpus):
    execute(stages(corpus), whole, configurations=texts_for(log="7"))


def test_a_changed_text_from_outside_is_refused(whole, corpus, tmp_path):
    (tmp_path / "a.en").write_text("one\ntwo\nthree\nfive\n")
    with pytest.raises(UserError, match=r"stage 'texts' .* another text 'a\.en-de'; .* --stages=texts,upper,count$"):
        execute(stages(corpus), whole, configurations=texts_for())


def test_a_stage_is_made_anew_although_it_was_not_finished(whole, corpus):
    (whole / "upper/artefact.json").unlink()
    with pytest.raises(UserError, match=r"stage 'upper' .* now 2"):
        execute(stages(corpus, "!"), whole, configurations=texts_for(upper="2"))
    execute(stages(corpus, "!"), whole, configurations=texts_for(upper="2"), only=["upper", "count"])
    assert (whole / "upper/a.en-de.en").read_text() == "ONE!\nTWO!\nTHREE!\n"


def test_some_stages_alone(corpus, tmp_path):
    out = tmp_path / "out"
    assert set(execute(stages(corpus), out, only=["texts"])) == {"texts"}
    with pytest.raises(UserError, match="stage 'upper' has not finished; add it to --stages"):
        execute(stages(corpus), out, only=["count"])
    assert set(execute(stages(corpus), out, only=["upper", "count"])) == set(NAMES)
    with pytest.raises(UserError, match="there is no stage 'uper'; there are texts, upper, count"):
        execute(stages(corpus), out, only=["uper"])


def test_a_missing_file_is_noticed(whole, corpus):
    (whole / "texts/a.en-de.en").unlink()
    with pytest.raises(UserError, match=r"its file texts/a\.en-de\.en is missing"):
        execute(stages(corpus), whole, configurations=texts_for())
    execute(stages(corpus), whole, configurations=texts_for(), only=["texts"])
    execute(stages(corpus), whole, configurations=texts_for())


def test_what_a_stage_refuses_leaves_it_unfinished(corpus, tmp_path, monkeypatch):
    def stop(self, workspace):
        raise Interrupted("stage 'upper'")

    with monkeypatch.context() as patch:
        patch.setattr(Upper, "make", stop)
        with pytest.raises(Interrupted):
            execute(stages(corpus), tmp_path / "out")
    assert status_of(Upper("upper", "texts"), tmp_path / "out").state == "unfinished"
    assert list(json.loads((tmp_path / "out/manifest.json").read_text())["stages"]) == ["texts"]


@pytest.mark.parametrize("file", ["upper/record.json", "upper/artefact.json", "manifest.json"])
@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 1, "artefact": {}, "outputs": {}}', None])
def test_damaged_records_are_one_line_that_says_what_to_delete(whole, corpus, file, text):
    path = whole / file
    path.unlink()
    path.mkdir() if text is None else path.write_text(text)
    gathered = file == "manifest.json"
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        audit(whole) if gathered else execute(stages(corpus), whole, configurations=texts_for())
    if text != "[]":
        assert f"Delete {path if gathered else path.parent} to rebuild it" in str(error.value)


def test_a_checkpoint_that_was_deleted_is_noticed(tmp_path):
    run = Given("model", directions=("en-de",))
    execute(Pipeline((run,)), tmp_path)
    assert status_of(run, tmp_path).state == "finished"
    (tmp_path / "stand-ins/model/checkpoints").mkdir(parents=True)
    assert status_of(run, tmp_path).difference == "its checkpoint stand-ins/model:1 is missing"
    (tmp_path / "stand-ins/model/checkpoints/00000001").mkdir()
    assert status_of(run, tmp_path).state == "finished"


def test_a_mistake_that_is_mended_leaves_no_trace(corpus, tmp_path):
    """No file is lost where there was none: the stage need not be named to be made from something else."""
    wrong = Pipeline((Texts("texts", (corpus,), start=9), *stages(corpus).stages[1:]))
    with pytest.raises(UserError, match="has no pair 9"):
        execute(wrong, tmp_path / "out", configurations=texts_for(texts="9"))
    execute(stages(corpus), tmp_path / "out", configurations=texts_for())
    assert json.loads((tmp_path / "out/texts/record.json").read_text())["configuration"] == texts_for()["texts"]
    assert not any(stage.problems for stage in audit(tmp_path / "out"))


def test_drafts_of_killed_processes_are_deleted_and_nothing_else_is(whole, corpus):
    drafts = [whole / name for name in (".manifest.json.12.tmp", "upper/.record.json.7.tmp", "upper/run/.a.json.7.tmp")]
    others = [whole / name for name in (".mine.tmp", "upper/.12.tmp", ".manifest.json.12.tmp.old")]
    (whole / "upper/run").mkdir()
    for path in (*drafts, *others):
        path.write_text("")
    execute(stages(corpus), whole, configurations=texts_for())
    assert not any(path.exists() for path in drafts)
    assert all(path.exists() for path in others)


def test_a_folder_that_is_not_of_a_pipeline_is_left_alone(corpus, tmp_path):
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper/mine.txt").write_text("dear to me")
    with pytest.raises(UserError, match="upper: exists and does not belong to a pipeline; name another --output_dir"):
        execute(stages(corpus), tmp_path)
    with pytest.raises(UserError, match="upper: exists and does not belong"):
        execute(stages(corpus), tmp_path, only=["upper"])
    assert (tmp_path / "upper/mine.txt").read_text() == "dear to me"


def test_killed_while_a_stage_is_deleted_it_is_made_anew(whole, corpus, tmp_path, monkeypatch):
    def half(folder, **options):
        if folder.name == ".upper.deleted" and folder.exists():
            (folder / "record.json").unlink()
            raise Killed

    changed = {"configurations": texts_for(upper="2"), "only": ["upper", "count"]}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            execute(stages(corpus, "!"), whole, **changed)
    execute(stages(corpus, "!"), whole, **changed)
    execute(stages(corpus, "!"), tmp_path / "other", configurations=texts_for(upper="2"))
    assert contents(whole) == contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "make room"), (errno.EFBIG, "ulimit -f"), (errno.EROFS, "make it writable")]
)
def test_a_full_disk_is_one_line_and_the_same_call_goes_on(whole, corpus, tmp_path, monkeypatch, number, advice):
    to_disk = files.to_disk

    def full(sink):
        if ".json." in sink.name:  # a small record has room
            return to_disk(sink)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files, "to_disk", full)
        with pytest.raises(
            UserError, match=f"out: {os.strerror(number)}; .*{advice}.*rerun the same command to resume"
        ):
            execute(stages(corpus), tmp_path / "out", configurations=texts_for())
    assert contents(tmp_path / "out") == {}
    execute(stages(corpus), tmp_path / "out", configurations=texts_for())
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((("b", "texts"),), "'b' reads 'texts', which is not a stage before it"),
        ((("b", "b"),), "'b' reads 'b'"),
        ((("Big", ""),), "the name 'Big' must be lower case"),
        ((("cache", ""),), "the name 'cache'"),
    ],
)
def test_stages_that_cannot_be_put_together(names, message):
    with pytest.raises(UserError, match=message):
        Pipeline(tuple(Upper(*name) for name in names))
    with pytest.raises(UserError, match="two stages are called 'a'"):
        Pipeline((Texts("a", ()), Texts("a", ())))
    with pytest.raises(UserError, match="there is no stage"):
        Pipeline(())


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Translate("b", "texts", ("texts",)), "stage 'b' reads models of 'texts', which makes corpora"),
        (GreedyEnsemble("b", ("texts",), ("texts",)), "stage 'b' reads models of 'texts', which makes corpora"),
        (NoisyDev("b", ("mean",)), "stage 'b' reads corpora of 'mean', which makes models"),
        (Translate("b", "mean", ("mean", "texts")), None),
    ],
)
def test_another_kind_of_stage_than_is_needed_is_noticed_before_any_is_run(stage, message):
    earlier = (Texts("texts", ()), Given("model"), Average("mean", "model", last=1))
    with pytest.raises(UserError, match=message) if message else nullcontext():
        Pipeline((*earlier, stage))


# The audit


def test_the_audit_walks_from_the_score_to_the_texts(whole):
    found = audit(whole)
    assert [stage.stage for stage in found] == ["count", "upper", "texts"]
    assert found[0].kind == "scores"
    assert found[-1].sources == ("a.en-de",)
    assert [stage.checked for stage in found] == [2, 3, 4]
    assert not any(stage.problems for stage in found)


@pytest.mark.parametrize(
    ("file", "stage", "problem"),
    [
        ("whole/upper/a.en-de.de", "upper", "upper/a.en-de.de has changed"),
        ("whole/count/scores.txt", "count", "count/scores.txt has changed"),
        ("whole/texts/artefact.json", "texts", "texts/artefact.json has changed"),
        ("a.de", "texts", "the text 'a.en-de' that it read has changed"),
    ],
)
def test_the_audit_names_what_has_changed(whole, tmp_path, file, stage, problem):
    with (tmp_path / file).open("a") as sink:
        sink.write("\n")
    problems = {one.stage: one.problems for one in audit(whole)}
    assert problems.pop(stage) == (problem,)
    assert not any(problems.values())


def test_the_audit_names_what_is_missing_or_was_made_from_another(whole, corpus, tmp_path):
    execute(stages(corpus, "!"), whole, configurations=texts_for(upper="2"), only=["upper"])
    (tmp_path / "a.de").unlink()
    (whole / "texts/a.en-de.en").unlink()
    problems = {one.stage: one.problems for one in audit(whole)}
    assert problems["count"] == ("it was made from another 'upper' than the one that is here",)
    assert problems["upper"] == ()
    assert problems["texts"][0] == "texts/a.en-de.en is missing"
    assert "a.de: no such file" in problems["texts"][1]
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        audit(tmp_path)


# Models and devices


def test_models_are_opened_on_the_devices_that_the_pipeline_names(tmp_path, monkeypatch):
    opened = []

    def from_run(run_dir, step, mesh, axis_rules):
        opened.append((run_dir, step, dict(mesh.shape), axis_rules))
        return f"{run_dir.name}:{step}"

    monkeypatch.setattr(workspace.Translator, "from_run", from_run)
    monkeypatch.setattr(workspace.Translator, "ensemble", lambda members, combine: (members, combine))
    rules = AxisRules(mlp="tensor")
    members = (Weights("a/run", 3), Weights("b/run", 5))

    @dataclass(frozen=True)
    class Opens(Count):
        def make(self, workspace):
            assert workspace.open(Model(("en-de",), members[:1])) == "run:3"
            both = Model(("en-de",), members, "probability")
            assert workspace.open(both) == workspace.open(both) == (["run:3", "run:5"], "probability")
            return super().make(workspace)

    texts = Given("texts", texts=(("a", ("en",), (("x",),)),))
    execute(Pipeline((texts, Opens("opens", "texts")), MeshConfig(fsdp=1, data=1), rules), tmp_path)
    shape = {"data": 1, "fsdp": 1, "tensor": 1, "slices": 1}
    assert [(step, rules) for _, step, _, rules in opened] == [(3, rules), (3, rules), (5, rules)]
    assert all(mesh.items() <= shape.items() for _, _, mesh, _ in opened)
    assert opened[2][0] == tmp_path / "b/run"


# Texts


def test_texts_take_a_stretch_and_a_side(corpus, tmp_path):
    pipeline = Pipeline((Texts("some", (corpus,), start=1, stop=3), Texts("side", (corpus,), start=3, side="target")))
    artefacts = execute(pipeline, tmp_path / "out")
    assert artefacts["some"].corpora == (
        TextFiles("a.en-de", ("en", "de"), ("some/a.en-de.en", "some/a.en-de.de"), lines=2),
    )
    assert (tmp_path / "out/some/a.en-de.de").read_text() == "zwei\ndrei\n"
    assert artefacts["side"].corpora == (TextFiles("a.en-de", ("de",), ("side/a.en-de.de",), lines=1),)
    assert (tmp_path / "out/side/a.en-de.de").read_text() == "vier\n"
    with pytest.raises(UserError, match=r"a\.en-de has no pair 9"):
        execute(Pipeline((Texts("none", (corpus,), start=9),)), tmp_path / "none")
    with pytest.raises(UserError, match=r"two texts are called 'a\.en-de'"):
        execute(Pipeline((Texts("two", (corpus, corpus)),)), tmp_path / "two")
