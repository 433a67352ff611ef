"""Slurm: the batch script, read by shellcheck and run by bash with programs that stand in for Slurm's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import launch_slurm
import pytest
from launching import Programs, check_shell, launch

from t5x_ext.cli import train
from t5x_ext.cli.flags import parse

FLAGS = (
    *("--nodes=2", "--gpus_per_node=4", "--time=24:00:00", "--gin_file=runs/quickstart.gin", "--run_dir=/shared/a run"),
    *("--gin.Run.steps=7", "--name=mt"),
)
NODES = (0, "gpu-a1\ngpu-a2")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    (tmp_path / "bin").mkdir()
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.add("sbatch", "srun", "scontrol")
    monkeypatch.chdir(tmp_path)
    for name, value in {"SLURM_JOB_ID": "4099", "SLURM_JOB_NODELIST": "gpu-a[1-2]"}.items():
        monkeypatch.setenv(name, value)
    return programs


def script(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert launch(launch_slurm, *FLAGS, *flags, "--dry_run") == 0
    return capsys.readouterr().out


def run(text: str) -> int:
    return subprocess.run(["bash"], input=text, text=True, check=False).returncode


def test_slurm_is_asked_for_a_task_a_gpu_and_a_signal_before_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    lines = script(capsys, "--partition=gpu", "--account=me", "--cpus_per_task=6", "--save_seconds=90",
                   "--sbatch_option=--constraint=h100").splitlines()  # fmt: skip
    assert lines[0] == "#!/usr/bin/env bash"
    options = [line.removeprefix("#SBATCH ") for line in lines[1:] if line.startswith("#SBATCH ")]
    # sbatch reads options up to the first command only.
    assert lines[1 : 1 + len(options)] == [f"#SBATCH {option}" for option in options]
    assert options == [
        *("--job-name=mt", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=6"),
        *("--time=24:00:00", "--partition=gpu", "--account=me", "--signal=USR1@90", "--requeue"),
        *("--open-mode=append", "--output=mt-%j.log", "--constraint=h100"),
    ]


@pytest.mark.parametrize("flags", [[], ["--setup=module load cuda", "--cache_dir=/shared/it's"]])
def test_the_script_is_sound_shell(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_shell(script(capsys, *flags), tmp_path)


def test_tasks_train_as_told(slurm: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, "--setup=echo ready > setup.txt", "--cache_dir=/$HOME")
    slurm.answer(NODES)
    assert run(text) == 0
    assert Path("setup.txt").read_text() == "ready\n"
    hostnames, srun = slurm.called
    assert hostnames == ["scontrol", "show", "hostnames", "gpu-a[1-2]"]
    assert srun == [
        *("srun", "--kill-on-bad-exit=0", "--wait=120", "t5x_ext", "train", "--gin_file=runs/quickstart.gin"),
        *("--run_dir=/shared/a run", "--cache_dir=/$HOME", "--gin.Run.steps=7"),
        *("--distributed=slurm", "--coordinator_address=gpu-a1:61443"),
    ]
    parse(train.define_flags, srun[5:])


def test_a_run_that_saved_after_a_signal_queues_again(slurm: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys)
    slurm.answer(NODES, (130, ""))
    assert run(text) == 130
    assert slurm.called[2:] == [["scontrol", "requeue", "4099"]]


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_other_endings_are_handed_on(status: int, slurm: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys)
    slurm.answer(NODES, (status, ""))
    assert run(text) == status
    assert len(slurm.called) == 2


@pytest.mark.parametrize(("count", "calls"), [("2", 3), ("3", 2)])
def test_restarts_have_an_end(
    count: str, calls: int, slurm: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(capsys, "--max_restarts=3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    slurm.answer(NODES, (130, ""))
    assert run(text) == 130
    assert len(slurm.called) == calls


def test_without_nodes_nothing_starts(slurm: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys)
    slurm.answer((1, ""))
    assert run(text) == 1
    assert len(slurm.called) == 1


def test_what_is_written_and_submitted_is_what_was_printed(slurm: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, "--submit")
    assert not Path("mt.sbatch").exists()
    assert slurm.called == []
    assert launch(launch_slurm, *FLAGS, "--submit") == 0
    assert Path("mt.sbatch").read_text() == text
    assert slurm.called == [["sbatch", "mt.sbatch"]]
    assert launch(launch_slurm, *FLAGS, "--out=other.sh") == 0
    assert Path("other.sh").read_text() == text
    assert len(slurm.called) == 1


def test_gin_files_of_ones_own_are_named_by_their_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.gin"
    mine.write_text("include 'runs/quickstart.gin'\n")
    assert f"--gin_file={mine}" in script(capsys, f"--gin_file={mine}")


def test_a_bucket_goes_with_a_cache_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--cache_dir=/scratch/cache" in script(capsys, "--run_dir=gs://bucket/run", "--cache_dir=/scratch/cache")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (FLAGS[:2], "--time is missing"),
        ([*FLAGS, "--time=soon"], "HH:MM:SS"),
        ([*FLAGS, "--time=1:2:3"], "HH:MM:SS"),
        ([*FLAGS, "--run_dir=out"], "absolute path"),
        ([*FLAGS, "--run_dir=/tmp/out"], "all 2 nodes share"),
        ([*FLAGS, "--run_dir=gs://bucket/run"], "--cache_dir is missing"),
        ([*FLAGS, "--sbatch_option=constraint=h100"], "--constraint=h100"),
        ([*FLAGS, "--sbatch_option=--a\nrm -rf /"], "one option"),
        ([*FLAGS, "--name=a b"], "lower-case"),
        ([*FLAGS, "--nodes=two"], "--nodes=two"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], what: str, tmp_path: Path, slurm: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(launch_slurm, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("launch_slurm.py: ")
    assert what in line
    assert slurm.called == []
    assert not list(tmp_path.glob("*.sbatch"))
