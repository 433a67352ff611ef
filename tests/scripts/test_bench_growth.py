"""Growth of costs: scanned programs are as large at any depth; the parts that the picture shows are measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_growth
from matplotlib.image import imread

SCRIPT = Path(bench_growth.__file__)
COMPILATION = [
    {"target": target, "scan_layers": scan, "layers": layers, "trace_seconds": 1.0, "compile_seconds": seconds}
    for target, scan in (("cpu", True), ("cpu", False), ("v5e:2x2", True))
    for layers, seconds in ((6, 2.0), (96, 2.0 if scan else 70.0))
]
MEMORY = [
    {"remat": remat, "layers": layers, "temporary_bytes": layers * (number + 1) * 2**25}
    for number, remat in enumerate(bench_growth.REMAT)
    for layers in (6, 96)
]
STEPS = [
    {"varied": varied, "rows": 8, "length": length, "seconds": length / 100, "target_tokens_per_second": 800.0}
    for varied in ("rows", "length")
    for length in (32, 512)
]
STARTUP = [
    {"start": start, "before": before, "compile": 1.0, "first_update": before + 2, "process": before + 3}
    for start, before in (("cold", 20.0), ("warm", 3.0))
]
TINY = """
from __gin__ import dynamic_registration
from t5x_ext import corpora
from t5x_ext import data
from t5x_ext import models
from t5x_ext import optim
from t5x_ext import tasks
from t5x_ext import train

train.Run.task = @tasks.Translation()
tasks.Translation.data = @data.DataConfig()
train.Run.task = @tasks.Translation()
tasks.Translation.model = @models.TransformerConfig()
train.Run.optimizer = @optim.adam()
train.Run.steps = 9
optim.adam.learning_rate = 0.003
models.TransformerConfig.embed_dim = 8
models.TransformerConfig.num_heads = 2
models.TransformerConfig.encoder_layers = 1
models.TransformerConfig.decoder_layers = 1
data.DataConfig.train = (@corpora.ParallelText(),)
corpora.ParallelText.source_path = 'a.en'
corpora.ParallelText.target_path = 'a.de'
corpora.ParallelText.source_language = 'en'
corpora.ParallelText.target_language = 'de'
data.DataConfig.vocabulary = @data.VocabularyConfig()
data.VocabularyConfig.size = 290
data.DataConfig.batch = @data.BatchConfig()
data.BatchConfig.rows = 2
data.BatchConfig.source_length = 16
data.BatchConfig.target_length = 16
"""


def measure(folder: Path, *flags: str) -> dict:
    """What the script writes, run in `folder`; programs that run for seconds are compiled quickly."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(SCRIPT), "--quick", "--json_out=out.json", *flags]
    subprocess.run(command, cwd=folder, check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads((folder / "out.json").read_text())


def test_scanned_programs_do_not_grow_with_depth(tmp_path):
    lines = measure(tmp_path, "--part=compilation", "--topology=")["compilation"]["lines"]
    scanned, unrolled = ([line for line in lines if line["scan_layers"] == scan] for scan in (True, False))
    assert [line["layers"] for line in scanned] == [line["layers"] for line in unrolled] == [2, 4]
    assert scanned[0]["traced_operations"] == scanned[1]["traced_operations"] > 1000
    assert unrolled[1]["traced_operations"] > 1.3 * unrolled[0]["traced_operations"]
    assert scanned[1]["compiled_operations"] < 1.03 * scanned[0]["compiled_operations"]
    assert unrolled[1]["compiled_operations"] > 1.3 * unrolled[0]["compiled_operations"]


def test_a_warm_start_takes_the_step_from_the_cache(tmp_path):
    (tmp_path / "tiny.gin").write_text(TINY)
    for language in ("en", "de"):
        (tmp_path / f"a.{language}").write_text("".join(f"{n} {n % 7} {n % 5}\n" for n in range(200)))
    (tmp_path / "out.json").write_text(json.dumps({"memory": {"lines": MEMORY}}))
    figures = measure(tmp_path, "--part=startup", "--gin_file=tiny.gin")
    assert figures["memory"]["lines"] == MEMORY
    assert figures["startup"]["machine"]["cores"] >= 1
    cold, warm = figures["startup"]["lines"]
    assert (cold["start"], warm["start"]) == ("cold", "warm")
    assert (cold["cache"], warm["cache"]) == ("hits 0, misses 1", "hits 1, misses 0")
    for start in (cold, warm):
        assert 0 < start["compile"] < start["before"] + start["compile"] < start["first_update"] < start["process"]


def test_draws_a_panel_a_part(tmp_path):
    figures = dict(zip(bench_growth.PARTS, ({"lines": lines} for lines in (COMPILATION, MEMORY, STEPS, STARTUP))))
    whole, empty = tmp_path / "whole.png", tmp_path / "empty.png"
    bench_growth.draw(figures, whole)
    bench_growth.draw({}, empty)
    inked = imread(whole)[..., :3].min(axis=2) < 0.9
    height, width = inked.shape
    for rows in (slice(height // 2), slice(height // 2, None)):
        for columns in (slice(width // 2), slice(width // 2, None)):
            assert inked[rows, columns].mean() > 0.005
    assert imread(empty).min() == 1
