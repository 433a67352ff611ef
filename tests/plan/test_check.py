"""Checks of small runs: on virtual devices that stand in for GPUs, and by the TPU compiler."""

from __future__ import annotations

import dataclasses
import json
from importlib import util

import jax
import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.data import BatchConfig
from t5x_ext.decode import Beam, DecodeConfig
from t5x_ext.models import TransformerConfig, num_params
from t5x_ext.parallel import HARDWARE, MeshConfig, data_parallel, fsdp, fsdp_tensor, make_mesh
from t5x_ext.plan.advice import scaled, training_advice
from t5x_ext.plan.check import check, check_decoding, decoding_flops, training_flops
from t5x_ext.plan.compiling import read_refusal
from t5x_ext.plan.estimate import Temporaries, estimate_decoding, estimate_temporaries, stored_bytes
from t5x_ext.plan.report import DeviceMemory
from t5x_ext.plan.topology import find_target
from t5x_ext.train.program import make_program

VOCAB_SIZE = 512
SIZES = {"vocab_size": VOCAB_SIZE}
KEYS = {
    "fits", "hbm_bytes", "per_device_bytes", "model_flops", "hlo_flops", "collectives", "roofline_step_seconds",
    "mfu_bound", "compile_seconds",
}  # fmt: skip


def products_of(run) -> float:
    """FLOPs that a compiled update without recomputation must have: attention is computed on whole rows."""
    config = dataclasses.replace(run.task.model, vocab_size=VOCAB_SIZE)
    s, t, d = run.task.data.batch.source_length, run.task.data.batch.target_length, config.embed_dim
    # `flops` counts the causal half of self-attention; a program computes it all.
    upper_half = config.decoder_layers * (4 * t * t * d - 2 * t * (t + 1) * d)
    return 3 * run.task.data.batch.rows * (config.flops([s], [t]) + upper_half)


def state_bytes(run, pieces: int) -> float:
    """float32 parameters cut into `pieces` along `embed`; biases of other axes stay whole."""
    config = dataclasses.replace(run.task.model, vocab_size=VOCAB_SIZE)
    attention_biases = 3 * config.embed_dim * (config.encoder_layers + 2 * config.decoder_layers)
    inner_biases = config.mlp_dim * (config.encoder_layers + config.decoder_layers)
    whole = attention_biases + inner_biases
    return 4 * ((num_params(config) - whole) / pieces + whole)


_reports = {}


@pytest.fixture
def gpu_report(make_run):
    """Compiled once, and only in the process with 8 devices: the other one must not ask for virtual devices."""

    def get():
        if not _reports:
            _reports["h100:8"] = check(make_run(), VOCAB_SIZE, find_target("h100:8"), mean_length=32)
        return _reports["h100:8"]

    return get


@pytest.mark.devices(8)
def test_a_gpu_node_bytes_and_flops_are_the_closed_form(make_run, gpu_report):
    run, gpu_report = make_run(), gpu_report()
    assert gpu_report.fits
    assert gpu_report.is_estimate
    assert gpu_report.hbm_bytes == HARDWARE["h100"].hbm_bytes
    assert gpu_report.mesh == {"slices": 1, "data": 1, "fsdp": 8, "tensor": 1}
    assert gpu_report.memory.params == state_bytes(run, 8)
    # Two moments, their count and that of the schedule, and the step.
    assert gpu_report.memory.optimizer == pytest.approx(2 * gpu_report.memory.params, abs=16)
    assert gpu_report.memory.batch == 7 * 16 * 32 * 4 / 8
    assert gpu_report.memory.ema == 0
    assert gpu_report.hlo_flops == products_of(run)


