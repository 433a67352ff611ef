from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_ext.contracts import UserError
from t5x_ext.data.row_counts import RowCounts

epochs_of_windows = st.integers(1, 4).flatmap(
    lambda windows: st.lists(st.lists(st.integers(1, 30), min_size=windows, max_size=windows), min_size=1, max_size=4)
)


def counted(epochs, batch_rows):
    counts = RowCounts(len(epochs[0]), batch_rows)
    for rows in epochs:
        for count in rows:
            counts.add(count)
    return counts


@given(epochs_of_windows, st.integers(1, 40))
def test_batches_hold_every_row_once_in_order(epochs, batch_rows):
    counts = counted(epochs, batch_rows)
    number = 0
    for epoch, rows in enumerate(epochs):
        batches = counts.batches(epoch)
        spans = [counts.rows_of(epoch, batch) for batch in range(batches)]
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
        assert spans[-1][1] == sum(rows)
        sizes = [stop - start for start, stop in spans]
        assert max(sizes) <= batch_rows
        assert min(sizes) >= 1
        full = sum(rows[:-1]) // batch_rows
        assert sizes[:full] == [batch_rows] * full
        assert max(sizes[full:]) - min(sizes[full:]) <= 1
        assert batches == -(-sum(rows) // batch_rows), "no more batches than needed"
        for batch in range(batches):
            assert counts.locate(number) == (epoch, batch)
            number += 1
    assert counts.locate(number) is None
    assert counts.batches(len(epochs)) is None


@given(epochs_of_windows, st.integers(1, 40))
def test_what_is_known_early_stays_true(epochs, batch_rows):
    whole = counted(epochs, batch_rows)
    early = RowCounts(len(epochs[0]), batch_rows)
    for count in [count for rows in epochs for count in rows]:
        early.add(count)
        number = 0
        while (found := early.locate(number)) is not None:
            assert found == whole.locate(number)
            assert early.rows_of(*found) == whole.rows_of(*found)
            number += 1


def test_json_round_trip_goes_on():
    counts, other = (RowCounts(3, 4) for _ in range(2))
    for rows in (5, 6, 7, 8):
        counts.add(rows)
    assert counts.to_json() == [[5, 6, 7], [8]]
    other.add(5)
    other.extend(counts.to_json())
    assert other.to_json() == [[5, 6, 7], [8]]
    other.extend([[5, 6]])
    assert (other.to_json(), other.next_window) == ([[5, 6, 7], [8]], (1, 1))


@pytest.mark.parametrize("rows", [[[5, 7]], [[6]], [[5], [6]], [[5, 6, 7, 8]]])
def test_contradictions_are_refused(rows):
    counts = RowCounts(3, 4)
    for known in (5, 6, 7):
        counts.add(known)
    with pytest.raises(UserError, match="of other data"):
        counts.extend(rows)
