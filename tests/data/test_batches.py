from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.data import (
    BatchConfig,
    BatchPlan,
    PackedBatches,
    Stream,
    SubwordSampling,
    TagPolicy,
    batch_iterator,
    build_cache,
)

ROWS, SOURCE_LENGTH, TARGET_LENGTH = 8, 48, 40
TAGS = TagPolicy(encoder="source", decoder="target")
KEYS = (
    "source_tokens",
    "source_segment_ids",
    "source_positions",
    "target_inputs",
    "target_labels",
    "target_segment_ids",
    "target_positions",
)


@pytest.fixture(scope="module")
def caches(make_corpus, vocabulary, tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    german, chinese = make_corpus(200), make_corpus(90, ("en", "zh"), seed=1, name="zh")
    return build_cache(german, vocabulary, root), build_cache(chinese, vocabulary, root)


@pytest.fixture(scope="module")
def make_batches(caches, vocabulary):
    """Three directions over two caches, one of them used both ways."""
    german, chinese = caches

    def make(tags=TAGS, seed=0, **config) -> PackedBatches:
        streams = [Stream(german), Stream(german, reverse=True), Stream(chinese, reverse=True)]
        shape = {"rows": ROWS, "source_length": SOURCE_LENGTH, "target_length": TARGET_LENGTH}
        return PackedBatches(BatchPlan(streams, vocabulary, tags, BatchConfig(**{**shape, **config}), seed), vocabulary)

    return make


@pytest.fixture(scope="module")
def batches(make_batches):
    return make_batches()


def assert_equal(left, right):
    assert tuple(left) == tuple(right) == KEYS
    for key in KEYS:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def fill_by_loop(batches: PackedBatches, index: int) -> dict[str, np.ndarray]:
    """One example and one token at a time."""
    plan, vocabulary = batches.plan, batches.vocabulary
    config, eos = plan.config, vocabulary.eos_id
    lengths = {"source": config.source_length, "target": config.target_length}
    arrays = {key: np.zeros((config.rows, lengths[key.split("_")[0]]), np.int32) for key in KEYS}
    used = {side: [0] * config.rows for side in lengths}
    segments = [0] * config.rows
    examples = plan.examples(index)
    for row, number, record in zip(examples.rows, examples.streams, examples.records):
        stream = plan.streams[number]
        sides = [ids[0].tolist() for ids in stream.cache.read([record])]
        source, target = reversed(sides) if stream.reverse else sides
        source = [*[*plan.source_prefixes[number], *source][: config.source_length - 1], eos]
        target = [*[*plan.target_prefixes[number], *target][: config.target_length - 1], eos]
        segments[row] += 1
        for side, ids in (("source", source), ("target", target)):
            for position, token in enumerate(ids):
                place = used[side][row] + position
                arrays[f"{side}_segment_ids"][row, place] = segments[row]
                arrays[f"{side}_positions"][row, place] = position
                arrays["source_tokens" if side == "source" else "target_labels"][row, place] = token
                if side == "target":
                    arrays["target_inputs"][row, place] = eos if position == 0 else ids[position - 1]
            used[side][row] += len(ids)
    return arrays


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": False},
        {"tags": TagPolicy()},
        {"tags": TagPolicy(encoder="target")},
        {"source_length": 12, "target_length": 9, "overlong": "truncate"},
        {"source_length": 4, "target_length": 4, "overlong": "truncate", "rows": 100},
    ],
    ids=["packed", "unpacked", "untagged", "encoder tag", "truncated", "shortest"],
)
def test_filling_equals_the_loop(make_batches, options):
    batches = make_batches(**options)
    for index in (0, 1, batches.plan.batches_per_epoch(0) - 1, batches.plan.batches_per_epoch(0) + 1):
        assert_equal(batches[index], fill_by_loop(batches, index))


def test_arrays_are_int32_of_fixed_shapes(batches):
    for index in (0, batches.plan.batches_per_epoch(0) - 1):
        for key, array in batches[index].items():
            assert array.dtype == np.int32
            assert array.shape == (ROWS, SOURCE_LENGTH if key.startswith("source") else TARGET_LENGTH)


