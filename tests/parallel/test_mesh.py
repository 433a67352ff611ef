"""The mesh, the rules and the shardings derived from them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_ext.contracts import UserError, path_name
from t5x_ext.optim import fsam, scale_by_flora, scale_by_ginger
from t5x_ext.optim.factored import scale_by_factored_rms
from t5x_ext.parallel import (
    MESH_AXES,
    AxisRules,
    MeshConfig,
    data_parallel,
    fsdp,
    fsdp_tensor,
    global_batch,
    host_rows,
    make_mesh,
    state_shardings,
    tree_shardings,
)

AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {"query": ("layers", "embed", "heads", "head_dim"), "scale": ("layers", "embed")},
    "odd": ("mlp",),
}
PARAMS = {
    "embedding": jax.ShapeDtypeStruct((16, 8), jnp.float32),
    "layers": {
        "query": jax.ShapeDtypeStruct((3, 8, 4, 2), jnp.float32),
        "scale": jax.ShapeDtypeStruct((3, 8), jnp.float32),
    },
    "odd": jax.ShapeDtypeStruct((7,), jnp.float32),
}


def specs(shardings):
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        (MeshConfig(), 8, (1, 8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), 8, (1, 1, 8, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), 8, (1, 2, 2, 2)),
        (MeshConfig(data=1), 1, (1, 1, 1, 1)),
        (MeshConfig(slices=2, data=1, fsdp=-1), 8, (2, 1, 4, 1)),
        (MeshConfig(slices=-1, data=1, fsdp=4), 8, (2, 1, 4, 1)),
    ],
)
def test_sizes(config, devices, sizes):
    assert config.sizes(devices) == sizes


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(data=2, fsdp=2), MeshConfig(data=16)])
def test_sizes_that_do_not_fit_are_refused(config):
    with pytest.raises(UserError, match="multiply to 8"):
        config.sizes(8)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 1), (1, -2, 1)])
def test_impossible_axes_are_refused(sizes):
    with pytest.raises(UserError, match="at least 1"):
        MeshConfig(*sizes)


def test_rules_know_their_names():
    with pytest.raises(UserError, match="embed = 'model' is not a mesh axis"):
        AxisRules(embed="model")
    with pytest.raises(UserError, match="unknown axis name 'width'"):
        data_parallel().mesh_axis("width")
    assert AxisRules(embed="fsdp").mesh_axis("embed") == "fsdp"
    assert fsdp().mesh_axis(None) is None


def test_one_device_needs_no_special_case():
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = global_batch(mesh, {"tokens": np.arange(6).reshape(3, 2)})
    assert host_rows(mesh, 3) == (0, 3)
    np.testing.assert_array_equal(batch["tokens"], np.arange(6).reshape(3, 2))


@pytest.mark.devices(8)
def test_presets_give_these_specs(caplog):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == MESH_AXES
    assert specs(tree_shardings(mesh, data_parallel(), AXES, PARAMS)) == {
        "embedding": P(None, None),
        "layers": {"query": P(None, None, None, None), "scale": P(None, None)},
        "odd": P(None),
    }
    assert specs(tree_shardings(mesh, fsdp(), AXES, PARAMS)) == {
        "embedding": P(None, "fsdp"),
        "layers": {"query": P(None, "fsdp", None, None), "scale": P(None, "fsdp")},
        "odd": P(None),
    }
    with caplog.at_level(logging.INFO, logger="t5x_ext.parallel.shardings"):
        assert specs(tree_shardings(mesh, fsdp_tensor(), AXES, PARAMS)) == {
            "embedding": P("tensor", "fsdp"),
            "layers": {"query": P(None, "fsdp", "tensor", None), "scale": P(None, "fsdp")},
            "odd": P(None),
        }
    [message] = caplog.messages
    assert message == "parameter odd: axis mlp of size 7 is not sharded: 2 devices along tensor do not divide it"


@pytest.mark.devices(8)
def test_a_mesh_axis_is_used_once_an_array_first_come():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    rules = AxisRules(vocab="fsdp", embed="fsdp")
    assert tree_shardings(mesh, rules, AXES, PARAMS)["embedding"].spec == P("fsdp", None)
    # An axis that cannot be cut leaves its mesh axis to the next one.
    shapes = PARAMS | {"embedding": jax.ShapeDtypeStruct((15, 8), jnp.float32)}
    assert tree_shardings(mesh, rules, AXES, shapes)["embedding"].spec == P(None, "fsdp")


def test_names_and_shapes_must_agree():
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match="parameter odd of shape"):
        tree_shardings(mesh, fsdp(), AXES | {"odd": ("mlp", "embed")}, PARAMS)
    with pytest.raises(UserError, match="parameter odd of shape"):
        tree_shardings(mesh, fsdp(), {name: AXES[name] for name in ("embedding", "layers")}, PARAMS)


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.ema(0.9)),
    "bfloat16 moment": lambda: optax.adam(1e-3, mu_dtype=jnp.bfloat16),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0, 1, 9)),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "masked": lambda: optax.masked(optax.adam(1e-3), {"embedding": True, "layers": True, "odd": False}),
    "partition": lambda: optax.partition(
        {"a": optax.adam(1e-3), "b": optax.sgd(1e-3, momentum=0.9)}, {"embedding": "a", "layers": "b", "odd": "a"}
    ),
}


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_follows_the_parameters(name):
    """Oracle: a moment has its parameter's spec wherever it sits; counts are whole; jit keeps it so."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer = OPTIMIZERS[name]()
    param_shardings = tree_shardings(mesh, fsdp_tensor(), AXES, PARAMS)
    state = jax.eval_shape(optimizer.init, PARAMS)
    shardings = state_shardings(mesh, state, PARAMS, param_shardings)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    by_shape = {PARAMS[name].shape: param_shardings[name].spec for name in ("embedding", "odd")}
    by_shape |= {PARAMS["layers"][name].shape: param_shardings["layers"][name].spec for name in ("query", "scale")}
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        # Of these parameters no two have the same shape, so a shape names its parameter.
        assert sharding.spec == by_shape.get(leaf.shape, P())
    if name == "adam":
        params = jax.tree.map(
            lambda leaf, sharding: jax.device_put(jnp.ones(leaf.shape), sharding), PARAMS, param_shardings
        )
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        _, after = jax.jit(optimizer.update, out_shardings=(param_shardings, shardings))(params, state, params)
        assert jax.tree.map(lambda leaf: leaf.sharding.spec, after) == specs(shardings)


