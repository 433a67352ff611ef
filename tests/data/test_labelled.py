"""Batches of labelled texts: every example once an epoch, packed without touching, the same whoever reads them."""

from __future__ import annotations

import numpy as np
import pytest

from t5x_ext.contracts import BatchSource, UserError
from t5x_ext.data.labelled import (
    Examples,
    LabelledBatches,
    RowConfig,
    batch_arrays,
    in_order,
    where_examples_are,
)
from t5x_ext.data.wordpiece import TokenizedText


def examples(count=50, longest=12, seed=0):
    rng = np.random.default_rng(seed)
    texts = []
    for number in range(count):
        size = int(rng.integers(3, longest + 1))
        texts.append(TokenizedText(np.full(size, number + 1, np.int32), (np.arange(size) > size // 2).astype(np.int32)))
    return Examples(texts, rng.integers(0, 3, count))


SHAPES = [RowConfig(4, 12, 1), RowConfig(4, 30, 4), RowConfig(2, 12, 9)]


def source(config, seed=0):
    return LabelledBatches(examples(), config, seed, {"seed": seed})


@pytest.mark.parametrize("config", SHAPES)
def test_an_epoch_sees_every_example_once(config):
    batches = source(config)
    assert isinstance(batches, BatchSource)
    seen, index = [], 0
    while len(seen) < 100:
        seen += batches.examples(index)
        index += 1
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50))
    assert seen[:50] != seen[50:]


@pytest.mark.parametrize("config", SHAPES)
def test_arrays_hold_the_examples_apart(config):
    data, batches = examples(), source(config)
    for index in range(batches.epoch().batches):
        batch = batches.read(index, 0, config.rows)
        assert {name: array.shape for name, array in batch.items()} == batch_arrays(config)
        found = []
        for row, slot in np.argwhere(batch["target_segment_ids"] > 0):
            inside = batch["segment_ids"][row] == slot + 1
            number = int(batch["tokens"][row][inside][0]) - 1
            assert np.array_equal(batch["tokens"][row][inside], data.texts[number].ids)
            assert np.array_equal(batch["token_types"][row][inside], data.texts[number].types)
            assert np.array_equal(batch["positions"][row][inside], np.arange(inside.sum()))
            assert batch["starts"][row, slot] == np.flatnonzero(inside)[0]
            assert batch["target_labels"][row, slot] == data.labels[number]
            found.append(number)
        assert sorted(found) == sorted(batches.examples(index))
        assert (batch["tokens"] > 0).sum() == batches.example_lengths(index).sum()


def test_rows_are_the_same_whoever_reads_them():
    config = RowConfig(4, 30, 4)
    whole, part = source(config).read(3, 0, 4), source(config).read(3, 1, 3)
    for name, array in whole.items():
        assert np.array_equal(array[1:3], part[name])


def test_packing_needs_fewer_rows():
    padded, packed = source(RowConfig(4, 30, 1)), source(RowConfig(4, 30, 4))
    assert packed.epoch().batches < padded.epoch().batches / 2
    assert packed.epoch().examples == padded.epoch().examples == 50


def test_batches_are_skipped_and_resumed():
    batches = source(RowConfig(4, 30, 4))
    skipping = batches.skipping([(1, 3)])
    assert skipping.examples(1) == batches.examples(3)
    assert skipping.unskipped(1) == 3
    later = source(RowConfig(4, 30, 4))
    batches.examples(20)
    later.remember(batches.memory())
    assert later.memory() == batches.memory()
    assert later.examples(20) == batches.examples(20)
    assert source(RowConfig(4, 30, 4), seed=1).examples(0) != batches.examples(0)


@pytest.mark.parametrize("config", SHAPES)
def test_evaluation_keeps_the_order(config):
    data = examples()
    batches, places = in_order(data, config), where_examples_are(data, config)
    labels = np.full(50, -1)
    for batch, (inside, numbers) in zip(batches, places, strict=True):
        assert np.array_equal(inside, batch["target_segment_ids"] > 0)
        labels[numbers] = batch["target_labels"][inside]
    assert np.array_equal(labels, data.labels)


def test_wrong_shapes_are_refused():
    with pytest.raises(UserError, match=r"RowConfig.examples_per_row is 0; it must be at least 1"):
        RowConfig(examples_per_row=0)