def test_decoder_input_is_the_labels_shifted_within_segments(batches, vocabulary):
    batch = batches[1]
    for row in range(ROWS):
        for segment in range(1, batch["target_segment_ids"][row].max() + 1):
            here = batch["target_segment_ids"][row] == segment
            labels, inputs = batch["target_labels"][row][here], batch["target_inputs"][row][here]
            assert inputs[0] == vocabulary.eos_id == labels[-1]
            np.testing.assert_array_equal(inputs[1:], labels[:-1])
            assert (batch["source_segment_ids"][row] == segment).any()
    assert not batch["target_inputs"][batch["target_segment_ids"] == 0].any()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_batch_is_the_same_for_any_number_of_hosts(batches, hosts):
    share = ROWS // hosts
    for index in range(3):
        parts = [batches.read(index, host * share, (host + 1) * share) for host in range(hosts)]
        assert_equal({key: np.concatenate([part[key] for part in parts]) for key in KEYS}, batches[index])


def test_hosts_read_only_their_rows(make_batches, monkeypatch):
    batches = make_batches()
    whole = len(batches.plan.examples(0).rows)
    read = []
    original = type(batches.plan.streams[0].cache).read_tokens
    monkeypatch.setattr(
        type(batches.plan.streams[0].cache),
        "read_tokens",
        lambda self, records: read.append(len(records)) or original(self, records),
    )
    batches.read(0, 0, 2)
    assert sum(read) == len(batches.plan.examples(0, 0, 2).rows) < whole
    assert len(read) <= 2, "one read a cache"


def test_empty_rows_are_all_padding(make_batches):
    batches = make_batches(rows=4000)
    batch = batches[0]
    assert batches.plan.batches_per_epoch(0) == 1
    empty = batch["target_segment_ids"].max(axis=1) == 0
    assert empty.any()
    assert not any(batch[key][empty].any() for key in KEYS)
    assert_equal(batches.read(0, 3998, 4000), {key: batch[key][3998:] for key in KEYS})


def test_every_text_is_there_once_an_epoch(batches, make_corpus):
    pairs = list(make_corpus(200).lines)
    chinese = make_corpus(90, ("en", "zh"), seed=1).lines
    expected = sorted(
        [("en-de", *pair) for pair in pairs]
        + [("de-en", *pair[::-1]) for pair in pairs]
        + [("zh-en", *pair[::-1]) for pair in chinese]
    )
    previews = [batches.preview(index, ROWS) for index in range(batches.plan.batches_per_epoch(0))]
    assert sorted(example for batch in previews for row in batch for example in row) == expected


def test_preview_of_more_rows_than_there_are(batches):
    assert len(batches.preview(0, rows=100)) == ROWS


def test_examples_name_corpus_direction_and_pair(batches, caches, make_corpus):
    lines = {"list": make_corpus(200).lines, "zh": make_corpus(90, ("en", "zh"), seed=1).lines}
    plan = batches.plan
    for index in (0, plan.batches_per_epoch(0) + 1):
        for example in batches.examples(index, texts=True):
            pair = lines[example.corpus][example.pair]
            assert (example.source, example.target) == (pair[::-1] if example.direction != "en-de" else pair)
        assert [example[:5] for example in batches.examples(index)] == [
            example[:5] for example in batches.examples(index, texts=True)
        ]
        assert [example.row for example in batches.examples(index)] == plan.examples(index).rows.tolist()


def test_examples_name_the_segmentation(make_corpus, vocabulary, tmp_path):
    cache = build_cache(make_corpus(20), vocabulary, tmp_path, subword=SubwordSampling(variants=2))
    batches = PackedBatches(BatchPlan([Stream(cache)], vocabulary, TAGS, BatchConfig(rows=4), seed=0), vocabulary)
    epochs = [batches.plan.batches_per_epoch(epoch) for epoch in range(2)]
    for epoch, first in enumerate((0, epochs[0])):
        examples = [example for index in range(epochs[epoch]) for example in batches.examples(first + index)]
        assert sorted(example.pair for example in examples) == list(range(20))
        assert {example.segmentation for example in examples} == {epoch}