FACTORS = {
    "mean over columns": ((3, 16), jnp.float32, P(None, "fsdp")),
    "mean over rows": ((3, 4, 2), jnp.float32, P(None, "tensor")),
    "columns compressed": ((3, 16, 6), jnp.float32, P(None, ("fsdp", "tensor"))),
    "rows compressed": ((3, 6, 4, 2), jnp.bfloat16, P(None, None, ("tensor", "fsdp"))),
    "a basis behind": ((3, 16, 4, 2, 7), jnp.float32, P(None, "fsdp", "tensor")),
    "a basis before": ((7, 3, 16, 4, 2), jnp.float32, P(None, None, "fsdp", "tensor")),
    "a basis of as many vectors as embed has entries": (
        (3, 16, 16, 4, 2),
        jnp.float32,
        P(None, None, "fsdp", "tensor"),
    ),
    "packed": ((3, 2, 4, 2), jnp.uint8, P(None, "fsdp", "tensor")),
    "packed to a size that does not divide": ((3, 1, 4, 2), jnp.uint8, P(None, None, "tensor")),
    "packed flat": ((48,), jnp.uint8, P()),
    "a placeholder": ((1,), jnp.float32, P()),
    "a count": ((), jnp.int32, P()),
}


@pytest.mark.devices(8)
@pytest.mark.parametrize("case", FACTORS)
def test_a_leaf_of_another_shape_is_cut_where_it_has_the_axes_of_its_parameter(case):
    shape, dtype, expected = FACTORS[case]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = {"query": jax.ShapeDtypeStruct((3, 16, 4, 2), jnp.float32)}
    param_shardings = tree_shardings(mesh, fsdp_tensor(), {"query": ("layers", "embed", "heads", "head_dim")}, params)
    state = {"mu": {"query": jax.ShapeDtypeStruct(shape, dtype)}, "other": jax.ShapeDtypeStruct(shape, dtype)}
    shardings = state_shardings(mesh, state, params, param_shardings)
    assert shardings["mu"]["query"].is_equivalent_to(NamedSharding(mesh, expected), len(shape))
    assert shardings["other"].spec == P()


