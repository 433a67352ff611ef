from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from t5x_ext.contracts import Batch, Context, Loss, UserError
from t5x_ext.objectives.packed import single_examples
from t5x_ext.optim import adam, flora, flora_accumulator, fsam, ginger, mean_accumulator, sam
from t5x_ext.train.curvature import _sample
from t5x_ext.train.microbatches import split_rows
from t5x_ext.train.state import create_state
from t5x_ext.train.step import accepted_arguments, make_train_step

ROWS, LENGTH, DIM, VOCAB = 8, 6, 5, 7


class LinearTagger:
    """A log-linear model of labels given inputs: convex, so that its gradients have closed forms."""

    def __init__(self, noise: float = 0.0):
        self.noise = noise

    def logits(self, params: Any, batch: Batch, context: Context) -> jax.Array:
        inputs = batch["target_inputs"]
        if context.rngs is not None and self.noise:
            inputs = inputs + self.noise * jax.random.normal(context.rngs["dropout"], inputs.shape)
        return inputs @ params["kernel"]

    def labels(self, batch: Batch) -> jax.Array:
        return batch["target_labels"]

    def single_examples(self, batch: Batch, count: int) -> Any:
        return single_examples(batch, count, batch["target_segment_ids"])

    def label_weights(self, batch: Batch, context=None) -> jax.Array:
        return (batch["target_segment_ids"] > 0).astype(jnp.float32)

    def __call__(self, params: Any, batch: Batch, context: Context) -> Loss:
        log_probs = jax.nn.log_softmax(self.logits(params, batch, context))
        picked = jnp.take_along_axis(log_probs, batch["target_labels"][..., None], axis=-1)[..., 0]
        weights = self.label_weights(batch)
        return Loss(-jnp.sum(picked * weights), jnp.sum(weights), {"accuracy": (jnp.zeros(()), jnp.ones(()))})


@pytest.fixture
def batch() -> Any:
    random = np.random.default_rng(0)
    lengths = random.integers(1, LENGTH + 1, ROWS)
    return {
        "target_inputs": random.normal(size=(ROWS, LENGTH, DIM)).astype(np.float32),
        "target_labels": random.integers(0, VOCAB, (ROWS, LENGTH)),
        "target_segment_ids": (np.arange(LENGTH) < lengths[:, None]).astype(np.int32),
    }


@pytest.fixture
def params() -> Any:
    return {"kernel": np.random.default_rng(1).normal(size=(DIM, VOCAB)).astype(np.float32)}


def float64_gradient(params: Any, batch: Any) -> tuple[float, np.ndarray]:
    """Mean loss over labels and its gradient, by hand."""
    x = batch["target_inputs"].astype(np.float64)
    logits = x @ params["kernel"].astype(np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    one_hot = np.eye(VOCAB)[batch["target_labels"]]
    weights = (batch["target_segment_ids"] > 0)[..., None]
    loss = -(np.log(probabilities) * one_hot * weights).sum() / weights.sum()
    return loss, np.einsum("bld,blv->dv", x, (probabilities - one_hot) * weights) / weights.sum()


def run_step(params: Any, batch: Any, optimizer: Any, noise: float = 0.0, **options: Any) -> Any:
    step = make_train_step(LinearTagger(noise), optimizer, mean_accumulator(), seed=3, **options)
    state = create_state(params, optimizer, with_ema="ema_decay" in options)
    return jax.jit(step)(state, {}, batch)


@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8])
def test_gradient_is_the_mean_over_labels_for_any_number_of_microbatches(params, batch, num_microbatches):
    state, metrics = run_step(params, batch, optax.sgd(1.0), num_microbatches=num_microbatches)
    loss, gradient = float64_gradient(params, batch)
    np.testing.assert_allclose(params["kernel"] - state.params["kernel"], gradient, atol=2e-6)
    np.testing.assert_allclose(metrics.loss.sum / metrics.loss.weight, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.gradient_norm, np.linalg.norm(gradient), rtol=1e-5)
    assert metrics.loss.weight == (batch["target_segment_ids"] > 0).sum()
    assert state.step == 1


