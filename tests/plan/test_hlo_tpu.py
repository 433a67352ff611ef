"""Costs of small programs with known answers, compiled by the TPU compiler for devices that are not here."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_ext.parallel.hardware import HARDWARE
from t5x_ext.plan import analyse, roofline

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed (extra `tpu`)"
)

MESH = {"data": 2, "fsdp": 4}
EMBED, HIDDEN, LAYERS, ROWS = 256, 512, 3, 1024


def _mesh(topology, shape, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    grid = np.array(devices).reshape(tuple(shape.values()))
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * grid.ndim)


@pytest.fixture(scope="module")
def mesh():
    return _mesh("v5e:2x4", MESH)


def _struct(mesh, shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))


def _compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile()


def _attention(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


PRODUCT = 2 * 4 * 8 * 128 * 128 * 64


@pytest.mark.parametrize(
    ("function", "products"),
    [(_attention, 2), (jax.grad(lambda *heads: _attention(*heads).sum().astype(jnp.float32), (0, 1, 2)), 5)],
    ids=["forward", "gradients"],
)
def test_batched_products_written_as_convolutions(mesh, function, products):
    heads = [_struct(mesh, (4, 128, 8, 64), jnp.bfloat16)] * 3
    compiled = _compiled(function, *heads)
    report = analyse(compiled.as_text(), MESH)
    assert report.flops == products * PRODUCT
    assert report.flops <= compiled.cost_analysis()["flops"] <= 1.2 * report.flops
    # At least the arguments are read and the results written; at most everything moves there and back.
    argument = 2 * 4 * 128 * 8 * 64
    assert (4 if products == 2 else 6) * argument <= report.bytes_accessed < 100 * argument


def _train_step(weights, x):
    """One update of a scanned two-matrix feed-forward stack, recomputed in the backward pass."""

    def layer(x, weights):
        up, down = (w.astype(jnp.bfloat16) for w in weights)
        return x + jnp.maximum(x @ up, 0) @ down, None

    def loss(weights):
        return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32) ** 2).sum()

    value, gradients = jax.value_and_grad(loss)(weights)
    return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradients), value


def _compiled_step(mesh, batch_axes):
    up = _struct(mesh, (LAYERS, EMBED, HIDDEN), jnp.float32, None, None, "fsdp")
    down = _struct(mesh, (LAYERS, HIDDEN, EMBED), jnp.float32, None, None, "fsdp")
    x = _struct(mesh, (ROWS * mesh.size, EMBED), jnp.bfloat16, batch_axes)
    shardings = ((up.sharding, down.sharding), None)
    return _compiled(_train_step, (up, down), x, donate_argnums=0, out_shardings=shardings)


def test_a_scanned_train_step_counts_every_layer(mesh):
    """Per layer: two products forward, the first again for the backward pass, four there."""
    text = _compiled_step(mesh, ("data", "fsdp")).as_text()
    report = analyse(text, MESH)
    product = 2 * ROWS * EMBED * HIDDEN
    # No gradient needs the last product, so whether it is computed again is the compiler's choice.
    assert report.flops in (7 * LAYERS * product, 8 * LAYERS * product)
    assert report.unknown_loops == ()
    moved = sum(c.bytes for c in report.collectives if "fsdp" in c.axes and c.dtype == "bf16")
    assert moved >= 2 * LAYERS * 2 * EMBED * HIDDEN * 2  # both matrices gathered at least twice
    coordinates = [device.coords for device in mesh.devices.flat]
    bound = roofline(report, HARDWARE["v5e"], MESH, coordinates)
    assert 0 < bound.overlapped < bound.serial


def test_between_slices_only_parts_of_gradients_move():
    shape = {"slices": 2, "data": 1, "fsdp": 4}
    mesh = _mesh("v5e:2x2", shape, num_slices=2)
    text = _compiled_step(mesh, ("slices", "data", "fsdp")).as_text()
    report = analyse(text, shape)
    between = [c for c in report.collectives if "slices" in c.axes]
    assert between
    assert {c.axes for c in between} == {("slices",)}
    whole = LAYERS * 2 * EMBED * HIDDEN * 4
    assert 0 < sum(c.bytes for c in between) <= whole + 4096
    assert {c.axes for c in report.collectives} == {("slices",), ("fsdp",)}


def _collectives(x):
    return (
        jax.lax.all_gather(x, "fsdp", tiled=True),
        jax.lax.psum(x * 2, "data"),
        jax.lax.psum_scatter(x * 3, "fsdp", tiled=True),
        jax.lax.all_to_all(x * 4, "data", 0, 1, tiled=True),
        jax.lax.ppermute(x * 5, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
        jax.lax.psum(x * 7, ("data", "fsdp")),
        jax.lax.scan(lambda x, _: (jnp.sin(jax.lax.psum(x, "fsdp")), None), x, None, length=6)[0],
    )


def test_collectives_by_kind_and_mesh_axis(mesh):
    spec = P(("data", "fsdp"))
    mapped = jax.shard_map(_collectives, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    report = analyse(_compiled(mapped, _struct(mesh, (1024, 256), jnp.float32, ("data", "fsdp"))).as_text(), MESH)
    buffer = 4 * 128 * 256
    assert {(c.kind, c.axes, c.group_size, c.count, c.bytes) for c in report.collectives} == {
        ("all-gather", ("fsdp",), 4, 1, 4 * buffer),
        ("all-reduce", ("data",), 2, 1, buffer),
        ("reduce-scatter", ("fsdp",), 4, 1, buffer),
        ("all-to-all", ("data",), 2, 1, buffer),
        ("collective-permute", ("fsdp",), 4, 1, buffer),
        ("all-reduce", ("data", "fsdp"), 8, 1, buffer),
        ("all-reduce", ("fsdp",), 4, 6, 6 * buffer),
    }