KERNELS = {
    "query": (("layers", "embed", "heads", "head_dim"), (4, 16, 4, 2)),
    "out": (("layers", "heads", "head_dim", "embed"), (4, 4, 2, 16)),
    "mlp": (("layers", "embed", "mlp"), (4, 8, 16)),
    "square": (("layers", "embed", "mlp"), (4, 16, 16)),
}


def _flora(rank):
    return lambda axes: scale_by_flora(rank, resample_every=1000, min_dim_size_to_compress=1, axes=axes)


TIES = {
    **{
        f"flora, rank of {what}": (
            _flora(rank),
            {
                "mu/query": ((4, 16, rank), P("data", ("fsdp", "tensor"))),
                "mu/out": ((4, rank, 16), P("data", None, ("fsdp", "tensor"))),
                "mu/mlp": ((4, rank, 16), P("data", None, "fsdp")),
                "mu/square": ((4, 16, rank), P("data", "fsdp")),
            },
        )
        for rank, what in ((4, "layers and heads"), (2, "head_dim"), (3, "nothing else"))
    },
    **{
        f"ginger, rank of {what}": (
            lambda axes, rank=rank: scale_by_ginger(rank, axes=axes),
            {
                "basis/query": ((4, rank, 16, 4, 2), P("data", None, "fsdp", "tensor")),
                "basis/out": ((4, rank, 4, 2, 16), P("data", None, "tensor", None, "fsdp")),
                "basis/mlp": ((4, rank, 8, 16), P("data", None, "fsdp")),
                "basis/square": ((4, rank, 16, 16), P("data", None, "fsdp")),
            },
        )
        for rank, what in ((4, "layers and heads"), (8, "embed of one"), (16, "embed of others"))
    },
    "fsam, packed sizes of heads and head_dim": (
        lambda axes: fsam(optax.sgd(0.1), sparsity=0.5),
        {
            "mask/query": ((4, 2, 4, 2), P("data", "fsdp", "tensor")),
            "mask/out": ((4, 4, 2, 2), P("data", "tensor", None, "fsdp")),
            "mask/mlp": ((4, 8, 2), P("data", "fsdp")),
            "mask/square": ((4, 16, 2), P("data", "fsdp")),
        },
    ),
    "factored": (
        lambda axes: scale_by_factored_rms(min_dim_size_to_factor=2, axes=axes),
        {
            "v_row/query": ((4, 16), P("data", "fsdp")),
            "v_col/query": ((4, 4, 2), P("data", "tensor")),
            "v_row/out": ((4, 4, 2), P("data", "tensor")),
            "v_col/out": ((4, 16), P("data", "fsdp")),
            "v_col/mlp": ((4, 16), P("data")),
            # Of two sides of one size the last one is taken for the missing one: v_col could be whole.
            "v_col/square": ((4, 16), P("data", "fsdp")),
        },
    ),
}


@pytest.mark.devices(8)
@pytest.mark.parametrize("case", TIES)
def test_where_sizes_tie_names_tell_which_axis_is_missing_or_added(case):
    """Expected by hand: each axis that an optimizer has kept is cut as in the parameter, and no rank is."""
    make, expected = TIES[case]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes = {name: names for name, (names, _) in KERNELS.items()}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (_, shape) in KERNELS.items()}
    rules = AxisRules(layers="data", embed="fsdp", heads="tensor")
    param_shardings = tree_shardings(mesh, rules, axes, params)
    state = jax.eval_shape(make(axes).init, params)
    shardings = state_shardings(mesh, state, params, param_shardings, axes)
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    found = {path_name(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)}
    for name, (shape, spec) in expected.items():
        assert leaves[name].shape == shape, name
        assert found[name].is_equivalent_to(NamedSharding(mesh, spec), len(shape)), (name, found[name].spec)