def test_rows_of_a_microbatch_are_spread_over_the_batch():
    pieces = split_rows({"x": np.arange(8)}, 4)
    np.testing.assert_array_equal(pieces["x"], [[0, 4], [1, 5], [2, 6], [3, 7]])
    with pytest.raises(ValueError, match="do not divide"):
        split_rows({"x": np.arange(8)}, 3)


def test_second_gradient_uses_the_same_rows_and_random_keys(params, batch):
    """At the weights of the first pass, what an optimizer pulls is what it was given; other noise would be 0.1 away."""

    def update(grads: Any, state: Any, params: Any, *, grad_fn: Any) -> Any:
        again = grad_fn(params, 0)
        return grads, jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), grads, again)

    probe = optax.GradientTransformationExtraArgs(lambda params: jax.tree.map(lambda _: jnp.ones(()), params), update)
    state, _ = run_step(params, batch, probe, noise=0.5, num_microbatches=2)
    assert state.optimizer_state["kernel"] < 1e-7


def test_sharpness_aware_minimization_of_optax_runs_and_matches_its_definition(params, batch):
    """optax.contrib.sam refuses keywords it does not know; one step must equal the two-gradient formula."""
    rho, rate = 0.1, 0.5
    optimizer = optax.contrib.sam(
        optax.sgd(rate), optax.chain(optax.contrib.normalize(), optax.sgd(rho)), sync_period=2, opaque_mode=True
    )
    state, _ = run_step(params, batch, optimizer)
    _, first = float64_gradient(params, batch)
    _, second = float64_gradient({"kernel": params["kernel"] + rho * first / np.linalg.norm(first)}, batch)
    np.testing.assert_allclose(state.params["kernel"], params["kernel"] - rate * second, atol=3e-6)


def test_only_accepted_arguments_are_offered():
    offered = {"grad_fn": 1, "curvature_grad_fn": 2}
    assert accepted_arguments(lambda grads, state, params=None: None, offered) == {}
    assert accepted_arguments(lambda grads, state, params, *, grad_fn: None, offered) == {"grad_fn": 1}
    assert accepted_arguments(lambda grads, state, **extra: None, offered) == offered


def test_curvature_gradient_squares_to_the_gauss_newton_matrix(params, batch):
    """E[g g^T] over sampled labels is the mean over labels of (diag p - p p^T) x x^T: Monte Carlo against the sum."""
    collected = []

    def update(grads: Any, state: Any, params: Any, *, curvature_grad_fn: Any) -> Any:
        return curvature_grad_fn(params), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    step = jax.jit(make_train_step(LinearTagger(), optimizer, mean_accumulator(), seed=0, num_microbatches=2))
    state = create_state(jax.tree.map(jnp.asarray, params), optimizer, with_ema=False)
    for draw in range(3000):
        moved, _ = step(state._replace(step=jnp.asarray(draw, jnp.int32)), {}, batch)
        collected.append(np.asarray(moved.params["kernel"] - state.params["kernel"]).ravel())
    estimate = np.mean([np.outer(g, g) for g in collected], axis=0)

    x = batch["target_inputs"].astype(np.float64)
    probabilities = np.asarray(jax.nn.softmax(x @ params["kernel"]))
    weights = (batch["target_segment_ids"] > 0).astype(float)
    hessian = np.einsum("blv,vw->blvw", probabilities, np.eye(VOCAB)) - np.einsum(
        "blv,blw->blvw", probabilities, probabilities
    )
    exact = np.einsum("bl,bli,blj,blvw->ivjw", weights, x, x, hessian).reshape(DIM * VOCAB, DIM * VOCAB)
    exact /= weights.sum()
    assert np.linalg.norm(estimate - exact) < 0.12 * np.linalg.norm(exact)
    assert abs(np.trace(estimate) / np.trace(exact) - 1) < 0.02


def pulled(name: str, params: Any, batch: Any, objective: Any = None, step: int = 0, **options: Any) -> Any:
    """What the step's callable of this name gives at its parameters."""

    def update(grads: Any, state: Any, params: Any, **offered: Any) -> Any:
        return jax.tree.map(jnp.subtract, offered[name](params), params), state

    probe = optax.GradientTransformationExtraArgs(lambda params: (), update)
    run = make_train_step(objective or LinearTagger(), probe, mean_accumulator(), seed=0, **options)
    state = create_state(jax.tree.map(jnp.asarray, params), probe, with_ema=False)
    return jax.jit(run)(state._replace(step=jnp.int32(step)), {}, batch)[0].params["kernel"]


