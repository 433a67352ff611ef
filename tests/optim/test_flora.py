"""Flora against float64 recursions written from the paper and the authors' code, and the laws of random projections."""

from __future__ import annotations

import math
import zlib
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_ext.contracts import UserError
from t5x_ext.models import PRESETS, init_params, logical_axes
from t5x_ext.optim import flora, flora_accumulator, gaussian, orthogonal, scale_by_flora
from t5x_ext.optim.factored import scale_by_factored_rms
from t5x_ext.optim.matrices import as_matrices, from_matrices, matrix_shape
from t5x_ext.parallel import MeshConfig, fsdp, fsdp_tensor, make_mesh, state_shardings, tree_shardings

AXES = {
    "embedding": ("vocab", "embed"),
    "in": ("layers", "embed", "heads", "head_dim"),
    "out": ("layers", "heads", "head_dim", "embed"),
    "up": ("embed", "mlp"),
    "scale": ("layers", "embed"),
}
SHAPES = {"embedding": (9, 6), "in": (2, 6, 2, 3), "out": (2, 2, 3, 6), "up": (6, 10), "scale": (2, 6)}
MATRICES = {"embedding": (1, 9, 6), "in": (2, 6, 6), "out": (2, 6, 6), "up": (1, 6, 10), "scale": (2, 1, 6)}
RANK = 4


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def projections(name, epoch, rank=RANK, seed=0):
    """As documented: key, CRC-32 of the path, epoch, number of the matrix; independent of the library's code."""
    batch, rows, cols = MATRICES[name]
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(name.encode())))
    key = jax.random.fold_in(key, epoch)
    keys = [jax.random.fold_in(key, i) for i in range(batch)] if "layers" in AXES[name] else [key]
    shape = (rank, min(rows, cols))
    return [np.float64(jax.random.normal(key, shape, jnp.float32)) / math.sqrt(rank) for key in keys]


class Reference:
    """Momentum of one tree in float64, resampled after the output of an update and before it is added."""

    def __init__(self, b1, resample_every, output, transfer, draw=projections):
        self.b1, self.every, self.output, self.transfer, self.draw = b1, resample_every, output, transfer, draw
        self.count, self.moments = 0, {}

    def matrix(self, y, m, old, new, changes):
        b1, left = self.b1, y.shape[0] < y.shape[1]
        down = lambda x, p: p @ x if left else x @ p.T
        up = lambda x, p: p.T @ x if left else x @ p
        m = down(np.zeros_like(y), old) if m is None else m
        mixed = b1 * up(m, old) + (1 - b1) * y
        if changes:
            m = down(up(m, old), new) if self.transfer == "project" else 0 * m
        m = b1 * m + (1 - b1) * down(y, new)
        nesterov = b1 * up(m, new) + (1 - b1) * y
        return {"mixed": mixed, "projected": up(m, new), "nesterov": nesterov}[self.output], m

    def update(self, updates):
        out, changes = {}, (self.count + 1) % self.every == 0
        epochs = self.count // self.every, (self.count + 1) // self.every
        for name, update in updates.items():
            y = np.float64(update).reshape(MATRICES[name])
            if name == "scale":
                m = self.b1 * self.moments.get(name, 0.0) + (1 - self.b1) * y
                self.moments[name] = m
                out[name] = self.b1 * m + (1 - self.b1) * y if self.output == "nesterov" else m
            else:
                old, new = (self.draw(name, epoch) for epoch in epochs)
                before = self.moments.get(name, [None] * len(y))
                pairs = [self.matrix(*args, changes) for args in zip(y, before, old, new, strict=True)]
                out[name], self.moments[name] = np.stack([u for u, _ in pairs]), [m for _, m in pairs]
            out[name] = out[name].reshape(update.shape)
        self.count += 1
        return out


