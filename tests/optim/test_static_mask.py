"""Training under a fixed mask: nothing that an optimizer does reaches masked entries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.optim import adam, flora, fsam, ginger, learning_rate_of, static_mask, with_masks


def params(seed=0):
    rng = np.random.default_rng(seed)
    tree = {"adapter": {"kernel": rng.normal(size=(8, 12)), "bias": rng.normal(size=12)}, "head": rng.normal(size=12)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


MASK = np.random.default_rng(1).random((8, 12)) < 0.5
MASKS = {"adapter": {"kernel": jnp.asarray(MASK), "bias": None}, "head": None}


def loss(tree):
    hidden = jnp.tanh(jnp.ones(8) @ tree["adapter"]["kernel"] + tree["adapter"]["bias"])
    return jnp.sum((hidden * tree["head"] - 1.0) ** 2)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "momentum after clipping": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1e-2, momentum=0.9)),
    "fsam": lambda: fsam(adam(1e-2), sparsity=0.5),
    "flora": lambda: flora(1e-2, rank=2),
    "ginger": lambda: ginger(1e-3, rank=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_entries_stay_bit_for_bit_whatever_the_optimizer(name):
    optimizer = static_mask(OPTIMIZERS[name]())
    before = params()
    before["adapter"]["kernel"] = before["adapter"]["kernel"].at[0].set(-0.0)
    grad_fn = lambda tree, index=0: jax.grad(loss)(tree)
    state = with_masks(optimizer.init(before), MASKS)

    @jax.jit
    def update(carry, _):
        tree, state = carry
        extra = {"grad_fn": grad_fn, "curvature_grad_fn": grad_fn}
        updates, state = optimizer.update(grad_fn(tree), state, tree, **extra)
        return (optax.apply_updates(tree, updates), state), None

    (after, _), _ = jax.lax.scan(update, (before, state), None, 50)
    changed = np.asarray(after["adapter"]["kernel"] != before["adapter"]["kernel"])
    assert not changed[~MASK].any()
    assert changed[MASK].all()
    assert (after["adapter"]["bias"] != before["adapter"]["bias"]).all()
    assert (after["head"] != before["head"]).all()
    assert float(loss(after)) < float(loss(before))


def test_without_masks_it_is_the_base_optimizer_bit_for_bit():
    base, tree = optax.adamw(1e-2, weight_decay=0.1), params()
    optimizer, grads = static_mask(base), jax.grad(loss)(tree)
    expected, _ = base.update(grads, base.init(tree), tree)
    updates, _ = optimizer.update(grads, optimizer.init(tree), tree)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b), updates, expected))


def test_masks_take_one_bit_an_entry():
    state = static_mask(optax.sgd(0.1)).init(params())
    assert state.mask["adapter"]["kernel"].nbytes == 8 * 12 // 8
    assert state.mask["head"] is None


def test_masks_are_found_inside_other_transformations():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), static_mask(optax.sgd(0.1)))
    state = jax.jit(lambda tree: with_masks(optimizer.init(tree), MASKS))(params())
    updates, _ = optimizer.update(jax.grad(loss)(params()), state, params())
    assert not np.asarray(updates["adapter"]["kernel"])[~MASK].any()


def test_it_tells_the_learning_rate_of_its_base():
    optimizer = static_mask(adam(optax.linear_schedule(1.0, 0.0, 10)))
    assert float(learning_rate_of(optimizer, optimizer.init(params()))) == 1.0


@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="static_mask: pattern 'lora' matches no parameter; names look like 'adapter/b"):
        static_mask(optax.sgd(0.1), ["lora"]).init(params())
    with pytest.raises(UserError, match=r"one optim.static_mask\(...\) around it; there are 0"):
        with_masks(optax.sgd(0.1).init(params()), MASKS)
    wrong = {**MASKS, "head": jnp.ones(12, bool)}
    with pytest.raises(UserError, match="masks are of other parameters"):
        with_masks(static_mask(optax.sgd(0.1)).init(params()), wrong)
