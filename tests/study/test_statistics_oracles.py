"""Tests and resamples against enumeration, integration and texts that are written out line by line."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.study.statistics import SAMPLES, _samples, moments, paired, resampled
from t5x_ext.study.table import Choice

VALUES = st.lists(st.integers(-20, 20), min_size=1, max_size=8)


def student_p(t, freedom):
    """Twice the tail beyond |t|, by Simpson's rule: in arctan(x / sqrt(freedom)) the density is a power of a cosine."""
    angles = np.linspace(math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2, 2001)
    weights = np.array([1, *[4, 2] * 999, 4, 1])
    part = (np.cos(angles) ** (freedom - 1) * weights).sum() * (angles[1] - angles[0]) / 3
    whole = math.sqrt(math.pi) * math.gamma(freedom / 2) / math.gamma((freedom + 1) / 2)
    return 2 * part / whole


def signed_rank_p(differences):
    """Two-sided, over all signs of distinct differences that are not zero."""
    ranks = [sorted(map(abs, differences)).index(abs(one)) + 1 for one in differences]
    middle = sum(ranks) / 2
    off = lambda signs: abs(sum(rank for rank, sign in zip(ranks, signs) if sign > 0) - middle)
    everything = list(itertools.product((-1, 1), repeat=len(ranks)))
    return sum(off(signs) >= off(differences) for signs in everything) / len(everything)


@settings(max_examples=10)
@given(st.lists(st.integers(-50, 50).filter(bool), min_size=2, max_size=7, unique_by=abs))
def test_p_values_are_those_of_all_signs_and_of_the_integral(differences):
    found = paired([3.0 + one for one in differences], [3.0] * len(differences))
    assert found.p_value == pytest.approx(student_p(found.difference / found.error, len(differences) - 1), abs=1e-7)
    assert found.wilcoxon_p_value == pytest.approx(signed_rank_p(differences))


@pytest.mark.parametrize("differences", [[1, 1, -2, 0], [3, -3, 5, 1, 2]])
def test_a_pair_of_arms_is_tested_alike_from_both_sides(differences):
    """Ties and equal pairs included: neither the side nor a common shift nor the order of seeds changes a p-value."""
    theirs = [float(number**2) for number in range(len(differences))]
    ours = [value + one for value, one in zip(theirs, differences)]
    one, other = (
        paired(ours, theirs),
        paired([value + 7 for value in theirs][::-1], [value + 7 for value in ours][::-1]),
    )
    assert other.difference == pytest.approx(-one.difference)
    assert other[1:] == pytest.approx(one[1:])
    assert 2 / 2 ** len(differences) <= one.wilcoxon_p_value <= 1


@given(VALUES, st.integers(-9, 9), st.integers(1, 5))
def test_moments_move_and_stretch_with_the_values(values, shift, scale):
    found, moved = moments(values), moments([shift + scale * value for value in values])
    assert found.mean == pytest.approx(math.fsum(values) / len(values))
    assert moved.mean == pytest.approx(shift + scale * found.mean)
    if len(values) > 1:
        squares = math.fsum((value - found.mean) ** 2 for value in values)
        assert found.error == pytest.approx(math.sqrt(squares / (len(values) - 1) / len(values)))
        assert moved.error == pytest.approx(scale * found.error)


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def texts(seed, lines=7):
    """Two numbers a line, of which the second is positive."""
    random = np.random.default_rng(seed)
    return np.stack([random.normal(size=lines), random.uniform(0.5, 2.0, size=lines)], axis=-1)


def test_a_resample_is_the_text_with_lines_repeated_or_missing():
    """Every sample written out as a list of lines and scored as such."""
    ours, theirs = [texts(1), texts(2)], [texts(3), texts(4)]
    found = resampled({"x": ours}, {"x": theirs}, ratio, "mean")["x"]
    values = []
    for counts in _samples(7):
        assert counts.sum() == 7
        numbers = [line for line, count in enumerate(counts) for _ in range(count)]
        scores = [
            [sum(one[i, 0] for i in numbers) / sum(one[i, 1] for i in numbers) for one in arm] for arm in (ours, theirs)
        ]
        values.append(np.mean(scores[0]) - np.mean(scores[1]))
    assert len(values) == SAMPLES
    ordered = sorted(values)
    assert ordered[24] <= found.low <= ordered[25], "25 of 1,000 samples are below the interval"
    assert ordered[974] <= found.high <= ordered[975]
    middle = math.fsum(values) / SAMPLES
    beyond = sum(abs(value - middle) > abs(found.difference) for value in values)
    assert found.p_value == pytest.approx((beyond + 1) / (SAMPLES + 1))


def test_resampled_differences_are_alike_from_both_sides():
    ours, theirs = {"a": [texts(1)], "b": [texts(5)]}, {"b": [texts(6)], "a": [texts(2)], "c": [texts(7)]}
    one, other = resampled(ours, theirs, ratio, "mean"), resampled(theirs, ours, ratio, "mean")
    assert one.keys() == other.keys() == {"a", "b", "mean"}
    for name, found in one.items():
        assert (other[name].difference, other[name].p_value) == pytest.approx((-found.difference, found.p_value))
        assert (other[name].low, other[name].high) == pytest.approx((-found.high, -found.low))
    assert one["mean"].difference == pytest.approx((one["a"].difference + one["b"].difference) / 2)


@pytest.mark.parametrize("lines", [1, 2, 5])
def test_samples_draw_every_line_as_often_as_any_other(lines):
    counts = _samples(lines)
    assert counts.shape == (SAMPLES, lines)
    assert (counts.sum(axis=1) == lines).all()
    # Of 1,000 binomial counts of variance 1 - 1/n: five standard errors of their mean.
    assert np.abs(counts.mean(axis=0) - 1).max() <= 5 * math.sqrt((1 - 1 / lines) / SAMPLES)
    np.testing.assert_array_equal(counts, _samples(lines))


@given(st.lists(st.sampled_from([0.5, 1.0, 1.5, math.nan, math.inf, -math.inf]), max_size=6), st.booleans())
def test_tuning_takes_the_first_of_the_best_finite_values(values, higher):
    choice = Choice(tuple(({"number": number}, value) for number, value in enumerate(values)), higher, has_run=True)
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        assert choice.settings is None
    else:
        assert choice.settings == {"number": values.index(max(finite) if higher else min(finite))}