@pytest.mark.parametrize(
    ("output", "transfer", "together"),
    [
        ("mixed", "project", 2**24),  # matrices of a stack side by side
        ("mixed", "reset", 1),  # one after the other
        ("projected", "project", 2**24),
        ("nesterov", "project", 1),
    ],
)
def test_momentum_is_the_float64_recursion(output, transfer, together, monkeypatch):
    monkeypatch.setattr(import_module("t5x_ext.optim.flora"), "_TOGETHER", together)
    options = {"output": output, "transfer": transfer}
    optimizer = scale_by_flora(RANK, 0.5, 3, min_dim_size_to_compress=2, axes=AXES, **options)
    reference = Reference(0.5, 3, **options)
    state, update = optimizer.init(tree(0)), jax.jit(optimizer.update)
    for step in range(7):  # two changes of projection
        out, state = update(tree(step), state)
        expected = reference.update(tree(step))
        for name in SHAPES:
            np.testing.assert_allclose(out[name], expected[name], atol=2e-6, err_msg=f"{name} {step}")
            moment = np.stack(reference.moments[name])
            np.testing.assert_allclose(np.ravel(state.mu[name]), np.ravel(moment), atol=2e-6, err_msg=name)
    assert {name: mu.shape for name, mu in state.mu.items()} == {
        "embedding": (9, RANK),
        "in": (2, 6, RANK),
        "out": (2, 2, 3, RANK),
        "up": (RANK, 10),
        "scale": (2, 6),
    }


class Recorded:
    """Projections given from outside, one for each new key in the order in which keys are first used."""

    def __init__(self, seed=0):
        self.rng, self.by_key, self.calls = np.random.default_rng(seed), {}, 0

    def __call__(self, key, shape, dtype):
        self.calls += 1
        key = np.asarray(jax.random.key_data(key)).tobytes()
        if key not in self.by_key:
            self.by_key[key] = self.rng.normal(size=shape) / math.sqrt(shape[0])
        return jnp.asarray(self.by_key[key], dtype)


def test_projections_can_be_given_and_are_asked_for_only_when_they_are_needed():
    recorded = Recorded()
    optimizer = scale_by_flora(RANK, 0.5, 3, min_dim_size_to_compress=2, projection=recorded)
    updates = [{"up": tree(step)["up"]} for step in range(7)]
    state = optimizer.init(updates[0])
    assert recorded.calls == 0
    calls, outputs = [], []
    for update in updates:
        before = recorded.calls
        out, state = optimizer.update(update, state)
        outputs.append(out["up"])
        calls.append(recorded.calls - before)
    assert calls == [1, 1, 2, 1, 1, 2, 1]
    given = list(recorded.by_key.values())
    assert len(given) == 3
    reference = Reference(0.5, 3, "mixed", "project", draw=lambda name, epoch: [given[epoch]])
    for out, update in zip(outputs, updates, strict=True):
        np.testing.assert_allclose(out, reference.update(update)["up"], atol=1e-6)


def test_every_layer_of_a_stack_asks_for_a_projection_of_its_own():
    recorded = Recorded()
    optimizer = scale_by_flora(RANK, 0.5, 3, min_dim_size_to_compress=2, axes=AXES, projection=recorded)
    update = {"in": tree(0)["in"]}
    out, state = optimizer.update(update, optimizer.init(update))
    given = list(recorded.by_key.values())
    assert len(given) == recorded.calls == 2
    reference = Reference(0.5, 3, "mixed", "project", draw=lambda name, epoch: given)
    np.testing.assert_allclose(out["in"], reference.update(update)["in"], atol=1e-6)
    np.testing.assert_allclose(np.ravel(state.mu["in"]), np.ravel(reference.moments["in"]), atol=1e-6)


