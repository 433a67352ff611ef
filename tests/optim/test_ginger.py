"""Ginger against the float64 recursion that it is in exact arithmetic, and its curvature gradients against sums."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.optim import ginger, ginger_curvature_grads, ginger_reference, scale_by_ginger
from t5x_ext.parallel import AxisRules, MeshConfig, make_mesh, state_shardings, tree_shardings

B1, B2 = 0.9, 0.99


class Exact:
    """The truncated recursion of one block in float64, on dense matrices; `keep` eigenvalues stay."""

    def __init__(self, dim, keep, damping, b1=B1, b2=B2):
        self.curvature, self.momentum, self.steps = np.zeros((dim, dim)), np.zeros(dim), 0
        self.keep, self.damping, self.b1, self.b2 = keep, damping, b1, b2

    def update(self, gradient, curvature_gradient):
        gradient, n = np.float64(gradient).ravel(), np.float64(curvature_gradient).ravel()
        values, vectors = np.linalg.eigh(self.b2 * self.curvature + (1 - self.b2) * np.outer(n, n))
        values, vectors = values[-self.keep :], vectors[:, -self.keep :]
        self.curvature = vectors * values @ vectors.T
        self.momentum = self.b1 * self.momentum + (1 - self.b1) * gradient
        self.steps += 1
        return self.solve(self.momentum / (1 - self.b1**self.steps))

    def solve(self, vector):
        return np.linalg.solve(self.curvature + self.damping * np.eye(len(self.curvature)), vector)


def start(optimizer, params):
    """A compiled `(gradient, curvature gradient) -> updates` that keeps its state in `.state`."""
    compiled = jax.jit(lambda g, state, n: optimizer.update(g, state, params, curvature_grad_fn=lambda params: n))

    def step(gradient, curvature_gradient):
        updates, step.state = compiled(gradient, step.state, curvature_gradient)
        return updates

    step.state = optimizer.init(params)
    return step


def difference(result, expected):
    return np.linalg.norm(np.float64(result).ravel() - expected) / np.linalg.norm(expected)


def curvature_of(state, layer=None, leaf="w", block=0):
    """U diag(s) U^T of one block, dense."""
    basis = np.float64(state.basis[leaf] if layer is None else state.basis[leaf][layer])
    basis = basis.reshape(len(basis), -1)
    return basis.T * np.float64(state.eigvals[block]) @ basis


def stream(dim, seed, steps, scale=1.0):
    rng = np.random.default_rng(seed)
    spectrum = np.linspace(2.0, 0.1, dim)
    for _ in range(steps):
        yield np.float32(rng.normal(size=dim)), np.float32(scale * spectrum * rng.normal(size=dim))


@pytest.mark.parametrize(("damping", "scale"), [(1e-1, 1.0), (1e-3, 1.0), (1e-5, 10.0), (1e-8, 1.0)])
def test_it_is_the_truncated_recursion_in_float64(damping, scale):
    params, exact = {"w": jnp.zeros((4, 8))}, Exact(32, keep=4, damping=damping)
    step = start(scale_by_ginger(rank=4, damping=damping), params)
    for gradient, n in stream(32, seed=1, steps=200, scale=scale):
        updates = step({"w": gradient.reshape(4, 8)}, {"w": n.reshape(4, 8)})
        assert difference(updates["w"], exact.update(gradient, n)) < 5e-6
    assert difference(curvature_of(step.state), exact.curvature.ravel()) < 5e-6
    assert np.all(np.diff(step.state.eigvals) <= 0)


@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5])
def test_with_enough_rank_nothing_is_lost(damping):
    """Oracle: the weighted sum of outer products, solved densely."""
    steps, params = 12, {"w": jnp.zeros(40)}
    step = start(scale_by_ginger(rank=12, damping=damping), params)
    curvature, momentum = np.zeros((40, 40)), np.zeros(40)
    for t, (gradient, n) in enumerate(stream(40, seed=2, steps=steps), start=1):
        updates = step({"w": gradient}, {"w": n})
        curvature = B2 * curvature + (1 - B2) * np.outer(np.float64(n), np.float64(n))
        momentum = B1 * momentum + (1 - B1) * np.float64(gradient)
        expected = np.linalg.solve(curvature + damping * np.eye(40), momentum / (1 - B1**t))
        assert difference(updates["w"], expected) < 5e-6


@pytest.mark.parametrize(("dim", "true_rank"), [(24, 3), (2, 2), (1, 1)])
def test_curvature_of_lower_rank_than_the_basis_adds_no_noise(dim, true_rank):
    """What is left of a gradient within the basis is rounding, and must not become a direction."""
    rng = np.random.default_rng(3)
    directions = rng.normal(size=(true_rank, dim))
    params, exact = {"w": jnp.zeros(dim)}, Exact(dim, keep=4, damping=1e-5)
    step = start(scale_by_ginger(rank=4, damping=1e-5), params)
    for _ in range(60):
        gradient, n = np.float32(rng.normal(size=dim)), np.float32(rng.normal(size=true_rank) @ directions)
        updates = step({"w": gradient}, {"w": n})
        expected = exact.update(gradient, n)
    assert difference(updates["w"], expected) < 5e-6
    basis = np.float64(step.state.basis["w"])
    assert np.linalg.matrix_rank(basis, tol=1e-3) == true_rank
    assert difference(curvature_of(step.state), exact.curvature.ravel()) < 5e-6


def test_the_basis_stays_orthonormal_for_5000_steps():
    """And eigenvalues are descending, not negative, and no larger than what went in."""
    dim, rank, steps = 256, 16, 5000
    optimizer = scale_by_ginger(rank=rank)
    params = jnp.zeros(dim)

    def step(carry, key):
        state, bound = carry
        n = jnp.linspace(3.0, 0.1, dim, dtype=jnp.float32) * jax.random.normal(key, (dim,), jnp.float32)
        _, state = optimizer.update(n, state, params, curvature_grad_fn=lambda params: n)
        return (state, B2 * bound + (1 - B2) * n @ n), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), steps))[0])
    state, bound = run((optimizer.init(params), jnp.float32(0.0)))
    basis, eigvals = np.float64(state.basis), np.asarray(state.eigvals[0])
    assert np.abs(basis @ basis.T - np.eye(rank)).max() < 1e-5
    assert np.all(eigvals > 0)
    assert np.all(np.diff(eigvals) <= 0)
    assert eigvals.sum() <= bound


@pytest.mark.parametrize("rank", [0, 4])
def test_without_curvature_it_is_momentum_over_damping(rank):
    params, exact = {"w": jnp.zeros(6)}, Exact(6, keep=1, damping=0.5)
    step = start(scale_by_ginger(rank=rank, damping=0.5), params)
    for gradient, n in stream(6, seed=4, steps=5):
        updates = step({"w": gradient}, {"w": n if rank == 0 else np.zeros_like(n)})
        assert difference(updates["w"], exact.update(gradient, np.zeros(6))) < 1e-6


def test_many_curvature_gradients_of_a_quadratic_give_newtons_step():
    rng = np.random.default_rng(5)
    scales = np.array([3.0, 1.0, 0.5, 0.2])
    step = start(scale_by_ginger(rank=4, b1=0.0, b2=0.999, damping=1e-4), {"w": jnp.zeros(4)})
    gradient = np.float32(rng.normal(size=4))
    for _ in range(8000):
        updates = step({"w": gradient}, {"w": np.float32(scales * rng.choice([-1, 1], size=4))})
    np.testing.assert_allclose(updates["w"], gradient / (scales**2 + 1e-4), rtol=0.25)


AXES = {
    "kernel": ("layers", "embed", "heads", "head_dim"),
    "scale": ("layers", "embed"),
    "embedding": ("vocab", "embed"),
}


def stacked(seed):
    kernel, scale, embedding = jax.random.split(jax.random.key(seed), 3)
    return {
        "kernel": jax.random.normal(kernel, (2, 4, 2, 3)),
        "scale": jax.random.normal(scale, (2, 4)),
        "embedding": jax.random.normal(embedding, (5, 4)),
    }


def test_stacked_layers_are_blocks_of_their_own():
    """Oracle: the same layers as parameters apart."""
    together = start(scale_by_ginger(rank=3, axes=AXES), stacked(0))
    apart = lambda tree: {
        "embedding": tree["embedding"],
        "layers": [{name: tree[name][layer] for name in ("kernel", "scale")} for layer in range(2)],
    }
    looped = start(scale_by_ginger(rank=3), apart(stacked(0)))
    for seed in range(1, 9):
        gradient, n = stacked(seed), stacked(100 + seed)
        result, expected = together(gradient, n), looped(apart(gradient), apart(n))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-3), apart(result), expected)
    shapes = jax.tree.map(jnp.shape, together.state.basis, is_leaf=lambda leaf: isinstance(leaf, jax.Array))
    assert shapes == {"kernel": (2, 3, 4, 2, 3), "scale": (2, 3, 4), "embedding": (3, 5, 4)}
    assert together.state.eigvals.shape == (5, 3)


@pytest.mark.devices(8)
def test_devices_exchange_inner_products_only():
    """Cut along one axis: one all-reduce for each pass of orthogonalising, whatever the number of parameters."""
    mesh, rules = make_mesh(MeshConfig(data=1, fsdp=8)), AxisRules(embed="fsdp")
    params = {"kernel": jnp.ones((3, 8, 2, 5)), "scale": jnp.ones((3, 8)), "embedding": jnp.ones((5, 8))}
    shardings = tree_shardings(mesh, rules, AXES, params)
    optimizer = scale_by_ginger(rank=3, axes=AXES)
    of_state = state_shardings(mesh, jax.eval_shape(optimizer.init, params), params, shardings)
    assert of_state.basis["kernel"].spec == jax.sharding.PartitionSpec(None, None, "fsdp", None, None)
    update = lambda gradient, state, n: optimizer.update(gradient, state, curvature_grad_fn=lambda params: n)
    compiled = jax.jit(update, in_shardings=(shardings, of_state, shardings), out_shardings=(shardings, of_state))
    text = compiled.lower(params, jax.eval_shape(optimizer.init, params), params).compile().as_text()
    collectives = re.findall(
        r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    )
    assert collectives == ["all-reduce", "all-reduce"]


def test_curvature_that_is_not_finite_is_left_out():
    params = {"w": jnp.zeros(8)}
    step, exact = start(scale_by_ginger(rank=2), params), Exact(8, keep=2, damping=1e-2)
    for gradient, n in stream(8, seed=6, steps=5):
        step({"w": gradient}, {"w": n})
        exact.update(gradient, n)
    before = step.state
    for poison in (np.nan, np.inf, 1e30):
        updates = step({"w": gradient}, {"w": np.where(np.arange(8) == 3, np.float32(poison), n)})
        for name in ("basis", "eigvals"):
            jax.tree.map(np.testing.assert_array_equal, getattr(step.state, name), getattr(before, name))
        assert difference(updates["w"], exact.solve(_momentum(step.state))) < 5e-6


def _momentum(state):
    return np.float64(state.mu["w"]) / (1 - B1 ** int(state.count))


def test_between_curvature_gradients_the_basis_stays_and_the_callable_is_not_called():
    calls, params = [], {"w": jnp.zeros(8)}
    optimizer, exact = scale_by_ginger(rank=2, curvature_every=3), Exact(8, keep=2, damping=1e-2)

    @jax.jit
    def step(gradient, state, n):
        def curvature_grad_fn(params):
            jax.debug.callback(lambda: calls.append(1))
            return {"w": n}

        return optimizer.update({"w": gradient}, state, params, curvature_grad_fn=curvature_grad_fn)

    state = optimizer.init(params)
    for number, (gradient, n) in enumerate(stream(8, seed=7, steps=7)):
        updates, new = step(gradient, state, n)
        jax.effects_barrier()
        assert len(calls) == number // 3 + 1
        if number % 3 == 0:
            exact.update(gradient, n)
        else:
            np.testing.assert_array_equal(new.basis["w"], state.basis["w"])
            np.testing.assert_array_equal(new.eigvals, state.eigvals)
        state = new
        assert difference(updates["w"], exact.solve(_momentum(state))) < 5e-6


def gauss_newton(likelihood, outputs, jacobian, counted):
    """J^T H J over the number of predictions, H the curvature of one loss at its output, as sums in float64."""
    if likelihood == "categorical":
        p = np.float64(jax.nn.softmax(outputs))
        hessian = np.einsum("ni,ij->nij", p, np.eye(p.shape[1])) - np.einsum("ni,nj->nij", p, p)
    elif likelihood == "bernoulli":
        p = np.float64(jax.nn.sigmoid(outputs))
        hessian, jacobian = (p * (1 - p))[:, None, None], jacobian[:, None]
    else:
        hessian = np.broadcast_to(np.eye(outputs.shape[1]), (*outputs.shape, outputs.shape[1]))
    return np.einsum("n,nip,nij,njq->pq", counted, jacobian, hessian, jacobian) / counted.sum()


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_curvature_gradients_square_to_the_gauss_newton_matrix(likelihood):
    """Monte Carlo: the error falls with the root of the number of draws."""
    rng = np.random.default_rng(8)
    x, counted = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), np.array([1.0, 1, 1, 1, 0, 1])
    params = jnp.asarray(rng.normal(size=(3,) if likelihood == "bernoulli" else (3, 4)), jnp.float32)
    apply_fn = lambda params, x: jnp.tanh(x @ params) * 2

    def outer(key):
        n = ginger_curvature_grads(apply_fn, params, x, key, likelihood, weights=jnp.asarray(counted)).ravel()
        return jnp.outer(n, n)

    jacobian = np.float64(jax.jacobian(lambda flat: apply_fn(flat.reshape(params.shape), x))(params.ravel()))
    exact = gauss_newton(likelihood, apply_fn(params, x), jacobian, counted)
    errors = []
    for draws in (500, 50_000):
        estimate = jax.jit(lambda keys: jnp.mean(jax.vmap(outer)(keys), axis=0))(
            jax.random.split(jax.random.key(9), draws)
        )
        errors.append(np.linalg.norm(estimate - exact) / np.linalg.norm(exact))
    assert errors[0] < 0.3
    assert errors[1] < 0.03


def test_the_chain_clips_before_decay_and_learning_rate():
    params = {"w": jnp.array([2.0, -4.0]), "bias": jnp.array([2.0])}
    gradient = {"w": jnp.array([0.3, -30.0]), "bias": jnp.array([0.1])}
    optimizer = ginger(0.5, damping=0.1, clip_value=10.0, weight_decay=0.01, no_decay=["bias"])
    zero = lambda params: jax.tree.map(jnp.zeros_like, params)
    once = lambda optimizer: jax.jit(
        lambda: optimizer.update(gradient, optimizer.init(params), params, curvature_grad_fn=zero)[0]
    )()
    updates = once(optimizer)
    np.testing.assert_allclose(updates["w"], [-0.5 * (3.0 + 0.02), -0.5 * (-10.0 - 0.04)], rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], [-0.5], rtol=1e-5)
    updates = once(ginger_reference())
    np.testing.assert_allclose(updates["w"], [-2e-4, 2e-4], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_ginger(rank=-1), "rank = -1"),
        (lambda: scale_by_ginger(b2=1.0), "b2 = 1.0"),
        (lambda: scale_by_ginger(damping=0.0), "damping = 0.0 must be above 0"),
        (lambda: scale_by_ginger(curvature_every=0), "curvature_every = 0"),
        (lambda: ginger(0.1, clip_value=0.0), "clip_value = 0.0"),
        (lambda: ginger(-0.1), "learning_rate = -0.1"),
        (lambda: ginger(0.1, axes={"w": ("embed", "layers")}).init({"w": jnp.zeros((2, 2))}), "layers must come first"),
        (lambda: ginger(0.1, axes={"w": ("embed",)}).init({"w": jnp.zeros((2, 2))}), "want one an axis"),
        (
            lambda: optax.masked(ginger(0.1), {"a": True, "b": False}).init({"a": jnp.ones(1), "b": jnp.ones(1)}),
            "outermost",
        ),
        (
            lambda: ginger(0.1).update(jnp.ones(1), ginger(0.1).init(jnp.ones(1)), jnp.ones(1)),
            "needs curvature_grad_fn",
        ),
        (lambda: ginger_curvature_grads(lambda p, b: p, jnp.ones(1), 0, jax.random.key(0), "poisson"), "poisson"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_said_in_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()
