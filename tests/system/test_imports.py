"""What is loaded when: nothing heavy for the package, no TensorFlow for the commands, gin for the command line only."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import t5x_ext

COMMANDS = """
import shlex, sys
from t5x_ext.cli.main import main

*lines, forbidden = sys.argv[1:]
for line in lines:
    assert main(shlex.split(line)) == 0, line
    loaded = {name for name in forbidden.split(",") if name in sys.modules}
    assert not loaded, (line, loaded)
print("clean")
"""


def test_the_package_loads_nothing_heavy(finish):
    code = "import sys, t5x_ext; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(re.findall(r"'(\w+)'", finish("-c", code)))
    assert "t5x_ext" in loaded
    assert not loaded & {"jax", "flax", "numpy", "optax", "orbax", "tensorflow", "gin", "absl", "sentencepiece"}


def test_help_starts_no_jax(finish):
    assert "clean" in finish("-c", COMMANDS, "--help", "train --help", "translate --help", "jax,flax,tensorflow,gin")


def test_commands_load_no_tensorflow_and_those_without_gin_files_no_gin(place, write_tiny, finish):
    flags = " ".join(write_tiny(place, train=100, test=3))
    train = f"train --gin_file=tiny.gin {flags} --run_dir=out --gin.DecodeConfig.max_length_ratio=0.0"
    assert "clean" in finish("-c", COMMANDS, train, "tensorflow,tensorflow_text,tensorflow_datasets,seqio,torch")
    assert Path("out/results.json").exists()
    short = "--strategy=greedy --max_length_ratio=0 --max_length_extra=2"
    translate = f"translate --run_dir=out --input=test.en --output=hypotheses.es {short}"
    evaluate = f"evaluate --run_dir=out --source=test.en --reference=test.es {short}"
    score = "score --run_dir=out --source=test.en --target=test.es"
    assert "clean" in finish("-c", COMMANDS, translate, evaluate, score, "tensorflow,tensorflow_text,seqio,torch,gin")


def test_floors_hold():
    checkout = Path(t5x_ext.__file__).parent.parent
    lint_imports = shutil.which("lint-imports", path=Path(sys.executable).parent)
    done = subprocess.run([lint_imports, "--no-cache"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout)
