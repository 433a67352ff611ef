"""`t5x_ext study`: from gin to the commands of its runs; mistakes are one line, before anything runs."""

from __future__ import annotations

import json

import pytest

from t5x_ext.cli.main import main

RUN = """
from __gin__ import dynamic_registration
from t5x_ext import corpora
from t5x_ext import data

include 'tiny.gin'
data.DataConfig.train = (@corpora.ParallelText(),)
corpora.ParallelText:
    source_path = 'a.en'
    target_path = 'a.de'
    source_language = 'en'
    target_language = 'de'
"""
STUDY = """
from __gin__ import dynamic_registration
from t5x_ext import study

RATE = 0.001
study.Study:
    name = 'Rates'
    arms = [@fast/study.Arm(), @slow/study.Arm()]
    seeds = [0, 1]
    gin_files = ['run.gin']
    bindings = {'VegaTiny.dropout': 0.0}
    budget = @study.Budget()
    baseline = 'fast'
study.Budget.steps = 3
fast/study.Arm.name = 'fast'
slow/study.Arm.name = 'slow'
slow/study.Arm.bindings = {'inverse_sqrt.peak': %RATE}
"""
COMMAND = ["study", "--gin_file=study.gin", "--output_dir=out"]


@pytest.fixture(autouse=True)
def files(bare_folder):
    (bare_folder / "run.gin").write_text(RUN)
    (bare_folder / "study.gin").write_text(STUDY)


def test_a_dry_run_shows_the_commands_and_leaves_nothing(folder, capsys):
    assert main([*COMMAND, "--dry_run", "--seeds=1", "--gin.RATE=0.5", "--steps=2", "--json_out=-"]) == 0
    shared = "--gin_file=run.gin --gin.VegaTiny.dropout=0.0"
    own = "--seed=1 --steps=2 --run_dir=out/arms/{}/seed_1 --cache_dir=out/cache"
    assert json.loads(capsys.readouterr().out) == [
        {"state": "new", "command": f"t5x_ext train {shared} {own.format('fast')}"},
        {"state": "new", "command": f"t5x_ext train {shared} --gin.inverse_sqrt.peak=0.5 {own.format('slow')}"},
    ]
    assert main([*COMMAND, "--dry_run", "--arms=slow"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["new", "new"]
    assert not (folder / "out").exists()


def test_budgets_of_tokens_are_understood_by_runs(capsys):
    flags = ["--gin.t5x_ext.study.Budget.steps=None", "--gin.t5x_ext.study.Budget.target_tokens=100"]
    assert main([*COMMAND, "--dry_run", *flags]) == 0
    assert "--gin.t5x_ext.train.Budget.target_tokens=100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms=fst"], "there is no arm 'fst'; there are fast, slow"),
        (["--seeds=2"], "the study has no seed 2; it has 0, 1"),
        (["--seeds=x"], "--seeds: 'x' is not a number"),
        (["--gin.Study.seeds=[]"], "--gin.Study.seeds: Study.seeds: there is no seed"),
        (["--gin.slow/Arm.name=fast"], "2 arms are called 'fast'"),
        (["--gin.Study.baseline=fst"], "--gin.Study.baseline: Study.baseline='fst': there are fast, slow"),
        (["--gin.RATE=-1"], "arm 'slow': --gin.inverse_sqrt.peak: "),
        (["--gin.slow/Arm.bindings={'inverse_sqrt.peek': 1}"], "arm 'slow': --gin.inverse_sqrt.peek: "),
        (["--gin.Study.gin_files=['rn.gin']"], "arm 'fast': there is no gin file 'rn.gin'; did you mean run.gin?"),
        (["--gin.Study.amrs=1"], "did you mean"),
        (["--gin.Study.measurements=[3]"], "Study.measurements is tuple of str or Measurement"),
        (["--output_dir=gs://b/o"], "give a local path"),
        (["--output_dir=run.gin"], "run.gin is a file, not a folder"),
        (["--measure=arms/fast/seed_7"], "--measure=arms/fast/seed_7: the study has no such run"),
        (["--processes=0"], "--processes=0"),
    ],
)
def test_mistakes_are_one_line_and_nothing_runs(folder, capsys, flags, message):
    before = sorted(folder.iterdir())
    assert main([*COMMAND, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.startswith("t5x_ext study: ")
    assert sorted(folder.iterdir()) == before


def test_what_it_needs(capsys):
    assert main(["study", "--output_dir=out"]) == 2
    assert "--gin_file is missing" in capsys.readouterr().err
    assert main(["study", "--gin_file=study.gin"]) == 2
    assert "--output_dir is missing" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train --run_dir=run", "pipeline --output_dir=run"])
def test_commands_for_runs_name_the_one_for_a_study(capsys, command):
    assert main([*command.split(), "--gin_file=study.gin"]) == 2
    assert "study.gin:8: this is a study; t5x_ext study runs it" in capsys.readouterr().err