def test_flora_is_the_authors_recursion_in_float64():
    """Factored second moment, momentum, clipping, scale of the weights and decay in the order of the released code."""
    names, rate, decay, threshold = ("embedding", "up"), 0.3, 0.2, 0.7
    recorded = Recorded()
    optimizer = flora(
        rate,
        RANK,
        0.6,
        3,
        min_dim_size_to_compress=2,
        projection=recorded,
        clipping_threshold=threshold,
        weight_decay=decay,
    )
    params = {name: tree(99)[name] for name in names}
    state, trajectory = optimizer.init(params), [params]
    gradients = [{name: tree(step)[name] * (1 + step) for name in names} for step in range(8)]
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, trajectory[-1])
        trajectory.append(optax.apply_updates(trajectory[-1], updates))

    given = list(recorded.by_key.values())  # both parameters' first projections, then both second ones, and so on
    draw = lambda name, epoch: [given[2 * epoch + names.index(name)]]
    momentum = Reference(0.6, 3, "mixed", "project", draw=draw)
    rms = lambda x: np.sqrt(np.mean(x**2))
    weights = {name: np.float64(params[name]) for name in names}
    rows, cols = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for step, gradient in enumerate(gradients):
        b2, scaled = 1 - (step + 1) ** -0.8, {}
        for name in names:
            square = np.float64(gradient[name]) ** 2 + 1e-30
            rows[name] = b2 * rows[name] + (1 - b2) * square.mean(1)
            cols[name] = b2 * cols[name] + (1 - b2) * square.mean(0)
            scaled[name] = gradient[name] / np.sqrt(np.outer(rows[name] / rows[name].mean(), cols[name]))
        for name, u in momentum.update(scaled).items():
            w = weights[name]
            u = u / max(1.0, rms(u) / threshold)
            weights[name] = w - rate * max(1e-3, rms(w)) * (u + decay * w)
            np.testing.assert_allclose(trajectory[step + 1][name], weights[name], atol=3e-6, err_msg=f"{name} {step}")


def draws(projection, rank, dim, count):
    return jax.vmap(lambda key: projection(key, (rank, dim), jnp.float32))(jax.random.split(jax.random.key(1), count))


@pytest.mark.parametrize(
    ("projection", "error"), [(gaussian, lambda r, c: (c + 1) / r), (orthogonal, lambda r, c: c / r - 1)]
)
@pytest.mark.parametrize(("rank", "dim"), [(4, 12), (3, 4)])
def test_projections_are_unbiased_with_their_variance(projection, error, rank, dim):
    count = 20_000
    p = draws(projection, rank, dim, count)
    identity = jnp.einsum("nrc,nrd->ncd", p, p)
    noise = math.sqrt(2 * dim / rank / count)
    np.testing.assert_allclose(identity.mean(0), np.eye(dim), atol=5 * noise)
    g = np.random.default_rng(0).normal(size=(dim, 3)).astype(np.float32)
    squared = jnp.sum((identity @ g - g) ** 2, (1, 2)).mean() / np.sum(g**2)
    np.testing.assert_allclose(squared, error(rank, dim), rtol=0.05)


def test_orthogonal_rows_are_orthogonal_at_any_size():
    for rank, dim in ((5, 5), (3, 2**15)):
        p = np.float64(orthogonal(jax.random.key(dim), (rank, dim)))
        np.testing.assert_allclose(p @ p.T, dim / rank * np.eye(rank), atol=2e-5 * dim / rank)
    with pytest.raises(UserError, match=r"orthogonal: \(rank, dim\) = \(3, 2\)"):
        orthogonal(jax.random.key(0), (3, 2))


def test_a_transfer_keeps_the_momentum_in_the_mean_with_its_variance():
    rank, dim, count, b1 = 8, 12, 4000, 0.5
    optimizer = scale_by_flora(rank, b1, 2, min_dim_size_to_compress=2, output="projected")
    zero = {"w": jnp.zeros((dim, 16))}
    moment = {"w": jax.random.normal(jax.random.key(5), (rank, 16))}

    def decoded(key, count):
        state = optimizer.init(zero)._replace(key=key, count=jnp.int32(count), mu=moment)
        return optimizer.update(zero, state)[0]["w"] / b1

    keys = jax.random.split(jax.random.key(0), count)
    kept, moved = jax.jit(jax.vmap(partial(decoded, count=0)))(keys), jax.jit(jax.vmap(partial(decoded, count=1)))(keys)
    squares = jnp.sum(kept**2)
    np.testing.assert_allclose(jnp.sum((moved - kept) ** 2) / squares, (dim + 1) / rank, rtol=0.05)
    np.testing.assert_allclose(jnp.sum(moved * kept) / squares, 1.0, atol=0.03)
    bias = jnp.mean(moved - kept, 0)
    assert float(jnp.sum(bias**2)) < 2 * (dim + 1) / rank * float(squares) / count**2


