"""Exact and near duplicates: keys of 8 bytes a line, and which lines are not the first with their key.

A pair is a duplicate if an earlier one that passed the rules for single pairs has the same key, whether or not that
one is kept. So every kind of key can be processed by itself, in any order and on any machine, memory does not grow with
the corpus, and no duplicates remain. The price: a near duplicate of a near duplicate is dropped too, however far it is
from the first.

Keys are split into partitions by their leading bits; one partition of one kind of key is in memory at a time.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8, UInt16, UInt64

from t5x_ext.contracts import UserError
from t5x_ext.corpora.filters.config import FilterConfig
from t5x_ext.corpora.filters.text import duplicate_key, is_unsegmented

DUPLICATE_RULES = ("duplicate", "duplicate_source", "duplicate_target", "near_duplicate")
"""Names of the rules for pairs of a corpus, in the order in which they are counted."""

BANDS = 8
KEYS_PER_PARTITION = 1 << 22
_SHINGLE, _SHINGLE_UNSEGMENTED = 4, 2
_KEPT = 255


class Part(NamedTuple):
    """The keys of a chunk that are in one partition.

    Rows of equal keys ascend.
    """

    chunk: int
    keys: UInt64[np.ndarray, " keys"]  # ascending
    rows: UInt16[np.ndarray, " keys"]  # their lines, counted from the chunk's first


class KeyMaker:
    """Makes the keys of lines: one column a kind of key.

    An exact key is a hash of 8 bytes (BLAKE2b) of `duplicate_key`: in a corpus of n pairs collisions drop about
    n^2 / 2^65, which is 0.03 pairs of a billion. A near key is such a hash of one band of a MinHash signature.

    Attributes:
      columns: the rule of every column.
    """

    def __init__(self, config: FilterConfig, languages: Sequence[str]):
        """For pairs of two languages, or lines of one.

        Raises:
          UserError: if near duplicates are asked for and datasketch is not installed.
        """
        self._languages = languages
        kinds = {"pair": "duplicate", "source": "duplicate_source", "target": "duplicate_target"}
        exact = {kinds[key] if len(languages) == 2 else "duplicate" for key in config.duplicates}
        self._exact = [rule for rule in DUPLICATE_RULES if rule in exact]
        self._rows = 0
        if config.near_duplicate_similarity is not None:
            self._minhash = _minhash()
            self._rows = rows_per_band(config.near_duplicate_similarity)
        self.columns = (*self._exact, *["near_duplicate"] * (BANDS if self._rows else 0))

    def keys(self, chunk: Sequence[Sequence[str]]) -> UInt64[np.ndarray, "columns lines"]:
        """The keys of pairs (or single lines)."""
        texts = [[duplicate_key(line) for line in lines] for lines in chunk]
        rows = [[_exact_key(rule, lines) for lines in texts] for rule in self._exact]
        if self._rows:
            rows += self._near_keys(texts)
        return np.array(rows, dtype=np.uint64).reshape(len(self.columns), len(chunk))

    def _near_keys(self, texts: Sequence[Sequence[str]]) -> list[list[int]]:
        sets = (shingles(lines, self._languages) for lines in texts)
        # SHA-1, the default, takes longer than all the rest; the sets are small enough for any hash of 32 bits.
        found = self._minhash.generator(sets, num_perm=BANDS * self._rows, hashfunc=zlib.crc32)
        signatures = (minhash.hashvalues.astype("<u4").reshape(BANDS, self._rows) for minhash in found)
        digests = [[_hash(band.tobytes()) for band in signature] for signature in signatures]
        return [list(column) for column in zip(*digests)] if digests else [[] for _ in range(BANDS)]


def rows_per_band(similarity: float) -> int:
    """Rows of each of the `BANDS` bands for which the threshold (1 / bands)^(1 / rows) is nearest to a similarity."""
    return max(1, round(math.log(BANDS) / -math.log(similarity)))


def near_duplicate_probability(jaccard: float, similarity: float) -> float:
    """The probability that two lines of some Jaccard similarity count as near duplicates, for a configured one.

    1 - (1 - s^r)^b for b bands of r rows: Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4.2.

    >>> [round(near_duplicate_probability(jaccard, 0.9), 3) for jaccard in (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)]
    [0.0, 0.006, 0.089, 0.645, 0.971, 1.0]
    """
    return 1 - (1 - jaccard ** rows_per_band(similarity)) ** BANDS


def shingles(lines: Sequence[str], languages: Sequence[str]) -> set[bytes]:
    """The character n-grams of lines, each with the number of its side; a short line is one n-gram as a whole."""
    found = set()
    for side, (line, language) in enumerate(zip(lines, languages)):
        size = _SHINGLE_UNSEGMENTED if is_unsegmented(language) else _SHINGLE
        found |= {f"{side}{line[start : start + size]}" for start in range(max(len(line) - size, 0) + 1)}
    return {shingle.encode("utf-8", "surrogatepass") for shingle in found}


def _exact_key(rule: str, lines: Sequence[str]) -> int:
    text = {"duplicate_source": lines[0], "duplicate_target": lines[-1]}.get(rule, "\n".join(lines))
    return _hash(text.encode("utf-8", "surrogatepass"))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _minhash() -> Any:
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise UserError(
            "FilterConfig.near_duplicate_similarity needs datasketch: pip install 't5x_ext[clean]', or set it to None"
            f" ({error})"
        ) from error
    return MinHash


def partition_bits(num_pairs: int) -> int:
    """How many leading bits of a key number its partition, in a corpus of `num_pairs` pairs."""
    return max(0, math.ceil(math.log2(max(num_pairs, 1) / KEYS_PER_PARTITION)))


def sort_keys(
    keys: UInt64[np.ndarray, "columns lines"],
) -> tuple[UInt64[np.ndarray, "columns lines"], UInt16[np.ndarray, "columns lines"]]:
    """Keys in ascending order, and the line of each: the input of `keys_of_partition`."""
    rows = np.argsort(keys, axis=1, kind="stable")
    return np.take_along_axis(keys, rows, axis=1), rows.astype(np.uint16)


def keys_of_partition(
    chunk: int,
    keys: UInt64[np.ndarray, " lines"],
    rows: UInt16[np.ndarray, " lines"],
    partition: int,
    bits: int,
) -> Part:
    """The sorted keys of one column of a chunk that are in a partition."""
    if not bits:
        return Part(chunk, np.asarray(keys), np.asarray(rows))
    ends = [np.uint64(number << (64 - bits)) for number in (partition, partition + 1) if number < 1 << bits]
    start, stop = [*np.searchsorted(keys, ends).tolist(), len(keys)][:2]
    return Part(chunk, np.array(keys[start:stop]), np.array(rows[start:stop]))


def find_later(parts: Iterable[Part]) -> dict[int, UInt16[np.ndarray, " rows"]]:
    """Lines by chunk that repeat the key of an earlier line; `parts` are all of one partition of one kind of key."""
    ordered = sorted((Part(*part) for part in parts), key=lambda part: part.chunk)
    if not ordered:
        return {}
    keys = np.concatenate([part.keys for part in ordered])
    order = np.argsort(keys, kind="stable")
    is_later = np.zeros(len(keys), dtype=bool)
    keys = keys[order]
    is_later[order[1:]] = keys[1:] == keys[:-1]
    ends = np.cumsum([len(part.keys) for part in ordered])
    later = (part.rows[mask] for part, mask in zip(ordered, np.split(is_later, ends[:-1])))
    return {part.chunk: rows for part, rows in zip(ordered, later) if len(rows)}


class Verdicts:
    """Which lines of every chunk the duplicate rules drop; about two bytes of memory a dropped line and key."""

    def __init__(self) -> None:
        self._later: dict[int, list[tuple[str, np.ndarray]]] = defaultdict(list)

    def add(self, rule: str, later: Mapping[int, np.ndarray]) -> None:
        """Adds what `find_later` found for a rule."""
        for chunk, rows in later.items():
            self._later[chunk].append((rule, rows))

    def of_chunk(self, chunk: int, lines: int) -> UInt8[np.ndarray, " lines"]:
        """The index in `DUPLICATE_RULES` of the first rule that drops each line; a larger number if none does."""
        verdict = np.full(lines, _KEPT, dtype=np.uint8)
        for rule, rows in self._later.get(chunk, ()):
            verdict[rows] = np.minimum(verdict[rows], DUPLICATE_RULES.index(rule))
        return verdict
