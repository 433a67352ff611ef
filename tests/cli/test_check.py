"""`t5x_ext check`: what it prints, what it writes, how it ends. What it computes is tested in tests/plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util

import jax
import pytest

from t5x_ext.cli.main import main

TINY = "--gin_file=tiny.gin --train_source=absent.en --train_target=absent.de --source_language=en --target_language=de"
needs_libtpu = pytest.mark.skipif(util.find_spec("libtpu") is None, reason="the TPU compiler comes with the extra tpu")


@pytest.fixture(autouse=True)
def platforms(monkeypatch):
    # The command sets it; this gives it back.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@needs_libtpu
def test_a_run_whose_texts_are_not_here_is_compiled_for_a_tpu(bare_folder, capfd):
    flags = "--topology=v5e:2x2 --gin.VegaTiny.encoder_layers=1 --gin.VegaTiny.decoder_layers=1 --vocab_size=512"
    assert main(f"check {TINY} {flags} --json_out=found.json".split()) == 0
    captured = capfd.readouterr()
    assert captured.err == ""  # libtpu is silent
    assert captured.out.startswith("train on v5e:2x2: 4 x TPU v5 lite, mesh slices 1 data 4 fsdp 1 tensor 1\n")
    assert "= max(compute, HBM, network)" in captured.out
    assert "= max(compute, HBM) + network" in captured.out
    found = json.loads((bare_folder / "found.json").read_text())
    assert found["fits"] is True
    assert found["hbm_bytes"] == int(15.75 * 2**30)
    assert found["per_device_bytes"]["params"] == 4 * (512 * 32 + _layer_parameters())
    assert {"params", "optimizer", "temporaries", "batch", "total"} <= found["per_device_bytes"].keys()
    assert {"overlapped", "serial"} <= found["roofline_step_seconds"].keys()
    assert {"overlapped", "serial"} <= found["mfu_bound"].keys()
    assert found["model_flops"] > 0
    assert found["hlo_flops"] > 0
    assert found["compile_seconds"] > 0
    assert found["collectives"][0]["axes"] == ["data"]


def _layer_parameters() -> int:
    d, f = 32, 64
    return (4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d) + (8 * d * d + 8 * d + 2 * d * f + f + d + 6 * d) + 4 * d


@needs_libtpu
def test_a_run_that_does_not_fit_ends_with_1_and_names_what_would_do(capfd):
    run = "--gin_file=runs/vega_mt_4b7_v5e_8x8.gin --gin.Vega4B7.encoder_layers=2 --gin.Vega4B7.decoder_layers=2"
    assert main(f"check {run} --topology=v5e:1x1 --gin.MeshConfig.data=1".split()) == 1
    out = capfd.readouterr().out
    assert "does not fit" in out
    assert "largest:" in out
    assert "Run.num_microbatches = " in out


def test_a_gpu_node_is_stood_in_for_by_virtual_devices(bare_folder):
    small = "--gin.VegaTiny.encoder_layers=1 --gin.VegaTiny.decoder_layers=1"
    command = f"check {TINY} {small} --topology=h100:2 --json_out=-"
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    process = subprocess.run(
        [sys.executable, "-m", "t5x_ext", *command.split()], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert (found["is_estimate"], found["num_devices"], found["fits"]) == (True, 2, True)


PIPELINE = "--gin_file=runs/vega_mt_tiny.gin"


@pytest.fixture
def quick_compilation():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_a_stage_that_decodes_is_searched_as_it_will_be(quick_compilation, capfd):
    """One virtual GPU: best_test reads an ensemble of the average and of what it was fine-tuned from."""
    assert main(f"check {PIPELINE} --stage=best_test --topology=h100:1 --decode_rows=4 --json_out=-".split()) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["program"], found["rows"], found["is_estimate"]) == ("decode", 4, True)
    # beam 2, ratio 1.0 and 4 more tokens, after a forced tag.
    assert found["assumption"] == "2 models together, beam, 2 hypotheses of 69 tokens for each sentence of 64"


def test_a_stage_that_trains_is_its_update(quick_compilation, capfd):
    flags = "--stage=pretrain --topology=h100:1 --mfu=0.4 --json_out=- --mean_length=16"
    assert main(f"check {PIPELINE} {flags}".split()) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["program"], found["rows"], found["steps"]) == ("train", 8, 100)
    seconds = 86_400 * found["costs"]["assumed"]["run_days"] / 100
    assert found["model_flops"] / seconds == pytest.approx(0.4 * 989e12)


MISTAKES = {
    f"check {PIPELINE} --topology=h100:1 --stage=pretain": "--stage=pretain: there is no such stage; did you mean pre",
    f"check {PIPELINE} --topology=h100:1 --stage=scores": "--stage=scores: Evaluate has no program to compile; stages",
    f"check {PIPELINE} --topology=h100:1 --stage=lm --steps=3": "--steps goes with a run; for a --stage write --gin.N",
    f"check {PIPELINE} --topology=h100:1 --stage=lm --program=decode": "--program goes with a run; a --stage has its",
    f"check {PIPELINE} --topology=h100:1 --stage=cycle --search": "--search goes with training, and --stage=cycle dec",
    "check --gin_file=runs/quickstart.gin --topology=h100:1 --stage=lm": "Pipeline.stages has no value; it must be bo",
    "check --topology=h100:1 --stage=lm": "--gin_file is missing",
    f"check {TINY} --topology=h100:1 --mfu=40": "--mfu=40",
    f"check {TINY}": "--topology is missing: devices, as v5e:8x8",
    "check --topology=v5e:2x2": "--train_source is missing",
    f"check {TINY} --topology=v5e": "topology 'v5e': give a kind of device and how many, as in v5e:8x8",
    f"check {TINY} --topology=h100:9": "topology 'h100:9': a node has up to 8 GPUs; write h100:8",
    f"check {TINY} --topology=v5e:2x2 --search --program=decode": "--search goes with --program=train",
    f"check {TINY} --topology=v5e:2x2 --json_out=no/x.json": "--json_out=no/x.json: there is no folder",
    f"check {TINY} --topology=v5e:2x2 --num_slices=0": "--num_slices=0: expected a positive integer",
}
TPU_MISTAKES = {
    f"check {TINY} --topology=v9:2x2": "topology 'v9:2x2': libtpu knows no such generation",
    f"check {TINY} --topology=v5e:2x4 --gin.BatchConfig.rows=12": "BatchConfig.rows is 12; 8 devices (slices x data x ",
}


@pytest.mark.parametrize(
    "command", [*MISTAKES, *(pytest.param(command, marks=needs_libtpu) for command in TPU_MISTAKES)]
)
def test_a_mistake_is_one_line(bare_folder, capfd, command):
    assert main(command.split()) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"t5x_ext check: {(MISTAKES | TPU_MISTAKES)[command]}")
    assert captured.err.count("\n") == 1


def test_the_vocabulary_in_use_is_the_one_that_is_there(bare_folder, capfd):
    from t5x_ext.cli.check import _vocab_size
    from t5x_ext.cli.flags import parse
    from t5x_ext.cli.run_flags import define_run_flags, run_from_flags
    from t5x_ext.data import Vocabulary

    def size(*flags):
        return _vocab_size(run_from_flags(parse(define_run_flags, [*TINY.split(), *flags]))[0])

    assert size() == 320
    lines = [f"a line with the number {number}, which is {number * number} squared\n" for number in range(300)]
    (bare_folder / "text").write_text("".join(lines))
    assert main(["vocab", "--input=text", "--languages=en,de", "--size=290", "--output=known"]) == 0
    assert size("--gin.VocabularyConfig.path=known") == Vocabulary.load("known").size
    assert size("--gin.VocabularyConfig.path=absent") == 1200
    assert "the vocabulary absent is not here; taking the 1,200 pieces of the model" in capfd.readouterr().err