def test_labels_are_drawn_from_the_model_s_distribution():
    """Chi-square of 40,000 labels. Where all scores are those of a bias, the gradient tells the counts."""
    vocab, rows, length = 300, 20, 2000  # no multiple of the groups that the vocabulary is cut into
    scores = np.random.default_rng(0).normal(size=vocab) * 2
    scores[[3, 299]] = -1e9
    probabilities = np.exp(scores) / np.exp(scores).sum()
    ones = np.ones((rows, length), np.int32)
    batch = {"target_inputs": ones[..., None].astype(np.float32), "target_labels": ones, "target_segment_ids": ones}
    # Parameters of zero, so that taking their update for the gradient rounds nothing.
    objective = LinearTagger()
    objective.logits = lambda params, batch, context: batch["target_inputs"] @ params["kernel"] + jnp.float32(scores)
    gradient = np.asarray(pulled("curvature_grad_fn", {"kernel": jnp.zeros((1, vocab))}, batch, objective), np.float64)
    drawn = rows * length
    counts = drawn * probabilities - np.sqrt(drawn) * gradient[0]
    np.testing.assert_allclose(counts, np.round(counts), atol=0.1)
    assert np.round(counts).sum() == drawn
    assert not np.round(counts[[3, 299]]).any()
    expected = drawn * probabilities
    often = expected >= 5
    bins = lambda values: np.append(values[often], values[~often].sum())
    chi_square = np.sum((bins(counts) - bins(expected)) ** 2 / bins(expected))
    assert abs(chi_square - often.sum()) < 3 * np.sqrt(2 * often.sum())


def test_a_label_never_has_probability_zero_and_the_tail_is_reached():
    """The least and the largest uniform number, at one label alone and at labels of probability 1e-9."""
    largest = 1 - 2.0**-24
    for alone in (0, 130, 255, 511):
        weights = (np.arange(512) == alone).astype(np.float32)
        for uniform in (0.0, largest):
            assert _sample(weights, np.full(2, uniform, np.float32)) == alone
    # A label each in the first and the last group beside one that takes nearly all of both.
    weights = np.zeros(512, np.float32)
    weights[[0, 1, 510, 511]] = [1e-9, 0.5, 0.5, 1e-9]
    drawn = [int(_sample(weights, np.float32([u, v]))) for u in (0.0, largest) for v in (0.0, 1e-8, largest)]
    assert drawn == [0, 1, 1, 510, 510, 510]


def test_sampled_labels_do_not_depend_on_microbatches(params, batch):
    whole, pieces = (pulled("curvature_grad_fn", params, batch, num_microbatches=n) for n in (1, 4))
    np.testing.assert_allclose(pieces, whole, atol=2e-6)


@pytest.fixture
def packed(batch: Any) -> Any:
    """Rows of none, one, two or three examples."""
    segments = np.array([[1, 1, 2, 2, 2, 0], [0] * 6, [1] * 6, [1, 2, 2, 3, 3, 3]] * 2, np.int32)
    return batch | {"target_segment_ids": segments}


def squared_gradients(params: Any, batch: Any) -> np.ndarray:
    """Of the log-likelihood of every example, [examples, DIM, VOCAB], row by row, in float64."""
    segments = batch["target_segment_ids"]
    examples = [segments[row] == i for row in range(ROWS) for i in range(1, segments[row].max() + 1)]
    rows = [row for row in range(ROWS) for _ in range(segments[row].max())]
    squares = []
    for row, kept in zip(rows, examples, strict=True):
        alone = {name: value[row : row + 1] for name, value in batch.items()} | {"target_segment_ids": kept[None]}
        squares.append((kept.sum() * float64_gradient(params, alone)[1]) ** 2)
    return np.stack(squares)


@pytest.mark.parametrize("count", [5, 20])
def test_fisher_is_the_mean_of_squares_over_single_examples(params, packed, count):
    squares = squared_gradients(params, packed)
    assert len(squares) == 12
    taken = np.arange(min(count, 12)) * 12 // min(count, 12)
    fisher = pulled("fisher_fn", params, packed, num_microbatches=2, fisher_examples=count)
    np.testing.assert_allclose(fisher, squares[taken].mean(axis=0), rtol=1e-4, atol=1e-6)