@pytest.mark.devices(8)
def test_a_whole_training_state_is_cut_in_one_call():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    param_shardings = tree_shardings(mesh, fsdp(), AXES, PARAMS)
    state = {"step": jax.ShapeDtypeStruct((), jnp.int32), "params": PARAMS, "ema": PARAMS, "mutable": None}
    shardings = state_shardings(mesh, state, PARAMS, param_shardings)
    assert shardings == {
        "step": NamedSharding(mesh, P()),
        "params": param_shardings,
        "ema": param_shardings,
        "mutable": None,
    }


@pytest.mark.devices(8)
def test_rows_are_cut_over_the_axes_of_a_batch():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = np.arange(24).reshape(8, 3)
    batch = global_batch(mesh, {"tokens": rows, "weights": rows[:, 0].astype(np.float32)})
    assert host_rows(mesh, 8) == (0, 8)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["tokens"], rows)
    np.testing.assert_array_equal(batch["weights"], rows[:, 0])
    with pytest.raises(UserError, match="6 rows cannot be split over 4"):
        host_rows(mesh, 6)
    with pytest.raises(UserError, match="6 host rows do not fit the mesh"):
        global_batch(mesh, {"tokens": rows[:6]})


def linear_step(optimizer, params, state, batch):
    def loss(params):
        hidden = jnp.einsum("be,ehd->bhd", batch["x"] @ params["embedding"], params["layers"]["query"][0])
        return jnp.mean((hidden.sum((1, 2)) - batch["y"]) ** 2)

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("rules", "config"),
    [
        (data_parallel(), MeshConfig()),
        (fsdp(), MeshConfig(data=1, fsdp=8)),
        (fsdp(), MeshConfig(data=2, fsdp=4)),
        (fsdp_tensor(), MeshConfig(data=2, fsdp=2, tensor=2)),
        (fsdp(), MeshConfig(slices=2, data=2, fsdp=2)),
    ],
)
def test_a_step_on_eight_devices_equals_one(rules, config):
    optimizer = optax.adam(1e-2)
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "embedding": jax.random.normal(keys[0], (16, 8)),
        "layers": {"query": jax.random.normal(keys[1], (3, 8, 4, 2)), "scale": jnp.ones((3, 8))},
        "odd": jnp.ones(7),
    }
    batch = {"x": np.asarray(jax.random.normal(keys[2], (16, 16))), "y": np.asarray(jax.random.normal(keys[3], (16,)))}
    mesh = make_mesh(config)
    param_shardings = tree_shardings(mesh, rules, AXES, params)
    shardings = state_shardings(mesh, jax.eval_shape(optimizer.init, params), params, param_shardings)
    step = jax.jit(partial(linear_step, optimizer))
    sharded_step = jax.jit(partial(linear_step, optimizer), out_shardings=(param_shardings, shardings))
    alone, alone_state = params, optimizer.init(params)
    together = jax.device_put(params, param_shardings)
    together_state = jax.device_put(optimizer.init(params), shardings)
    for _ in range(3):
        alone, alone_state = step(alone, alone_state, batch)
        together, together_state = sharded_step(together, together_state, global_batch(mesh, batch))
    assert together["embedding"].sharding == param_shardings["embedding"]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-6), together, alone)


@dataclass(frozen=True)
class Somewhere:
    """A device that only knows where it is."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "a GPU"


@pytest.mark.parametrize("attribute", ["slice_index", "process_index"])
def test_each_position_on_slices_is_one_slice_or_process(attribute):
    """Devices come in no order; those of a position on `slices` are on one fast network, and all of it."""
    other = {"slice_index": "process_index", "process_index": "slice_index"}[attribute]
    devices = [Somewhere(number, **{attribute: number % 2, other: 0}) for number in range(8)]
    mesh = make_mesh(MeshConfig(slices=2, data=2, fsdp=2), devices)
    assert mesh.shape == {"slices": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert [{getattr(device, attribute) for device in part.flat} for part in mesh.devices] == [{0}, {1}]


def test_tpu_slices_must_be_on_the_axis_of_slices():
    devices = [Somewhere(number, 0, number // 4, platform="tpu") for number in range(8)]
    with pytest.raises(UserError, match=r"are in 2 slices and MeshConfig.slices is 1: set it to 2"):
        make_mesh(MeshConfig(), devices)
