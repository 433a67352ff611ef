"""Gradual pruning against brute force in NumPy: exact densities, death and growth, and what must not change."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_ext.contracts import Loss, UserError
from t5x_ext.optim import (
    PruningGroup,
    Regrowth,
    adam,
    fsam,
    gradual_pruning,
    mean_accumulator,
    pruning_masks,
)
from t5x_ext.train.state import create_state
from t5x_ext.train.step import make_train_step

SHAPES = {
    "first": {"kernel": (9, 16), "bias": (16,)},
    "second": {"kernel": (16, 5)},
    "edge_logits": (30,),
    "feature_logits": (9,),
}
STEPS, BEGIN, END, EVERY = 14, 2, 10, 2  # events at 4, 6, 8, 10
EVENTS = 4

GROUPS = (
    PruningGroup(["kernel$"], 0.1),
    PruningGroup(["edge_logits"], 0.5, importance="value"),
    PruningGroup(["feature_logits"], 0.4, scope="local"),
)
ONE = (PruningGroup(["first/kernel"], 0.25),)
GROUP_OF = {"first/kernel": 0, "second/kernel": 0, "edge_logits": 1, "feature_logits": 2}
SIZES = (9 * 16 + 16 * 5, 30, 9)


def tree(seed):
    keys = iter(range(100))
    draw = lambda shape: np.random.default_rng((seed, next(keys))).normal(size=shape).astype(np.float32)
    return jax.tree.map(draw, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def start():
    """Feature logits all begin at 1, as the paper has it."""
    return tree(0) | {"feature_logits": np.ones(9, np.float32)}


def gradients(step):
    return tree(step + 1)


def named(params):
    names = {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(params)
    }
    return {name: None if leaf is None else np.asarray(leaf) for name, leaf in names.items()}


def train(optimizer, params=None, steps=STEPS, grads=gradients):
    """Parameters and masks after every update."""
    params = jax.tree.map(jnp.asarray, start() if params is None else params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    history = []
    for step in range(steps):
        updates, state = update(grads(step), state, params)
        params = optax.apply_updates(params, updates)
        history.append((named(params), named(pruning_masks(state, params))))
    return history


@cache
def trained(score):
    regrowth = Regrowth(0.3, 0.005, score) if score else None
    return train(gradual_pruning(optax.adam(0.05), GROUPS, begin=BEGIN, end=END, every=EVERY, regrowth=regrowth))


def flat_mask(masks, group):
    return np.concatenate([np.ravel(masks[name]) for name in sorted(GROUP_OF) if GROUP_OF[name] == group])


def density(final, event):
    return final + (1 - final) * (1 - Fraction(event, EVENTS)) ** 3


# --- Densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["momentum", "gradient", "random", None])
def test_densities_after_every_update_are_those_of_the_formula(score):
    finals = (Fraction(1, 10), Fraction(1, 2), Fraction(2, 5))
    for step, (_, masks) in enumerate(trained(score), 1):
        event = min(max((step - BEGIN) // EVERY, 0), EVENTS)
        for group, final in enumerate(finals):
            active = flat_mask(masks, group)
            assert active.size == SIZES[group]
            assert active.sum() == math.floor(density(final, event) * SIZES[group]), (step, group)
        assert masks.get("first/bias") is None


def test_the_schedule_is_cubic_and_exact():
    group = PruningGroup(["kernel"], 0.1)
    assert [float(group.density(k, 10)) for k in (0, 1, 9, 10)] == pytest.approx([1, 0.1 + 0.9 * 0.729, 0.1009, 0.1])
    assert group.density(10, 10) == Fraction(1, 10)
    assert PruningGroup(["kernel"], 0.1, 0.5).density(0, 10) == Fraction(1, 2)
    assert PruningGroup(["kernel"], 1e-4).density(9, 10) == Fraction(1, 10**4) + Fraction(9999, 10**4) / 1000


def test_the_rate_of_death_is_a_half_cosine():
    regrowth = Regrowth(0.2, 0.005)
    assert [regrowth.rate(t, 100) for t in (0, 50, 100, 150)] == pytest.approx([0.2, 0.1025, 0.005, 0.005])


def test_an_initial_density_holds_from_begin_on():
    groups = [PruningGroup(["kernel$"], 0.1, 0.5)]
    history = train(gradual_pruning(optax.adam(0.05), groups, begin=2, end=8, every=2), steps=3)
    assert [flat_mask(masks, 0).sum() for _, masks in history] == [224, 112, 112]


# --- What is inactive is exactly zero, and what stays, stays ---------------------------------------------------------


INNER = {
    "adam": lambda: optax.adam(0.05),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "nesterov and decay": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, 0.9, nesterov=True)),
    "adam of the house with decay and clipping": lambda: adam(0.05, weight_decay=0.1, clip_norm=1.0),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.05),
    "lion": lambda: optax.lion(0.05),
}


@pytest.mark.parametrize(
    ("inner", "slots"),
    [*((inner, "keep") for inner in INNER), ("adam", "reset"), ("adam", "mask"), ("injected", "mask")],
)
def test_inactive_entries_are_exactly_zero_under_any_optimizer(inner, slots):
    regrowth = Regrowth(0.3, 0.3, "gradient")
    optimizer = gradual_pruning(INNER[inner](), ONE, begin=BEGIN, end=END, every=EVERY, regrowth=regrowth, slots=slots)
    for params, masks in train(optimizer, steps=11):
        inactive = params["first/kernel"][~masks["first/kernel"]]
        assert (inactive == 0).all()
        assert not np.signbit(inactive).any()
        assert (params["first/bias"] != 0).all()


def test_all_groups_are_exactly_zero_where_inactive():
    for params, masks in trained("momentum"):
        assert all((params[name][~masks[name]] == 0).all() for name in GROUP_OF)


def test_masks_change_at_events_only_and_are_frozen_after_the_last():
    masks = [flat_mask(masks, 0) for _, masks in trained("momentum")]
    changed = [step for step in range(2, STEPS + 1) if (masks[step - 1] != masks[step - 2]).any()]
    assert changed == [4, 6, 8, 10]


def test_without_regrowth_nothing_pruned_comes_back():
    for group in range(3):
        masks = [flat_mask(masks, group) for _, masks in trained(None)]
        assert all((after <= before).all() for before, after in itertools.pairwise(masks))


def test_a_rate_of_zero_is_magnitude_pruning_bit_for_bit():
    optimizer = gradual_pruning(
        optax.adam(0.05), GROUPS, begin=BEGIN, end=END, every=EVERY, regrowth=Regrowth(0.0, 0.0, "gradient")
    )
    for (params, masks), (expected, expected_masks) in zip(train(optimizer), trained(None), strict=True):
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        jax.tree.map(np.testing.assert_array_equal, masks, expected_masks)


@pytest.mark.parametrize("inner", ["adam", "nesterov and decay"])
def test_final_density_one_is_dense_training_bit_for_bit(inner):
    groups = [PruningGroup(["kernel$", "logits$"], 1.0)]
    dense, params = INNER[inner](), jax.tree.map(jnp.asarray, start())
    state, update = dense.init(params), jax.jit(dense.update)
    for step, (pruned, masks) in enumerate(train(gradual_pruning(INNER[inner](), groups, end=9, every=3))):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(np.testing.assert_array_equal, pruned, named(params))
        assert all(mask.all() for mask in masks.values() if mask is not None)


# --- Against brute force ---------------------------------------------------------------------------------------------


class Reference:
    """The controller in NumPy over Adam, one array after another, by stable sorts."""

    def __init__(self, groups, regrowth, layers=()):
        self.groups, self.regrowth, self.layers = groups, regrowth, layers
        self.params = named(start())
        self.masks = {name: np.ones(self.params[name].shape, bool) for name in GROUP_OF}
        self.inner = optax.adam(0.05)
        self.state = self.inner.init(self.params)
        self.count = 0

    def rank(self, name):
        values = self.params[name]
        ranks = values if self.groups[GROUP_OF[name]].importance == "value" else np.abs(values)
        return np.where(self.masks[name], ranks, -np.inf)

    def keep(self, names, ranks, count):
        flat = np.concatenate([rank.ravel() for rank in ranks])
        kept = np.zeros(flat.size, bool)
        kept[np.argsort(-flat, kind="stable")[:count]] = True
        parts = np.split(kept, np.cumsum([rank.size for rank in ranks])[:-1])
        for name, part, rank in zip(names, parts, ranks, strict=True):
            self.masks[name] = part.reshape(rank.shape)

    def update(self, grads):
        grads = named(grads)
        updates, self.state = self.inner.update(grads, self.state, self.params)
        self.params = {name: np.asarray(self.params[name] + updates[name]) for name in self.params}
        self.zero()
        self.count += 1
        if self.count >= BEGIN and self.count <= END and (self.count - BEGIN) % EVERY == 0 and self.count > BEGIN:
            self.event((self.count - BEGIN) // EVERY, grads)

    def zero(self):
        for name, mask in self.masks.items():
            self.params[name] = np.where(mask, self.params[name], np.float32(0))

    def event(self, number, grads):
        for index, group in enumerate(self.groups):
            names = [name for name in sorted(GROUP_OF) if GROUP_OF[name] == index]
            share = group.density(number, EVENTS)
            pools = [names] if group.scope == "global" else [[name] for name in names]
            for pool in pools:
                size = sum(self.params[name].size for name in pool)
                self.keep(pool, [self.rank(name) for name in pool], math.floor(share * size))
        self.zero()
        rate = self.regrowth.rate(self.count, self.regrowth.steps or END)
        for name in GROUP_OF:
            self.regrow(name, rate, grads)
        self.zero()

    def regrow(self, name, rate, grads):
        before = self.masks[name].copy()
        self.keep([name], [self.rank(name)], before.sum() - math.ceil(rate * before.sum()))
        dead = before.sum() - self.masks[name].sum()
        score = np.abs(grads[name])
        if self.regrowth.score == "momentum":
            mu, nu = (np.asarray(getattr(self.state[0], part)[name]) for part in ("mu", "nu"))
            score = np.abs(mu) / (np.sqrt(nu) + 1e-8)
        candidates = np.where(self.masks[name], -np.inf, score)
        chosen = np.argsort(-candidates.ravel(), kind="stable")[:dead]
        assert not self.masks[name].ravel()[chosen].any()
        self.masks[name] |= np.isin(np.arange(score.size), chosen).reshape(score.shape)


@pytest.mark.parametrize("score", ["momentum", "gradient"])
def test_it_is_brute_force(score):
    reference = Reference(GROUPS, Regrowth(0.3, 0.005, score))
    for step, (params, masks) in enumerate(trained(score)):
        reference.update(gradients(step))
        for name, mask in reference.masks.items():
            np.testing.assert_array_equal(masks[name], mask, err_msg=f"{name} after update {step + 1}")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, reference.params)


def test_regrowth_conserves_each_tensor_and_what_grows_starts_from_zero():
    """The same parameters are pruned with and without it: after the first event each tensor has as many entries."""
    pruned, grown = trained(None)[3], trained("momentum")[3]
    for name in GROUP_OF:
        assert pruned[1][name].sum() == grown[1][name].sum()
    fresh = grown[1]["first/kernel"] & ~pruned[1]["first/kernel"]
    assert fresh.any()
    assert (grown[0]["first/kernel"][fresh] == 0).all()


def test_random_growth_is_the_same_for_a_seed_and_another_for_another():
    def mask(seed):
        regrowth = Regrowth(0.5, 0.5, "random")
        optimizer = gradual_pruning(optax.sgd(0.05), ONE, end=3, every=1, regrowth=regrowth, seed=seed)
        return train(optimizer, steps=1)[-1][1]["first/kernel"]

    first, second = mask(0), mask(1)
    assert (first != second).any()
    assert (first == mask(0)).all()


def test_ties_go_to_the_first_entries():
    params = {"kernel": np.ones(8, np.float32)}
    zero = lambda step: {"kernel": np.zeros(8, np.float32)}
    optimizer = gradual_pruning(optax.sgd(0.1), [PruningGroup(["kernel"], 0.5)], end=3, every=1)
    masks = [masks["kernel"].astype(int).tolist() for _, masks in train(optimizer, params, 3, zero)]
    assert masks[0] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert masks[-1] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_an_active_entry_of_value_zero_outranks_inactive_ones():
    """Entries that have just grown are 0, as the pruned ones are."""
    params = {"kernel": np.array([4.0, 3.0, 2.0, 1.0], np.float32)}
    zero = lambda step: {"kernel": np.zeros(4, np.float32)}
    optimizer = gradual_pruning(
        optax.sgd(0.1), [PruningGroup(["kernel"], 0.5)], end=3, every=1, regrowth=Regrowth(0.5, 0.5, "random")
    )
    for step, (_, masks) in enumerate(train(optimizer, params, 6, zero)):
        assert masks["kernel"].sum() == (2 if step else math.floor(4 * (0.5 + 0.5 * (2 / 3) ** 3)))


# --- Layers of a stack -----------------------------------------------------------------------------------------------


def test_every_layer_of_a_stack_is_a_tensor_of_its_own_with_axes():
    rng = np.random.default_rng(0)
    stack = {"kernel": rng.normal(size=(3, 10, 8)).astype(np.float32) * np.array([1, 2, 4], np.float32)[:, None, None]}
    grads = lambda step: {"kernel": np.random.default_rng((1, step)).normal(size=(3, 10, 8)).astype(np.float32)}
    separate = {f"layer_{i}_kernel": stack["kernel"][i] for i in range(3)}
    apart = lambda step: {f"layer_{i}_kernel": grads(step)["kernel"][i] for i in range(3)}
    group, regrowth = PruningGroup(["kernel"], 0.2, scope="local"), Regrowth(0.3, 0.1)
    make = lambda axes: gradual_pruning(optax.adam(0.05), [group], end=6, every=2, regrowth=regrowth, axes=axes)
    stacked = train(make({"kernel": ("layers", "embed", "mlp")}), stack, 7, grads)
    for (params, masks), (expected, expected_masks) in zip(stacked, train(make(None), separate, 7, apart), strict=True):
        for i in range(3):
            np.testing.assert_array_equal(masks["kernel"][i], expected_masks[f"layer_{i}_kernel"])
            np.testing.assert_allclose(params["kernel"][i], expected[f"layer_{i}_kernel"], atol=1e-6)
    assert [mask.sum() for mask in stacked[-1][1]["kernel"]] == [16, 16, 16]


# --- Slots -----------------------------------------------------------------------------------------------------------


def moments_after(slots):
    params = jax.tree.map(jnp.asarray, start())
    regrowth = Regrowth(0.5, 0.5, "gradient")
    optimizer = gradual_pruning(optax.adam(0.05), ONE, end=9, every=3, regrowth=regrowth, slots=slots)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(3):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return named(params), named(pruning_masks(state, params)), [named(m) for m in state.opt_state[0][1:]]


def test_slots_of_what_grows_or_is_inactive_can_be_zero():
    (params, masks, kept), (*_, reset), (*_, masked) = map(moments_after, ("keep", "reset", "mask"))
    mask = masks["first/kernel"]
    fresh = mask & (params["first/kernel"] == 0)
    assert fresh.any()
    for before, after, sparse in zip(kept, reset, masked, strict=True):
        np.testing.assert_array_equal(after["first/kernel"], np.where(fresh, 0, before["first/kernel"]))
        np.testing.assert_array_equal(sparse["first/kernel"], np.where(mask & ~fresh, before["first/kernel"], 0))
        for other in (after, sparse):
            np.testing.assert_array_equal(other["edge_logits"], before["edge_logits"])


def test_slots_are_told_from_those_of_parameters_with_a_longer_path():
    """`kernel` is the end of the path `layer/kernel` too, and both have one shape."""
    params = {"kernel": np.arange(1, 9, dtype=np.float32), "layer": {"kernel": np.ones(8, np.float32)}}
    optimizer = gradual_pruning(optax.adam(0.0), [PruningGroup(["^kernel"], 0.5)], end=3, every=1, slots="mask")
    state, grads = optimizer.init(params), jax.tree.map(np.ones_like, params)
    for _ in range(3):
        _, state = jax.jit(optimizer.update)(grads, state, params)
    mu = state.opt_state[0].mu
    assert (np.asarray(mu["kernel"]) == 0).sum() == 4
    assert (np.asarray(mu["layer"]["kernel"]) != 0).all()


# --- In a training step, with others ---------------------------------------------------------------------------------


class Regression:
    """Rows (x, y); what is pruned is the kernel."""

    def __call__(self, params, batch, context):
        errors = jnp.sum((batch["x"] @ params["kernel"] + params["bias"] - batch["y"]) ** 2)
        return Loss(errors, jnp.float32(batch["x"].shape[0]), {})


def batch(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(8, 12)).astype(np.float32)
    return {"x": x, "y": (x[:, :3] @ np.ones((3, 4))).astype(np.float32)}


def run(wrap, microbatches, steps=9):
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(12, 4)), jnp.float32), "bias": jnp.zeros(4)}
    inner = gradual_pruning(wrap(adam(0.1)), [PruningGroup(["kernel"], 0.25)], end=6, every=2, regrowth=Regrowth())
    step = make_train_step(Regression(), inner, mean_accumulator(), seed=0, num_microbatches=microbatches)
    step = jax.jit(step, donate_argnums=0)
    state = create_state(params, inner, with_ema=False)
    for number in range(steps):
        state, _ = step(state, {}, batch(number))
        mask = np.asarray(pruning_masks(state.optimizer_state, state.params)["kernel"])
        assert (np.asarray(state.params["kernel"])[~mask] == 0).all()
    assert mask.sum() == 12
    return np.asarray(state.params["kernel"])


def test_it_trains_in_the_training_step_and_microbatches_change_nothing():
    one, two = run(lambda inner: inner, 1), run(lambda inner: inner, 2)
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_it_hands_on_what_inner_optimizers_pull():
    run(lambda inner: fsam(inner, rho=0.01, sparsity=0.5), 2)


def test_an_update_that_is_left_out_does_not_use_up_an_event():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(12, 4)), jnp.float32), "bias": jnp.zeros(4)}
    optimizer = gradual_pruning(adam(0.1), [PruningGroup(["kernel"], 0.25)], end=6, every=2)
    step = jax.jit(make_train_step(Regression(), optimizer, mean_accumulator(), seed=0))
    state = create_state(params, optimizer, with_ema=False)
    actives = []
    for number in range(7):
        rows = batch(number)
        state, metrics = step(state, {}, rows | {"y": rows["y"] * np.nan} if number == 1 else rows)
        assert bool(metrics.finite) == (number != 1)
        actives.append(int(pruning_masks(state.optimizer_state, params)["kernel"].sum()))
    assert actives == [48, 48, 22, 22, 13, 13, 12]


def test_multi_steps_of_optax_keeps_zeros():
    optimizer = optax.MultiSteps(gradual_pruning(optax.adam(0.05), ONE, end=3, every=1), 2)
    params = jax.tree.map(jnp.asarray, start())
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for number in range(1, 9):
        updates, state = update(gradients(number), state, params)
        params = optax.apply_updates(params, updates)
        mask = np.asarray(pruning_masks(state, params)["first"]["kernel"])
        assert mask.sum() == [144, 68, 40, 36, 36][number // 2]
        assert (np.asarray(params["first"]["kernel"])[~mask] == 0).all()


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruningGroup("kernel", 0.1), r"patterns = 'kernel' must be a list"),
        (lambda: PruningGroup(["kernel"], 0.0), "final_density = 0.0 must be above 0 and at most 1"),
        (lambda: PruningGroup(["kernel"], 0.5, 0.4), "initial_density = 0.4 must be at least 0.5 and at most 1"),
        (lambda: PruningGroup(["kernel"], 0.5, scope="layer"), "scope = 'layer' is none of 'global', 'local'"),
        (lambda: Regrowth(0.1, 0.2), "final_rate = 0.2 must be at least 0 and at most 0.1"),
        (lambda: Regrowth(1.0), "initial_rate = 1.0 must be at least 0 and below 1"),
        (lambda: Regrowth(score="magnitude"), "score = 'magnitude' is none of"),
        (lambda: pruning(end=50, every=30), "every = 30 leaves 1 events between begin = 0 and end = 50; at least 3"),
        (lambda: pruning(end=50, every=0), "every = 0 must be an integer of at least 1"),
        (lambda: pruning(groups=[]), "groups is empty"),
        (lambda: pruning(groups=[PruningGroup(["kernel"], 0.1, 0.5)]), "begin = 0 must be at least 1"),
        (lambda: pruning(slots="clear"), "slots = 'clear' is none of"),
        (lambda: pruning(groups=[PruningGroup(["kernal"], 0.1)]), r"patterns \['kernal'\] match no parameter"),
        (lambda: pruning(groups=[*GROUPS, PruningGroup(["logits"], 0.1)]), "edge_logits is in two groups, 1 and 3"),
        (
            lambda: pruning(groups=[PruningGroup(["kernel"], 0.01, scope="local")], train=True),
            r"final_density = 0.01 of \['kernel'\] leaves no entry of second/kernel, which has 80; .* at least 0.0125",
        ),
        (lambda: pruning(optax.sgd(0.1), regrowth=Regrowth()), "needs the first moment of edge_logits"),
        (
            lambda: pruning(optax.adam(0.1), regrowth=Regrowth(), slots="mask"),
            "'mask' leaves nothing of Adam's moments",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_said_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def pruning(inner=None, groups=GROUPS, **options):
    options = {"end": 30, "every": 10} | {k: v for k, v in options.items() if k != "train"}
    gradual_pruning(inner or optax.sgd(0.1), groups, **options).init(start())


def test_params_are_needed_and_states_without_it_have_no_masks():
    optimizer = gradual_pruning(optax.sgd(0.1), GROUPS, end=9, every=3)
    with pytest.raises(UserError, match="needs params"):
        optimizer.update(start(), optimizer.init(start()))
    with pytest.raises(UserError, match="not one of gradual_pruning"):
        pruning_masks(optax.sgd(0.1).init(start()), start())
