"""The wheel is enough: installed, far from any checkout, it trains the packaged quickstart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import t5x_ext

WHERE = """
from pathlib import Path
import t5x_ext
from t5x_ext.cli.gin_read import find_gin_file
print(Path(t5x_ext.__file__).parent, find_gin_file("runs/quickstart.gin"))
"""
# A small embedded corpus, and two tokens for each line of its test.
SMALL = [
    "--steps=2",
    "--gin.english_corpora.num_tuples=600",
    "--gin.english_corpora.valid_per_family=1",
    "--gin.english_corpora.test_per_family=1",
    "--gin.Beam.beam_size=1",
    "--gin.DecodeConfig.max_length_ratio=0.0",
    "--gin.DecodeConfig.max_length_extra=2",
]


def test_the_quickstart_trains_from_an_installed_wheel(place):
    checkout = Path(t5x_ext.__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "wheels", str(checkout))
    (wheel,) = Path("wheels").glob("*.whl")
    # An environment with the wheel first and the packages of this one after it; editable installs are in neither.
    run(sys.executable, "-m", "venv", "--without-pip", "installed")
    python = place / "installed/bin/python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    packages = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib"))

    (place / "empty").mkdir()
    os.chdir(place / "empty")  # the fixture leads back
    package, gin_file = map(Path, run(str(python), "-c", WHERE).split())
    assert package == packages / "t5x_ext"
    assert gin_file == package / "_gin/runs/quickstart.gin"
    assert not gin_file.is_relative_to(checkout)

    train = run(str(python.parent / "t5x_ext"), "train", "--gin_file=runs/quickstart.gin", "--run_dir=out", *SMALL)
    results = json.loads(Path("out/results.json").read_text())
    assert results["steps"] == 2
    assert len(results["directions"]) == 10
    assert "zh-en" in train
    assert sorted(path.name for path in Path().iterdir()) == ["out"]
