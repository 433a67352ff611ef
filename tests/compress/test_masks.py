"""Masks: exact counts for any scores, densities of Erdős-Rényi graphs, rounds, and what masked training keeps."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.compress import (
    apply_masks,
    as_density,
    at_init,
    er,
    er_densities,
    from_scores,
    kept_entries,
    large_sparse,
    magnitude,
    random,
    report,
    report_text,
    snip,
    synflow,
)
from t5x_ext.compress.masks import preferred_scope
from t5x_ext.contracts import UserError

KEY = jax.random.key(0)
DENSITIES = st.one_of(
    st.sampled_from([0, 1, 1e-6, 0.1, 0.3, 0.6, 0.7, 0.999999, Fraction(1, 3), Fraction(2, 3)]),
    st.floats(0, 1).map(lambda x: round(x, 6)),
)
SHAPES = {"a": (3, 4, 5), "b": {"c": (2, 7), "d": (6,)}, "e": (3, 2, 2, 3)}
AXES = {
    "a": ("layers", "embed", "mlp"),
    "b": {"c": ("embed", "mlp"), "d": ("mlp",)},
    "e": ("layers", *("heads", "head_dim", "embed")),
}


def tree_of(values):
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    ends = np.cumsum([math.prod(shape) for shape in leaves])[:-1]
    parts = np.split(np.asarray(values, np.float32), ends)
    return structure.unflatten([jnp.asarray(p.reshape(shape)) for p, shape in zip(parts, leaves, strict=True)])


TOTAL = sum(math.prod(s) for s in jax.tree.leaves(SHAPES, is_leaf=lambda node: isinstance(node, tuple)))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, -3.0, 1e-45]), min_size=TOTAL, max_size=TOTAL), DENSITIES)
def test_global_masks_are_those_of_a_stable_sort(values, density):
    mask = flat(from_scores(tree_of(values), density))
    kept = TOTAL - math.ceil((1 - Fraction(str(density))) * TOTAL)
    order = np.argsort(-np.asarray(values, np.float32).astype(np.float64) + 0.0, kind="stable")
    assert mask.sum() == kept == kept_entries(TOTAL, density)
    expected = np.zeros(TOTAL, bool)
    expected[order[:kept]] = True
    # A CPU may take denormal numbers for zero when it compares; counts are exact all the same.
    if 1e-45 not in values:
        assert np.array_equal(mask, expected)


@settings(max_examples=30)
@given(st.integers(0, 2**31), DENSITIES, st.sampled_from(["local", "er"]))
def test_masks_by_matrix_keep_their_shares_and_the_exact_total(seed, density, scope):
    scores = tree_of(np.random.default_rng(seed).normal(size=TOTAL))
    rows = report(from_scores(scores, density, scope=scope, axes=AXES), AXES)
    assert len(rows) == 3 + 1 + 1 + 3
    assert sum(row.kept for row in rows) == kept_entries(TOTAL, density)
    shapes = [(4, 5)] * 3 + [(2, 7)] + [(1, 6)] + [(4, 3)] * 3
    share = er_densities(shapes, density) if scope == "er" else [float(as_density(density=density))] * len(shapes)
    for row, expected in zip(rows, share, strict=True):
        assert abs(row.kept - expected * row.entries) < 1 + 1e-6


def test_local_masks_keep_the_largest_of_each_matrix():
    scores = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 9.0]])}
    mask = from_scores(scores, 0.5, scope="local", axes={"w": ("layers", "embed")})
    assert mask["w"].tolist() == [[True, True, False, False], [True, False, False, True]]
    assert from_scores(scores, 0.5)["w"].tolist() == [[True, True, True, False], [False, False, False, True]]


def test_equal_scores_keep_exactly_so_many():
    mask = from_scores({"w": jnp.ones((10, 10))}, 0.37)
    assert mask["w"].sum() == 37
    assert mask["w"].ravel()[:37].all()


def test_nan_is_smallest_and_infinity_largest():
    mask = from_scores({"w": jnp.array([jnp.nan, -jnp.inf, 0.0, jnp.inf])}, 0.75)
    assert mask["w"].tolist() == [False, True, True, True]


def test_masks_are_traceable():
    scores = tree_of(np.random.default_rng(0).normal(size=TOTAL))
    compiled = jax.jit(functools.partial(from_scores, density=0.3))(scores)
    assert np.array_equal(flat(compiled), flat(from_scores(scores, 0.3)))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6), st.floats(0, 1))
def test_er_densities_keep_the_budget(shapes, density):
    density = round(density, 6)
    densities = er_densities(shapes, density)
    sizes = [a * b for a, b in shapes]
    np.testing.assert_allclose(np.dot(densities, sizes), density * sum(sizes), rtol=1e-9, atol=1e-9)
    assert all(0 <= d <= 1 + 1e-12 for d in densities)
    # Where none is dense, densities are in proportion to (n_in + n_out) / (n_in n_out).
    free = [d * a * b / (a + b) for d, (a, b) in zip(densities, shapes, strict=True) if d < 1]
    np.testing.assert_allclose(free, free[:1] * len(free), rtol=1e-9)


def test_er_densities_of_equal_shapes_are_equal():
    assert er_densities([(64, 16)] * 4, 0.25) == [0.25] * 4
    assert er_densities([(3, 3), (5, 5)], 1.0) == [1.0, 1.0]


def test_large_sparse_keeps_the_budget():
    for width, bottleneck, factor in [(384, 16, 2), (384, 16, 3), (100, 7, 4), (64, 8, 1.5)]:
        wide, sparsity = large_sparse(bottleneck, factor)
        kept = kept_entries(2 * width * wide, 1 - sparsity)
        assert abs(kept - 2 * width * bottleneck) <= 1
    assert large_sparse(16, 3).sparsity == Fraction(2, 3)
    for bottleneck, factor in [(16, 0.5), (3, 1.5), (0, 2)]:
        with pytest.raises(UserError, match="large_sparse: factor"):
            large_sparse(bottleneck, factor)


@pytest.mark.usefixtures("unchecked")
def test_density_and_sparsity_are_never_mixed_up():
    assert as_density(sparsity=0.9) == Fraction(1, 10)
    for arguments in [{}, {"density": 0.5, "sparsity": 0.5}]:
        with pytest.raises(UserError, match="either density, the share of entries kept, or sparsity"):
            as_density(**arguments)
    for wrong in (1.5, -0.1, "0.5", True, float("nan")):
        with pytest.raises(UserError, match=r"sparsity = .* must be a number from 0 to 1"):
            as_density(sparsity=wrong)


def net(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "down": {"kernel": jnp.asarray(rng.normal(0, 0.3, (6, 4)), jnp.float32), "bias": jnp.zeros(4)},
        "up": {"kernel": jnp.asarray(rng.normal(0, 0.3, (4, 6)), jnp.float32)},
    }


@jax.jit
def loss_fn(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["down"]["kernel"] + params["down"]["bias"])
    return jnp.mean((batch["x"] + hidden @ params["up"]["kernel"] - batch["y"]) ** 2)


def data(seed=1):
    rng = np.random.default_rng(seed)
    return [{name: jnp.asarray(rng.normal(size=(8, 6)), jnp.float32) for name in ("x", "y")} for _ in range(2)]


SELECTED = {"down": {"kernel": True, "bias": False}, "up": {"kernel": True}}


@pytest.mark.parametrize("score", [random, magnitude, er, snip, synflow])
def test_masks_at_initialisation_have_the_asked_density(score):
    masks = at_init(score, loss_fn, net(), SELECTED, data(), KEY, sparsity=0.4)
    assert masks["down"]["bias"] is None
    assert sum(row.kept for row in report(masks)) == 28  # floor(0.6 * 48)


def test_one_round_is_the_top_of_the_scores():
    scores = snip(loss_fn, net(), SELECTED, data(), KEY)
    masks = at_init(snip, loss_fn, net(), SELECTED, data(), KEY, density=0.5)
    assert np.array_equal(flat(masks), flat(from_scores(scores, 0.5)))


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_rounds_score_the_masked_network(schedule):
    """Two rounds by hand: scores of the second are w times the gradient at masked weights."""
    params, first_density = net(), {"exponential": 0.5, "linear": 0.625}[schedule]
    first = from_scores(snip(loss_fn, params, SELECTED, data(), KEY), first_density)
    gradients = [jax.grad(loss_fn)(apply_masks(params, first), batch) for batch in data()]
    scores = jax.tree.map(lambda w, *g: jnp.abs(w * sum(g)), params, *gradients)
    scores["down"]["bias"] = None
    expected = from_scores(scores, 0.25)
    masks = at_init(snip, loss_fn, params, SELECTED, data(), KEY, density=0.25, rounds=2, schedule=schedule)
    assert np.array_equal(flat(masks), flat(expected))


def test_an_entry_may_come_back_in_a_later_round():
    calls = []

    def score(loss, params, selected, batches, key):
        calls.append(selected)
        order = 1.0 if len(calls) == 1 else -1.0
        return {"w": order * jnp.arange(4.0)}

    masks = at_init(score, loss_fn, {"w": jnp.ones(4)}, {"w": True}, [], KEY, density=0.25, rounds=2)
    assert masks["w"].tolist() == [True, False, False, False]
    assert calls[0]["w"] is True
    assert calls[1]["w"].tolist() == [False, False, True, True]


def test_more_rounds_of_synflow_differ_from_one():
    params = net()
    one, many = (
        at_init(synflow, loss_fn, params, SELECTED, [], KEY, density=0.3, rounds=n, allow_collapse=True)
        for n in (1, 50)
    )
    assert flat(one).sum() == flat(many).sum() == 14
    assert not np.array_equal(flat(one), flat(many))


def test_scores_may_be_any_callable(no_loss):
    """A score of the user's own: what `functools.partial` made of a function, arrays of NumPy, other leaves ignored."""

    def distance(loss, params, selected, batches, key, *, origin):
        return jax.tree.map(lambda w: np.abs(np.asarray(w) - origin), params)

    masks = at_init(functools.partial(distance, origin=1.0), no_loss, net(), SELECTED, [], KEY, density=0.5)
    assert flat(masks).sum() == 24
    assert preferred_scope(functools.partial(er)) == "er"