@pytest.mark.devices(8)
def test_a_gpu_node_gathers_weights_and_scatters_gradients(gpu_report):
    gpu_report = gpu_report()
    kinds = {(collective.kind, collective.axes) for collective in gpu_report.collectives}
    assert ("all-gather", ("fsdp",)) in kinds
    scattered = next(c for c in gpu_report.collectives if c.kind == "reduce-scatter")
    # All gradients but those of biases and norms, once a microbatch.
    assert scattered.bytes == pytest.approx(2 * 4 * 98_304, rel=0.35)
    assert gpu_report.roofline.hbm_seconds == 0
    assert gpu_report.mfu_bound[0] >= gpu_report.mfu_bound[1] > 0


@pytest.mark.devices(8)
def test_the_report_as_json_and_for_people(gpu_report):
    gpu_report = gpu_report()
    found = json.loads(json.dumps(gpu_report.to_json()))
    assert found.keys() >= KEYS
    assert found["per_device_bytes"].keys() >= {"params", "optimizer", "temporaries", "batch", "total"}
    parts = found["per_device_bytes"]
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    for bounds in ("roofline_step_seconds", "mfu_bound"):
        assert found[bounds]["overlapped"] > 0
        assert found[bounds]["serial"] > 0
    assert found["collectives"][0].keys() >= {"kind", "axes", "bytes", "count"}
    text = str(gpu_report)
    assert "8 x h100" in text
    assert "estimated by formula" in text
    assert "= max(compute, network)" in text
    assert "= compute + network" in text
    unknown = dataclasses.replace(gpu_report, device_kind="TPU v9", roofline=None, mfu_bound=None)
    assert "the peak of TPU v9 is not in the table" in str(unknown)
    assert unknown.to_json()["mfu_bound"] == {"overlapped": None, "serial": None}


@pytest.mark.devices(8)
def test_days_and_tokens_of_a_run_follow_from_the_bounds(gpu_report):
    report = dataclasses.replace(gpu_report(), steps=50_000, assumed_mfu=0.001)
    costs = report.costs()
    assert costs["overlapped"].run_days == pytest.approx(50_000 * report.roofline.overlapped / 86_400)
    assert costs["serial"].run_days == pytest.approx(50_000 * report.roofline.serial / 86_400)
    seconds = report.model_flops / (8 * HARDWARE["h100"].peak_flops * 0.001)
    assert costs["assumed"].run_days == pytest.approx(50_000 * seconds / 86_400)
    for cost in costs.values():
        # Whatever the speed, a day of all devices is so many updates of 16 rows of 32 tokens.
        updates = 50_000 / cost.run_days
        assert cost.target_tokens_per_device_day == pytest.approx(updates * 512 / 8)
    text = str(report)
    assert "50,000 updates" in text
    assert "0% MFU" in text
    assert report.to_json()["costs"]["serial"]["run_days"] == costs["serial"].run_days
    assert dataclasses.replace(report, roofline=None).costs() == {}


@pytest.mark.devices(8)
def test_nodes_are_replicas_that_exchange_gradients(make_run):
    report = check(make_run(), VOCAB_SIZE, find_target("h100:4", num_slices=2))
    assert report.mesh == {"slices": 2, "data": 1, "fsdp": 4, "tensor": 1}
    assert report.memory.params == state_bytes(make_run(), 4)
    assert any("slices" in collective.axes for collective in report.collectives)
    assert report.roofline.slice_network_seconds > 0
    assert "between slices" in str(report)


