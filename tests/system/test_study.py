"""A whole study of a tiny model: two arms with two seeds, in processes; what it says is what the runs have found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from t5x_ext.cli.main import main

RUN = """
from __gin__ import dynamic_registration
from t5x_ext import corpora
from t5x_ext import data
from t5x_ext import train

include 'tiny.gin'
data.DataConfig.train = (@train/corpora.ParallelText(),)
data.DataConfig.valid = (@valid/corpora.ParallelText(),)
corpora.ParallelText.source_language = 'en'
corpora.ParallelText.target_language = 'es'
train/corpora.ParallelText.source_path = 'train.en'
train/corpora.ParallelText.target_path = 'train.es'
valid/corpora.ParallelText.source_path = 'valid.en'
valid/corpora.ParallelText.target_path = 'valid.es'
"""
STUDY = """
from __gin__ import dynamic_registration
from t5x_ext import study

study.Study:
    name = 'Rates'
    arms = [@fast/study.Arm(), @slow/study.Arm()]
    seeds = [0, 1]
    gin_files = ['run.gin']
    budget = @study.Budget()
    measurements = ['valid/loss', 'spent/target_tokens']
    curves = ['loss']
    baseline = 'slow'
study.Budget.target_tokens = 600
fast/study.Arm.name = 'fast'
fast/study.Arm.bindings = {'adam.learning_rate': 0.02, 'Run.steps': 20}
slow/study.Arm.name = 'slow'
slow/study.Arm.bindings = {'adam.learning_rate': 0.0001, 'Run.steps': 20}
"""
COMMAND = ("study", "--gin_file=study.gin", "--output_dir=out")


def test_a_study_says_what_its_runs_have_found(place, write_tiny, finish, capsys):
    write_tiny(place, train=120, valid=6)
    (place / "run.gin").write_text(RUN)
    (place / "study.gin").write_text(STUDY)
    printed = finish("-m", "t5x_ext", *COMMAND)
    assert "fast, seed 1: finished in " in printed
    assert "| fast  | slow      | 2       |" in printed
    found = json.loads(Path("out/table.json").read_text())
    arms = {arm["name"]: arm for arm in found["arms"]}
    for name, arm in arms.items():
        losses = []
        for seed in (0, 1):
            folder = Path("out/arms", name, f"seed_{seed}")
            spent = json.loads((folder / "results.json").read_text())["spent"]["target_tokens"]
            assert 600 <= spent < 600 + 8 * 32
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            losses += [line["valid/loss"] for line in lines if "valid/loss" in line]
        assert len(losses) == 2
        assert arm["values"]["valid/loss"]["mean"] == np.mean(losses)
    fast, slow = (arms[name]["values"]["valid/loss"]["mean"] for name in ("fast", "slow"))
    assert fast < slow - 0.3
    assert found["facts"]["devices of the runs"].startswith("1 x cpu")
    assert (place / "out/figures/curve_loss.png").exists()
    page = (place / "out/report.html").read_text()
    assert "http" not in page
    assert str(place) not in page

    # Again nothing runs; the same is said.
    logs = {path: path.stat().st_size for path in Path("out").glob("arms/*/*.log")}
    assert len(logs) == 4
    assert main([*COMMAND, "--json_out=again.json"]) == 0
    assert json.loads(Path("again.json").read_text())["arms"] == found["arms"]
    assert {path: path.stat().st_size for path in Path("out").glob("arms/*/*.log")} == logs

    # What is computed of a run, here in this process.
    sharpness = "@t5x_ext.study.Sharpness()"
    measure = [f"--gin.Study.measurements=[{sharpness}]", "--measure=arms/fast/seed_0"]
    assert main([*COMMAND, *measure]) == 0
    values = json.loads(Path("out/arms/fast/seed_0.measured.json").read_text())["values"]["fast"]
    assert values.keys() == {f"sharpness/{name}" for name in ("loss", "eigenvalue", "random", "uphill")}
    assert values["sharpness/uphill"] > abs(values["sharpness/random"])
    assert values["sharpness/eigenvalue"] > 0
