from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.data import BatchConfig, DataConfig, PackedBatches, TagPolicy, VocabularyConfig, prepare

CONFIG = BatchConfig(rows=4, source_length=64, target_length=64)
SWITCH = 9


@pytest.fixture(scope="module")
def prepared(make_corpus, tmp_path_factory):
    """`prepared(bidirectional, bidirectional_steps)` over one cache."""
    run_dir = tmp_path_factory.mktemp("run")
    config = DataConfig(
        train=(make_corpus(60, name="de"), make_corpus(30, ("en", "zh"), name="zh")),
        bidirectional=True,
        tags=TagPolicy(decoder="target"),
        vocabulary=VocabularyConfig(size=400),
        batch=CONFIG,
    )

    def make(bidirectional: bool, steps: int | None = None):
        changed = dataclasses.replace(config, bidirectional=bidirectional, bidirectional_steps=steps)
        return prepare(changed, str(run_dir), seed=3)

    return make


def assert_same(batches: PackedBatches, index: int, others: PackedBatches, other: int) -> None:
    for name, array in batches[index].items():
        np.testing.assert_array_equal(array, others[other][name], err_msg=f"{name} of batch {index}")


def test_before_the_switch_both_directions_after_it_the_forward_ones_from_their_beginning(prepared):
    switched, both, forward = (prepared(*a).batches for a in ((True, SWITCH), (True,), (False,)))
    for index in range(SWITCH):
        assert_same(switched, index, both, index)
    for index in range(3 * SWITCH):
        assert_same(switched, SWITCH + index, forward, index)
    directions = [{example.direction for example in switched.examples(index)} for index in (0, SWITCH)]
    assert directions == [{"en-de", "de-en", "en-zh", "zh-en"}, {"en-de", "en-zh"}]


def test_the_ends_are_ordinary_training_and_symmetric_training(prepared):
    """Bidirectional training with none of the budget is ordinary; with all of it both directions count the same."""
    never, forward = prepared(True, 0).batches, prepared(False).batches
    for index in range(2 * SWITCH):
        assert_same(never, index, forward, index)
    rates = prepared(True, 10**6).plan.rates()
    assert rates["en-de"] == rates["de-en"] == pytest.approx(1 / 3)


def test_what_is_left_out_counts_across_the_switch(prepared):
    switched = prepared(True, SWITCH).batches
    shorter = switched.skipping([(2, 4), (SWITCH - 1, SWITCH + 2)])
    kept = [i for i in range(3 * SWITCH) if i not in (2, 3, *range(SWITCH - 1, SWITCH + 2))]
    for index, original in enumerate(kept):
        assert shorter.plan.unskipped(index) == original
        assert_same(shorter, index, switched, original)


def test_a_run_that_goes_on_need_not_plan_what_is_known(prepared):
    started = prepared(True, SWITCH).batches
    late = 40 * SWITCH
    expected = started[late]
    known = json.loads(json.dumps(started.plan.known_rows()))
    resumed = prepared(True, SWITCH)
    resumed.plan.remember(known)
    assert resumed.plan.known_rows() == known
    for name, array in resumed.batches[late].items():
        np.testing.assert_array_equal(array, expected[name])
    fresh = prepared(True, SWITCH).plan
    fresh.remember([])  # a checkpoint that knew nothing
    assert fresh.known_rows() == prepared(True, SWITCH).plan.known_rows()


def test_the_switch_is_part_of_what_a_run_that_goes_on_must_find(prepared):
    assert prepared(True, SWITCH).description != prepared(True, SWITCH + 1).description
    assert "bidirectional_steps" not in prepared(True).description


def test_a_switch_needs_two_directions_and_a_number(make_corpus, prepared):
    with pytest.raises(UserError, match="bidirectional_steps is set but bidirectional is False"):
        DataConfig(train=(make_corpus(3),), bidirectional_steps=3)
    with pytest.raises(UserError, match="bidirectional_steps=-1: must be 0 or more"):
        prepared(True, -1)