def test_fisher_of_an_empty_batch_is_zero(params, packed):
    empty = packed | {"target_segment_ids": np.zeros_like(packed["target_segment_ids"])}
    np.testing.assert_allclose(pulled("fisher_fn", params, empty), 0.0, atol=1e-6)


def test_fisher_is_computed_only_when_a_mask_is_refreshed(params, packed):
    """Four updates with a mask every third: two times three examples, each a batch of a single row."""
    rows = []

    class Watched(LinearTagger):
        def logits(self, params: Any, batch: Any, context: Context) -> jax.Array:
            jax.debug.callback(lambda size: rows.append(int(size)), batch["target_inputs"].shape[0])
            return super().logits(params, batch, context)

    optimizer = fsam(optax.sgd(0.1), fisher="per_example", sparsity=0.5, mask_update_interval=3)
    step = jax.jit(make_train_step(Watched(), optimizer, mean_accumulator(), seed=0, fisher_examples=3))
    state = create_state(jax.tree.map(jnp.asarray, params), optimizer, with_ema=False)
    for _ in range(4):
        state, _ = step(state, {}, packed)
    jax.effects_barrier()
    assert rows.count(1) == 2 * 3
    assert rows.count(ROWS) == 4 * 2


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_an_update_that_is_not_finite_changes_nothing_but_the_counter(params, batch, poison):
    optimizer = optax.adam(0.1)
    bad = dict(batch)
    if poison == "loss":
        bad["target_inputs"] = np.where(np.arange(DIM) == 0, np.nan, batch["target_inputs"]).astype(np.float32)
    else:
        bad["target_inputs"] = (batch["target_inputs"] * 1e38).astype(np.float32)
    state, metrics = run_step(params, bad, optimizer, ema_decay=0.9)
    before = create_state(params, optimizer, with_ema=True)
    assert not metrics.finite
    assert state.step == 1
    jax.tree.map(np.testing.assert_array_equal, state._replace(step=before.step), before)


def test_a_second_gradient_that_is_not_finite_changes_nothing_but_the_counter(params, batch):
    """A loss that is finite where the weights are, and NaN wherever SAM moves them."""

    class Cliff(LinearTagger):
        def __call__(self, at: Any, batch: Batch, context: Context) -> Loss:
            loss = super().__call__(at, batch, context)
            moved = jnp.any(at["kernel"] != params["kernel"])
            return loss._replace(sum=loss.sum * jnp.where(moved, jnp.nan, 1.0))

    optimizer = sam(adam(0.1))
    step = jax.jit(make_train_step(Cliff(), optimizer, mean_accumulator(), seed=0, ema_decay=0.9))
    before = create_state(params, optimizer, with_ema=True)
    state, metrics = step(before, {}, batch)
    assert np.isfinite(metrics.loss.sum)
    assert np.isfinite(metrics.gradient_norm)
    assert not metrics.finite
    assert state.step == 1
    jax.tree.map(np.testing.assert_array_equal, state._replace(step=before.step), before)


def test_moving_average_follows_its_recursion(params, batch):
    optimizer = optax.sgd(0.5)
    step = jax.jit(make_train_step(LinearTagger(), optimizer, mean_accumulator(), seed=0, ema_decay=0.75))
    state = create_state(params, optimizer, with_ema=True)
    average = params["kernel"].astype(np.float64)
    for _ in range(5):
        state, _ = step(state, {}, batch)
        average = 0.75 * average + 0.25 * np.asarray(state.params["kernel"], np.float64)
    np.testing.assert_allclose(state.ema["kernel"], average, atol=1e-6)
    np.testing.assert_array_equal(state.evaluation_params["kernel"], state.ema["kernel"])


# --- Optimizers that call for gradients, and accumulators ------------------------------------------------------------

