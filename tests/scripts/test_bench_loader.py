from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_loader.py"


def test_rows_are_full_and_memory_is_flat(tmp_path):
    """A small form of the measurement: density and memory are those of the large one, speed is another machine's."""
    command = (
        f"--pairs=60000 --seconds=0.5 --length=256 --threads=1 --examples=300000 --json_out={tmp_path}/figures.json"
    )
    result = subprocess.run([sys.executable, str(SCRIPT), *command.split()], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    (speed,), (memory,) = figures["speed"], figures["memory"]
    assert speed["density"] >= 0.97
    assert speed["target_tokens_per_second"] > 1e5
    assert memory["own_mib"] < 100
    assert "target tokens/s" in result.stdout
