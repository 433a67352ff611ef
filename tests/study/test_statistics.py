"""Statistics against closed forms and scipy; the bootstrap against what is known of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from t5x_ext.study.statistics import SAMPLES, moments, paired, resampled


def test_moments_are_mean_and_standard_error():
    assert moments([4.0]) == (4.0, None, 1)
    assert moments([1.0, 3.0]) == (2.0, pytest.approx(1.0), 2)  # root of 2 over root of 2
    values = np.random.default_rng(0).normal(size=9)
    assert moments(values.tolist()) == (pytest.approx(values.mean()), pytest.approx(stats.sem(values)), 9)


def test_the_paired_tests_are_those_of_scipy():
    random = np.random.default_rng(1)
    baseline = random.normal(size=8)
    values = baseline + random.normal(0.5, 0.4, size=8)
    found = paired(values.tolist(), baseline.tolist())
    assert found.difference == pytest.approx((values - baseline).mean())
    assert found.p_value == pytest.approx(stats.ttest_rel(values, baseline).pvalue)
    assert found.wilcoxon_p_value == pytest.approx(stats.wilcoxon(values - baseline).pvalue)


def test_the_t_test_of_two_pairs_has_a_closed_form():
    """With one degree of freedom Student's distribution is Cauchy's: p = 1 - 2 / pi * arctan(t), here t = 3."""
    found = paired([1.0, 4.0], [0.0, 2.0])
    assert (found.difference, found.error) == (1.5, pytest.approx(0.5))
    assert found.p_value == pytest.approx(1 - 2 / math.pi * math.atan(3))
    assert found.wilcoxon_p_value == pytest.approx(0.5)  # 2 / 2^2


@pytest.mark.parametrize(
    ("values", "baseline", "p_values"),
    [
        ([1.0], [0.5], (None, None)),
        ([1.0, 2.0], [1.0, 2.0], (1.0, 1.0)),
        ([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], (0.0, 0.25)),
    ],
)
def test_samples_without_a_spread(values, baseline, p_values):
    found = paired(values, baseline)
    assert found[3:] == p_values


def score(sums):
    """The mean of a quantity over lines; the second number of each line is 1."""
    return sums[..., 0] / sums[..., 1]


def lines(values):
    return np.stack([values, np.ones_like(values)], axis=-1)


def test_the_bootstrap_of_a_mean_has_the_standard_error_of_the_mean():
    random = np.random.default_rng(2)
    before, after = random.normal(size=400), random.normal(0.3, 1.0, size=400)
    found = resampled({"x": [lines(after)]}, {"x": [lines(before)]}, score, "mean")
    assert found.keys() == {"x"}
    error = stats.sem(after - before)
    assert found["x"].difference == pytest.approx((after - before).mean())
    assert found["x"].high - found["x"].low == pytest.approx(2 * 1.96 * error, rel=0.1)
    p_value = 2 * stats.norm.sf(found["x"].difference / error)
    assert found["x"].p_value == pytest.approx(p_value, abs=0.01)


def test_equal_texts_differ_by_nothing_and_other_ones_at_most_by_chance():
    same = lines(np.arange(10.0))
    assert resampled({"x": [same]}, {"x": [same]}, score, "mean")["x"] == (0, 0, 0, 1.0)
    found = resampled({"x": [lines(np.arange(10.0) + 5)]}, {"x": [same]}, score, "mean")["x"]
    assert found == (pytest.approx(5), pytest.approx(5), pytest.approx(5), pytest.approx(1 / (SAMPLES + 1)))


def test_directions_share_the_sampled_lines_and_seeds_are_averaged():
    random = np.random.default_rng(3)
    before, after = lines(random.normal(size=50)), lines(random.normal(0.3, 1.0, size=50))
    one = resampled({"a": [after]}, {"a": [before]}, score, "mean")["a"]
    # The same lines once more tell nothing new.
    two = resampled({"a": [after], "b": [after]}, {"a": [before], "b": [before]}, score, "mean")
    assert two["mean"] == pytest.approx(one)
    both = resampled({"a": [after, before]}, {"a": [before, before]}, score, "mean")["a"]
    assert both.difference == pytest.approx(one.difference / 2)
    assert resampled({"a": [after]}, {"b": [before]}, score, "mean") == {}