@pytest.mark.devices(8)
@pytest.mark.parametrize("layout", [(MeshConfig(), data_parallel()), (MeshConfig(data=1, fsdp=-1), fsdp())])
def test_decoding_on_a_gpu_node_by_formula(make_run, layout):
    """One beam of 4 over 8 devices that hold the whole model, or gather it: every figure in closed form."""
    run = make_run(mesh=layout[0], axis_rules=layout[1], model={"compute_dtype": "bfloat16"})
    decode = DecodeConfig(Beam(beam_size=4), max_length_ratio=1.0, max_length_extra=0)
    report = check_decoding(run, VOCAB_SIZE, find_target("h100:8"), decode, rows=16, source_length=10)
    config = dataclasses.replace(run.task.model, vocab_size=VOCAB_SIZE)
    d, f = 64, 128
    encoder = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d + 2 * d
    decoder_weights = 2 * (num_params(config) - encoder)
    # Two rows a device, with a forced tag; a layer's keys and values, 64 wide, in two bytes.
    cache, memory = 2 * 4 * 11 * (2 * 64 * 2), 2 * 10 * (2 * 64 * 2)
    scores = 4 * (4 * 2 * 4 * VOCAB_SIZE)
    assert report.memory.temporaries == pytest.approx(decoder_weights + 4 * cache + memory + scores)
    traffic = 11 * (decoder_weights + 6 * cache + memory + scores)
    assert report.roofline.hbm_seconds == pytest.approx(traffic / HARDWARE["h100"].hbm_bandwidth)
    assert report.fits
    assert report.is_estimate
    assert "max(compute, HBM, network)" in str(report)
    assert report.to_json()["roofline_step_seconds"]["hbm"] == report.roofline.hbm_seconds
    # 16 sentences, and 11 target tokens for each, in the time of a batch.
    cost = report.costs()["overlapped"]
    assert cost.rows_per_device_day == pytest.approx(16 * 86_400 / report.roofline.overlapped / 8)
    assert cost.target_tokens_per_device_day == pytest.approx(11 * cost.rows_per_device_day)
    assert cost.run_days is None
    assert "sentences a device-day" in str(report)


@pytest.mark.devices(8)
def test_rows_that_do_not_divide_are_refused(make_run):
    with pytest.raises(UserError, match=r"need a multiple of 32$"):
        check(make_run(num_microbatches=4), VOCAB_SIZE, find_target("h100:8"))
    with pytest.raises(UserError, match="JAX has started with 8"):
        find_target("h100:8", num_slices=2)


