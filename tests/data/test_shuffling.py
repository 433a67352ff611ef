from __future__ import annotations

import numpy as np
import pytest

from t5x_ext.data.shuffling import Shuffle


@pytest.mark.parametrize("size", [*range(1, 40), 99, 100, 101, 1023, 65_537])
def test_every_number_stands_in_one_place(size):
    order = Shuffle(size, np.random.default_rng(size))(np.arange(size))
    assert sorted(order.tolist()) == list(range(size))


def test_stretches_are_those_of_the_whole():
    shuffle = Shuffle(1000, np.random.default_rng(0))
    parts = [shuffle(np.arange(start, min(start + 77, 1000))) for start in range(0, 1000, 77)]
    np.testing.assert_array_equal(np.concatenate(parts), shuffle(np.arange(1000)))


def test_orders_look_random():
    """Neighbours are as far apart, and places as independent of numbers, as in a permutation drawn at random."""
    size = 200_000
    places = np.arange(size)
    first, second = (Shuffle(size, np.random.default_rng(seed))(places) for seed in (1, 2))
    for order in (first, second):
        assert np.abs(np.diff(order)).mean() == pytest.approx(size / 3, rel=0.01)
        assert abs(np.corrcoef(order, places)[0, 1]) < 0.01
        counts = np.histogram2d(order, places, bins=20)[0]
        expected = size / 400
        assert ((counts - expected) ** 2 / expected).sum() < 361 + 5 * np.sqrt(2 * 361), "chi-squared, 19 x 19 freedom"
    assert (first == second).sum() < 12, "one agreement is expected"
