"""Random meshes, shapes and layouts: parameters that are cut over eight devices go where whole ones go."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ext.optim import adam, flora, fsam, ginger, sam
from t5x_ext.parallel import state_shardings

MESH_AXES = ("slices", "data", "fsdp", "tensor")
MESHES = [(1, 1, 1, 8), (2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 4, 1), (1, 1, 4, 2), (8, 1, 1, 1)]
KINDS = [
    (),
    ("embed",),
    ("embed", "mlp"),
    ("layers", "embed"),
    ("layers", "embed", "mlp"),
    ("layers", "embed", "heads", "head_dim"),
    ("layers", "heads", "head_dim", "embed"),
]
RANK = 2
SIZES = [1, RANK, RANK + 1, 5, 8, 16, 24]  # odd ones, and some that are as large as the rank
DTYPES = [jnp.float32, jnp.float32, jnp.bfloat16]

MAKE = {
    "flora": lambda axes: flora(0.1, RANK, 0.5, 3, min_dim_size_to_compress=2, axes=axes),
    "flora without names": lambda axes: flora(0.1, RANK, 0.5, 3, min_dim_size_to_compress=2, output="projected"),
    "ginger": lambda axes: ginger(0.05, RANK, damping=0.5, axes=axes, curvature_every=2),
    "ginger without names": lambda axes: ginger(0.05, RANK, damping=0.5),
    "fsam": lambda axes: fsam(optax.sgd(0.1), 0.3, sparsity=0.7, mask_update_interval=2, maskable=["[02]"]),
    "fsam over flora": lambda axes: fsam(MAKE["flora"](axes), 0.3, sparsity=0.5, normalize="masked"),
    "sam": lambda axes: sam(adam(0.01)),
}


def random_parameters(random, mesh):
    """A tree of parameters, their axis names and their layouts, each axis of the mesh used once at most."""
    params, names, layouts = {}, {}, {}
    for number in range(3):
        kind = KINDS[random.integers(len(KINDS))]
        shape = tuple(int(random.choice([1, 2, 3] if axis in ("layers", "heads") else SIZES)) for axis in kind)
        free, spec = list(random.permutation(MESH_AXES)), []
        for size in shape:
            cut = []
            while (
                free and random.random() < 0.6 and size % math.prod(mesh.shape[name] for name in [*cut, free[0]]) == 0
            ):
                cut.append(str(free.pop(0)))
            spec.append(tuple(cut) or None)
        name = f"p{number}"
        params[name] = jnp.asarray(random.normal(size=shape), DTYPES[random.integers(len(DTYPES))])
        names[name], layouts[name] = kind, NamedSharding(mesh, PartitionSpec(*spec))
    return params, names, layouts


@pytest.mark.devices(8)
@pytest.mark.parametrize("seed", range(len(MAKE)))
def test_where_parameters_lie_does_not_matter(seed):
    random, make = np.random.default_rng(seed), list(MAKE.values())[seed]
    mesh = Mesh(np.array(jax.devices()).reshape(MESHES[seed % len(MESHES)]), MESH_AXES)
    params, names, layouts = random_parameters(random, mesh)
    targets = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), params)
    optimizer = make(names)
    grad_fn = lambda params, index=0: jax.tree.map(jnp.subtract, params, targets)
    curvature_grad_fn = lambda params: jax.tree.map(lambda leaf: jnp.sin(37.0 * leaf), params)
    pulled = {"grad_fn": grad_fn, "curvature_grad_fn": curvature_grad_fn}

    def step(params, state):
        updates, state = optax.with_extra_args_support(optimizer).update(grad_fn(params), state, params, **pulled)
        return optax.apply_updates(params, updates), state

    expected, state = params, optimizer.init(params)
    of_state = state_shardings(mesh, jax.eval_shape(optimizer.init, params), params, layouts)
    moved, placed = jax.device_put(params, layouts), jax.device_put(state, of_state)
    whole_step, cut_step = jax.jit(step), jax.jit(step, out_shardings=(layouts, of_state))
    for _ in range(4):
        expected, state = whole_step(expected, state)
        moved, placed = cut_step(moved, placed)
    for name, leaf in moved.items():
        assert leaf.sharding.is_equivalent_to(layouts[name], leaf.ndim)
        tolerance = 2e-5 if leaf.dtype == jnp.float32 else 2e-2
        a, b = np.float64(leaf), np.float64(expected[name])
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max(initial=0)), err_msg=name)
    for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(of_state), strict=True):
        assert a.sharding.is_equivalent_to(b, a.ndim)