@pytest.mark.parametrize(
    ("dim", "rank", "b1", "enough"),
    [
        (512, 128, 0.9, 8),
        (512, 128, 0.99, 81),
        (512, 128, 0.999, 806),
        (4096, 256, 0.9, 14),
        (4096, 256, 0.99, 141),
        (4096, 256, 0.999, 1417),
        (4096, 128, 0.999, 1748),
    ],
)
def test_momentum_that_could_not_forget_a_transfer_is_refused(dim, rank, b1, enough):
    params = {"a": {"kernel": jax.ShapeDtypeStruct((dim, dim), jnp.float32)}}
    jax.eval_shape(scale_by_flora(rank, b1, enough).init, params)
    jax.eval_shape(scale_by_flora(rank, b1, 1, transfer="reset").init, params)
    with pytest.raises(UserError, match=f"momentum of .* would grow .* use resample_every >= {enough}, or transfer"):
        jax.eval_shape(scale_by_flora(rank, b1, enough - 1).init, params)


def test_what_no_matrix_could_stand_is_refused_at_construction():
    with pytest.raises(UserError, match=r"scale_by_flora: momentum of any matrix .* 128 to rank 4 every 1 updates"):
        scale_by_flora(4, 0.9, 1)
    with pytest.raises(UserError, match=r"129 to rank 128 every 5 updates with b1 = 0\.95"):
        flora(1e-3, 128, 0.95, 5)


@pytest.mark.parametrize(("resample_every", "grows"), [(1, True), (2, False)])
def test_the_rule_of_stability_is_the_behaviour(resample_every, grows):
    """64 to rank 8 with b1 = 0.5: a factor of 1.5 an update when drawn every time, of 0.75 every two when every two."""
    b1 = jnp.float32(0.5)  # an array is not checked
    optimizer = scale_by_flora(8, b1, resample_every, min_dim_size_to_compress=2)
    zero = jnp.zeros((64, 64))
    state = optimizer.init(zero)._replace(mu=jnp.ones((64, 8)))
    run = jax.jit(lambda state: jax.lax.fori_loop(0, 40, lambda i, state: optimizer.update(zero, state)[1], state))
    norm = float(jnp.linalg.norm(run(state).mu) / jnp.linalg.norm(state.mu))
    assert norm > 1e4 if grows else norm < 1e-1


@pytest.mark.parametrize("projection", [gaussian, orthogonal])
def test_rank_of_the_whole_side_is_plain_momentum(projection):
    options = {"min_dim_size_to_compress": 2, "projection": projection}
    optimizer, ema = scale_by_flora(10, 0.9, 50, **options), optax.ema(0.9, debias=False)
    full, adafactor = (
        flora(0.1, 10, 0.9, 50, **options),
        flora(0.1, 10, 0.9, 50, compressible=lambda _: False, **options),
    )
    params = tree(0)
    states = [one.init(params) for one in (optimizer, ema, full, adafactor)]
    for step in range(5):
        outs = []
        for i, one in enumerate((optimizer, ema, full, adafactor)):
            out, states[i] = one.update(tree(step), states[i], params)
            outs.append(out)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), outs[0], outs[1])
        jax.tree.map(np.testing.assert_array_equal, outs[2], outs[3])


@pytest.mark.parametrize("output", ["mixed", "projected", "nesterov"])
def test_an_orthogonal_projection_of_nearly_all_loses_nearly_nothing(output):
    """Of a side of 64 projected to 63, everything in the 63 directions is momentum, exactly."""
    basis = orthogonal(jax.random.key(3), (64, 64))
    keep = basis[:63]
    optimizer = scale_by_flora(63, 0.9, 50, min_dim_size_to_compress=2, output=output, projection=lambda *_: keep)
    state, mu = optimizer.init(jnp.zeros((64, 65))), np.zeros((64, 65))
    for step in range(5):
        y = keep.T @ jax.random.normal(jax.random.key(step), (63, 65))
        mu = 0.9 * mu + 0.1 * np.float64(y)
        out, state = optimizer.update(y, state)
        np.testing.assert_allclose(out, 0.9 * mu + 0.1 * y if output == "nesterov" else mu, atol=1e-5)


