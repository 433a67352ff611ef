"""Exact top-k by counting against NumPy's stable sort, counts beyond 2^32 against Python's integers, packed bits."""

from __future__ import annotations

import math
import random
import re
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ext.contracts import UserError
from t5x_ext.optim import top_k, top_k_mask
from t5x_ext.optim.bits import pack, packed_shape, unpack
from t5x_ext.optim.top_k import add, as_count, count_true, less, num_kept, subtract, sum_words

SHAPES = {"a": (8, 16, 3), "b": {"c": (), "d": (31,)}, "e": (4, 2, 8, 2), "f": (0, 5), "g": (9, 4)}
TOTAL = 384 + 1 + 31 + 128 + 36  # 580
TINY = np.float32(1e-45)


def by_sorting(scores, k):
    """A flat mask of the k largest, the first ones of equals; NaN below everything."""
    flat = np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(scores)])
    first = np.lexsort(
        [np.arange(flat.size), -np.nan_to_num(flat, nan=0, posinf=np.inf, neginf=-np.inf), np.isnan(flat)]
    )
    mask = np.zeros(flat.size, bool)
    mask[first[:k]] = True
    return mask


def flat(mask):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(mask)])


def tree_of(values):
    """A tree of SHAPES that holds the 580 values in order."""
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    ends = np.cumsum([math.prod(shape) for shape in leaves])
    parts = np.split(np.asarray(values), ends[:-1])
    return structure.unflatten([part.reshape(shape) for part, shape in zip(parts, leaves, strict=True)])


def draws(seed=0):
    return np.random.default_rng(seed).normal(size=TOTAL).astype(np.float32)


SCORES = {
    "all_different": draws(),
    "massive_ties": np.round(draws()),
    "all_equal": np.full(TOTAL, 2.5, np.float32),
    "mostly_zero": np.where(draws() > 1.5, draws(1) ** 2, np.float32(0)),
    "two_zeros": np.where(draws() > 0, np.float32(-0.0), np.float32(0.0)),
    "denormal": np.abs(np.round(draws() * 3)).astype(np.float32) * TINY,
    "denormal_and_signs": np.where(draws() > 0, -1, 1).astype(np.float32)
    * np.round(draws(1)).astype(np.float32)
    * TINY,
    "infinite": np.where(draws() > 1, np.inf, np.where(draws() < -1, -np.inf, np.round(draws(1)))).astype(np.float32),
    "largest_and_smallest": np.where(draws() > 0, np.finfo(np.float32).max, -np.finfo(np.float32).max),
    "not_numbers": np.where(np.abs(draws()) < 0.5, np.nan, draws()),
    "not_numbers_with_sign": np.where(draws() < 0, np.copysign(np.nan, draws(1)), -np.inf).astype(np.float32),
    "squares": (draws() ** 2 * 1e-30).astype(np.float32),
}


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(top_k_mask, static_argnums=1)


@pytest.mark.parametrize("k", [1, 290])
@pytest.mark.parametrize("name", SCORES)
def test_it_is_the_stable_sort(compiled, name, k):
    scores = tree_of(SCORES[name])
    mask = compiled(scores, k)
    assert jax.tree.structure(mask) == jax.tree.structure(scores)
    np.testing.assert_array_equal(flat(mask), by_sorting(scores, k))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_ranked_as_they_are(compiled, dtype):
    scores = tree_of(jnp.asarray(SCORES["all_different"], dtype))
    np.testing.assert_array_equal(flat(compiled(scores, 290)), by_sorting(scores, 290))


def test_magnitudes_are_ranked_without_their_signs():
    choose = jax.jit(lambda scores: top_k_mask(scores, 290, magnitude=True))
    for name, values in SCORES.items():
        scores = tree_of(values)
        expected = by_sorting(jax.tree.map(np.abs, scores), 290)
        np.testing.assert_array_equal(flat(choose(scores)), expected, err_msg=name)


def test_none_and_all():
    scores = tree_of(SCORES["not_numbers"])
    assert not flat(top_k_mask(scores, 0)).any()
    assert flat(top_k_mask(scores, TOTAL)).all()
    assert jax.tree.leaves(top_k_mask({}, 0)) == []


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="k = 3 of 2 entries"):
        top_k_mask(jnp.zeros(2), 3)
    with pytest.raises(UserError, match="an axis has 2\\^32 entries"):
        jax.eval_shape(partial(top_k_mask, k=1), jax.ShapeDtypeStruct((2**32,), jnp.float32))


# --- How many -------------------------------------------------------------------------------------------------------


def test_the_number_kept_is_that_of_the_decimal():
    assert num_kept(0.9, 580) == 58
    for thousandths in range(1001):
        for total in (1, 7, 10, 580, 1000, 355_359_744, 4_700_000_000, 10**13):
            exact = (1000 - thousandths) * total // 1000
            assert num_kept(thousandths / 1000, total) == exact
            assert num_kept(1 - (1000 - thousandths) / 1000, total) == exact, "written as 1 - keep"
    for written in ("0.123456789", "1e-05", "0.999999", "0.5000001"):
        exact = ((1 - Decimal(written)) * 4_700_000_001).to_integral_value(ROUND_FLOOR)
        assert num_kept(float(written), 4_700_000_001) == exact
    assert [num_kept(number, 580) for number in (0, 1, Fraction(1, 3), np.float64(0.9), np.float32(0.9))] == [
        *(580, 0, 386, 58, 58)
    ]


# --- Counts above 2^32 ----------------------------------------------------------------------------------------------


def as_int(count):
    return int(count.high) * 2**32 + int(count.low)


EDGES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 3 * 2**32 - 1, 4_700_000_000, 2**40 + 5]