@pytest.mark.devices(8)
def test_too_little_memory_names_what_is_largest_and_what_would_do(make_run, gpu_report):
    deep = {"encoder_layers": 4, "decoder_layers": 4, "scan_layers": True}
    program = make_program(
        make_run(num_microbatches=1, model=deep), {"vocab_size": VOCAB_SIZE}, make_mesh(make_run().mesh)
    )
    stored, estimate = stored_bytes(program), estimate_temporaries(program)
    memory = DeviceMemory(stored.params, stored.optimizer, 0, estimate.total, stored.batch)
    report = dataclasses.replace(gpu_report(), fits=False, memory=memory, hbm_bytes=memory.total * 7 // 8)

    advice = training_advice(program, report, estimate)
    assert any(line.startswith("Run.num_microbatches = 2 (now 1)") and line.endswith(", enough") for line in advice)
    assert any(line.startswith("TransformerConfig.remat = 'full' (now 'none')") for line in advice)
    text = str(dataclasses.replace(report, advice=advice, largest=((3 * 2**30, "f32[9]"),)))
    assert "does not fit: 114% of it" in text
    assert "3.00 GiB  f32[9]" in text
    assert f"  - {advice[0]}" in text

    whole = make_program(
        make_run(mesh=MeshConfig(), axis_rules=data_parallel()), {"vocab_size": VOCAB_SIZE}, make_mesh()
    )
    advice = training_advice(whole, dataclasses.replace(report, hbm_bytes=100_000), None)
    assert any("parallel/fsdp.gin" in line for line in advice)
    assert advice[-1].startswith("none of these is enough alone")


def test_model_flops_are_those_of_rows_full_of_examples(make_run):
    config = TransformerConfig(vocab_size=VOCAB_SIZE, embed_dim=64, mlp_dim=128, num_heads=4)
    run = make_run()
    flops, source_tokens, target_tokens = training_flops(config, run, 8)
    assert flops == pytest.approx(3 * 16 * config.flops([8] * 4, [8] * 4))
    assert (source_tokens, target_tokens) == (512, 512)
    assert training_flops(config, run, 100)[0] == pytest.approx(3 * 16 * config.flops([32], [32]))
    batch = BatchConfig(rows=16, source_length=64, target_length=32, packing=False)
    padded = dataclasses.replace(run, data=dataclasses.replace(run.task.data, batch=batch))
    flops, source_tokens, target_tokens = training_flops(config, padded, 8)
    assert flops == pytest.approx(3 * 16 * config.flops([16], [8]))
    assert (source_tokens, target_tokens) == (256, 128)


def test_decoding_flops_compute_keys_of_the_source_once():
    config = TransformerConfig(vocab_size=VOCAB_SIZE, embed_dim=64, mlp_dim=128, num_heads=4, decoder_layers=3)
    one = config.flops([10], [20])
    assert decoding_flops(config, 7, 1, 10, 20) == 7 * one
    extra = decoding_flops(config, 1, 2, 10, 20) - one
    per_token = 6 * (2 * (6 * 64**2 + 2 * 64 * 128) * 3 / 6) + 2 * 64 * VOCAB_SIZE
    attention = 3 * (2 * 20 * 21 * 64 + 4 * 20 * 10 * 64)
    assert extra == pytest.approx(20 * per_token + attention)


REFUSED = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.84G of 15.48G hbm. Exceeded by 8.36G.

Total hbm usage >= 24.36G:
    program          23.84G

  Largest program allocations in hbm:

  1. Size: 512.00M
     Operator: op_name="jit(step)/decoder/exp"
     Shape: f32[64,1024,2048]{2,1,0}
     Unpadded size: 512.00M
     Allocation type: HLO temp
     ==========================

  2. Size: 8.00G
     Shape: bf16[8,2048]{1,0}
     ==========================
"""


def test_what_a_compiler_says_when_it_refuses():
    refused = read_refusal(REFUSED)
    assert refused.total == int(23.84 * 2**30)
    assert refused.largest == (
        (8 * 2**30, "bf16[8,2048]{1,0}"),
        (2**29, 'f32[64,1024,2048]{2,1,0} op_name="jit(step)/decoder/exp"'),
    )
    short = "the total memory required for HLO temporaries (3.01T) exceeds available HBM (15.75G)."
    assert read_refusal(short).total == int(3.01 * 2**40)
    assert read_refusal("RESOURCE_EXHAUSTED").total is None


def test_an_estimate_is_scaled_to_what_the_compiler_says():
    estimate = Temporaries(gradients=100, residuals=600, recomputed=200, gathered=0, scores=0)
    assert scaled(estimate, 500) == Temporaries(100, 300, 100, 0, 0)
    assert scaled(estimate, 40) == Temporaries(40, 0, 0, 0, 0)


@pytest.mark.skipif(util.find_spec("libtpu") is None, reason="the TPU compiler comes with the extra tpu")
class TestTpu:
    """By the TPU compiler; `tests/plan/test_vega_4b7.py` has the runs that are shipped."""

    @pytest.mark.parametrize(
        ("topology", "num_slices", "devices", "kind", "gib"),
        [
            ("v5e:8x8", 1, 64, "TPU v5 lite", 15.75),
            ("v5e:1x1", 1, 1, "TPU v5 lite", 15.75),
            ("v5e:4x8", 2, 64, "TPU v5 lite", 15.75),
            ("v4:2x2x2", 1, 8, "TPU v4", 30.75),
            ("v5p:2x2x2", 1, 8, "TPU v5", 95.74),
            ("v6e:2x4", 3, 24, "TPU v6 lite", 31.25),
            # Not in the table: the compiler is asked for its memory.
            ("v3:2x2", 1, 8, "TPU v3", 15.48),
        ],
    )
    def test_topologies(self, topology, num_slices, devices, kind, gib):
        target = find_target(topology, num_slices)
        assert (len(target.devices), target.device_kind) == (devices, kind)
        assert target.hbm_bytes == int(gib * 2**30)
        assert target.is_compiled_for
        assert len({getattr(device, "slice_index", 0) for device in target.devices}) == num_slices

    @pytest.mark.parametrize(
        ("topology", "message"),
        [
            ("v5e", "topology 'v5e': give a kind of device and how many, as in v5e:8x8"),
            ("v9:2x2", "topology 'v9:2x2': libtpu knows no such generation; examples: v5e:8x8"),
            ("v5e:32x32", "topology 'v5e:32x32': a slice of v5e has at most 256 devices; see num_slices"),
            ("h100:16", "topology 'h100:16': a node has up to 8 GPUs; write h100:8 and the nodes as num_slices"),
        ],
    )
    def test_topologies_that_do_not_exist(self, topology, message):
        with pytest.raises(UserError) as caught:
            find_target(topology)
        assert str(caught.value).startswith(message)

    def test_a_mesh_of_three_axes(self, make_run):
        run = make_run(mesh=MeshConfig(data=2, fsdp=2, tensor=2), axis_rules=fsdp_tensor(), ema_decay=0.99)
        report = check(run, VOCAB_SIZE, find_target("v5e:2x4"), mean_length=32)
        assert report.fits
        assert report.hlo_flops == products_of(run)
        axes = {axis for collective in report.collectives for axis in collective.axes}
        assert axes == {"data", "fsdp", "tensor"}
        memory = report.memory
        assert memory.ema == memory.params
        assert memory.params == pytest.approx(
            4 * num_params(dataclasses.replace(run.task.model, vocab_size=512)) / 4, rel=0.02
        )
        assert 0 < report.roofline.overlapped <= report.roofline.serial
        assert report.mfu_bound[0] == pytest.approx(
            report.model_flops / (8 * HARDWARE["v5e"].peak_flops * report.roofline.overlapped)
        )

    def test_decoding_keeps_caches_with_their_rows(self, make_run):
        run = make_run(mesh=MeshConfig(), axis_rules=data_parallel())
        target = find_target("v5e:2x2")
        decode = DecodeConfig(Beam(beam_size=2), max_length_ratio=1.0, max_length_extra=0)
        report = check_decoding(run, VOCAB_SIZE, target, decode, rows=8, source_length=16)
        assert report.program == "decode"
        assert report.memory.optimizer == 0
        # Devices agree on the end of the search, and exchange nothing else.
        assert sum(collective.bytes for collective in report.collectives) < 1000
        assert report.hlo_flops == pytest.approx(report.model_flops, rel=0.25)
        with pytest.raises(UserError, match="take a multiple of 4"):
            check_decoding(run, VOCAB_SIZE, target, decode, rows=6, source_length=16)

    def test_an_ensemble_has_the_weights_and_operations_of_its_members(self, make_run):
        run = make_run(mesh=MeshConfig(data=2, tensor=2), axis_rules=fsdp_tensor())
        decode = DecodeConfig(Beam(beam_size=2), max_length_ratio=1.0, max_length_extra=0)
        one, two = (
            check_decoding(run, VOCAB_SIZE, find_target("v5e:2x2"), decode, rows=8, source_length=16, members=members)
            for members in (1, 2)
        )
        assert two.memory.params == 2 * one.memory.params
        assert two.model_flops == 2 * one.model_flops
        assert two.hlo_flops == pytest.approx(2 * one.hlo_flops, rel=0.1)
        assert two.assumption.startswith("2 models together, beam, 2 hypotheses")

    @pytest.mark.slow
    def test_the_formula_for_decoding_is_near_the_compiler(self, make_run):
        model = {"embed_dim": 512, "mlp_dim": 2048, "num_heads": 4, "encoder_layers": 4, "decoder_layers": 4}
        model |= {"compute_dtype": "bfloat16", "scan_layers": True}
        run = make_run(mesh=MeshConfig(), axis_rules=data_parallel(), model=model)
        target = find_target("v5e:2x2")
        found = check_decoding(run, VOCAB_SIZE, target, DecodeConfig(), rows=128, source_length=32)
        program = make_program(run, SIZES, make_mesh(run.mesh, target.devices))
        temporaries, traffic = estimate_decoding(program, 128, 5, 32, 117)
        assert found.memory.temporaries / 2 < temporaries.total < 2 * found.memory.temporaries
        assert found.roofline.hbm_seconds / 2 < 117 * traffic / HARDWARE["v5e"].hbm_bandwidth
        assert 117 * traffic / HARDWARE["v5e"].hbm_bandwidth < 2 * found.roofline.hbm_seconds

    def test_a_program_that_needs_too_much_is_refused_with_advice(self, make_run):
        run = make_run(rows=4096, length=512, num_microbatches=1, model={"remat": "full"})
        report = check(run, VOCAB_SIZE, find_target("v5e:1x1"))
        assert not report.fits
        assert report.memory.total > report.hbm_bytes
        assert report.hlo_flops is None
        assert report.roofline is None
        assert report.advice[0].startswith("Run.num_microbatches = ")
        assert report.advice[0].endswith(", enough")
        assert report.to_json()["roofline_step_seconds"]["overlapped"] is None
        assert "does not fit" in str(report)

    @pytest.mark.slow
    @pytest.mark.parametrize("remat", ["none", "dots_saveable", "full"])
    def test_the_formula_for_temporaries_is_near_the_compiler(self, make_run, remat):
        model = {"embed_dim": 256, "mlp_dim": 1024, "encoder_layers": 8, "decoder_layers": 8, "scan_layers": True}
        model |= {"compute_dtype": "bfloat16", "remat": remat}
        run = make_run(rows=64, length=128, num_microbatches=1, model=model)
        target = find_target("v5e:2x2")
        estimate = estimate_temporaries(make_program(run, SIZES, make_mesh(run.mesh, target.devices)))
        found = check(run, VOCAB_SIZE, target).memory.temporaries
        assert found / 2 < estimate.total < 2 * found


def estimate_on_one_device(run):
    return estimate_temporaries(make_program(run, SIZES, make_mesh(MeshConfig(), jax.devices()[:1])))


def test_residuals_of_full_recomputation_are_the_inputs_of_layers(make_run):
    def estimate(layers):
        model = {"encoder_layers": layers, "decoder_layers": layers, "scan_layers": True, "remat": "full"}
        return estimate_on_one_device(make_run(model={**model, "compute_dtype": "bfloat16"}))

    # 8 rows of a microbatch, 32 tokens, 64 wide, in two bytes; a dropout key each does not count.
    input_bytes = 8 * 32 * 64 * 2
    few, more = estimate(3), estimate(5)
    assert more.residuals - few.residuals == 2 * 2 * input_bytes
    assert more.recomputed == few.recomputed


def test_gradients_and_scores_of_the_formula(make_run):
    run = make_run()
    params = 4 * num_params(dataclasses.replace(run.task.model, vocab_size=VOCAB_SIZE))
    estimate = estimate_on_one_device(run)
    # The accumulator's sum and one microbatch's gradient; its count of labels on top. A single gradient is the sum.
    assert estimate.gradients == pytest.approx(2 * params, abs=16)
    assert estimate_on_one_device(make_run(num_microbatches=1)).gradients == params
    # 256 of the positions of a microbatch, and their gradient.
    assert estimate.scores == 2 * 4 * 256 * VOCAB_SIZE
    assert estimate.gathered == 0


def test_stored_bytes_follow_the_template(make_run):
    run = make_run(ema_decay=0.5)
    program = make_program(run, SIZES, make_mesh(MeshConfig(), jax.devices()[:1]))
    stored = stored_bytes(program)
    sizes = [np.prod(leaf.shape, dtype=int) * 4 for leaf in jax.tree.leaves(program.template.params)]
    assert stored.params == stored.ema == sum(sizes)
    assert stored.total == sum(stored)


def test_the_compiler_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"pip install 't5x_ext\[tpu\]'"):
        find_target("v5e:8x8")