def test_without_momentum_it_is_adafactor():
    params = {"w": jax.random.normal(jax.random.key(0), (12, 8)), "b": jnp.ones(5), "square": jnp.ones((8, 8))}
    random = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    ours = flora(0.1, 4, b1=0.0, min_dim_size_to_compress=6)
    theirs = optax.adafactor(0.1, min_dim_size_to_factor=6)
    mine, state, others, other_state = params, ours.init(params), params, theirs.init(params)
    for step in range(5):
        gradient = jax.tree.map(partial(jnp.multiply, step + 1), random)
        updates, state = jax.jit(ours.update)(gradient, state, mine)
        mine = optax.apply_updates(mine, updates)
        updates, other_state = jax.jit(theirs.update)(gradient, other_state, others)
        others = optax.apply_updates(others, updates)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), mine, others)


def test_a_stack_of_layers_is_its_layers():
    """With one projection for all, so that only the layout differs; attention kernels are matrices, vectors vectors."""
    shapes = {"in": (2, 6, 2, 3), "scale": (2, 6)}
    params = {name: tree(3)[name] for name in shapes}
    options = {
        "min_dim_size_to_compress": 2,
        "projection": lambda key, shape, dtype: gaussian(jax.random.key(7), shape, dtype),
        "weight_decay": 0.1,
    }
    stacked = flora(0.1, RANK, 0.5, 2, axes=AXES, **options)
    single = flora(0.1, RANK, 0.5, 2, axes={name: AXES[name][1:] for name in shapes}, **options)
    layer = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    whole, parts = params, [layer(params, i) for i in range(2)]
    state, states = stacked.init(params), [single.init(part) for part in parts]
    for step in range(3):
        gradients = {name: tree(step)[name] for name in shapes}
        updates, state = stacked.update(gradients, state, whole)
        whole = optax.apply_updates(whole, updates)
        for i in range(2):
            updates, states[i] = single.update(layer(gradients, i), states[i], parts[i])
            parts[i] = optax.apply_updates(parts[i], updates)
    for i in range(2):
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), layer(whole, i), parts[i])


def test_a_projection_depends_on_the_path_and_not_on_the_company():
    optimizer = scale_by_flora(RANK, 0.5, 3, min_dim_size_to_compress=2)
    alone, both = {"up": tree(0)["up"]}, {"embedding": tree(0)["embedding"], "up": tree(0)["up"]}
    _, one = optimizer.update(alone, optimizer.init(alone))
    _, two = optimizer.update(both, optimizer.init(both))
    np.testing.assert_array_equal(one.mu["up"], two.mu["up"])
    masked = optax.masked(optimizer, {"embedding": False, "up": True})
    _, three = masked.update(both, masked.init(both))
    np.testing.assert_array_equal(one.mu["up"], three.inner_state.mu["up"])
    other = scale_by_flora(RANK, 0.5, 3, min_dim_size_to_compress=2, key=jax.random.key(1))
    _, four = other.update(alone, other.init(alone))
    assert not np.allclose(one.mu["up"], four.mu["up"])


def test_what_is_spared_keeps_exact_momentum():
    options = {"min_dim_size_to_compress": 7, "mu_dtype": jnp.bfloat16}
    optimizer = scale_by_flora(RANK, 0.5, 3, compressible=lambda name: name != "embedding", **options)
    params = {"embedding": jnp.ones((9, 8)), "small": jnp.ones((6, 9)), "up": jnp.ones((8, 9))}
    mu = jax.eval_shape(optimizer.init, params).mu
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in mu.items()} == {
        "embedding": ((9, 8), jnp.bfloat16),
        "small": ((6, 9), jnp.bfloat16),
        "up": ((RANK, 9), jnp.bfloat16),
    }


# --- Accumulation ----------------------------------------------------------------------------------------------------


def accumulated(accumulator, gradients, weights, step=0):
    state = accumulator.init(gradients[0], jnp.int32(step))
    for gradient, weight in zip(gradients, weights, strict=True):
        state = jax.jit(accumulator.add)(state, gradient, jnp.float32(weight))
    return accumulator.finish(state)