_SGD = optax.sgd(0.1, momentum=0.9)
_MASKED: dict[str, Any] = {"sparsity": 0.5, "mask_update_interval": 2}
METHODS = {
    "sam": lambda rho: (sam(_SGD, rho), mean_accumulator()),
    "fsam": lambda rho: (fsam(_SGD, rho, **_MASKED), mean_accumulator()),
    "fsam_per_example": lambda rho: (fsam(_SGD, rho, fisher="per_example", **_MASKED), mean_accumulator()),
    "flora": lambda rho: (flora(0.1, 2, 0.5, 2, min_dim_size_to_compress=4), mean_accumulator()),
    "flora_accumulator": lambda rho: (_SGD, flora_accumulator(2, min_dim_size_to_compress=4)),
    "ginger": lambda rho: (ginger(0.1, 2, damping=0.1, curvature_every=2), mean_accumulator()),
}
STEPS = 4


def new_step(name: str, rho: float = 0.1, noise: float = 0.0, num_microbatches: int = 4) -> Any:
    optimizer, accumulator = METHODS[name](rho)
    step = make_train_step(
        LinearTagger(noise), optimizer, accumulator, seed=0, num_microbatches=num_microbatches, ema_decay=0.5,
        fisher_examples=5,
    )  # fmt: skip
    return optimizer, jax.jit(step)


compiled_step = cache(new_step)


def run_steps(step: Any, state: Any, batch: Any, steps: int) -> Any:
    """Every step has rows of its own: those of the batch, turned."""
    for _ in range(steps):
        turned = {name: np.roll(values, int(state.step), axis=0) for name, values in batch.items()}
        state, metrics = step(state, {}, turned)
        assert metrics.finite
    return state


def begin_with(optimizer: Any, params: Any) -> Any:
    return create_state(jax.tree.map(jnp.asarray, params), optimizer, with_ema=True)


@pytest.mark.parametrize("name", METHODS)
def test_four_microbatches_train_as_one(params, packed, name):
    optimizer, step = compiled_step(name)
    _, whole_step = new_step(name, num_microbatches=1)
    pieces, whole = (run_steps(s, begin_with(optimizer, params), packed, STEPS) for s in (step, whole_step))
    assert np.abs(np.asarray(pieces.params["kernel"] - params["kernel"])).max() > 1e-3
    np.testing.assert_allclose(whole.params["kernel"], pieces.params["kernel"], atol=2e-5)
    np.testing.assert_allclose(whole.ema["kernel"], pieces.ema["kernel"], atol=2e-5)


@pytest.mark.parametrize("name", ["fsam_per_example", "flora", "ginger"])
def test_a_state_is_all_that_a_run_needs_to_go_on(params, packed, name):
    """Bit for bit: four updates, or three and then one by a step that is built anew; masks last for two."""
    optimizer, step = compiled_step(name)
    expected = run_steps(step, begin_with(optimizer, params), packed, STEPS)
    interrupted = jax.device_get(run_steps(step, begin_with(optimizer, params), packed, STEPS - 1))
    resumed = run_steps(new_step(name)[1], interrupted, packed, 1)
    data = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(data(a), data(b)), resumed, expected)


@pytest.mark.parametrize("name", ["sam", "fsam_per_example"])
def test_a_step_uphill_of_length_zero_leaves_the_base_optimizer(params, packed, name):
    """With noise: the second gradient must be of the same random numbers, microbatch by microbatch."""
    optimizer, step = new_step(name, rho=0.0, noise=0.5)
    state = run_steps(step, begin_with(optimizer, params), packed, 2)
    base = make_train_step(LinearTagger(0.5), _SGD, mean_accumulator(), seed=0, num_microbatches=4, ema_decay=0.5)
    expected = run_steps(jax.jit(base), begin_with(_SGD, params), packed, 2)
    np.testing.assert_allclose(state.params["kernel"], expected.params["kernel"], atol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: optax.MultiSteps(inner, 2).gradient_transformation(),
        lambda inner: optax.chain(optax.MultiSteps(inner, 2).gradient_transformation()),
    ],
)
@pytest.mark.parametrize("inner", [sam(optax.sgd(0.1)), ginger(0.1, damping=0.1)])
def test_multi_steps_around_what_pulls_gradients_is_refused(params, packed, wrap, inner):
    with pytest.raises(UserError, match=r"cannot be inside optax.MultiSteps: .*; set Run.num_microbatches instead"):
        run_step(params, packed, wrap(inner))


def test_multi_steps_around_other_things_is_no_concern(params, packed):
    state, _ = run_step(params, packed, sam(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()))
    assert state.step == 1
