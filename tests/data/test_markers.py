"""Markers of text that a model has written: a piece in the encoder's input, and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.corpora import ParallelText
from t5x_ext.data import BatchConfig, DataConfig, TagPolicy, Vocabulary, VocabularyConfig, prepare


@pytest.fixture(scope="module")
def text(make_corpus, tmp_path_factory) -> ParallelText:
    folder = tmp_path_factory.mktemp("texts")
    pairs = list(make_corpus(40).pairs())
    for side, language in enumerate(("en", "de")):
        (folder / f"a.{language}").write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    return ParallelText(str(folder / "a.en"), str(folder / "a.de"), "en", "de")


def config(*corpora, bidirectional=True, **vocabulary) -> DataConfig:
    return DataConfig(
        train=corpora,
        bidirectional=bidirectional,
        tags=TagPolicy(encoder="source", decoder="target"),
        vocabulary=VocabularyConfig(size=400, **vocabulary),
        # One example a row, so that a longer prefix moves no example.
        batch=BatchConfig(rows=4, source_length=64, target_length=64, packing=False),
    )


def source_rows(prepared, index):
    batch = prepared.batches[index]
    return [
        row[segments > 0].tolist()
        for row, segments in zip(np.asarray(batch["source_tokens"]), np.asarray(batch["source_segment_ids"]))
    ]


@pytest.mark.parametrize(("side", "forward", "backward"), [("source", "BT", "FT"), ("target", "FT", "BT")])
def test_a_marker_stands_behind_the_tag_and_changes_with_the_direction(text, tmp_path, side, forward, backward):
    markers = ("BT", "FT")
    plain = prepare(config(text, markers=markers), str(tmp_path), seed=5)
    marked = prepare(config(dataclasses.replace(text, synthetic=side), markers=markers), str(tmp_path), seed=5)
    assert marked.batches.cache_paths == plain.batches.cache_paths
    seen = set()
    for index in range(6):
        directions = [example.direction for example in plain.batches.examples(index)]
        assert [example.direction for example in marked.batches.examples(index)] == directions
        for row, expected, direction in zip(source_rows(marked, index), source_rows(plain, index), directions):
            marker = forward if direction == "en-de" else backward
            assert row == [expected[0], marked.vocabulary.marker_id(marker), *expected[1:]]
            seen.add(direction)
        np.testing.assert_array_equal(marked.batches[index]["target_labels"], plain.batches[index]["target_labels"])
        texts = [[row.source for row in rows] for rows in marked.batches.preview(index, 4)]
        assert texts == [[row.source for row in rows] for rows in plain.batches.preview(index, 4)]
    assert seen == {"en-de", "de-en"}
    assert marked.description != plain.description


def test_a_vocabulary_that_is_trained_gets_the_markers_that_its_corpora_need(text, tmp_path):
    marked = prepare(config(dataclasses.replace(text, synthetic="source")), str(tmp_path / "marked"))
    vocabulary = marked.vocabulary
    assert vocabulary.markers == ("BT", "FT")
    assert vocabulary.size <= 400
    assert {vocabulary.marker_id(marker) for marker in vocabulary.markers} == {vocabulary.size - 2, vocabulary.size - 1}
    again = Vocabulary.load(str(tmp_path / "marked/vocabulary"))
    assert (again.fingerprint(), again.size) == (vocabulary.fingerprint(), vocabulary.size)
    assert again.decode([[vocabulary.marker_id("BT"), *again.encode(["the cat"])[0]]]) == ["the cat"]
    without = Vocabulary.from_model(vocabulary.model, vocabulary.languages)
    assert without.fingerprint() != vocabulary.fingerprint()
    assert without.size == vocabulary.size - 2
    with pytest.raises(UserError, match="was trained with the markers"):
        prepare(config(text), str(tmp_path / "marked"))


def test_a_vocabulary_without_them_is_refused_in_one_line(text, tmp_path):
    prepare(config(text), str(tmp_path / "plain"))
    path = str(tmp_path / "plain/vocabulary")
    with pytest.raises(UserError, match=r"has no marker <BT>; make it with VocabularyConfig\.markers"):
        prepare(config(dataclasses.replace(text, synthetic="source"), path=path), str(tmp_path / "other"))
    given = prepare(
        config(dataclasses.replace(text, synthetic="source"), path=path, markers=("BT", "FT")), str(tmp_path / "given")
    )
    assert given.vocabulary.markers == ("BT", "FT")


def test_wrong_values_are_refused(text):
    with pytest.raises(UserError, match="synthetic='both': allowed are None"):
        dataclasses.replace(text, synthetic="both")
    with pytest.raises(UserError, match="marker '<BT>'"):
        VocabularyConfig(markers=("<BT>",))


def test_a_corpus_that_is_given_twice_counts_twice(text, make_corpus, tmp_path):
    """The way to weigh one corpus more than another: all examples of a direction count the same."""
    other = make_corpus(40, seed=7)
    once = prepare(config(text, other, bidirectional=False), str(tmp_path / "once"))
    thrice = prepare(config(text, text, text, other, bidirectional=False), str(tmp_path / "thrice"))
    assert once.plan.examples_per_epoch == 80
    assert thrice.plan.examples_per_epoch == 160
    drawn = [example.corpus for index in range(40) for example in thrice.batches.examples(index)]
    assert (drawn.count("a.en-de"), drawn.count("list")) == (120, 40)
