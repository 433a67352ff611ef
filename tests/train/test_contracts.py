"""What an objective may have beside its value: totals over the whole batch, state of its own; and what a step tells."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_ext.contracts import Context, Loss
from t5x_ext.optim import adam, flora, learning_rate_of, linear_decay, mean_accumulator, sam
from t5x_ext.train.state import create_state
from t5x_ext.train.step import make_evaluation_step, make_train_step

ROWS = 8


def batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "x": random.normal(size=(ROWS, 3)).astype(np.float32),
        "first": (np.arange(ROWS) < 5).astype(np.float32),
        "second": (np.arange(ROWS) % 3 == 0).astype(np.float32),
    }


class TwoMeans:
    """The sum of two means over different rows."""

    def totals(self, batch, context):
        return {name: jnp.sum(batch[name]) for name in ("first", "second")}

    def __call__(self, params, batch, context):
        values = (batch["x"] @ params["w"]) ** 2
        weight = jnp.sum(batch["first"])
        parts = [jnp.sum(values * batch["first"]), jnp.sum(values**2 * batch["second"])]
        totals = context.totals
        return Loss(parts[0] + totals["first"] / totals["second"] * parts[1], weight, {})


def stepped(objective, optimizer, num_microbatches=1, steps=1, params=None, **options) -> Any:
    params = {"w": jnp.array([0.5, -1.0, 0.25])} if params is None else params
    step = jax.jit(make_train_step(objective, optimizer, mean_accumulator(), seed=0, num_microbatches=num_microbatches))
    state = create_state(params, optimizer, with_ema=False, **options)
    for _ in range(steps):
        state, metrics = step(state, {}, batch())
    return state, metrics


@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8])
def test_a_sum_of_means_is_exact_under_microbatches(num_microbatches):
    """Against the closed form in float64."""
    data = {name: values.astype(np.float64) for name, values in batch().items()}
    w = np.array([0.5, -1.0, 0.25])
    score = data["x"] @ w
    one = (2 * score * data["first"]) @ data["x"] / data["first"].sum()
    two = (4 * score**3 * data["second"]) @ data["x"] / data["second"].sum()
    state, metrics = stepped(TwoMeans(), optax.sgd(1.0), num_microbatches)
    np.testing.assert_allclose(w - np.asarray(state.params["w"]), one + two, rtol=2e-5)
    mean = (score**2 * data["first"]).sum() / data["first"].sum() + (score**4 * data["second"]).sum() / data[
        "second"
    ].sum()
    np.testing.assert_allclose(metrics.loss.sum / metrics.loss.weight, mean, rtol=1e-5)


def test_evaluation_has_totals_and_the_true_step():
    class Told(TwoMeans):
        def __call__(self, params, batch, context):
            assert not context.train
            loss = super().__call__(params, batch, context)
            return loss._replace(metrics={"step": (context.step * 1.0, 1.0)})

    loss = make_evaluation_step(Told())({"w": jnp.ones(3)}, {}, (), 7, batch())
    assert float(loss.metrics["step"][0]) == 7


class Queue:
    """Keeps the last four scores, row by row, and counts the updates."""

    def init_mutable(self, params):
        return {"queue": jnp.zeros(4), "seen": jnp.zeros((), jnp.int32)}

    def __call__(self, params, batch, context: Context):
        scores = batch["x"] @ params["w"]
        queue = jnp.concatenate([context.mutable["queue"], scores])[-4:]
        mutable = {"queue": queue, "seen": context.mutable["seen"] + len(scores)}
        return Loss(jnp.sum(scores), jnp.float32(len(scores)), {}, mutable)


def test_state_of_an_objective_goes_through_microbatches_and_updates():
    """Row r is in microbatch r mod 4: the last one holds rows 3 and 7, the one before rows 2 and 6."""
    objective, start = Queue(), {"w": jnp.array([0.5, -1.0, 0.25])}
    state, metrics = stepped(objective, optax.sgd(0.0), 4, mutable=objective.init_mutable(start))
    scores = batch()["x"] @ np.asarray(start["w"])
    np.testing.assert_allclose(state.mutable["queue"], scores[[2, 6, 3, 7]], rtol=1e-5)
    assert state.mutable["seen"] == ROWS
    assert metrics.loss.mutable == ()
    state, _ = stepped(objective, optax.sgd(0.0), 4, steps=3, mutable=objective.init_mutable(start))
    assert state.mutable["seen"] == 3 * ROWS


def test_a_skipped_update_keeps_the_state_of_the_objective():
    class Bad(Queue):
        def __call__(self, params, batch, context):
            return super().__call__(params, batch, context)._replace(sum=jnp.nan * jnp.sum(params["w"]))

    start = Bad().init_mutable({})
    state, metrics = stepped(Bad(), optax.sgd(0.1), mutable=start)
    assert not metrics.finite
    jax.tree.map(np.testing.assert_array_equal, state.mutable, start)


class Counted(NamedTuple):
    """State of an optimizer that tells something."""

    updates: jax.Array

    @property
    def metrics(self):
        return {"told": self.updates}


def test_a_step_tells_learning_rate_update_norm_and_what_optimizers_report():
    schedule = linear_decay(0.1, warmup_steps=2, total_steps=10)
    counting = optax.GradientTransformation(
        lambda params: Counted(jnp.zeros(())), lambda updates, state, params=None: (updates, Counted(state.updates + 1))
    )
    plain = adam(schedule)
    optimizer = type(plain)(*optax.chain(plain, counting))
    optimizer.schedule = plain.schedule
    before, _ = stepped(TwoMeans(), optimizer, steps=2)
    after, metrics = stepped(TwoMeans(), optimizer, steps=3)
    moved = np.asarray(after.params["w"]) - np.asarray(before.params["w"])
    assert float(metrics.extra["learning_rate"]) == pytest.approx(float(schedule(2)))
    assert float(metrics.extra["update_norm"]) == pytest.approx(np.linalg.norm(moved), rel=1e-4)
    assert float(metrics.extra["told"]) == 3


@pytest.mark.parametrize("count", [0, 3])
def test_the_learning_rate_of_any_optimizer_that_tells(count):
    schedule = linear_decay(0.1, warmup_steps=2, total_steps=10)
    params = {"w": jnp.ones((4, 4))}
    for optimizer in (adam(schedule), sam(adam(schedule)), flora(schedule, 2, min_dim_size_to_compress=2)):
        state = optimizer.init(params)
        for _ in range(count):
            grads = jax.tree.map(jnp.ones_like, params)
            extra = {"grad_fn": lambda params, index=0: params} if isinstance(optimizer.schedule, object) else {}
            try:
                _, state = optimizer.update(grads, state, params, **extra)
            except TypeError:
                _, state = optimizer.update(grads, state, params)
        assert float(learning_rate_of(optimizer, state)) == pytest.approx(float(schedule(count)))
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    assert float(learning_rate_of(injected, injected.init(params))) == 0.25
    assert learning_rate_of(adam(0.125), ()) == 0.125
    assert learning_rate_of(optax.sgd(schedule), optax.sgd(schedule).init(params)) is None
