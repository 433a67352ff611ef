"""`t5x_ext translate` on two processes: killed, gone on with, and joined to the bytes of one process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from t5x_ext.checkpoints import CheckpointStore, RunFolder
from t5x_ext.cli.main import main
from t5x_ext.decode import DecodeConfig, Sample, Translator, translate_file
from t5x_ext.parallel import MeshConfig, fsdp_tensor, make_mesh

LINES = ["a dog", "", "cat and dog", "here", "  ", "there", "are", "x y z", "today", "b", "there are cats"]
CONFIG = DecodeConfig(Sample(n_best=2, seed=3), max_length_ratio=1.0, max_length_extra=2)
FLAGS = ("--strategy=sample", "--n_best=2", "--max_length_ratio=1", "--max_length_extra=2", "--seed=3")


@pytest.fixture
def folder(translator, tmp_path, monkeypatch):
    """The current folder, with the run `run` and the text `in.txt`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # Compiled quickly, and everywhere alike.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    run, tags = RunFolder("run"), dataclasses.asdict(translator.tags)
    run.write_model(translator.model.config.to_json(), tags, translator.directions, translator.vocabulary.fingerprint())
    translator.vocabulary.save(str(run.vocabulary))
    with CheckpointStore(run.checkpoints) as store:
        store.save(3, {"params": translator.params})
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in LINES))
    yield tmp_path
    jax.config.update("jax_disable_most_optimizations", before)


def translate_alone(output: str, chunk_lines: int) -> bytes:
    """What one process writes."""
    translator = Translator.from_run("run", "last", make_mesh(MeshConfig(), jax.local_devices()[:1]), fsdp_tensor())
    translate_file(translator, "in.txt", output, "en", "de", CONFIG, chunk_lines=chunk_lines, show_progress=False)
    with open(output, "rb") as file:
        return file.read()


def start_two(*flags: str, dies_at: int = -1) -> list[subprocess.Popen[str]]:
    """The command on two processes, of which each dies in the chunk that begins at the line `dies_at`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    command = (sys.executable, __file__, str(dies_at), "translate", "--run_dir=run", "--input=in.txt", *flags)
    languages = ("--checkpoint=last", "--source_language=en", "--target_language=de", "--output=out.txt")
    joining = ("--distributed=explicit", f"--coordinator_address={address}", "--num_processes=2", "--chunk_lines=3")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
    return [
        subprocess.Popen([*command, *languages, *joining, *FLAGS, f"--process_id={number}"], **pipes)
        for number in (0, 1)
    ]


def test_two_processes_that_were_killed_end_with_the_bytes_of_one(folder):
    expected = translate_alone("alone.txt", chunk_lines=3)
    assert len(expected.splitlines()) == 2 * len(LINES) - 2
    # Other cuts have batches of other shapes, which may change the last digit of a score, but draw alike.
    texts = lambda content: [line.rsplit(b" ||| ", 1)[0] for line in content.splitlines()]
    assert texts(translate_alone("other_cuts.txt", chunk_lines=5)) == texts(expected)

    first, second = start_two(dies_at=9)  # the last of four chunks, the second one of process 1
    second.wait(timeout=120)
    finished = [folder / "out.txt.parts" / f"{index:08d}" for index in range(3)]
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in finished) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert first.poll() is None, first.communicate()[0]
    first.kill()  # it waits for the other one
    assert second.returncode == -signal.SIGKILL, second.communicate()[0]
    first.communicate()
    assert not (folder / "out.txt").exists()
    assert not (folder / "out.txt.parts" / "00000003").exists()

    processes = start_two("--json_out=speed.json")
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert (folder / "out.txt").read_bytes() == expected
    speed = json.loads((folder / "speed.json").read_text())
    assert (speed["lines"], speed["resumed_lines"], speed["processes"]) == (2, 9, 2)
    assert speed["target_tokens_per_second"] == speed["target_tokens"] / speed["seconds"] > 0
    assert "11 lines: out.txt" in outputs[0]
    assert "lines" not in outputs[1]
    assert sorted(os.listdir()) == ["alone.txt", "in.txt", "other_cuts.txt", "out.txt", "run", "speed.json"]


def _die_at(line: int) -> None:
    translate = Translator.translate_n_best

    def translate_or_die(*arguments, first_line=0):
        if first_line == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return translate(*arguments, first_line=first_line)

    Translator.translate_n_best = translate_or_die


if __name__ == "__main__":
    _die_at(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