@pytest.mark.parametrize("a", EDGES)
def test_counts_are_integers_of_64_bits(a):
    a_count = as_count(a)
    assert as_int(a_count) == a
    for b in EDGES:
        assert as_int(add(a_count, as_count(b))) == a + b
        assert bool(less(a_count, as_count(b))) == (a < b)
        if b <= a:
            assert as_int(subtract(a_count, as_count(b))) == a - b


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 70_000])
def test_words_add_up_beyond_their_size(size):
    large = np.full(size, 2**32 - 1, np.uint32)
    assert as_int(sum_words(jnp.asarray(large))) == size * (2**32 - 1)
    words = np.random.default_rng(size).integers(0, 2**32, size, dtype=np.uint32)
    assert as_int(sum_words(jnp.asarray(words))) == sum(map(int, words))


@pytest.fixture
def small_words(monkeypatch):
    """Arrays are seen as rows of their last axis, as those of 2^32 entries are."""
    monkeypatch.setattr(top_k, "_inner_axes", lambda shape: max(len(shape) - 1, 0))


def test_an_array_of_many_rows_is_ranked_as_one(small_words):
    choose = jax.jit(lambda scores: top_k_mask(scores, 291))
    for scores in map(tree_of, SCORES.values()):
        np.testing.assert_array_equal(flat(choose(scores)), by_sorting(scores, 291))


def test_counting_by_rows(small_words):
    for leaf in jax.tree.leaves(tree_of(SCORES["mostly_zero"])):
        assert as_int(count_true(jnp.asarray(leaf > 0))) == int(np.sum(leaf > 0))


def test_where_an_array_is_cut_into_rows():
    assert top_k._inner_axes((24, 1024, 4096)) == 0
    assert top_k._inner_axes((2**16, 2**16)) == 1
    assert top_k._inner_axes((5, 3, 2**16, 2**15)) == 2
    assert top_k._inner_axes((96, 16384, 65536)) == 1


def test_trees_above_two_to_the_32_are_traced():
    """5.7e11 entries: every intermediate has a shape and a type, and no Python integer is too large for its word."""
    scores = {"mlp": (96, 16384, 65536), "embedding": (250_000, 16384), "out": (7, 96, 2**16, 2**14)}
    scores = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in scores.items()}
    k = num_kept(0.9, sum(leaf.size for leaf in scores.values()))
    mask = jax.eval_shape(lambda scores: jax.tree.map(pack, top_k_mask(scores, k)), scores)
    assert k > 2**35
    assert sum(leaf.size for leaf in mask.values()) == sum(leaf.size for leaf in scores.values()) // 8


def test_the_threshold_is_found_among_counts_above_two_to_the_32(monkeypatch):
    """Every entry stands for 2^31 + 3 equal ones: the bisection then runs on counts of that size."""
    weight = 2**31 + 3
    real = top_k.count_true

    def heavy(mask):
        total = as_count(0)
        one = real(mask)
        for bit in range(32):
            if weight >> bit & 1:
                shifted = top_k.Count((one.high << bit) | (one.low >> (32 - bit) if bit else 0), one.low << bit)
                total = add(total, shifted)
        return total

    monkeypatch.setattr(top_k, "count_true", heavy)
    values = np.random.default_rng(3).permutation(40).astype(np.float32)
    for kept in (1, 7, 39):
        leaves = top_k._numbered([jnp.asarray(values[:24]).reshape(4, 6), jnp.asarray(values[24:])], magnitude=False)
        rank, missing = top_k._next_digit(leaves, (), 32, as_count(kept * weight))
        assert int(rank) == int(top_k._rank(jnp.sort(jnp.asarray(values))[-kept]))
        assert as_int(missing) == weight


# --- Bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (8,), (13,), (6, 16, 8), (64, 3), (3, 5), (2, 8, 2, 4), (0, 5)])
def test_bits_come_back(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    words = pack(jnp.asarray(mask))
    assert words.shape == packed_shape(shape)
    assert words.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack(words, shape), mask)
    assert sum(bin(word).count("1") for word in np.ravel(words).tolist()) == mask.sum()


def test_packing_wastes_as_little_as_it_can():
    for _ in range(200):
        shape = tuple(random.Random(_).choices([1, 2, 3, 5, 8, 12, 16, 64], k=3))
        best = min(-(-shape[axis] // 8) * math.prod(shape) // shape[axis] for axis in range(3))
        assert math.prod(packed_shape(shape)) == best


# --- Eight devices --------------------------------------------------------------------------------------------------

SHARDED = {
    "kernel": ((64, 48), ("a", "b")),
    "attention": ((4, 32, 2, 8), (None, "a", "b")),
    "flat": ((128,), (("a", "b"),)),
    "scale": ((5,), ()),
    "transposed": ((256, 16), ("b", "a")),
}


@pytest.mark.devices(8)
def test_eight_devices_choose_the_same_and_gather_nothing():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    shardings = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, (_, spec) in SHARDED.items()}
    random = np.random.default_rng(1)
    scores = {name: np.round(random.normal(size=shape)) for name, (shape, _) in SHARDED.items()}  # thousands of ties
    scores = {name: leaf.astype(np.float32) for name, leaf in scores.items()}
    placed = jax.device_put(scores, shardings)
    choose = jax.jit(lambda scores: jax.tree.map(pack, top_k_mask(scores, 3000)))
    program = choose.lower(placed).compile()
    assert not re.search(r"all-gather|all-to-all|collective-permute|\bsort\(", program.as_text())
    words = program(placed)
    mask = jax.tree.map(lambda bits, leaf: np.asarray(unpack(bits, leaf.shape)), words, scores)
    np.testing.assert_array_equal(flat(mask), by_sorting(scores, 3000))
    for name, leaf in words.items():
        assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), name