def test_accumulation_is_the_projection_of_the_mean_and_new_for_every_update():
    accumulator = flora_accumulator(RANK, min_dim_size_to_compress=2, axes=AXES, key=0)
    gradients, weights = [tree(seed) for seed in range(5)], [3.0, 0.0, 5.0, 1.0, 2.0]
    mean = {name: sum(np.float64(g[name]) for g in gradients) / 11.0 for name in SHAPES}
    for step in (0, 7):
        result = accumulated(accumulator, gradients, weights, step)
        np.testing.assert_allclose(result["scale"], mean["scale"], rtol=1e-5, atol=1e-6)
        for name in ("embedding", "in", "out", "up"):
            left = MATRICES[name][1] < MATRICES[name][2]
            matrices = zip(mean[name].reshape(MATRICES[name]), projections(name, step), strict=True)
            expected = [p.T @ p @ g if left else g @ p.T @ p for g, p in matrices]
            np.testing.assert_allclose(result[name], np.reshape(expected, SHAPES[name]), rtol=1e-4, atol=2e-6)


def test_accumulated_sums_of_devices_add_up():
    """Sums of compressed gradients are the compressed gradient of the sum: what devices exchange can be compressed."""
    accumulator = flora_accumulator(RANK, min_dim_size_to_compress=2, axes=AXES)
    start = accumulator.init(tree(0), jnp.int32(3))
    one, two = (accumulator.add(start, tree(seed), jnp.float32(seed)) for seed in (1, 2))
    both = accumulator.add(accumulator.add(start, tree(1), jnp.float32(1)), tree(2), jnp.float32(2))
    total = jax.tree.map(jnp.add, one, two)._replace(step=start.step)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), accumulator.finish(total), accumulator.finish(both))


def test_accumulation_without_labels_is_zero_and_holds_no_full_sum():
    accumulator = flora_accumulator(RANK, min_dim_size_to_compress=2)
    params = {"w": jnp.ones((16, 32), jnp.bfloat16)}
    state = accumulator.init(params, jnp.int32(0))
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(), (RANK, 32), ()]
    finished = accumulator.finish(accumulator.add(state, {"w": jnp.full((16, 32), jnp.nan)}, jnp.float32(0)))
    assert finished["w"].dtype == jnp.float32
    np.testing.assert_array_equal(finished["w"], np.zeros((16, 32)))


def test_accumulated_gradients_are_unbiased():
    gradient = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(12, 16)), jnp.float32)}
    accumulator = flora_accumulator(8, min_dim_size_to_compress=2)

    def once(step):
        return accumulator.finish(accumulator.add(accumulator.init(gradient, step), gradient, jnp.float32(1)))["w"]

    results = jax.jit(jax.vmap(once))(jnp.arange(4000))
    square = jnp.sum(gradient["w"] ** 2)
    np.testing.assert_allclose(jnp.sum((results - gradient["w"]) ** 2, (1, 2)).mean() / square, 13 / 8, rtol=0.05)
    assert float(jnp.sum((results.mean(0) - gradient["w"]) ** 2) / square) < 2 * 13 / 8 / 4000


# --- Memory and layout -----------------------------------------------------------------------------------------------


def state_bytes(state):
    sized = [leaf for leaf in jax.tree.leaves(state) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in sized)


