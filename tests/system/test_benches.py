"""The scripts that kill and damage runs, in a small form; in full they are run by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def figures(script, folder, *flags):
    """What a script measured, after a good end; programs that run for seconds are compiled quickly."""
    path = folder / "figures.json"
    command = [sys.executable, str(SCRIPTS / script), f"--json_out={path}", *flags]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(path.read_text()), process.stdout.splitlines()


def test_killed_at_random_moments(tmp_path):
    found, printed = figures("bench_resume.py", tmp_path, "--repetitions=1", "--kills=2", "--steps=20", "--seed=4")
    assert printed[-1] == "1 of 1"
    assert found["identical"] == 1
    assert found["results"][0]["kills"]


def test_a_disk_that_is_full_in_a_save(tmp_path):
    found, printed = figures("bench_faults.py", tmp_path, "--only=disk_full_in_a_save")
    assert printed[-1] == "survived 1/1"
    assert "could not be saved: File too large" in found["faults"]["disk_full_in_a_save"]["happened"]
