from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.corpora.filters import FilterConfig, duplicates, near_duplicate_probability
from t5x_ext.corpora.filters.duplicates import (
    BANDS,
    KeyMaker,
    find_later,
    keys_of_partition,
    partition_bits,
    rows_per_band,
    shingles,
    sort_keys,
)


@settings(max_examples=60, database=None)
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=6),
    st.integers(0, 4),
    st.randoms(use_true_random=False),
)
def test_later_lines_are_those_that_a_set_has_seen(chunks, bits, dice):
    # Keys spread over all partitions, in the order of the numbers drawn.
    chunks = [np.array([number * (2**64 // 41) for number in chunk], dtype=np.uint64) for chunk in chunks]
    found: set[tuple[int, int]] = set()
    for partition in range(1 << bits):
        sorted_keys = [sort_keys(chunk[np.newaxis]) for chunk in chunks]
        parts = [keys_of_partition(n, keys[0], rows[0], partition, bits) for n, (keys, rows) in enumerate(sorted_keys)]
        dice.shuffle(parts)
        found |= {(chunk, int(row)) for chunk, rows in find_later(parts).items() for row in rows}
    seen: set[int] = set()
    expected = set()
    for number, chunk in enumerate(chunks):
        for row, key in enumerate(chunk.tolist()):
            if key in seen:
                expected.add((number, row))
            seen.add(key)
    assert found == expected


def test_partitions_hold_what_memory_holds():
    assert [partition_bits(pairs) for pairs in (0, 1, 1 << 22, (1 << 22) + 1, 1 << 30)] == [0, 0, 0, 1, 8]


def words(dice: random.Random, count: int) -> list[str]:
    return ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 9))) for _ in range(count)]


@pytest.mark.parametrize("similarity", [0.7, 0.9])
def test_minhash_finds_pairs_as_often_as_their_exact_similarity_says(similarity):
    dice = random.Random(5)
    maker = KeyMaker(FilterConfig(duplicates=(), near_duplicate_similarity=similarity), ("en", "de"))
    expected, variance, found, near = 0.0, 0.0, 0, 0
    for _ in range(400):
        source, target = words(dice, 20), words(dice, 20)
        changed = list(source)
        for place in dice.sample(range(20), dice.choice([0, 1, 1, 2, 3, 6])):
            changed[place] = words(dice, 1)[0]
        pairs = [(" ".join(source), " ".join(target)), (" ".join(changed), " ".join(target))]
        one, other = (shingles(pair, ("en", "de")) for pair in pairs)
        jaccard = len(one & other) / len(one | other)
        keys = maker.keys(pairs)
        assert keys.shape == (BANDS, 2)
        is_near = bool((keys[:, 0] == keys[:, 1]).any())
        chance = near_duplicate_probability(jaccard, similarity)
        expected, variance = expected + chance, variance + chance * (1 - chance)
        found, near = found + is_near, near + (0.1 < chance < 0.9)
        assert is_near or jaccard < 1
    assert near > 40
    assert abs(found - expected) < 4 * math.sqrt(variance)


def test_the_threshold_is_where_the_curve_rises():
    for similarity in (0.5, 0.7, 0.8, 0.9, 0.95):
        assert near_duplicate_probability(similarity, similarity) == pytest.approx(0.65, abs=0.07)
        threshold = (1 / BANDS) ** (1 / rows_per_band(similarity))
        assert abs(threshold - similarity) < 0.03


def test_shingles_tell_sides_apart_and_short_lines_are_whole():
    assert shingles(("abcde", "ab"), ("en", "de")) == {b"0abcd", b"0bcde", b"1ab"}
    assert shingles(("一二三",), ("zh",)) == {"0一二".encode(), "0二三".encode()}


@pytest.mark.parametrize(
    ("kept", "columns"),
    [
        (("pair",), ("duplicate",)),
        (("target", "source"), ("duplicate_source", "duplicate_target")),
        ((), ()),
    ],
)
def test_exact_keys_are_those_of_the_sides_asked_for(kept, columns):
    maker = KeyMaker(FilterConfig(duplicates=kept, near_duplicate_similarity=None), ("en", "de"))
    assert maker.columns == columns
    keys = dict(zip(columns, maker.keys([("A", "b"), ("ａ", "B"), ("a", "c"), ("d", "B")])))
    same = {rule: [bool(key == found[0]) for key in found] for rule, found in keys.items()}
    expected = {
        "duplicate": [True, True, False, False],
        "duplicate_source": [True, True, True, False],
        "duplicate_target": [True, True, False, True],
    }
    assert same == {rule: expected[rule] for rule in columns}


def test_text_of_one_language_has_one_kind_of_duplicate():
    for choice in (("pair",), ("source", "target"), ("target",)):
        config = FilterConfig(duplicates=choice, near_duplicate_similarity=None)
        assert KeyMaker(config, ("en",)).columns == ("duplicate",)
    assert duplicates.DUPLICATE_RULES[0] == "duplicate"
