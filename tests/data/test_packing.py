from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.data.packing import pack

# Mean and deviation of log lengths that give Multi30k's 16.4 +- 5.4 tokens, end of sentence included.
_LOG_MEAN, _LOG_DEVIATION = 2.75, 0.32


def caption_lengths(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated log-normal lengths of both sides, the target's a little longer."""
    random = np.random.default_rng(0)
    common, source, target = random.normal(size=(3, count))
    source = np.exp(_LOG_MEAN - 0.02 + _LOG_DEVIATION * (0.9 * common + 0.43 * source))
    target = np.exp(_LOG_MEAN + _LOG_DEVIATION * (0.9 * common + 0.43 * target))
    return tuple(np.clip(side, 3, 100).astype(np.int64) for side in (source, target))


def best_fit_decreasing(source, target, source_capacity, target_capacity):
    """One window, one example and one row at a time."""
    order = sorted(range(len(source)), key=lambda i: -max(source[i] / source_capacity, target[i] / target_capacity))
    free, rows = [], [0] * len(source)
    for example in order:
        fits = [
            (min(room), row)
            for row, room in enumerate(free)
            if room[0] >= source[example] and room[1] >= target[example]
        ]
        if not fits:
            free.append([source_capacity, target_capacity])
            fits = [(0, len(free) - 1)]
        row = min(fits)[1]
        free[row][0] -= source[example]
        free[row][1] -= target[example]
        rows[example] = row
    return rows, len(free)


lengths_and_capacities = st.tuples(st.integers(4, 40), st.integers(4, 40)).flatmap(
    lambda capacities: st.tuples(
        st.just(capacities),
        st.lists(st.tuples(st.integers(1, capacities[0]), st.integers(1, capacities[1])), min_size=1, max_size=120),
    )
)


@given(lengths_and_capacities)
@settings(max_examples=100)
def test_one_window_equals_the_loop(case):
    (source_capacity, target_capacity), pairs = case
    source, target = (np.array(side) for side in zip(*pairs))
    rows, num_rows = pack(source, target, source_capacity, target_capacity)
    assert (rows.tolist(), num_rows) == best_fit_decreasing(source, target, source_capacity, target_capacity)


@pytest.mark.parametrize("count", [1, 127, 5000, 40_000])
def test_no_row_overflows_and_none_is_empty(count):
    source, target = caption_lengths(count)
    rows, num_rows = pack(source, target, 100, 110)
    assert np.bincount(rows, weights=source).max() <= 100
    assert np.bincount(rows, weights=target).max() <= 110
    assert set(rows.tolist()) == set(range(num_rows))


@pytest.mark.parametrize(("capacity", "bar"), [(128, 0.96), (256, 0.975), (512, 0.984)])
def test_density_and_speed(capacity, bar):
    source, target = caption_lengths(60_000)
    start = time.process_time()
    _, num_rows = pack(source, target, capacity, capacity)
    seconds = time.process_time() - start
    assert target.sum() / (num_rows * capacity) >= bar
    assert target.sum() / seconds > 2e6, "target tokens planned a second; about 1.5e7 on an idle core"
