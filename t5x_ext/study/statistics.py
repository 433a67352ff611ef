"""Means with standard errors, paired tests over seeds, and paired bootstrap over lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

SAMPLES = 1000
"""Of the bootstrap, as many as sacreBLEU takes."""

COVERAGE = 0.95
"""Of intervals."""


class Moments(NamedTuple):
    """A sample of runs."""

    mean: float
    error: float | None  # standard error of the mean; None of a single value
    size: int


class Paired(NamedTuple):
    """Differences of two samples whose members belong together, seed by seed."""

    difference: float  # mean
    error: float | None  # its standard error
    size: int
    p_value: float | None  # two-sided, of Student's paired t-test; None of a single pair
    wilcoxon_p_value: float | None  # two-sided, of Wilcoxon's signed-rank test: with n pairs at least 2 / 2^n


class Resampled(NamedTuple):
    """The difference of two scores of the same lines, by paired bootstrap (Koehn 2004)."""

    difference: float
    low: float  # of the interval of 95 %
    high: float
    p_value: float  # two-sided, as sacreBLEU's


def moments(values: Sequence[float]) -> Moments:
    """Mean and standard error (standard deviation of n - 1 degrees of freedom, over the root of n).

    >>> moments([1.0, 3.0])
    Moments(mean=2.0, error=1.0, size=2)
    """
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Moments(float(np.mean(values)), error, len(values))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Tests whether two samples differ, whose i-th members are of the same seed.

    Student's test assumes differences that are about normally distributed, Wilcoxon's symmetric ones. Differences that
    are all zero have p = 1.

    Args:
      values: of one arm.
      baseline: of the other one, as many.
    """
    differences = np.subtract(values, baseline, dtype=float)
    mean, error, size = moments(differences.tolist())
    if size < 2:
        return Paired(mean, error, size, None, None)
    if not differences.any():
        return Paired(mean, error, size, 1.0, 1.0)
    from scipy import stats

    wilcoxon = float(stats.wilcoxon(differences).pvalue)
    if np.ptp(differences) == 0:  # all the same: the t statistic is infinite
        return Paired(mean, error, size, 0.0, wilcoxon)
    return Paired(mean, error, size, float(stats.ttest_1samp(differences, 0.0).pvalue), wilcoxon)


LineSums = Mapping[str, Sequence[Float[np.ndarray, "lines sums"]]]
"""By the name of a score, what it sums up, line by line, for each seed."""

Score = Callable[[Float[np.ndarray, "*samples sums"]], Float[np.ndarray, "*samples"]]


def resampled(values: LineSums, baseline: LineSums, score: Score, mean: str) -> dict[str, Resampled]:
    """Differences of scores by paired bootstrap over lines, averaged over seeds.

    Line i is the same line in both, in all seeds and, if texts have equally many lines, under all names: one sample of
    line numbers serves them all, so that lines that are hard in every language make the mean as uncertain as it is.

    Args:
      values: of one arm.
      baseline: of the other; names and seeds that one of them lacks are not compared.
      score: from sums over lines to values.
      mean: the name of the mean over all names.

    Returns:
      By name, and as `mean` over them if there are several; nothing without a common name.
    """
    points: dict[str, np.ndarray] = {}
    samples: dict[str, np.ndarray] = {}
    for name in values:
        if name not in baseline:
            continue
        pairs = list(zip(values[name], baseline[name]))
        weights = _samples(len(pairs[0][0])).astype(float)
        points[name] = np.mean([score(one.sum(axis=0)) - score(other.sum(axis=0)) for one, other in pairs])
        samples[name] = np.mean([score(weights @ one) - score(weights @ other) for one, other in pairs], axis=0)
    if len(points) > 1:
        points[mean], samples[mean] = np.mean([*points.values()], axis=0), np.mean([*samples.values()], axis=0)
    return {name: _interval(float(points[name]), samples[name]) for name in points}


def _samples(lines: int) -> Int[np.ndarray, "samples lines"]:
    """How often every line is in each sample; always the same for as many lines."""
    return np.random.default_rng(0).multinomial(lines, np.full(lines, 1 / lines), SAMPLES)


def _interval(difference: float, samples: Float[np.ndarray, " samples"]) -> Resampled:
    low, high = np.percentile(samples, (50 * (1 - COVERAGE), 50 * (1 + COVERAGE)))
    more_extreme = int(np.sum(np.abs(samples - samples.mean()) > abs(difference)))
    p_value = (more_extreme + 1) / (len(samples) + 1) if difference else 1.0
    return Resampled(difference, float(low), float(high), p_value)
