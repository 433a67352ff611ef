from __future__ import annotations

import numpy as np

from t5x_ext.data import Stream, text_directions


def test_reversing_swaps_everything_and_twice_is_nothing(make_stream):
    lengths = np.array([[1, 2], [3, 4]])
    forward = make_stream(lengths)
    backward = Stream(forward.cache, reverse=True)
    assert (forward.name, backward.name) == ("en-de", "de-en")
    assert (backward.source_language, backward.target_language) == ("de", "en")
    np.testing.assert_array_equal(backward.lengths, lengths[:, ::-1])
    np.testing.assert_array_equal(Stream(backward.cache, not backward.reverse).lengths, forward.lengths)


def test_text_directions(make_corpus):
    corpora = (make_corpus(3), make_corpus(2, ("en", "zh")))
    assert [direction.name for direction in text_directions(corpora, bidirectional=False)] == ["en-de", "en-zh"]
    directions = text_directions(corpora, bidirectional=True)
    assert [direction.name for direction in directions] == ["en-de", "de-en", "en-zh", "zh-en"]
    sources, references = directions[0].texts()
    assert list(zip(sources, references)) == list(corpora[0].lines)
    assert directions[1].texts() == (references, sources)
