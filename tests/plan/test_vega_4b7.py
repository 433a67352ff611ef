"""The 4.7B model's own update, compiled for real topologies: what must not be in it, whether it fits, its bound."""

from __future__ import annotations

import math

import jax
import pytest

from t5x_ext.cli.flags import parse
from t5x_ext.cli.run_flags import define_run_flags, run_from_flags
from t5x_ext.contracts import path_name
from t5x_ext.parallel import make_mesh
from t5x_ext.plan.check import training_flops
from t5x_ext.plan.compiling import Compiled, compile_for
from t5x_ext.plan.estimate import stored_bytes
from t5x_ext.plan.roofline import mfu_bound, roofline
from t5x_ext.plan.topology import find_target
from t5x_ext.train.program import make_program

pytest.importorskip("libtpu", reason="the TPU compiler comes with the extra tpu")

TOPOLOGIES = [
    "v5e:8x8",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5e:16x16", "v4:4x4x4", "v5p:4x4x4", "v6e:8x8")),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_update_of_a_million_tokens_fits_and_can_be_fast(topology):
    name = topology.replace(":", "_")
    run, _ = run_from_flags(parse(define_run_flags, [f"--gin_file=runs/vega_mt_4b7_{name}.gin"]))
    shape = run.data.batch
    assert shape.rows * shape.target_length >= 1_000_000
    target = find_target(topology)
    program = make_program(run, run.data.vocabulary.size, make_mesh(run.mesh, target.devices))
    params = program.template.params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_693_321_728

    compiled = compile_for(program.lower(), dict(program.mesh.shape))

    assert isinstance(compiled, Compiled)
    assert compiled.arguments + compiled.others <= target.hbm_bytes
    # Parameters and Adam's moments are float32 and cut over the devices of a copy, biases and norms apart.
    stored = stored_bytes(program)
    assert stored.params == pytest.approx(4 * 4_693_321_728 / program.mesh.shape["fsdp"], rel=0.02)
    assert stored.optimizer == pytest.approx(2 * stored.params, rel=0.01)

    hlo = compiled.hlo
    paths = jax.tree_util.tree_leaves_with_path(params)
    stacked = [leaf for path, leaf in paths if path_name(path).endswith("kernel")]
    assert len(stacked) >= 16
    for leaf in stacked:
        assert not hlo.arrays_of_shape(leaf.shape)
    largest_stack = max(leaf.size * leaf.dtype.itemsize for leaf in stacked)
    assert hlo.buffers[0].bytes < largest_stack / 2

    pieces, vocab = shape.rows // (program.mesh.size * run.num_microbatches), program.config.vocab_size
    tokens = pieces * shape.target_length
    scores = hlo.find("f32", lambda dims: vocab in dims)
    assert scores
    assert all(math.prod(buffer.dims) <= tokens * vocab / 2 for buffer in scores)
    # Of what has a vocabulary axis, only the table is gathered, in bfloat16 (scores are float32), and only its gradient
    # is summed: whole, or the part that a device keeps.
    moved = [op for op in hlo.collective_ops if vocab in op.dims]
    embed_dim, cuts = program.config.embed_dim, program.mesh.shape["fsdp"]
    assert any(op.kind == "all-gather" for op in moved) or "v5e" not in topology
    for op in moved:
        assert sorted(op.dims) in ([embed_dim, vocab], [embed_dim // cuts, vocab])
        assert op.dtype == "bf16" or (op.kind == "all-reduce" and min(op.dims) == embed_dim // cuts)

    coordinates = [device.coords for device in program.mesh.devices.flat]
    bound = roofline(hlo, target.hardware, dict(program.mesh.shape), coordinates)
    flops, _, target_tokens = training_flops(program.config, run, 32)
    assert target_tokens >= 1_000_000
    assert mfu_bound(flops, bound.overlapped, target.hardware, program.mesh.size) >= 0.6
    assert bound.serial > bound.overlapped
