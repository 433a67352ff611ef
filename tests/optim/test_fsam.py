"""SAM and FSAM against the float64 formulas of the papers, closed forms, `optax.contrib.sam` and the base optimizer."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ext.contracts import UserError, path_predicate
from t5x_ext.optim import adam, fsam, sam
from t5x_ext.optim.bits import unpack
from t5x_ext.parallel import state_shardings

RHO = 0.05
SIZES = {"embedding": (1, 6), "layer": {"bias": (5,), "kernel": (6, 5)}}
NAMES = ["embedding", "layer/bias", "layer/kernel"]


# --- Softmax regression with an offset of the input, gradients by hand in float64 -------------------------------------


def start(seed=0):
    random = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)
    return jax.tree.map(lambda shape: random.normal(size=shape).astype(np.float32) / 2, SIZES, is_leaf=is_shape)


def data(step, rows=7):
    random = np.random.default_rng(100 + step)
    return random.normal(size=(rows, 6)).astype(np.float32), random.integers(0, 5, rows)


def loss(params, inputs, labels):
    logits = (inputs + params["embedding"]) @ params["layer"]["kernel"] + params["layer"]["bias"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(labels.size), labels])


def example_gradients(params, inputs, labels):
    """By hand, float64: for each leaf an array with the examples in front."""
    embedding, bias, kernel = (np.float64(leaf) for leaf in jax.tree.leaves(params))
    x = inputs + embedding
    logits = x @ kernel + bias
    delta = np.exp(logits - logits.max(1, keepdims=True))
    delta /= delta.sum(1, keepdims=True)
    delta[np.arange(labels.size), labels] -= 1
    return [(delta @ kernel.T)[:, None], delta, x[:, :, None] * delta[:, None]]


def masked_entries(scores, maskable, k):
    """Masks of the k largest scores over maskable leaves; the first of equals."""
    parts = [score.ravel() if chosen else np.full(score.size, -1.0) for score, chosen in zip(scores, maskable)]
    best = np.argsort(-np.concatenate(parts), kind="stable")[:k]
    flat = np.zeros(sum(part.size for part in parts), bool)
    flat[best] = True
    pieces = np.split(flat, np.cumsum([part.size for part in parts])[:-1])
    return [piece.reshape(score.shape) for piece, score in zip(pieces, scores)]


def reference(steps, *, k, interval, maskable, dense, fisher, normalize, rate=0.3, momentum=0.9):
    """FSAM over SGD with momentum as the page writes it, float64: parameters and masks after each step."""
    params = [np.float64(leaf) for leaf in jax.tree.leaves(start())]
    trace = [np.zeros_like(leaf) for leaf in params]
    for step in range(steps):
        structured = jax.tree.unflatten(jax.tree.structure(start()), params)
        each = example_gradients(structured, *data(step))
        grads = [leaf.mean(0) for leaf in each]
        if step % interval == 0:
            scores = [(leaf**2).mean(0) for leaf in each] if fisher == "per_example" else [g**2 for g in grads]
            mask = masked_entries(scores, maskable, k)
        moved = [m if chosen else np.full(m.shape, dense) for m, chosen in zip(mask, maskable)]
        full = np.sqrt(sum(np.sum(g**2) for g in grads))
        part = np.sqrt(sum(np.sum((g * m) ** 2) for g, m in zip(grads, moved)))
        scale = RHO / (full if normalize == "full" else part)
        uphill = [p + scale * g * m for p, g, m in zip(params, grads, moved)]
        second = example_gradients(jax.tree.unflatten(jax.tree.structure(start()), uphill), *data(step))
        trace = [momentum * t + g.mean(0) for t, g in zip(trace, second)]
        params = [p - rate * t for p, t in zip(params, trace)]
        yield params, mask


def batch_step(optimizer, per_example=False):
    """`(params, state, inputs, labels) -> (params, state)`, compiled."""

    def step(params, state, inputs, labels):
        grad_fn = lambda params, index=0: jax.grad(loss)(params, inputs, labels)

        def fisher_fn(params):
            one = lambda x, y: jax.grad(loss)(params, x[None], y[None])
            return jax.tree.map(lambda g: jnp.mean(g**2, 0), jax.vmap(one)(inputs, labels))

        extra = {"fisher_fn": fisher_fn} if per_example else {}
        updates, state = optimizer.update(grad_fn(params), state, params, grad_fn=grad_fn, **extra)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def masks_of(state, params):
    """Boolean masks by leaf; None where the state holds none."""
    words = jax.tree.leaves(state.mask, is_leaf=lambda leaf: leaf is None)
    leaves = jax.tree.leaves(params)
    return [None if bits is None else np.asarray(unpack(bits, leaf.shape)) for bits, leaf in zip(words, leaves)]


VARIANTS = {
    "plain": {},
    "per_example": {"fisher": "per_example"},
    "masked_norm": {"normalize": "masked", "sparsity": 0.9},
    "kernels_only": {"maskable": ["kernel"], "mask_update_interval": 1},
    "kernels_only_skip": {"maskable": path_predicate("kernel"), "unmaskable": "skip", "sparsity": 0.8},
    "skip_and_masked_norm": {"maskable": "kernel$", "unmaskable": "skip", "normalize": "masked"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_trajectories_are_those_of_the_formulas(name):
    options = {"sparsity": 0.5, "mask_update_interval": 3, "fisher": "batch", "normalize": "full"} | VARIANTS[name]
    optimizer = fsam(optax.sgd(0.3, momentum=0.9), RHO, **options)
    maskable = ["kernel" in path if "maskable" in options else True for path in NAMES]
    total = sum(size for size, chosen in zip((6, 5, 30), maskable) if chosen)
    expected = reference(
        8,
        k=int((1 - Fraction(str(options["sparsity"]))) * total),
        interval=options["mask_update_interval"],
        maskable=maskable,
        dense=options.get("unmaskable", "perturb") == "perturb",
        fisher=options["fisher"],
        normalize=options["normalize"],
    )
    params, step = start(), batch_step(optimizer, per_example=options["fisher"] == "per_example")
    state = optimizer.init(params)
    for number, (wanted, mask) in enumerate(expected):
        params, state = step(params, state, *data(number))
        for got, want, chosen in zip(masks_of(state, params), mask, maskable):
            assert (got is None) == (not chosen)
            assert got is None or np.array_equal(got, want)
        for got, want in zip(jax.tree.leaves(params), wanted):
            np.testing.assert_allclose(got, want, atol=3e-6)
    assert int(state.count) == 8


# --- Ends of the scale ------------------------------------------------------------------------------------------------


def run(optimizer, steps=20, params=None, **options):
    params = start() if params is None else params
    state, step = optimizer.init(params), batch_step(optimizer, **options)
    for number in range(steps):
        params, state = step(params, state, *data(number))
    return params


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("make", [partial(sam, rho=RHO), partial(fsam, rho=RHO, sparsity=0, fisher="per_example")])
def test_sparsity_0_is_the_sam_of_optax(make):
    uphill = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    theirs = optax.contrib.sam(optax.adam(0.01), uphill, sync_period=2, opaque_mode=True)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), run(make(optax.adam(0.01))), run(theirs))


@pytest.mark.parametrize("base", [optax.adam(0.01), adam(0.01, clip_norm=0.1)])
def test_sparsity_1_is_the_base_optimizer_bit_for_bit(base):
    without = optax.with_extra_args_support(base)
    assert_same(run(fsam(base, 0.3, sparsity=1)), run(without))
    assert_same(run(fsam(base, 0.3, sparsity=1.0, maskable=["kernel"], unmaskable="skip")), run(without))


def test_sparsity_1_takes_no_second_gradient():
    def never(params, index):
        raise AssertionError

    params, optimizer = jax.tree.map(jnp.asarray, start()), fsam(optax.sgd(0.1), sparsity=1)
    optimizer.update(params, optimizer.init(params), params, grad_fn=never)
    with pytest.raises(AssertionError):  # biases are perturbed, whatever the sparsity of kernels
        fsam(optax.sgd(0.1), sparsity=1, maskable=["kernel"]).update(
            params, optimizer.init(params), params, grad_fn=never
        )


def test_rho_0_is_the_base_optimizer():
    base = optax.adam(0.01)
    result = run(fsam(base, 0.0))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), result, run(optax.with_extra_args_support(base)))


def test_a_quadratic_in_closed_form():
    """x1 = x0 - rate * H (x0 + rho * m g / |g|), g = H x0."""
    random = np.random.default_rng(2)
    root = random.normal(size=(10, 10))
    hessian, x = root @ root.T / 10, random.normal(size=10)
    g = hessian @ x
    mask = np.abs(g) >= np.sort(np.abs(g))[-3]
    expected = x - 0.1 * hessian @ (x + 0.5 * mask * g / np.linalg.norm(g))
    optimizer = fsam(optax.sgd(0.1), rho=0.5, sparsity=0.7)
    grad_fn = lambda x, index=0: jnp.float32(hessian) @ x
    x = jnp.float32(x)
    updates, _ = optimizer.update(grad_fn(x), optimizer.init(x), x, grad_fn=grad_fn)
    np.testing.assert_allclose(x + updates, expected, atol=1e-6)


# --- The mask -----------------------------------------------------------------------------------------------------


SHAPES = {"a": (20, 24), "b": (4, 5, 4), "c": (20,)}  # 580 entries


def gradients(seed, levels):
    """Few different values when `levels` is small."""
    random = np.random.default_rng(seed)
    return {name: jnp.float32(np.round(random.normal(size=shape) * levels)) for name, shape in SHAPES.items()}


@cache
def asking(optimizer):
    """`(grads, state, params) -> (where the second gradient is asked for, state after the update)`, compiled."""

    def update(grads, state, params):
        asked = []
        grad_fn = lambda params, index: asked.append((params, index)) or grads
        _, state = optimizer.update(grads, state, params, grad_fn=grad_fn)
        ((moved, index),) = asked
        assert index == 0
        return moved, state

    return jax.jit(update)


def uphill_of(optimizer, grads, params, state):
    return asking(optimizer)(grads, state, params)


@pytest.mark.parametrize(("sparsity", "kept"), [(0.999, 0), (0.99, 5), (0.9, 58), (0.1, 522), (0, 580)])
def test_exactly_so_many_entries_are_perturbed(sparsity, kept):
    optimizer = fsam(optax.sgd(0.1), sparsity=sparsity)
    for levels in (0.3, 1e6):
        grads = jax.tree.map(lambda g: jnp.where(g == 0, 1e-3, g), gradients(0, levels))
        params = jax.tree.map(jnp.zeros_like, grads)
        if kept == 0:
            updates, _ = optimizer.update(grads, optimizer.init(params), params, grad_fn=lambda params, index: 1 / 0)
            assert_same(updates, jax.tree.map(lambda g: -0.1 * g, grads))
            continue
        moved, state = uphill_of(optimizer, grads, params, optimizer.init(params))
        assert sum(int(np.sum(leaf != 0)) for leaf in jax.tree.leaves(moved)) == kept
        assert kept == 580 or sum(int(mask.sum()) for mask in masks_of(state, params)) == kept


def test_the_mask_stays_between_refreshes_and_a_refresh_uses_its_own_batch():
    params = jax.tree.map(jnp.zeros_like, gradients(0, 1))
    optimizer = fsam(optax.sgd(0.1), sparsity=0.9, mask_update_interval=3)
    state = optimizer.init(params)
    assert not any(mask.any() for mask in masks_of(state, params))
    for step in range(7):
        grads = gradients(step, 1e6)
        moved, state = uphill_of(optimizer, grads, params, state)
        latest = gradients(step - step % 3, 1e6)
        magnitudes = [np.abs(leaf) for leaf in jax.tree.leaves(latest)]
        expected = masked_entries(magnitudes, [True] * 3, 58)
        for mask, entries, leaf in zip(masks_of(state, params), expected, jax.tree.leaves(moved)):
            np.testing.assert_array_equal(mask, entries)
            np.testing.assert_array_equal(leaf != 0, entries)  # perturbed in the step of a refresh too
        assert int(state.count) == step + 1


def test_the_mask_does_not_need_squares():
    """Squares of 1e-25 are zero in float32; magnitudes rank all the same."""
    optimizer = fsam(optax.sgd(0.1), sparsity=0.75)
    for magnitude in (1e-25, 1e-19, 1.0):
        grads = jnp.float32(np.random.default_rng(0).permutation(np.arange(1.0, 41.0)) * magnitude)
        params = jnp.zeros_like(grads)
        _, state = uphill_of(optimizer, grads, params, optimizer.init(params))
        np.testing.assert_array_equal(masks_of(state, params)[0], grads > 30.5 * magnitude)


@pytest.mark.parametrize("normalize", ["full", "masked"])
def test_the_length_of_the_step_uphill(normalize):
    grads = gradients(3, 1e6)
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer = fsam(optax.sgd(0.1), RHO, sparsity=0.9, normalize=normalize)
    moved, state = uphill_of(optimizer, grads, params, optimizer.init(params))
    masked = [g * m for g, m in zip(jax.tree.leaves(grads), masks_of(state, params))]
    expected = RHO * optax.tree.norm(masked) / optax.tree.norm(grads) if normalize == "full" else RHO
    np.testing.assert_allclose(optax.tree.norm(moved), expected, rtol=1e-5)
    assert expected <= RHO


def test_the_mask_costs_one_bit_an_entry():
    params = {"kernel": jnp.zeros((64, 128)), "embedding": jnp.zeros((24, 64)), "bias": jnp.zeros(128)}
    entries = sum(leaf.size for leaf in params.values())
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    state = fsam(optax.sgd(0.1)).init(params)
    assert size(state.mask) * 8 == entries
    assert state.mask["kernel"].shape == (64, 16)
    partly = fsam(optax.sgd(0.1), maskable=["kernel"]).init(params)
    assert size(partly.mask) * 8 == params["kernel"].size
    assert sam(optax.sgd(0.1)).init(params).mask == fsam(optax.sgd(0.1), sparsity=1).init(params).mask == ()


@pytest.mark.usefixtures("unchecked")  # arrays in the place of all numbers
def test_rho_may_be_a_schedule_and_injected():
    grads = gradients(0, 1e6)
    params = jax.tree.map(jnp.zeros_like, grads)
    scheduled = fsam(optax.sgd(0.1), lambda count: 0.1 * (1 + count), sparsity=0)
    make = optax.inject_hyperparams(fsam, static_args="sparsity")
    injected = make(optax.sgd(0.1), lambda count: 0.1 * (1 + count), sparsity=0)
    for optimizer in (scheduled, injected):
        state = optimizer.init(params)
        for step in range(2):
            moved, state = uphill_of(optimizer, grads, params, state)
            np.testing.assert_allclose(optax.tree.norm(moved), 0.1 * (1 + step), rtol=1e-5)
    halves = optax.inject_hyperparams(fsam)(optax.sgd(0.1), sparsity=Fraction(1, 2), maskable=["a"])
    moved, _ = uphill_of(halves, grads, params, halves.init(params))
    assert int(jnp.sum(moved["a"] != 0)) == 240


def test_what_the_base_optimizer_pulls_is_handed_on():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update)
    x = jnp.ones(16)
    fsam(base).update(x, fsam(base).init(x), x, grad_fn=lambda x, index: x, curvature_grad_fn="pulled", value=3)
    assert seen == [{"curvature_grad_fn": "pulled", "value": 3}]


# --- Numbers at the edge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"sparsity": 0}, {"normalize": "masked"}, {"eps": 0.0}], ids=str)
def test_a_zero_gradient_moves_nothing(options):
    params = {"kernel": jnp.ones((4, 8))}
    zero = jax.tree.map(jnp.zeros_like, params)
    optimizer = fsam(optax.adam(0.1), **options)
    moved, state = uphill_of(optimizer, zero, params, optimizer.init(params))
    assert_same(moved, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_a_gradient_that_is_not_finite_perturbs_nothing_and_waits(sparsity):
    """3e38 is finite and its square is not: the norm decides, as in the training step."""
    params = {"kernel": jnp.ones((4, 8), jnp.float32), "bias": jnp.ones(3, jnp.float32)}
    good = jax.tree.map(lambda leaf: jnp.arange(1.0, leaf.size + 1, dtype=jnp.float32).reshape(leaf.shape), params)
    optimizer = fsam(optax.sgd(0.1), sparsity=sparsity, mask_update_interval=1)
    moved, begin = uphill_of(optimizer, good, params, optimizer.init(params))
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        spoilt = good | {"bias": jnp.array([1.0, bad, 1.0], jnp.float32)}
        asked, after = uphill_of(optimizer, spoilt, params, begin)
        assert_same(asked, params)
        assert_same((after.count, after.mask), (begin.count, begin.mask))
        again, _ = uphill_of(optimizer, good, params, after)
        assert_same(again, moved)


def test_a_second_gradient_that_is_not_finite_can_be_left_to_the_base_optimizer():
    params, optimizer = jnp.ones(16), fsam(optax.apply_if_finite(optax.adam(0.1), 3))
    state = optimizer.init(params)
    updates, after = optimizer.update(params, state, params, grad_fn=lambda params, index: params * jnp.nan)
    assert not updates.any()
    assert_same(after.opt_state.inner_state, state.opt_state.inner_state)
    updates, _ = optimizer.update(params, after, params, grad_fn=lambda params, index: params)
    np.testing.assert_allclose(updates, -0.1, rtol=1e-5)


def test_weights_in_bfloat16_move_as_far_as_they_can():
    """The step is computed in float32 and rounded once, with the weights."""
    random = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(random.normal(size=(8, 16)), jnp.bfloat16)}
    grads = {"kernel": jnp.asarray(random.normal(size=(8, 16)), jnp.bfloat16)}
    optimizer = fsam(adam(0.01), 0.5, sparsity=0.5)
    moved, state = uphill_of(optimizer, grads, params, optimizer.init(params))
    w, g = np.float64(params["kernel"]), np.float64(grads["kernel"])
    exact = w + 0.5 * g / np.linalg.norm(g) * masks_of(state, params)[0]
    assert moved["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved["kernel"], jnp.asarray(np.float32(exact), jnp.bfloat16))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"int32", "uint8", "float32"}


# --- Mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "fsam: rho = -0.1 must be at least 0"),
        ({"rho": float("nan")}, "fsam: rho = nan"),
        ({"sparsity": 1.1}, "fsam: sparsity = 1.1 must be at least 0 and at most 1"),
        ({"sparsity": "0.9"}, "fsam: sparsity = '0.9' must be"),
        ({"sparsity": jnp.float32(0.9)}, "name it in static_args"),
        ({"mask_update_interval": 0}, "fsam: mask_update_interval = 0 must be an integer of at least 1"),
        ({"mask_update_interval": 1.5}, "mask_update_interval = 1.5"),
        ({"eps": -1e-12}, "eps = -1e-12"),
        ({"fisher": "exact"}, "fsam: fisher = 'exact' is none of 'batch', 'per_example'"),
        ({"unmaskable": "drop"}, "unmaskable = 'drop'"),
        ({"normalize": "none"}, "normalize = 'none'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_hyperparameters_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        fsam(optax.sgd(0.1), **options)


def test_parameters_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="maskable selects no parameter; names look like 'embedding'"):
        fsam(optax.sgd(0.1), maskable=["kernle"]).init(start())
    with pytest.raises(UserError, match="fsam: embedding is not maskable, and unmaskable = 'error'"):
        fsam(optax.sgd(0.1), maskable=["kernel"], unmaskable="error").init(start())


@pytest.mark.usefixtures("unchecked")
def test_callables_that_are_missing_are_named():
    params = start()
    for name, optimizer, extra, missing in [
        ("sam", sam(optax.sgd(0.1)), {}, "grad_fn"),
        ("fsam", fsam(optax.sgd(0.1), fisher="per_example"), {"grad_fn": lambda params, index: params}, "fisher_fn"),
    ]:
        state = optimizer.init(params)
        with pytest.raises(UserError, match=f"^{name} needs {missing}: .* must be outermost") as caught:
            optimizer.update(params, state, params, **extra)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="fsam needs params"):
        optimizer.update(params, state, grad_fn=lambda params, index: params)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda inner: optax.masked(inner, {"embedding": False, "layer": True}), "give it its own path predicate"),
        (
            lambda inner: optax.partition(
                {"a": inner, "b": optax.sgd(0.1)}, {"embedding": "b", "layer": {"bias": "a", "kernel": "a"}}
            ),
            "give it its own path predicate",
        ),
    ],
)
def test_wrappers_that_hide_something_are_refused(wrap, message):
    inits = {"fsam": wrap(fsam(optax.sgd(0.1))).init, "sam": jax.jit(wrap(sam(optax.sgd(0.1))).init)}
    for name, init in inits.items():
        with pytest.raises(UserError, match=f"^{name} must be outermost: .*{message}"):
            init(start())


# --- Eight devices --------------------------------------------------------------------------------------------------

SPECS = {
    "kernel": ((32, 64), ("a", "b")),
    "attention": ((2, 32, 2, 8), (None, "a", "b")),
    "embedding": ((48, 32), ("b", "a")),
    "odd": ((3, 5), ()),
}


@pytest.mark.devices(8)
def test_eight_devices_choose_the_mask_of_one():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    shardings = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, (_, spec) in SPECS.items()}
    random = np.random.default_rng(1)
    draw = lambda: {
        name: np.round(random.normal(size=shape) * 8).astype(np.float32) for name, (shape, _) in SPECS.items()
    }
    params, grads = draw(), draw()  # small integers: sums of squares are exact in any order
    options = {"normalize": "masked", "maskable": ["kernel|embedding|odd"]}
    optimizer = fsam(optax.sgd(0.125, momentum=0.5), 0.25, mask_update_interval=2, **options)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params, grad_fn=lambda params, index: params)
        return optax.apply_updates(params, updates), state

    expected = jax.jit(step)(params, optimizer.init(params), grads)
    layouts = state_shardings(mesh, jax.eval_shape(optimizer.init, params), params, shardings)
    state = jax.jit(optimizer.init, out_shardings=layouts)(jax.device_put(params, shardings))
    arguments = (jax.device_put(params, shardings), state, jax.device_put(grads, shardings))
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    assert not re.search(r"all-gather|all-to-all|collective-permute", program.as_text())
    result = program(*arguments)
    assert_same(jax.tree.map(np.asarray, result[1].mask), expected[1].mask)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), result, expected)
    for leaf, layout in zip(jax.tree.leaves(result), jax.tree.leaves((shardings, layouts)), strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
    assert result[1].mask["kernel"].sharding.spec == PartitionSpec("a", "b")
