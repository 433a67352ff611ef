"""`t5x_ext pipeline`: from gin to a folder of stages; mistakes are one line."""

from __future__ import annotations

import json

import pytest

from t5x_ext.cli.main import main

GIN = """
from __gin__ import dynamic_registration
from t5x_ext import corpora
from t5x_ext import data
from t5x_ext import pipeline
from t5x_ext import vega_mt

FIRST = 3
pipeline.Pipeline.stages = [@bitext/pipeline.Texts(), @german/pipeline.Texts()]
bitext/pipeline.Texts:
    name = 'bitext'
    corpora = [@corpora.ParallelText()]
    stop = %FIRST
german/pipeline.Texts:
    name = 'german'
    corpora = [@corpora.ParallelText()]
    start = %FIRST
    side = 'target'
corpora.ParallelText:
    source_path = 'a.en'
    target_path = 'a.de'
    source_language = 'en'
    target_language = 'de'
"""
RUN = ["pipeline", "--gin_file=p.gin", "--output_dir=out"]


@pytest.fixture(autouse=True)
def files(folder):
    (folder / "p.gin").write_text(GIN)
    (folder / "a.en").write_text("".join(f"line {number}\n" for number in range(5)))
    (folder / "a.de").write_text("".join(f"Zeile {number}\n" for number in range(5)))


def test_it_runs_and_runs_again_and_is_audited(folder, capsys):
    assert main([*RUN, "--dry_run"]) == 0
    assert not (folder / "out").exists()
    assert "german" in capsys.readouterr().out
    assert main([*RUN, "--json_out=made.json"]) == 0
    assert (folder / "out/german/a.en-de.de").read_text() == "Zeile 3\nZeile 4\n"
    made = json.loads((folder / "made.json").read_text())
    assert made["bitext"]["corpora"][0]["lines"] == 3
    assert "bitext           corpora  lines 3" in capsys.readouterr().out
    assert main(RUN) == 0
    capsys.readouterr()
    assert main([*RUN, "--dry_run", "--json_out=-"]) == 0
    assert [status["state"] for status in json.loads(capsys.readouterr().out)] == ["finished", "finished"]
    assert main(["pipeline", "--output_dir=out", "--audit"]) == 0
    assert "german (corpora): 3 digests, as recorded; from text a.en-de" in capsys.readouterr().out
    (folder / "out/german/a.en-de.de").write_text("Zeile 3\n")
    assert main(["pipeline", "--output_dir=out", "--audit", "--json_out=audit.json"]) == 1
    assert "  german/a.en-de.de has changed" in capsys.readouterr().out
    assert json.loads((folder / "audit.json").read_text())[0]["problems"] == ["german/a.en-de.de has changed"]


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_record_of_the_machine_is_one_line(folder, capsys, text):
    (folder / "out").mkdir()
    (folder / "out/environment.json").write_text(text)
    assert main(RUN) == 2
    assert "out/environment.json: not a record of ours; delete it" in capsys.readouterr().err


def test_of_a_text_that_is_not_there_nothing_is_left(folder, capsys):
    (folder / "a.de").unlink()
    assert main(RUN) == 2
    assert capsys.readouterr().err == "t5x_ext pipeline: a.de: no such file\n"
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", ["train --run_dir=run", "check --topology=h100:1"])
def test_a_command_for_one_run_names_those_for_a_pipeline(folder, capsys, command):
    assert main([*command.split(), "--gin_file=runs/vega_mt_tiny.gin"]) == 2
    assert "this is a pipeline: t5x_ext pipeline runs it, t5x_ext check takes one --stage" in capsys.readouterr().err