def test_example_lengths_are_those_of_all_rows(batches):
    for index in range(3):
        batch = batches[index]
        for side, lengths in zip(("source", "target"), batches.example_lengths(index)):
            segments = batch[f"{side}_segment_ids"]
            expected = [np.count_nonzero(row == number) for row in segments for number in range(1, row.max() + 1)]
            assert lengths.tolist() == expected


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_iterator_gives_batches_in_order_across_epochs(batches, num_threads):
    count = batches.plan.batches_per_epoch(0) + 3
    for index, batch in enumerate(itertools.islice(batch_iterator(batches, num_threads=num_threads), count)):
        assert_equal(batch, batches[index])


def test_a_resumed_iterator_goes_on_where_it_stopped(make_batches):
    whole = list(itertools.islice(batch_iterator(make_batches()), 12))
    for start in (0, 5, 11):
        resumed = batch_iterator(make_batches(), start=start, row_start=2, row_stop=6, prefetch=3)
        for expected, batch in zip(whole[start:], resumed):
            assert_equal(batch, {key: expected[key][2:6] for key in KEYS})


def test_skipped_batches_do_not_appear(make_batches):
    whole = list(itertools.islice(batch_iterator(make_batches()), 10))
    skipping = batch_iterator(make_batches().skipping([(2, 5)]), start=1)
    for expected, batch in zip([whole[1], *whole[5:]], skipping):
        assert_equal(batch, expected)


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize(
    ("raised", "told"),
    [(UserError("shard: damaged"), "batch 7: shard: damaged"), (ValueError("a bug"), "a bug"), (SystemExit(3), "3")],
)
def test_failure_in_a_reading_thread_reaches_the_consumer(make_batches, monkeypatch, num_threads, raised, told):
    batches = make_batches()
    read = PackedBatches._filled

    def fail(self, index, *part):
        if index == 7:
            raise raised
        return read(self, index, *part)

    monkeypatch.setattr(PackedBatches, "_filled", fail)
    iterator = batch_iterator(batches, start=3, num_threads=num_threads)
    for _ in range(4):
        next(iterator)
    with pytest.raises(type(raised), match=told) as caught:
        next(iterator)
    if isinstance(raised, ValueError):
        # Grain may add notes of its own.
        note, *_ = [note for note in caught.value.__notes__ if note.startswith("while batch 7 was read from ")]
        assert batches.cache_paths[0] in note
        assert "fail" in [entry.name for entry in caught.traceback], "the traceback is the thread's"
    with pytest.raises(StopIteration):
        next(iterator)


def test_damage_during_training_names_batch_shard_and_remedy(make_corpus, vocabulary, tmp_path):
    cache = build_cache(make_corpus(3000), vocabulary, tmp_path)
    plan = BatchPlan([Stream(cache)], vocabulary, TAGS, BatchConfig(rows=8), seed=0)
    iterator = batch_iterator(PackedBatches(plan, vocabulary))
    next(iterator)
    shard = next(Path(cache.path).glob("*.array_record"))
    os.truncate(shard, 0)
    with pytest.raises(UserError, match=rf"^batch \d+: {shard}: damaged \(.*delete the folder {cache.path} and"):
        list(itertools.islice(iterator, 100))


def test_seeds_differ(make_batches):
    assert not np.array_equal(make_batches(seed=0)[0]["source_tokens"], make_batches(seed=1)[0]["source_tokens"])


def test_speed(list_corpus, vocabulary, tmp_path):
    """A far lower bar than the 4 million target tokens a second of an idle core: it catches loops over tokens."""
    random = np.random.default_rng(0)
    words = np.array(["the", "cat", "dog", "house", "tree", "river", "child", "street", "garden", "window"])
    lines = tuple(tuple(" ".join(words[random.integers(0, 10, 6)]) for _ in range(2)) for _ in range(4000))
    cache = build_cache(list_corpus(lines), vocabulary, tmp_path)
    config = BatchConfig(rows=32, source_length=256, target_length=256)
    batches = PackedBatches(BatchPlan([Stream(cache)], vocabulary, TAGS, config, seed=0), vocabulary)
    batches[0]
    count = batches.plan.batches_per_epoch(0)
    start = time.process_time()
    labels = sum(int((batches[index]["target_segment_ids"] > 0).sum()) for index in range(count))
    assert labels / (time.process_time() - start) > 5e5