def test_a_collapsed_matrix_is_refused(no_loss):
    params = net()
    params["up"]["kernel"] = params["up"]["kernel"] * 1e-3
    with pytest.raises(UserError, match=r"density 0.25 nothing is kept of up/kernel; scope='local' keeps"):
        at_init(magnitude, no_loss, params, SELECTED, [], KEY, density=0.25)
    masks = at_init(magnitude, no_loss, params, SELECTED, [], KEY, density=0.25, allow_collapse=True)
    assert not masks["up"]["kernel"].any()
    assert (
        at_init(magnitude, no_loss, params, SELECTED, [], KEY, density=0.25, scope="local")["up"]["kernel"].sum() == 6
    )
    assert not flat(at_init(magnitude, no_loss, params, SELECTED, [], KEY, density=0)).any()


@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_one_line():
    arguments = (loss_fn, net(), SELECTED, data(), KEY)
    nothing = jax.tree.map(lambda _: False, net())
    cases = [
        (lambda: at_init(snip, loss_fn, net(), nothing, data(), KEY, density=0.5), "no parameter is selected"),
        (lambda: at_init(snip, *arguments, density=0.5, scope="layer"), "scope = 'layer' is none of 'global', 'local'"),
        (lambda: at_init(snip, *arguments, density=0.5, rounds=0), "rounds = 0 must be a positive integer"),
        (lambda: at_init(snip, *arguments, density=0.5, schedule="cubic"), "schedule = 'cubic' is none of"),
        (lambda: at_init(lambda *a: {"x": 1}, *arguments, density=0.5), "a score must return a tree like"),
        (
            lambda: at_init(lambda *a: jax.tree.map(jnp.sum, a[1]), *arguments, density=0.5),
            r"score of down/kernel has shape \(\), the parameter \(6, 4\)",
        ),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_masked_entries_stay_as_they_are_through_a_thousand_updates():
    """Weights stored with zeros, gradients through the mask: AdamW with weight decay leaves zeros bit for bit."""
    params = net()
    masks = at_init(snip, loss_fn, params, SELECTED, data(), KEY, sparsity=0.4)
    params, optimizer = apply_masks(params, masks), optax.adamw(1e-2, weight_decay=0.1)
    batch = data()[0]

    def update(carry, _):
        params, state = carry
        gradients = jax.grad(lambda p: loss_fn(apply_masks(p, masks), batch))(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), gradients

    (trained, _), gradients = jax.jit(lambda c: jax.lax.scan(update, c, None, 1000))((params, optimizer.init(params)))
    for name in ("down", "up"):
        removed = ~np.asarray(masks[name]["kernel"])
        assert removed.any()
        assert not np.asarray(trained[name]["kernel"])[removed].view(np.uint32).any()
        assert not np.asarray(gradients[name]["kernel"])[:, removed].any()
        assert (np.asarray(trained[name]["kernel"])[~removed] != np.asarray(params[name]["kernel"])[~removed]).all()
    assert float(loss_fn(apply_masks(trained, masks), batch)) == float(loss_fn(trained, batch))


def test_density_one_masks_nothing():
    params = net()
    masks = at_init(snip, loss_fn, params, SELECTED, data(), KEY, density=1)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, apply_masks(params, masks), params))


def test_a_report_counts_by_layer():
    masks = {"layers": {"kernel": jnp.array([[[True, False]], [[True, True]]])}, "bias": None}
    rows = report(masks, {"layers": {"kernel": ("layers", "embed", "mlp")}, "bias": ("mlp",)})
    assert [(row.name, row.entries, row.kept) for row in rows] == [
        ("layers/kernel[0]", 2, 1),
        ("layers/kernel[1]", 2, 2),
    ]
    assert report_text(rows).splitlines()[-1].split() == ["all", "kept", "3", "of", "4", "sparsity", "0.2500"]