def test_each_stage_has_its_own_configuration(folder, capsys):
    assert main(RUN) == 0
    stages = json.loads((folder / "out/manifest.json").read_text())["stages"]
    assert "Texts.start = 3" in stages["german"]["configuration"]
    assert "Texts.start = 3" not in stages["bitext"]["configuration"]
    only_german = [*RUN, "--gin.german/Texts.start=2"]
    assert main(only_german) == 2
    assert "stage 'german' in out was made from something else: " in capsys.readouterr().err
    assert main([*only_german, "--stages=german"]) == 0
    assert (folder / "out/german/a.en-de.de").read_text() == "Zeile 2\nZeile 3\nZeile 4\n"
    assert main(only_german) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages=germn"], "there is no stage 'germn'; there are bitext, german"),
        (["--gin.FIRST=9"], "a.en-de has no pair 9"),
        (["--gin.german/Texts.side=left"], "not 'left'"),
        (["--gin.Texts.nmae=x"], "did you mean"),
        (["--gin.ParallelText.target_language=xx"], "xx"),
        (["--audit", "--dry_run"], "--audit goes with neither"),
        (["--audit"], "out: has no manifest.json"),
        (["--dry_run", "--distributed=auto"], "--audit and --dry_run are for one process"),
        (["--output_dir=gs://b/o"], "--output_dir=gs://b/o: give a local path"),
        (["--gin.ParallelText.source_path=none.en"], "none.en: no such file"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, message):
    assert main([*RUN, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    # Beside what says which stage it is in.
    assert len([line for line in error.splitlines() if not line.startswith("stage ")]) == 1


def test_what_it_needs(capsys):
    assert main(["pipeline", "--output_dir=out"]) == 2
    assert "--gin_file is missing" in capsys.readouterr().err
    assert main(["pipeline", "--gin_file=p.gin"]) == 2
    assert "--output_dir is missing" in capsys.readouterr().err


MINE = """
from dataclasses import dataclass


def upper(line: str, language: str) -> str:
    return line.upper()


@dataclass(frozen=True)
class Trained:
    name: str = "model"

    def inputs(self):
        return ()

    def sources(self):
        return ()

    def make(self, workspace):
        raise NotImplementedError
"""
FINISH = """
from __gin__ import dynamic_registration
import finish_plugin
from t5x_ext import pipeline
from t5x_ext import vega_mt

include 'p.gin'
pipeline.Pipeline.stages = [
    @bitext/pipeline.Texts(), @finish_plugin.Trained(),
    @mine/pipeline.Translate(), @theirs/pipeline.Translate(), @plain/pipeline.Translate(),
]
pipeline.Translate.model = 'model'
pipeline.Translate.texts = ['bitext']
mine/pipeline.Translate.name = 'mine'
mine/pipeline.Translate.postprocess = @finish_plugin.upper
theirs/pipeline.Translate.name = 'theirs'
theirs/pipeline.Translate.postprocess = @vega_mt.widen_as_released
plain/pipeline.Translate.name = 'plain'
"""


def test_a_postprocessor_is_a_name_or_any_function_that_gin_names(folder, monkeypatch, capsys):
    from t5x_ext.cli.gin_config import build_parts
    from t5x_ext.pipeline import Pipeline
    from t5x_ext.pipeline.postprocess import postprocessor

    (folder / "finish_plugin.py").write_text(MINE)
    (folder / "finish.gin").write_text(FINISH)
    monkeypatch.syspath_prepend(folder)
    pipeline, texts = build_parts("stages", ["finish.gin"], root=Pipeline)
    finished = [postprocessor(stage.postprocess)("你好, world", "zh") for stage in pipeline.stages[2:]]
    assert finished == ["你好, WORLD", "你好，world", "你好，world"]
    assert "mine/t5x_ext.pipeline.Translate.postprocess = @finish_plugin.upper\n" in texts[2]
    command = ["pipeline", "--gin_file=finish.gin", "--output_dir=out", "--dry_run"]
    assert main(command) == 0
    capsys.readouterr()
    for name, message in (
        ("wide", "postprocess = 'wide': must be one of 'widths', 'none', or a function (line, language) -> line"),
        ("released", "'released' is no longer a name; give the function, @t5x_ext.vega_mt.widen_as_released"),
    ):
        assert main([*command, f"--gin.plain/Translate.postprocess='{name}'"]) == 2
        assert message in capsys.readouterr().err
