"""Scores against finite differences and closed forms in float64, and against removing every entry in turn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.stats import spearmanr

from t5x_ext.compress import er, grasp, magnitude, map_selected, random, snip, synflow
from t5x_ext.contracts import UserError, path_predicate, select

WIDTH, BOTTLENECK, CLASSES = 16, 5, 3
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def adapter(width=WIDTH, bottleneck=BOTTLENECK, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return {
        "adapter": {
            "down": {"kernel": rng.normal(0, scale, (width, bottleneck)), "bias": np.zeros(bottleneck)},
            "up": {"kernel": rng.normal(0, scale, (bottleneck, width)), "bias": np.zeros(width)},
        },
        "head": {"kernel": rng.normal(0, 1, (width, CLASSES))},
    }


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


@jax.jit
def loss_fn(params, batch):
    """Mean cross-entropy of a head over a residual adapter; tanh, so that second derivatives are not zero."""
    down, up = params["adapter"]["down"], params["adapter"]["up"]
    hidden = jnp.tanh(batch["x"] @ down["kernel"] + down["bias"]) @ up["kernel"] + up["bias"]
    scores = (batch["x"] + hidden) @ params["head"]["kernel"]
    return -jnp.mean(jax.nn.log_softmax(scores)[jnp.arange(len(batch["y"])), batch["y"]])


def batches(count=3, rows=7, width=WIDTH, seed=1):
    rng = np.random.default_rng(seed)
    return [
        {"x": jnp.asarray(rng.normal(size=(rows, width))), "y": jnp.asarray(rng.integers(0, CLASSES, rows))}
        for _ in range(count)
    ]


def kernels(params):
    return select(params, path_predicate(r"adapter/.*/kernel$"))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def perturbed(params, number, step):
    """The parameters with one entry of the masked kernels (counted through both) changed by `step(value)`."""
    sizes = np.cumsum([0, params["adapter"]["down"]["kernel"].size])
    name = "up" if number >= sizes[1] else "down"
    kernel = np.array(params["adapter"][name]["kernel"])
    index = np.unravel_index(number - sizes[1] * (name == "up"), kernel.shape)
    kernel[index] += step(kernel[index])
    changed = {**params["adapter"], name: {**params["adapter"][name], "kernel": jnp.asarray(kernel)}}
    return {**params, "adapter": changed}


gradient = jax.jit(jax.grad(loss_fn))


def summed_gradient(params, data):
    return sum(flat(map_selected(lambda g: g, gradient(params, b), kernels(params))) for b in data)


def test_snip_is_the_derivative_by_a_mask_of_ones():
    params, data = on_device(adapter()), batches()

    def masked(masks):
        down, up = params["adapter"]["down"], params["adapter"]["up"]
        kept = {
            "down": {**down, "kernel": down["kernel"] * masks[0]},
            "up": {**up, "kernel": up["kernel"] * masks[1]},
        }
        return sum(loss_fn({**params, "adapter": kept}, b) for b in data)

    ones = (jnp.ones((WIDTH, BOTTLENECK)), jnp.ones((BOTTLENECK, WIDTH)))
    by_masks = flat(jax.jit(jax.grad(masked))(ones))
    scores = snip(loss_fn, params, kernels(params), data, KEY)
    np.testing.assert_allclose(flat(scores), np.abs(by_masks), rtol=1e-12)
    step = 1e-6
    for number in (0, 17, 81, 159):
        up, down = (
            sum(float(loss_fn(perturbed(params, number, lambda w, s=sign: s * step * w), b)) for b in data)
            for sign in (1, -1)
        )
        np.testing.assert_allclose(flat(scores)[number], abs(up - down) / (2 * step), rtol=1e-5, atol=1e-9)


def test_gradients_are_summed_before_the_absolute_value():
    """Two batches with opposite gradients say nothing together; each alone does."""
    loss = lambda params, batch: jnp.sum(params["w"] * batch["x"])
    params, one = {"w": jnp.array([1.0, 2.0])}, {"x": jnp.array([1.0, 1.0])}
    opposite = {"x": jnp.array([-1.0, 0.0])}
    scores = snip(loss, params, {"w": True}, [one, opposite], KEY)
    assert scores["w"].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("score", [snip, grasp])
def test_order_of_scores_ignores_scale_and_order_of_batches(score):
    params, data = on_device(adapter()), batches()
    reference = flat(score(loss_fn, params, kernels(params), data, KEY))
    scaled = score(lambda p, b: 7.5 * loss_fn(p, b), params, kernels(params), data, KEY)
    assert np.array_equal(np.argsort(flat(scaled)), np.argsort(reference))
    np.testing.assert_allclose(flat(score(loss_fn, params, kernels(params), data[::-1], KEY)), reference, rtol=1e-9)


def test_grasp_of_a_quadratic_is_its_closed_form():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    a, b, w = root @ root.T, rng.normal(size=6), rng.normal(size=6)
    loss = lambda params, batch: 0.5 * params["w"] @ batch["a"] @ params["w"] - batch["b"] @ params["w"]
    scores = grasp(loss, {"w": jnp.asarray(w)}, {"w": True}, [{"a": jnp.asarray(a), "b": jnp.asarray(b)}], KEY)
    np.testing.assert_allclose(scores["w"], w * (a @ (a @ w - b)), rtol=1e-12)


def test_grasp_is_the_change_of_the_gradient_norm():
    params, data = on_device(adapter()), batches()
    scores = flat(grasp(loss_fn, params, kernels(params), data, KEY))
    step = 1e-6
    for number in (3, 40, 95, 150):
        less, more = (
            np.sum(summed_gradient(perturbed(params, number, lambda w, s=sign: s * step * w), data) ** 2)
            for sign in (-1, 1)
        )
        change = (less - more) / (2 * step)
        np.testing.assert_allclose(change, -2 * scores[number], rtol=1e-5, atol=1e-8)


def test_snip_orders_removals_as_the_loss_does():
    """A 12-entry adapter: every entry is removed in turn."""
    params = on_device(adapter(3, 2, seed=4, scale=0.05))
    data = batches(1, 9, width=3)
    scores = flat(snip(loss_fn, params, kernels(params), data, KEY))
    assert scores.size == 12
    before = float(loss_fn(params, data[0]))
    changes = [abs(float(loss_fn(perturbed(params, i, lambda w: -w), data[0])) - before) for i in range(12)]
    first_order = np.abs(summed_gradient(params, data) * flat(map_selected(lambda w: w, params, kernels(params))))
    assert np.array_equal(np.argsort(scores), np.argsort(first_order))
    assert spearmanr(scores, changes).statistic > 0.9


def test_synflow_is_what_differentiating_the_flow_gives():
    params = on_device(adapter())
    scores = synflow(loss_fn, params, kernels(params), [], KEY)
    down, up = (params["adapter"][name]["kernel"] for name in ("down", "up"))

    @jax.jit
    def mean_output(down, up):
        return jnp.mean(jax.nn.relu(jnp.ones(WIDTH) @ jnp.abs(down)) @ jnp.abs(up))

    for name, weight, gradient in zip(("down", "up"), (down, up), jax.grad(mean_output, (0, 1))(down, up), strict=True):
        np.testing.assert_allclose(scores["adapter"][name]["kernel"], jnp.abs(weight * gradient), rtol=1e-12)
    assert scores["head"]["kernel"] is None


def test_synflow_conserves_flow_in_each_layer_and_at_the_bottleneck(no_loss):
    """What a bottleneck unit receives it hands on; chains of stacked layers do not mix."""
    rng = np.random.default_rng(0)
    down, up = rng.normal(size=(4, 6, 3)), rng.normal(size=(4, 3, 2, 5))
    params = on_device({"layers": {"down": {"kernel": down}, "up": {"kernel": up}}})
    selected = jax.tree.map(lambda _: True, params)
    scores = synflow(no_loss, params, selected, [], KEY)["layers"]
    into, out = scores["down"]["kernel"].sum(1), scores["up"]["kernel"].sum((2, 3))
    np.testing.assert_allclose(into, out, rtol=1e-12)
    first = on_device({"down": {"kernel": down[1]}, "up": {"kernel": up[1]}})
    alone = synflow(no_loss, first, jax.tree.map(lambda _: True, first), [], KEY)
    np.testing.assert_allclose(alone["up"]["kernel"], scores["up"]["kernel"][1], rtol=1e-12)


def test_synflow_counts_removed_entries_as_zero(no_loss):
    params = on_device({"down": {"kernel": np.ones((2, 2))}, "up": {"kernel": np.ones((2, 1))}})
    live = {"down": {"kernel": jnp.array([[True, False], [True, True]])}, "up": {"kernel": jnp.ones((2, 1), bool)}}
    scores = synflow(no_loss, params, live, [], KEY)
    assert scores["down"]["kernel"].tolist() == [[1, 0], [1, 1]]
    assert scores["up"]["kernel"].tolist() == [[2], [1]]


def test_random_depends_on_the_key_alone(no_loss):
    params = on_device(adapter())
    one, same, other = (random(no_loss, params, kernels(params), [], jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(flat(one), flat(same))
    assert not np.array_equal(flat(one), flat(other))
    assert np.array_equal(flat(er(no_loss, params, kernels(params), [], jax.random.key(0))), flat(one))
    assert er.scope == "er"


def test_magnitude(no_loss):
    params = on_device(adapter())
    scores = magnitude(no_loss, params, kernels(params), [], KEY)
    assert np.array_equal(scores["adapter"]["up"]["kernel"], np.abs(params["adapter"]["up"]["kernel"]))
    assert scores["adapter"]["up"]["bias"] is None


@pytest.mark.parametrize("score", [snip, grasp, synflow])
def test_zero_factors_are_refused_with_the_reason(score):
    params = adapter()
    params["adapter"]["up"]["kernel"][:] = 0
    with pytest.raises(UserError, match=r"every score of adapter/(up|down)/kernel is 0 .* normal\(0.02\)"):
        score(loss_fn, on_device(params), kernels(params), batches(), KEY)


def test_mistakes_are_one_line():
    params = on_device(adapter())
    nothing = jax.tree.map(lambda _: False, params)
    with pytest.raises(UserError, match="snip: no parameter is selected"):
        snip(loss_fn, params, nothing, batches(), KEY)
    with pytest.raises(UserError, match="grasp scores by gradients and got no calibration batch"):
        grasp(loss_fn, params, kernels(params), [], KEY)
    with pytest.raises(UserError, match="snip: a score of adapter/down/kernel is not finite"):
        snip(lambda p, b: loss_fn(p, b) * jnp.nan, params, kernels(params), batches(), KEY)
    with pytest.raises(UserError, match="synflow: head/kernel is selected and in no chain"):
        synflow(loss_fn, params, select(params, path_predicate("kernel$")), [], KEY)


def test_a_partial_passes_its_arrays_as_arguments():
    params, data = on_device(adapter()), batches()
    head = params.pop("head")
    loss = Partial(lambda head, params, batch: loss_fn({**params, "head": head}, batch), head)
    scores = snip(loss, params, kernels(params), data, KEY)
    whole = {**params, "head": head}
    expected = snip(loss_fn, whole, kernels(whole), data, KEY)
    np.testing.assert_allclose(flat(scores), flat(expected), rtol=1e-12)


def test_low_precision_parameters_are_scored_in_float32():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), adapter())
    data = [{"x": b["x"].astype(jnp.bfloat16), "y": b["y"]} for b in batches()]
    scores = snip(loss_fn, params, kernels(params), data, KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(scores)} == {jnp.dtype(jnp.float32)}
