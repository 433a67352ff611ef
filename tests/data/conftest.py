"""Small corpora, a vocabulary and streams of given lengths for the tests of this room."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from t5x_ext.data import Stream, Vocabulary, train_vocabulary

# Keeps pytest's doctest collection from importing the program that test_seqio.py runs with TensorFlow.
collect_ignore = ["seqio_program.py"]

WORDS = {
    "en": ("the", "cat", "dog", "house", "tree", "river", "child", "street", "garden", "window", "letter"),
    "de": ("das", "Katze", "Hund", "Haus", "Baum", "Fluss", "Kind", "Straße", "Garten", "Fenster", "Brief"),
    "zh": ("这", "猫", "狗", "房子", "树", "河", "孩子", "街道", "花园", "窗户", "信"),
}


@dataclass(frozen=True)
class ListCorpus:
    """A corpus from outside the package: nothing but the Protocol's members."""

    lines: tuple[tuple[str, str], ...]
    languages: tuple[str, str] = ("en", "de")
    name: str = "list"

    def pairs(self) -> Iterator[tuple[str, str]]:
        return iter(self.lines)

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.lines, self.languages)).encode()).hexdigest()


def sentences(count: int, languages: tuple[str, str], seed: int = 0) -> tuple[tuple[str, str], ...]:
    random = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        words = random.integers(0, len(WORDS["en"]), random.integers(1, 12))
        source, target = (" ".join(WORDS[language][word] for word in words) for language in languages)
        pairs.append((f"{source} {number}", f"{target} {number}"))
    return tuple(pairs)


@pytest.fixture(scope="session")
def make_corpus() -> Callable[..., ListCorpus]:
    """`make_corpus(count, ("en", "de"), seed, name)`: random aligned sentences, each ending in its number."""

    def make(count: int, languages: tuple[str, str] = ("en", "de"), seed: int = 0, name: str = "list") -> ListCorpus:
        return ListCorpus(sentences(count, languages, seed), languages, name)

    return make


@pytest.fixture(scope="session")
def list_corpus() -> type[ListCorpus]:
    return ListCorpus


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    lines = [line for pair in (*sentences(300, ("en", "de")), *sentences(300, ("en", "zh"))) for line in pair]
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


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], str]:
    """`write(name, content)` -> path of a new file."""

    def write_file(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return write_file
