"""Cloud TPU VMs: the printed commands are those that run, and an interrupted run is started again."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import launch_tpu_vm
import pytest
from launching import REPOSITORY, Programs, check_shell, launch

from t5x_ext.cli import train
from t5x_ext.cli.flags import parse

FLAGS = (
    *("--topology=v5e:8x8", "--zone=us-west4-a", "--gin_file=runs/vega_mt_4b7.gin", "--run_dir=gs://bucket/run"),
    *("--gin.Run.steps=7", "--gin.Run.log_every=4", "--train_flag=seed=3", "--poll_seconds=0"),
)
NONE, ACTIVE, LOST = (1, ""), (0, "ACTIVE"), (0, "SUSPENDED")
DONE, FAILED = (0, ""), (255, "")


@pytest.fixture
def gcloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    (tmp_path / "bin").mkdir()
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.add("gcloud")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t5x_ext-1-py3-none-any.whl").write_bytes(b"")
    return programs


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, list[str]]:
    """The commands of a dry run by their verb."""
    assert launch(launch_tpu_vm, *FLAGS, *flags, "--dry_run") == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    verbs = ("build", "describe", "create", "scp", "install", "train", "delete")
    return dict(zip(verbs if commands[0][0] != "gcloud" else verbs[1:], commands, strict=True))


def test_the_request_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    commands = printed(capsys, "--num_slices=2", "--spot", "--name=big", "--project=mine", "--service_account=a@b.c")
    assert commands["create"] == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "big", "--zone=us-west4-a", "--project=mine"),
        *("--quiet", "--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite", "--node-count=2"),
        *("--node-prefix=big", "--spot", "--service-account=a@b.c"),
    ]
    assert commands["build"][-1] == str(REPOSITORY)
    assert "--node-id=t5x-ext" in printed(capsys)["create"]
    assert {"--type=v5p", "--topology=4x4x12"} < set(printed(capsys, "--topology=v5p:4x4x12")["create"])


def test_a_dry_run_does_nothing(gcloud: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    printed(capsys)
    assert gcloud.called == []
    assert sorted(tmp_path.rglob("*")) == before


def test_what_runs_is_what_was_printed(gcloud: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--wheel=t5x_ext-1-py3-none-any.whl", "--delete_after")
    say = printed(capsys, *flags)
    gcloud.answer(NONE, DONE, (0, "WAITING_FOR_RESOURCES"), (0, "PROVISIONING"), ACTIVE)
    assert launch(launch_tpu_vm, *FLAGS, *flags) == 0
    verbs = ["describe", "create", *["describe"] * 3, "scp", "install", "train", "delete"]
    assert gcloud.called == [say[verb] for verb in verbs]


def test_a_run_that_was_launched_before_is_found_again(gcloud: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    say = printed(capsys, "--wheel=t5x_ext-1-py3-none-any.whl")
    gcloud.answer(ACTIVE)
    assert launch(launch_tpu_vm, *FLAGS, "--wheel=t5x_ext-1-py3-none-any.whl") == 0
    assert gcloud.called == [say[verb] for verb in ("describe", "scp", "install", "train")]


def test_a_preempted_run_gets_new_machines(gcloud: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    say = printed(capsys, "--wheel=t5x_ext-1-py3-none-any.whl")
    gcloud.answer(ACTIVE, DONE, DONE, FAILED, LOST, DONE, DONE, ACTIVE)
    assert launch(launch_tpu_vm, *FLAGS, "--wheel=t5x_ext-1-py3-none-any.whl") == 0
    start = ["scp", "install", "train"]
    verbs = ["describe", *start, "describe", "delete", "create", "describe", *start]
    assert gcloud.called == [say[verb] for verb in verbs]


def test_restarts_have_an_end(gcloud: Programs) -> None:
    gcloud.answer(*[ACTIVE, DONE, DONE, (130, "")] * 9)
    assert launch(launch_tpu_vm, *FLAGS, "--wheel=t5x_ext-1-py3-none-any.whl", "--max_restarts=2") == 130
    assert sum("--batch-size=all" in call for call in gcloud.called) == 3


def test_a_mistake_is_not_tried_again_and_the_tpu_goes_back(gcloud: Programs) -> None:
    gcloud.answer(ACTIVE, DONE, DONE, (2, ""))
    assert launch(launch_tpu_vm, *FLAGS, "--wheel=t5x_ext-1-py3-none-any.whl", "--delete_after") == 2
    assert [call[4] for call in gcloud.called] == ["describe", "scp", "ssh", "ssh", "delete"]


def test_a_refused_request_ends_the_launch(gcloud: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    gcloud.answer(NONE, (1, ""))
    assert launch(launch_tpu_vm, *FLAGS, "--wheel=t5x_ext-1-py3-none-any.whl") == 2
    assert len(gcloud.called) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("launch_tpu_vm.py: gcloud refused")


def test_remote_commands_are_sound_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = printed(capsys, "--cache_dir=/tmp/it's")
    for verb in ("install", "train"):
        (text,) = (part.removeprefix("--command=") for part in commands[verb] if part.startswith("--command="))
        check_shell(text + "\n", tmp_path)


def test_gin_files_of_ones_own_travel_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "my run.gin"
    mine.write_text("# Empty: what the packaged file says is enough.\n")
    commands = printed(capsys, f"--gin_file={mine}")
    assert str(mine) in commands["scp"]
    assert "'--gin_file=./my run.gin'" in commands["train"][-1]


def test_a_machine_trains_as_told_and_ends_what_a_lost_connection_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys)["train"][-1].removeprefix("--command=")
    program = tmp_path / "t5x_ext_env" / "bin" / "t5x_ext"
    program.parent.mkdir(parents=True)
    # It saves for a moment when told to stop, and tells when it began and ended.
    program.write_text(
        "#!/bin/bash\n"
        'trap "sleep 0.3; echo $$ saved >> log; exit 130" TERM\n'
        'printf "%s\\n" "$@" > arguments; echo $$ began >> log\n'
        "while [ ! -e finish ]; do sleep 0.05; done\n"
    )
    program.chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path)}

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["bash", "-c", text], cwd=tmp_path, env=environment)
        deadline = time.monotonic() + 20
        while f"{process.pid} began" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            # A process that has ended is there until its parent, here this test, has asked for it.
            [before.poll() for before in started]
            time.sleep(0.02)
        started.append(process)
        return process

    started: list[subprocess.Popen[bytes]] = []
    (tmp_path / "log").write_text("")
    first = start()
    second = start()
    (tmp_path / "finish").touch()
    assert (first.wait(20), second.wait(20)) == (130, 0)
    assert (tmp_path / "log").read_text().splitlines() == [
        f"{first.pid} began",
        f"{first.pid} saved",
        f"{second.pid} began",
    ]
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments == [
        *("train", "--gin_file=runs/vega_mt_4b7.gin", "--run_dir=gs://bucket/run", "--cache_dir=/tmp/t5x_ext_cache"),
        *("--gin.Run.steps=7", "--gin.Run.log_every=4", "--seed=3", "--distributed=tpu"),
    ]
    parse(train.define_flags, arguments[1:])


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ([], "--topology is missing"),
        (["--topology=v5e:8x8"], "--zone is missing"),
        ([*FLAGS, "--topology=v5e:9x9"], "v5e has the shapes"),
        ([*FLAGS, "--run_dir="], "--run_dir is missing"),
        ([*FLAGS, "--run_dir=/home/me/run"], "give a bucket"),
        ([*FLAGS, "--gin_file=runs/quikstart.gin"], "did you mean runs/quickstart.gin"),
        ([*FLAGS, "--train_flag=stpes=3"], "--stpes; did you mean --steps"),
        ([*FLAGS, "--train_flag=steps=many"], "--steps=many"),
        ([*FLAGS, "--gin.Run.stpes=3"], "did you mean steps"),
        ([*FLAGS, "--gin.MeshConfig.fsdp=48"], "does not fit 64 devices"),
        (
            [*FLAGS, "--num_slices=4", "--gin.MeshConfig.slices=2"],
            "the run has MeshConfig.slices=2; add --gin.MeshConfig.slices=4",
        ),
        (
            [*FLAGS[:2], "--gin_file=runs/quickstart.gin", FLAGS[3], "--num_slices=2"],
            "add --gin_file=parallel/multislice.gin",
        ),
        ([*FLAGS, "--spot", "--reserved"], "exclude each other"),
        ([*FLAGS, "--num_slices=0"], "--num_slices=0"),
        ([*FLAGS, "--name=My_Run"], "lower-case"),
        ([*FLAGS, "--wheel=missing.whl"], "no such file"),
        ([*FLAGS, "--zoen=x"], "did you mean --zone"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], what: str, gcloud: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(launch_tpu_vm, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("launch_tpu_vm.py: ")
    assert what in line
    assert gcloud.called == []


def test_a_run_is_spread_over_the_slices(capsys: pytest.CaptureFixture[str]) -> None:
    def train_command(*flags: str) -> str:
        return printed(capsys, *flags)["train"][-1]

    assert "MeshConfig" not in train_command()
    assert " --gin.MeshConfig.slices=2 " in train_command("--num_slices=2")
    # What the user says is left alone.
    for mesh in ("--gin.MeshConfig.slices=2", "--gin.parallel.MeshConfig.slices=2"):
        assert train_command("--num_slices=2", mesh).count("MeshConfig.slices") == 1
    assert "MeshConfig" not in train_command("--num_slices=2", "--gin_file=parallel/multislice.gin")


@pytest.mark.parametrize("script", ["launch_tpu_vm.py", "launch_gke.py", "launch_slurm.py"])
def test_a_script_runs_from_anywhere(script: str, tmp_path: Path) -> None:
    command = [sys.executable, REPOSITORY / "scripts" / script]
    done = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: scripts/{script} ")
    assert "--[no]dry_run" in done.stdout
    assert os.access(REPOSITORY / "scripts" / script, os.X_OK)
