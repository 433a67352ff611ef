from __future__ import annotations

import json
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.data import BatchConfig, BatchPlan, TagPolicy
from t5x_ext.data import plan as plan_module

LENGTHS = np.random.default_rng(0).integers(2, 12, (300, 2))
CONFIG = BatchConfig(rows=4, source_length=32, target_length=32)


@pytest.fixture
def plan_of(vocabulary):
    def make(*streams, seed=0, tags=TagPolicy(), shuffle=True, skipped=(), **config):  # noqa: B008
        batch = BatchConfig(**{**{"rows": 4, "source_length": 32, "target_length": 32}, **config})
        return BatchPlan(streams, vocabulary, tags, batch, seed, shuffle, skipped)

    return make


def epoch_examples(plan, epoch):
    """(stream, record) of every example of an epoch, in batch order."""
    first = sum(plan.batches_per_epoch(number) for number in range(epoch))
    examples = [plan.examples(first + batch) for batch in range(plan.batches_per_epoch(epoch))]
    return [pair for batch in examples for pair in zip(batch.streams.tolist(), batch.records.tolist())]


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_exactly_once_an_epoch(plan_of, make_stream, packing):
    plan = plan_of(
        make_stream(LENGTHS), make_stream(LENGTHS, reverse=True), make_stream(LENGTHS[:70], "en", "zh"), packing=packing
    )
    expected = Counter((stream, record) for stream, size in enumerate((300, 300, 70)) for record in range(size))
    orders = [epoch_examples(plan, epoch) for epoch in range(3)]
    assert all(Counter(order) == expected for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_rows_hold_their_examples_whole(plan_of, make_stream):
    plan = plan_of(make_stream(LENGTHS), tags=TagPolicy(encoder="source", decoder="target"))
    for index in range(plan.batches_per_epoch(0)):
        examples = plan.examples(index)
        np.testing.assert_array_equal(examples.source_lengths, LENGTHS[examples.records, 0] + 2)
        np.testing.assert_array_equal(examples.target_lengths, LENGTHS[examples.records, 1] + 2)
        assert (np.diff(examples.rows) >= 0).all()
        assert examples.rows.max() < 4
        assert np.bincount(examples.rows, examples.source_lengths).max() <= 32
        assert np.bincount(examples.rows, examples.target_lengths).max() <= 32


def test_without_packing_one_example_a_row(plan_of, make_stream):
    plan = plan_of(make_stream(LENGTHS), packing=False)
    assert plan.batches_per_epoch(0) == 75
    assert plan.examples(3).rows.tolist() == [0, 1, 2, 3]


def test_without_shuffling_the_order_is_the_streams(plan_of, make_stream):
    plan = plan_of(make_stream(LENGTHS), make_stream(LENGTHS[:10], "en", "zh"), packing=False, shuffle=False)
    expected = [(0, record) for record in range(300)] + [(1, record) for record in range(10)]
    assert epoch_examples(plan, 0) == expected


def test_batches_of_an_epoch_have_equally_many_rows(plan_of, make_stream):
    plan = plan_of(make_stream(LENGTHS[:101]), packing=False, rows=20)
    rows = [len(np.unique(plan.examples(index).rows)) for index in range(plan.batches_per_epoch(0))]
    assert sorted(rows) == [16, 17, 17, 17, 17, 17]


def test_a_plan_is_a_pure_function_of_seed_and_number(plan_of, make_stream):
    forward, backward, other = (plan_of(make_stream(LENGTHS), seed=seed) for seed in (5, 5, 6))
    total = sum(forward.batches_per_epoch(epoch) for epoch in range(3))
    ahead = [forward.examples(index).records.tolist() for index in range(total)]
    back = [backward.examples(index).records.tolist() for index in reversed(range(total))]
    assert ahead == back[::-1]
    assert ahead != [other.examples(index).records.tolist() for index in range(total)]


def test_parts_of_a_batch_are_rows_of_the_whole(plan_of, make_stream):
    plan = plan_of(make_stream(LENGTHS))
    whole = plan.examples(2)
    for start, stop in ((0, 2), (1, 4), (3, 3), (0, 4)):
        part, inside = plan.examples(2, start, stop), (whole.rows >= start) & (whole.rows < stop)
        np.testing.assert_array_equal(part.rows + start, whole.rows[inside])
        np.testing.assert_array_equal(part.records, whole.records[inside])


def test_locate(plan_of, make_stream):
    plan = plan_of(make_stream(LENGTHS[:50]))
    expected = [(epoch, batch) for epoch in range(4) for batch in range(plan.batches_per_epoch(epoch))]
    assert [plan.locate(index) for index in range(len(expected))] == expected
    assert [plan.epoch_of(index) for index in range(len(expected))] == [epoch for epoch, _ in expected]
    with pytest.raises(IndexError):
        plan.locate(-1)


def test_skipped_ranges_are_left_out(plan_of, make_stream):
    plan = plan_of(make_stream(LENGTHS[:50]))
    total = 3 * plan.batches_per_epoch(0)
    left = [index for index in range(total) if not (2 <= index < 5 or 7 <= index < 8)]
    skipping = plan.skipping([(7, 8), (2, 4), (3, 5), (9, 9)])
    assert skipping.skipped == ((2, 5), (7, 8))
    assert [skipping.unskipped(index) for index in range(len(left))] == left
    for index, number in enumerate(left):
        assert skipping.examples(index).records.tolist() == plan.examples(number).records.tolist()
    assert skipping.skipping([(20, 22)]).skipped == ((2, 5), (7, 8), (20, 22))
    assert plan_of(make_stream(LENGTHS), skipped=[(1, 3)]).skipped == ((1, 3),)
    with pytest.raises(UserError, match=r"skipped range \[3, 1\)"):
        plan.skipping([(3, 1)])


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of at most 64 examples, so that small epochs have several."""
    monkeypatch.setattr(plan_module, "_WINDOW_EXAMPLES", 64)


@pytest.mark.parametrize("packing", [True, False])
def test_windows_of_an_epoch_hold_every_example_once(plan_of, make_stream, small_windows, packing):
    overlong = LENGTHS.copy()
    overlong[::7] = 33
    plan = plan_of(make_stream(LENGTHS), make_stream(overlong, reverse=True), make_stream(LENGTHS[:70], "en", "zh"),
                   packing=packing)  # fmt: skip
    kept = [record for record in range(300) if record % 7]
    expected = Counter([(0, n) for n in range(300)] + [(1, n) for n in kept] + [(2, n) for n in range(70)])
    orders = [epoch_examples(plan, epoch) for epoch in range(3)]
    assert all(Counter(order) == expected for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [len(rows) for rows in plan.known_rows()[:3]] == [10, 10, 10], "627 examples in windows of at most 64"
    if packing:
        for index in range(plan.batches_per_epoch(0)):
            examples = plan.examples(index)
            assert np.bincount(examples.rows, examples.source_lengths).max() <= 32
            assert np.bincount(examples.rows, examples.target_lengths).max() <= 32


def test_windows_mix_streams_as_the_epoch_does(plan_of, make_stream, small_windows):
    plan = plan_of(make_stream(LENGTHS), make_stream(LENGTHS[:100], "en", "zh"), packing=False, rows=40)
    for index in range(plan.batches_per_epoch(0)):
        assert 2 <= (plan.examples(index).streams == 1).sum() <= 20


def test_batches_before_the_last_window_are_full(plan_of, make_stream, small_windows):
    plan = plan_of(make_stream(LENGTHS[:270]), packing=False, rows=25)
    rows = [len(np.unique(plan.examples(index).rows)) for index in range(plan.batches_per_epoch(0))]
    assert rows == [25] * 8 + [23, 23, 24], "216 rows before the last window of five, 200 of them in full batches"


@pytest.mark.parametrize("rows", [1, 4, 50, 500])
def test_windows_keep_a_plan_a_pure_function_of_seed_and_number(plan_of, make_stream, small_windows, rows):
    forward, backward = (plan_of(make_stream(LENGTHS), make_stream(LENGTHS[:50], "en", "zh"), rows=rows, temperature=3)
                         for _ in range(2))  # fmt: skip
    total = sum(forward.batches_per_epoch(epoch) for epoch in range(3))
    ahead = [forward.examples(index).records.tolist() for index in range(total)]
    assert ahead == [backward.examples(index).records.tolist() for index in reversed(range(total))][::-1]


def test_parts_of_batches_across_windows_are_rows_of_the_whole(plan_of, make_stream, small_windows):
    plan = plan_of(make_stream(LENGTHS), rows=30)
    for index in range(plan.batches_per_epoch(0)):
        whole = plan.examples(index)
        for start, stop in ((0, 10), (10, 30), (29, 30), (7, 7)):
            part, inside = plan.examples(index, start, stop), (whole.rows >= start) & (whole.rows < stop)
            np.testing.assert_array_equal(part.rows + start, whole.rows[inside])
            np.testing.assert_array_equal(part.records, whole.records[inside])


def test_what_is_known_of_rows_spares_planning(plan_of, make_stream, small_windows, monkeypatch):
    first = plan_of(make_stream(LENGTHS))
    index = sum(first.batches_per_epoch(epoch) for epoch in range(4)) + 3
    expected = first.examples(index).records.tolist()
    resumed = plan_of(make_stream(LENGTHS))
    resumed.remember(json.loads(json.dumps(first.known_rows())))
    planned = []
    plan_window = BatchPlan._plan_window
    monkeypatch.setattr(
        BatchPlan, "_plan_window", lambda self, *window: planned.append(window) or plan_window(self, *window)
    )
    assert resumed.examples(index).records.tolist() == expected
    assert planned == [(4, 0), (4, 1)], "the window, and the next one ahead"
    assert resumed.skipping([(index, index + 1)]).known_rows() == resumed.known_rows() == first.known_rows()


def test_knowledge_of_another_plan_is_refused(plan_of, make_stream, small_windows):
    plan = plan_of(make_stream(LENGTHS))
    plan.examples(0)
    known = plan.known_rows()
    with pytest.raises(UserError, match="of other data: windows have other rows"):
        plan.remember([[known[0][0] + 1]])
    with pytest.raises(UserError, match="of other data: epochs have other windows"):
        plan.remember([[5, 5], [5]])
    fresh = plan_of(make_stream(LENGTHS))
    fresh.remember([[known[0][0] + 1]])
    with pytest.raises(UserError, match="of other data: windows have other rows"):
        fresh.examples(0)


def test_memory_does_not_grow_with_the_number_of_examples(plan_of, make_stream, monkeypatch):
    monkeypatch.setattr(plan_module, "_WINDOW_EXAMPLES", 1 << 12)
    lengths = np.random.default_rng(0).integers(2, 28, (200_000, 2)).astype(np.int32)
    peaks = []
    for count in (20_000, 200_000):
        stream = make_stream(lengths[:count])
        tracemalloc.start()
        plan_of(stream, rows=64).batches_per_epoch(0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0], f"ten times the examples, {peaks} bytes: threads overlap by chance"


def test_failure_while_planning_reaches_the_caller(plan_of, make_stream, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(plan_module, "pack", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        plan_of(make_stream(LENGTHS)).examples(0)


def test_rates_from_proportional_to_uniform(plan_of, make_stream):
    streams = [
        make_stream(np.full((size, 2), 5), "en", target) for size, target in ((800, "de"), (150, "zh"), (50, "en"))
    ]
    proportional = plan_of(*streams).rates()
    assert proportional == pytest.approx({"en-de": 0.8, "en-zh": 0.15, "en-en": 0.05})
    rates = [plan_of(*streams, temperature=temperature).rates() for temperature in (1, 2, 5, 100, math.inf)]
    assert rates[-1] == pytest.approx(dict.fromkeys(proportional, 1 / 3))
    assert all(sum(rate.values()) == pytest.approx(1) for rate in rates)
    for direction, sign in (("en-de", -1), ("en-en", 1)):
        assert (np.diff([rate[direction] for rate in rates]) * sign > 0).all()
    square_roots = np.sqrt([800, 150, 50])
    np.testing.assert_allclose(list(rates[1].values()), square_roots / square_roots.sum())


def test_corpora_of_a_direction_share_its_rate_by_size(plan_of, make_stream):
    streams = [make_stream(np.full((size, 2), 5)) for size in (30, 60)] + [make_stream(LENGTHS[:10], "en", "zh")]
    plan = plan_of(*streams, temperature=math.inf)
    assert plan.rates() == pytest.approx({"en-de": 0.5, "en-zh": 0.5})
    drawn = Counter(stream for stream, _ in epoch_examples(plan, 0))
    assert [drawn[stream] for stream in range(3)] == pytest.approx([50 / 3, 100 / 3, 50], abs=1)


def test_draws_follow_rates_and_passes_are_complete(plan_of, make_stream):
    plan = plan_of(make_stream(LENGTHS[:90]), make_stream(LENGTHS[:10], "en", "zh"), temperature=math.inf)
    epochs = [epoch_examples(plan, epoch) for epoch in range(9)]
    assert all(Counter(stream for stream, _ in epoch) == {0: 50, 1: 50} for epoch in epochs)
    drawn = Counter(pair for epoch in epochs for pair in epoch)
    assert {drawn[0, record] for record in range(90)} == {5}, "450 draws are five passes over 90 examples"
    assert {drawn[1, record] for record in range(10)} == {45}
    assert {count for (stream, _), count in Counter(epochs[0]).items() if stream == 1} == {5}


def test_no_stream_is_starved(plan_of, make_stream):
    streams = [make_stream(np.full((size, 2), 5)) for size in (2000, 1)] + [make_stream(LENGTHS, "en", "zh")]
    plan = plan_of(*streams, temperature=math.inf)
    drawn = Counter(stream for stream, _ in epoch_examples(plan, 0))
    assert drawn[1] == 1
    assert sum(drawn.values()) == 2301


def test_segmentations_change_with_the_pass(plan_of, make_stream):
    plan = plan_of(make_stream(np.tile(LENGTHS[:20], (3, 1)), variants=3))
    for epoch in range(4):
        assert sorted(record for _, record in epoch_examples(plan, epoch)) == [
            epoch % 3 * 20 + pair for pair in range(20)
        ]


def test_overlong_examples_are_dropped_and_counted(plan_of, make_stream, caplog):
    lengths = np.array([[5, 5], [31, 5], [32, 5], [5, 30], [5, 31]])
    tags = TagPolicy(decoder="target")
    with caplog.at_level("INFO"):
        plan = plan_of(make_stream(lengths), tags=tags)
    assert {record for _, record in epoch_examples(plan, 0)} == {0, 1, 3}
    assert plan.overlong == {"en-de": 2}
    assert "en-de (ende): 2 of 5 examples dropped as overlong" in caplog.text
    with pytest.raises(UserError, match=r"ende, en-de: all 1 examples are longer than source_length=32"):
        plan_of(make_stream(lengths[2:3]), tags=tags)


def test_a_pair_is_dropped_if_one_segmentation_is_overlong(plan_of, make_stream):
    plan = plan_of(make_stream([[5, 5], [5, 5], [5, 5], [5, 40]], variants=2))
    assert epoch_examples(plan, 0) == [(0, 0)]
    assert epoch_examples(plan, 1) == [(0, 2)]


def test_overlong_examples_are_truncated(plan_of, make_stream):
    plan = plan_of(make_stream([[5, 5], [40, 5], [5, 40]]), overlong="truncate")
    examples = [plan.examples(index) for index in range(plan.batches_per_epoch(0))]
    lengths = {
        record: (source, target)
        for batch in examples
        for record, source, target in zip(batch.records, batch.source_lengths, batch.target_lengths)
    }
    assert lengths == {0: (6, 6), 1: (32, 6), 2: (6, 32)}
    assert plan.overlong == {"en-de": 2}


def test_density_counts_labels(plan_of, make_stream):
    plan = plan_of(make_stream(np.full((6, 2), 15)))
    assert plan.batches_per_epoch(0) == 1
    assert plan.density == 6 * 16 / (4 * 32)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", 0), ("source_length", 3), ("target_length", 0), ("temperature", 0.5), ("overlong", "keep")],
)
def test_config_mistakes(field, value):
    with pytest.raises(UserError, match=f"BatchConfig.{field}={value!r}"):
        BatchConfig(**{field: value})


def test_no_streams(vocabulary):
    with pytest.raises(UserError, match="no training data"):
        BatchPlan([], vocabulary, TagPolicy(), CONFIG, seed=0)
