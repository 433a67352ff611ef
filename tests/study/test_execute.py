"""Runs of a study in processes: what is run, skipped, resumed, refused, and what a killed study leaves."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study_stand_ins import configure, options, starts, study_of, table

from t5x_ext.contracts import UserError
from t5x_ext.study import Arm, Budget, Options, Study, Tuning, check, execute, select, status

STUDY_PROCESS = """
import logging, pickle, sys
sys.path.insert(0, sys.argv[1])
from study_stand_ins import configure
from t5x_ext.study import execute

logging.basicConfig(level=logging.INFO)
study, folder, options = pickle.load(open(sys.argv[2], "rb"))
sys.exit(execute(study, folder, configure, options=options).code)
"""


def run(study, folder, options, **changes):
    return execute(study, str(folder), configure, options=options, **changes)


def test_every_arm_has_every_seed_and_finished_runs_are_skipped(tmp_path):
    study = study_of({"low": {"level": 1}, "high": {"level": 2.5}}, baseline="low")
    ended = run(study, tmp_path, options())
    assert ended.code == 0
    found = table(tmp_path)
    assert [arm["name"] for arm in found["arms"]] == ["low", "high"]
    low, high = (arm["values"]["valid/loss"] for arm in found["arms"])
    assert low["mean"] == pytest.approx(1 + 1 / 16 + 4 / 3)
    assert (high["difference"]["difference"], high["difference"]["p_value"]) == (pytest.approx(1.5), 0.0)
    assert (low["against"], high["against"]) == ("", "low")
    assert {"figures", "report.html", "table.md", "table.json"} <= {path.name for path in tmp_path.iterdir()}
    (_, niceness, cores), *others = starts(tmp_path, "arms/high/seed_1")
    assert not others
    assert niceness == min(19, os.nice(0) + 10)
    assert cores == len(os.sched_getaffinity(0))

    assert run(study, tmp_path, options()).code == 0
    assert len(starts(tmp_path, "arms/high/seed_1")) == 1
    assert table(tmp_path)["arms"] == found["arms"]


def test_selected_runs_alone_are_made_and_the_others_are_new(tmp_path):
    study = study_of({"low": {}, "high": {"level": 2}})
    assert run(study, tmp_path, options(), arms=["high"], seeds=[1]).code == 0
    states = {arm["name"]: [one["state"] for one in arm["runs"].values()] for arm in table(tmp_path)["arms"]}
    assert states == {"low": ["new", "new"], "high": ["new", "finished"]}
    with pytest.raises(UserError, match="there is no arm 'hgh'; there are low, high"):
        run(study, tmp_path, options(), arms=["hgh"])
    with pytest.raises(UserError, match="the study has no seed 7; it has 0, 1"):
        run(study, tmp_path, options(), seeds=[7])


def test_a_failing_arm_is_a_line_and_does_not_stop_the_others(tmp_path):
    study = study_of({"bad": {"fail": f"{tmp_path}/no such file"}, "worse": {"crash": "boom"}, "good": {}})
    ended = run(study, tmp_path, options(), seeds=[0])
    assert ended.code == 2
    errors = [(arm.name, error) for arm, seed, error in ended.results.errors(select(study, seeds=[0]))]
    assert errors == [("bad", f"{tmp_path}/no such file"), ("worse", "ValueError: boom")]
    text = (tmp_path / "table.md").read_text()
    assert "| OUT/no such file " in text
    assert str(tmp_path) not in text + (tmp_path / "report.html").read_text()
    assert table(tmp_path)["arms"][2]["values"]["valid/loss"]["size"] == 1
    assert run(study, tmp_path, options(), seeds=[0]).code == 2  # failed runs are tried again
    assert [len(starts(tmp_path, f"arms/{name}/seed_0")) for name in ("bad", "good")] == [2, 1]


def test_mistakes_are_found_before_anything_runs(tmp_path):
    study = study_of({"good": {}, "bad": {"levle": 3}})
    with pytest.raises(UserError, match=r"arm 'bad': --gin\.levle: nothing uses it"):
        run(study, tmp_path / "out", options(), arms=["good"])
    assert not (tmp_path / "out").exists()


def test_a_longer_budget_resumes_and_other_settings_are_run_again(tmp_path):
    run(study_of({"a": {}}, seeds=(0,)), tmp_path, options())
    longer = study_of({"a": {}}, seeds=(0,), budget=Budget(steps=5))
    (job,) = check(longer, str(tmp_path), configure)
    assert status(job, str(tmp_path), configure) == "changed"
    assert run(longer, tmp_path, options()).code == 0
    lines = [json.loads(line) for line in (tmp_path / "arms/a/seed_0/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    # What was made with other settings is in no mean.
    other = study_of({"a": {"level": 9}, "b": {}}, seeds=(0,), budget=Budget(steps=5))
    ended = run(other, tmp_path, options(), arms=["b"])
    assert ended.results.runs["a"][0].state == "changed"
    assert ended.results.names == ["valid/loss"]
    assert ended.results.cell(other.arms[0], "valid/loss").moments is None
    shutil.rmtree(tmp_path / "arms/a/seed_0")
    assert status(job, str(tmp_path), configure) == "changed"


def test_runs_side_by_side_share_the_cores(tmp_path):
    study = study_of({"a": {"pause": 0.2}, "b": {"pause": 0.2}}, seeds=(0,))
    run(study, tmp_path, options(processes=2))
    cores = len(os.sched_getaffinity(0))
    used = [starts(tmp_path, f"arms/{name}/seed_0")[0][2] for name in ("a", "b")]
    assert sum(used) == max(cores, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_runs_gracefully_and_the_next_call_resumes(tmp_path, number):
    study = study_of({"a": {"pause": 0.05}, "b": {"pause": 0.05}}, budget=Budget(steps=40))
    process = start(tmp_path, study, options(processes=2))
    wait_for(process, tmp_path / "out/arms/a/seed_0/metrics.jsonl", tmp_path / "out/arms/b/seed_0/metrics.jsonl")
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    record = json.loads((tmp_path / "out/arms/a/seed_0.json").read_text())
    assert record["run"]["state"] == "unfinished"
    assert record["run"]["error"] == "stopped by a signal; rerun the same command to resume"
    assert not (tmp_path / "out/arms/a/seed_1").exists()
    assert not (tmp_path / "out/table.json").exists()
    assert int((tmp_path / "out/arms/a/seed_0/saved").read_text()) < 40
    finish(tmp_path, study, options(processes=2), runs=4)


def test_runs_of_a_killed_study_save_and_end_and_the_next_call_waits_for_them(tmp_path):
    study = study_of({"a": {"pause": 0.05, "saving": 1}}, seeds=(0,), budget=Budget(steps=40))
    process = start(tmp_path, study, options())
    wait_for(process, tmp_path / "out/arms/a/seed_0/metrics.jsonl")
    process.kill()
    process.wait()
    assert not (tmp_path / "out/arms/a/seed_0.json").exists()
    # At once: the run is still saving, and would say that two processes are in its folder.
    finish(tmp_path, study, options(), runs=1)
    assert len(starts(tmp_path / "out", "arms/a/seed_0")) == 2


def start(folder: Path, study: Study, options: Options) -> subprocess.Popen:
    (folder / "study.pickle").write_bytes(pickle.dumps((study, str(folder / "out"), options)))
    arguments = ["-c", STUDY_PROCESS, str(Path(__file__).parent), str(folder / "study.pickle")]
    return subprocess.Popen([sys.executable, *arguments])


def wait_for(process: subprocess.Popen, *files: Path) -> None:
    end = time.monotonic() + 120
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


def finish(folder: Path, study: Study, options: Options, runs: int) -> None:
    """The study again, to its end: every update of every run was made once."""
    assert run(study, folder / "out", options).code == 0
    files = list((folder / "out").glob("arms/*/*/metrics.jsonl"))
    assert len(files) == runs
    for file in files:
        steps = [json.loads(line)["step"] for line in file.read_text().splitlines() if '"loss"' in line]
        assert steps == list(range(1, 41))


def test_tuning_chooses_for_the_arm_and_for_those_that_add_to_it(tmp_path):
    tuned = Arm("a", tuned={"level": [3, 1, 2]})
    study = Study(
        "Tuned",
        (tuned, Arm("b", tuned_as="a"), Arm("c", tuned={"fail": ["no", "never"]})),
        seeds=(0,),
        budget=Budget(steps=3),
        tuning=Tuning(seeds=(5, 6), budget=Budget(steps=2)),
    )
    assert run(study, tmp_path, options(), arms=["b"]).code == 0
    found = table(tmp_path)
    assert found["tuning"]["a"]["chosen"] == {"level": 1}
    assert [one["value"] for one in found["tuning"]["a"]["tried"]] == pytest.approx([5.6875, 3.6875, 4.6875])
    assert found["arms"][1]["values"]["valid/loss"]["mean"] == pytest.approx(1 + 4 / 3)
    assert [one["state"] for one in found["arms"][2]["runs"].values()] == ["new"]
    assert not (tmp_path / "arms/a").exists()
    ended = run(study, tmp_path, options())
    assert ended.code == 2
    assert [error for _, _, error in ended.results.errors()] == ["none of the choices of c could be trained"]
    assert "level = 3: 5.688; level = 1: 3.688; level = 2: 4.688 | level = 1 |" in (tmp_path / "table.md").read_text()
    assert len(starts(tmp_path, "tuning/a/choice_1/seed_5")) == 1


class Counted:
    """A measurement that counts how often it is made."""

    calls = 0

    def __call__(self, run):
        type(self).calls += 1
        assert run.config is not None
        if run.arm.name == "unmeasurable":
            raise UserError("there is nothing to measure")
        return {"counted": float((run.folder / "saved").read_text()) + run.seed}


def test_measurements_are_made_once_a_run_and_their_errors_are_lines(tmp_path):
    Counted.calls = 0
    study = study_of({"a": {}, "unmeasurable": {}}, measurements=("loss", "directions/en-de/bleu", Counted()))
    ended = run(study, tmp_path, options())
    assert ended.code == 2
    assert [(arm.name, error) for arm, _, error in ended.results.errors()] == [
        ("unmeasurable", "there is nothing to measure")
    ] * 2
    assert ended.results.values(study.arms[0], "counted") == {0: 3.0, 1: 4.0}
    assert Counted.calls == 4
    run(study, tmp_path, options(), arms=["a"])
    assert Counted.calls == 4
    (tmp_path / "arms/a/seed_0.measured.json").unlink()
    run(study, tmp_path, options(), arms=["a"])
    assert Counted.calls == 5


def test_a_damaged_record_is_one_line(tmp_path):
    study = study_of({"a": {}}, seeds=(0,))
    run(study, tmp_path, options())
    (tmp_path / "arms/a/seed_0.json").write_text("{")
    with pytest.raises(UserError, match=r"seed_0\.json: not a record of ours"):
        run(study, tmp_path, options())


def test_arms_that_share_a_run_are_measured_in_it(tmp_path):
    class Part:
        def __call__(self, run):
            return {"length": float(len(run.arm.part))}

    arms = (Arm("a", run="both", part="x"), Arm("b", run="both", part="yyy"))
    study = Study("Shared", arms, (0, 1), budget=Budget(steps=1), measurements=(Part(), "valid/loss"), baseline="a")
    ended = run(study, tmp_path, options())
    assert ended.code == 0
    assert [path.name for path in (tmp_path / "arms").iterdir()] == ["both"]
    assert [ended.results.values(arm, "length") for arm in arms] == [{0: 1.0, 1: 1.0}, {0: 3.0, 1: 3.0}]
    assert ended.results.cell(arms[1], "valid/loss").difference.p_value == 1.0