@pytest.mark.parametrize("options", [{"rank": 256, "mu_dtype": jnp.bfloat16}, {"rank": 128}], ids=["256 bf16", "128"])
def test_state_of_the_4b7_model_is_a_twentieth_of_adams(options):
    config = PRESETS["vega_4b7"]()
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    adam = state_bytes(jax.eval_shape(optax.adam(1e-3).init, params))
    ours = state_bytes(jax.eval_shape(flora(1e-3, axes=logical_axes(config), **options).init, params))
    assert ours < 0.035 * adam


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            fsdp(),
            {
                "embedding": P(),  # nine pieces cannot be cut in two
                "in": P(None, "fsdp"),
                "out": P(None, None, None, None),
                "up": P(None, "fsdp"),
            },
        ),
        (
            fsdp_tensor(),
            {
                "embedding": P(),
                "in": P(None, "fsdp"),  # six cannot be cut in four
                "out": P(None, "tensor"),
                "up": P(None, "tensor"),
            },
        ),
    ],
    ids=["fsdp", "fsdp_tensor"],
)
def test_compressed_moments_are_cut_as_their_parameters(rules, expected):
    """The axis that was not compressed keeps its cut and takes the other one where it divides; the rank is whole."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer = flora(0.1, RANK, 0.5, 2, axes=AXES, min_dim_size_to_compress=2)
    params = tree(0)
    shardings = tree_shardings(mesh, rules, AXES, params)
    of_state = state_shardings(mesh, jax.eval_shape(optimizer.init, params), params, shardings)
    for name, spec in expected.items():
        mu = of_state[1].mu[name]
        assert mu.is_equivalent_to(NamedSharding(mesh, spec), params[name].ndim - (name == "in")), name


# --- Matrices and mistakes -------------------------------------------------------------------------------------------


def test_parameters_are_matrices_by_the_names_of_their_axes():
    for name, shape in SHAPES.items():
        x = tree(0)[name]
        assert as_matrices(x, AXES[name]).shape == MATRICES[name]
        np.testing.assert_array_equal(from_matrices(as_matrices(x, AXES[name]), shape), x)
    assert matrix_shape((2, 3, 4)) == ((2,), (3,), (4,))
    assert matrix_shape((3,)) == ((), (), (3,))
    assert matrix_shape(()) == ((), (), ())
    assert matrix_shape((5, 2, 3), ("layers", "heads", "head_dim")) == ((5,), (), (2, 3))
    assert matrix_shape((5, 2, 3), (None, "embed", "mlp")) == ((5,), (2,), (3,))
    with pytest.raises(UserError, match="layers must come first"):
        matrix_shape((2, 3), ("embed", "layers"))
    with pytest.raises(UserError, match="want one an axis"):
        matrix_shape((2, 3), ("embed",))


def test_attention_kernels_are_factored_where_optax_keeps_them_whole():
    axes = {"in": ("layers", "embed", "heads", "head_dim")}
    params = {"in": jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32)}
    state = jax.eval_shape(scale_by_factored_rms(axes=axes).init, params)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(), (2, 256), (2, 4, 64)]
    assert max(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(optax.adafactor(0.1).init, params))) == 2 * 256**2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_flora(0), "scale_by_flora: rank = 0 must be an integer of at least 1"),
        (lambda: scale_by_flora(4, b1=1.0), "b1 = 1.0 must be at least 0 and below 1"),
        (lambda: scale_by_flora(4, resample_every=0), "resample_every = 0"),
        (lambda: scale_by_flora(4, output="exact"), "output = 'exact' is none of 'mixed', 'projected', 'nesterov'"),
        (lambda: scale_by_flora(4, transfer="keep"), "transfer = 'keep' is none of"),
        (lambda: scale_by_flora(4, min_dim_size_to_compress=0), "min_dim_size_to_compress = 0"),
        (lambda: flora_accumulator(0), "flora_accumulator: rank = 0"),
        (lambda: flora(0.1, weight_decay=-1.0), "flora: weight_decay = -1.0"),
        (lambda: flora(0.1, clipping_threshold=0.0), "flora: clipping_threshold = 0.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_mistakes_in_trees_and_projections_are_refused():
    params = {"w": jnp.ones((8, 8))}
    with pytest.raises(UserError, match=r"parameter w of shape \(8, 8\) has axis names None"):
        scale_by_flora(4, axes={"v": ("embed", "mlp")}).init(params)
    wrong = scale_by_flora(4, 0.5, 5, min_dim_size_to_compress=2, projection=lambda key, shape, dtype: jnp.ones((8, 4)))
    with pytest.raises(UserError, match=r"projection gave \(8, 4\) for w: want \(4, 8\)"):
        wrong.update(params, wrong.init(params))
    optimizer = flora(0.1, 4)
    with pytest.raises(UserError, match="update needs params"):
        optimizer.update(params, optimizer.init(params))
