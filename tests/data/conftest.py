"""A vocabulary and streams of given lengths for the tests of this room."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from t5x_ext.data import Stream, Vocabulary, train_vocabulary


@pytest.fixture(scope="session")
def vocabulary(make_corpus: Callable[..., Any]) -> Vocabulary:
    corpora = make_corpus(300, ("en", "de")), make_corpus(300, ("en", "zh"))
    lines = [line for corpus in corpora for pair in corpus.pairs() for line in pair]
    return train_vocabulary(lines, size=400, languages=("en", "de", "zh"))


@pytest.fixture(scope="session")
def make_stream() -> Callable[..., Stream]:
    """`make_stream(lengths [n, 2], "en", "de")`: a stream that has lengths but no tokens, enough for a plan."""

    def make(
        lengths: np.ndarray, source: str = "en", target: str = "de", reverse: bool = False, variants: int = 1
    ) -> Stream:
        lengths = np.asarray(lengths, dtype=np.int32)
        cache = SimpleNamespace(
            path=f"{source}{target}",
            name=f"{source}{target}",
            languages=(source, target),
            lengths=lengths,
            variants=variants,
            num_pairs=len(lengths) // variants,
        )
        return Stream(cache, reverse)

    return make
