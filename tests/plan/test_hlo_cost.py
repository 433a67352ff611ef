"""Costs of small programs with known answers, compiled for CPU devices; forms of other compilers as text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_ext.plan import analyse

MESH = {"data": 2, "fsdp": 4}


def _struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def _attention(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _nested_scans(w, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def block(x, _):
        return jax.lax.scan(layer, x, w)[0], None

    return jax.lax.scan(block, x, None, length=5)[0].sum()


def _decode(x):
    return jax.lax.while_loop(lambda c: (c[0] < 9) & (c[1].sum() > 0), lambda c: (c[0] + 1, c[1] @ x), (0, x))[1]


HEADS = [_struct(4, 128, 8, 64)] * 3
PRODUCT = 2 * 4 * 8 * 128 * 128 * 64
LAYERS = (_struct(3, 64, 64), _struct(32, 64))
LAYER = 2 * 32 * 64 * 64
SQUARE = 2 * 64**3


@pytest.mark.parametrize(
    ("function", "arguments", "flops"),
    [
        (jnp.matmul, (_struct(128, 64), _struct(64, 32)), 2 * 128 * 64 * 32),
        (_attention, HEADS, 2 * PRODUCT),
        # The scores again, and the gradients to weights, values, queries and keys.
        (jax.grad(lambda *heads: _attention(*heads).sum(), (0, 1, 2)), HEADS, 5 * PRODUCT),
        (_nested_scans, LAYERS, 15 * LAYER),
        (jax.grad(_nested_scans), LAYERS, 45 * LAYER),
        (lambda x: jax.lax.fori_loop(2, 10, lambda _, x: x @ x, x), (_struct(64, 64),), 8 * SQUARE),
        (_decode, (_struct(64, 64),), 9 * SQUARE),
        (
            lambda x, p: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x),
            (_struct(64, 64), _struct(dtype=bool)),
            2 * SQUARE,
        ),
    ],
    ids=["matmul", "attention", "attention_grad", "scans", "scans_grad", "fori", "while_and", "cond"],
)
def test_flops_are_the_closed_form(function, arguments, flops):
    report = analyse(_compiled(function, *arguments).as_text(), {})
    assert (report.flops, report.unknown_loops) == (flops, ())


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (jnp.matmul, (_struct(128, 64), _struct(64, 32))),
        (_attention, HEADS),
        (jax.grad(lambda *heads: _attention(*heads).sum(), (0, 1, 2)), HEADS),
        (
            lambda x, k: jax.lax.conv_general_dilated(
                x, k, (2, 1), "SAME", rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            (_struct(2, 9, 8, 3), _struct(3, 3, 3, 4)),
        ),
        (lambda x, i: jax.lax.dynamic_slice(x, (i, 0), (2, 64)), (_struct(512, 64), _struct(dtype=jnp.int32))),
    ],
    ids=["matmul", "attention", "attention_grad", "convolution", "slice"],
)
def test_programs_without_loops_agree_with_cost_analysis(function, arguments):
    compiled = _compiled(function, *arguments)
    report = analyse(compiled.as_text(), {})
    expected = compiled.cost_analysis()
    assert report.bytes_accessed == pytest.approx(expected["bytes accessed"], rel=1e-3)
    # The compiler also counts additions, exponentials, ...: few beside a matrix product.
    assert report.flops <= expected.get("flops", 0) <= 1.02 * report.flops + 10


def test_programs_before_optimization_are_read_too():
    lowered = jax.jit(jax.grad(_nested_scans)).lower(*LAYERS)
    assert analyse(lowered.as_text("hlo"), {}).flops == 45 * LAYER


def test_a_loop_whose_end_is_an_argument_counts_once_and_is_named():
    loop = _compiled(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x), _struct(64, 64), _struct(dtype=int))
    report = analyse(loop.as_text(), {})
    assert report.flops == SQUARE
    assert len(report.unknown_loops) == 1
    assert analyse(loop.as_text(), {}, unknown_trips=7).flops == 7 * SQUARE


def test_a_scan_over_stacked_weights_reads_each_once():
    scan = _compiled(lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], _struct(100, 64, 64), LAYERS[1])
    weights, carried = 4 * 100 * 64 * 64, 4 * 100 * 32 * 64
    assert weights < analyse(scan.as_text(), {}).bytes_accessed < 4 * weights + 6 * carried


def test_buffers_are_found_by_shape_and_dtype():
    function = lambda a, b: jnp.exp(jnp.einsum("ab,bc->ca", a, b)).astype(jnp.bfloat16)
    report = analyse(_compiled(function, _struct(96, 32), _struct(32, 80)).as_text(), {})
    assert report.buffers[0].bytes == max(buffer.bytes for buffer in report.buffers) == 4 * 96 * 80
    assert report.arrays_of_shape((96, 1, 80), "bf16")
    assert not report.arrays_of_shape((96, 80), "f64")
    assert {buffer.dims for buffer in report.find("f32", lambda dims: 32 in dims)} == {(96, 32), (32, 80)}


def _collectives(x):
    def repeated(x, _):
        return jax.lax.psum(x, "fsdp"), None

    return (
        jax.lax.all_gather(x, "fsdp", tiled=True),
        jax.lax.psum(x * 2, "data"),
        jax.lax.psum_scatter(x * 3, "fsdp", tiled=True),
        jax.lax.all_to_all(x * 4, "data", 0, 1, tiled=True),
        jax.lax.ppermute(x * 5, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
        jax.lax.psum(x.astype(jnp.int32), ("data", "fsdp")),
        jax.lax.scan(repeated, x, None, length=6)[0],
    )


BUFFER = 4 * 128 * 256
EXPECTED = {
    ("all-gather", ("fsdp",), 4, "f32", 1, 4 * BUFFER),
    ("all-reduce", ("data",), 2, "f32", 1, BUFFER),
    ("reduce-scatter", ("fsdp",), 4, "f32", 1, BUFFER),
    ("all-to-all", ("data",), 2, "f32", 1, BUFFER),
    ("collective-permute", ("fsdp",), 4, "f32", 1, BUFFER),
    ("all-reduce", ("data", "fsdp"), 8, "s32", 1, BUFFER),
    ("all-reduce", ("fsdp",), 4, "f32", 6, 6 * BUFFER),
}


@pytest.mark.devices(8)
def test_collectives_by_kind_and_mesh_axis():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    spec = P(("data", "fsdp"))
    mapped = jax.shard_map(_collectives, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=NamedSharding(mesh, spec))
    report = analyse(_compiled(mapped, x).as_text(), MESH)
    found = {(c.kind, c.axes, c.group_size, c.dtype, c.count, c.bytes) for c in report.collectives}
    assert found == EXPECTED
    (gather,) = (op for op in report.collective_ops if op.kind == "all-gather")
    assert (gather.dims, gather.times) == ((512, 256), 1)


@pytest.mark.devices(8)
def test_a_product_with_cut_weights_gathers_or_reduces_over_the_axis_that_cuts():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    place = lambda shape, *axes: jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, P(*axes)))
    report = analyse(_compiled(jnp.matmul, place((64, 256), "data", "fsdp"), place((256, 32), "fsdp")).as_text(), MESH)
    assert report.flops == 2 * 32 * 64 * 32
    (reduce,) = report.collectives
    assert (reduce.kind, reduce.axes, reduce.bytes) == ("all-reduce", ("fsdp",), 4 * 32 * 32)


@pytest.mark.devices(8)
def test_a_mesh_of_another_size_is_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="for 8 devices"):
        analyse(_compiled(jnp.sum, x).as_text(), {"data": 2, "fsdp": 2})


def _module(body, header="HloModule m, num_partitions=4"):
    return f"{header}\n\n{body}"


def test_a_chain_of_fusions_gathers_once():
    """The TPU compiler prints an all-gather again in every fusion beside which it goes on."""
    gather = (
        "bf16[8,64]{1,0} all-gather(%p), channel_id=2, replica_groups=mesh['a'=1,'b'=4] {'b'}, dimensions={0}, "
        'use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}'
    )
    text = _module(f"""%start (p: bf16[2,64]) -> (bf16[2,64], bf16[8,64], u32[]) {{
  %p = bf16[2,64]{{1,0}} parameter(0)
  %g = {gather}
  ROOT %s = (bf16[2,64]{{1,0}}, bf16[8,64]{{1,0}}, u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%beside (p: bf16[2,64], q: bf16[8,64], x: f32[32,32]) -> (f32[32,32], bf16[8,64], bf16[8,64]) {{
  %x = f32[32,32]{{1,0}} parameter(2)
  %y = f32[32,32]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %p = bf16[2,64]{{1,0}} parameter(0)
  %q = bf16[8,64]{{1,0}} parameter(1)
  %g = {gather}
  ROOT %t = (f32[32,32]{{1,0}}, bf16[8,64]{{1,0}}, bf16[8,64]{{1,0}}) tuple(%y, %q, %g)
}}

%done (p: bf16[2,64], q: bf16[8,64]) -> bf16[8,64] {{
  %p = bf16[2,64]{{1,0}} parameter(0)
  %q = bf16[8,64]{{1,0}} parameter(1)
  %g = {gather}
  ROOT %d = bf16[8,64]{{1,0}} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (w: bf16[2,64], x: f32[32,32]) -> bf16[8,64] {{
  %w = bf16[2,64]{{1,0}} parameter(0)
  %x = f32[32,32]{{1,0}} parameter(1)
  %a = (bf16[2,64]{{1,0}}, bf16[8,64]{{1,0}}, u32[]) fusion(%w), kind=kCustom, calls=%start
  %b = bf16[8,64]{{1,0}} get-tuple-element(%a), index=1
  %c = (f32[32,32]{{1,0}}, bf16[8,64]{{1,0}}, bf16[8,64]{{1,0}}) fusion(%w, %b, %x), kind=kOutput, calls=%beside
  %e = bf16[8,64]{{1,0}} get-tuple-element(%c), index=2
  ROOT %f = bf16[8,64]{{1,0}} fusion(%w, %e), kind=kCustom, calls=%done
}}
""")
    report = analyse(text, {"fsdp": 4})
    (gather_op,) = report.collective_ops
    assert (gather_op.axes, gather_op.bytes, gather_op.dims, gather_op.times) == (("fsdp",), 1024, (8, 64), 1)
    assert report.flops == 2 * 32**3
    assert report.bytes_accessed == (256 + 1024) + 2 * 4096


def test_what_slices_send_to_each_other_goes_over_the_outermost_axis():
    text = _module("""ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %token = token[] after-all()
  %s = (f32[16]{0}, u32[], token[]) send(%x, %token), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %r = (f32[16]{0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %sd = token[] send-done(%s), channel_id=1, is_host_transfer=true
  %rd = (f32[16]{0}, token[]) recv-done(%r), channel_id=2, is_host_transfer=true
  ROOT %y = f32[16]{0} get-tuple-element(%rd), index=0
}
""")
    (between,) = analyse(text, {"slices": 2, "data": 1, "fsdp": 4}).collectives
    assert (between.kind, between.axes, between.group_size, between.bytes) == ("all-reduce", ("slices",), 2, 64)


ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

"""


def test_a_fused_all_reduce_of_which_a_slice_is_kept_scatters():
    text = _module(f"""{ADD}%scatter (p: f32[8,64], i: s32[]) -> f32[2,64] {{
  %p = f32[8,64]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %r = f32[8,64]{{1,0}} all-reduce(%p), channel_id=1, replica_groups=[1,4]<=[4], use_global_device_ids=true, \
to_apply=%add
  ROOT %d = f32[2,64]{{1,0}} dynamic-slice(%r, %i, %zero), dynamic_slice_sizes={{2,64}}
}}

ENTRY %main (x: f32[8,64], j: s32[]) -> f32[2,64] {{
  %x = f32[8,64]{{1,0}} parameter(0)
  %j = s32[] parameter(1)
  ROOT %f = f32[2,64]{{1,0}} fusion(%x, %j), kind=kCustom, calls=%scatter
}}
""")
    (op,) = analyse(text, {"fsdp": 4}).collective_ops
    assert (op.kind, op.axes, op.bytes, op.dims) == ("reduce-scatter", ("fsdp",), 2048, (8, 64))


def test_asynchronous_forms_of_gpus_count_as_the_collective_they_start():
    text = _module(f"""{ADD}%wrapped (p: f32[8,64]) -> f32[2,64] {{
  %p = f32[8,64]{{1,0}} parameter(0)
  ROOT %s = f32[2,64]{{1,0}} reduce-scatter(%p), channel_id=3, replica_groups={{{{0,1,2,3}}}}, \
use_global_device_ids=true, dimensions={{0}}, to_apply=%add
}}

ENTRY %main (x: f32[8,64], y: f32[2,64]) -> (f32[2,64], f32[4,64], f32[8,64]) {{
  %x = f32[8,64]{{1,0}} parameter(0)
  %y = f32[2,64]{{1,0}} parameter(1)
  %a = ((f32[8,64]{{1,0}}), f32[2,64]{{1,0}}, u32[]) async-start(%x), calls=%wrapped
  %b = f32[2,64]{{1,0}} async-done(%a)
  %c = (f32[2,64]{{1,0}}, f32[4,64]{{1,0}}) all-gather-start(%y), channel_id=4, \
replica_groups={{{{0,2}},{{1,3}}}}, dimensions={{0}}, use_global_device_ids=true
  %d = f32[4,64]{{1,0}} all-gather-done(%c)
  %e = f32[8,64]{{1,0}} all-reduce-start(%x), channel_id=5, replica_groups={{{{0}}}}, to_apply=%add
  %f = f32[8,64]{{1,0}} all-reduce-done(%e)
  ROOT %t = (f32[2,64]{{1,0}}, f32[4,64]{{1,0}}, f32[8,64]{{1,0}}) tuple(%b, %d, %f)
}}
""")
    report = analyse(text, {"data": 2, "fsdp": 2})
    assert {(op.kind, op.axes, op.bytes) for op in report.collective_ops} == {
        ("reduce-scatter", ("data", "fsdp"), 2048),
        ("all-gather", ("data",), 1024),
        ("all-reduce", ("data", "fsdp"), 2048),  # groups of replicas: all partitions of the one replica
    }
    assert report.bytes_accessed == (2048 + 512) + (512 + 1024) + 2 * 2048


def test_anything_may_be_asynchronous():
    text = _module(
        """%product (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %a = ((f32[8,8]{1,0}), f32[8,8]{1,0}, u32[]) fusion-start(%x), kind=kOutput, calls=%product
  %b = f32[8,8]{1,0} fusion-done(%a)
  %c = ((f32[8,8]{1,0}), f32[8,8]{1,0}, u32[]) call-start(%b), to_apply=%product
  %d = f32[8,8]{1,0} call-done(%c)
  %e = ((f32[8,8]{1,0}), f32[8,8]{1,0}, u32[]) unheard-of-start(%d), mode=strange
  ROOT %f = f32[8,8]{1,0} unheard-of-done(%e)
}
""",
        "HloModule m",
    )
    report = analyse(text, {})
    assert report.flops == 2 * 2 * 8**3
    assert report.bytes_accessed == (2 + 3 + 2) * 256  # the product that is called reads its operand twice


def test_updates_in_place_and_on_chip_arrays_cost_what_moves():
    text = _module(
        """%update (p: f32[100,64], u: f32[1,64], i: s32[]) -> f32[100,64] {
  %p = f32[100,64]{1,0} parameter(0)
  %u = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %d = f32[100,64]{1,0} dynamic-update-slice(%p, %u, %i, %zero)
}

ENTRY %main (x: f32[100,64], u: f32[1,64], i: s32[]) -> f32[100,64] {
  %x = f32[100,64]{1,0} parameter(0)
  %u = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = (f32[1,64]{1,0:S(1)}, f32[1,64]{1,0}, u32[]{:S(2)}) copy-start(%u)
  %v = f32[1,64]{1,0:S(1)} copy-done(%c)
  %s = ((f32[100,64]{1,0}), f32[10,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:10], [0:64]}
  %z = f32[10,64]{1,0:S(1)} slice-done(%s)
  %w = f32[10,64]{1,0:S(1)} negate(%z)
  ROOT %f = f32[100,64]{1,0} fusion(%x, %v, %i), kind=kLoop, calls=%update
}
""",
        "HloModule m",
    )
    report = analyse(text, {})
    assert report.bytes_accessed == 256 + 2560 + (4 + 256)
    assert {buffer.name for buffer in report.buffers} == {"x", "u", "i", "f"}


def test_products_of_gpu_libraries_count():
    text = _module(
        """ENTRY %main (x: f32[4,8,16], y: f32[4,16,32]) -> (f32[4,8,32], s8[64]) {
  %x = f32[4,8,16]{2,1,0} parameter(0)
  %y = f32[4,16,32]{2,1,0} parameter(1)
  ROOT %g = (f32[4,8,32]{2,1,0}, s8[64]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"epilogue":"DEFAULT"}}
}
""",
        "HloModule m",
    )
    assert analyse(text, {}).flops == 2 * 4 * 8 * 32 * 16
