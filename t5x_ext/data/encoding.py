"""Cleaning and tokenising a chunk of pairs for a token cache."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from t5x_ext.contracts import UserError
from t5x_ext.corpora.cleaning import clean_line
from t5x_ext.corpora.filters import PairRules, pair_rules
from t5x_ext.data.vocabulary import Vocabulary

CHUNK_PAIRS = 8192
"""Pairs a chunk, before cleaning; random segmentations depend on it."""


@dataclass(frozen=True)
class SubwordSampling:
    """Several random segmentations of every line instead of its best one.

    The cache stores `variants` segmentations of every pair. Pass number n over the corpus reads segmentation
    n mod `variants`. So sampling costs disk space, but no time during training.

    Attributes:
      variants: segmentations a pair; 0: the best one only.
      alpha: small values give varied, large values likely segmentations, see `Vocabulary.sample`. On Multi30k with
        8,000 subwords 0.2, 0.3 and 0.5 make lines 30, 11 and 3 % longer.
    """

    variants: int = 0
    alpha: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.variants <= 64:
            raise UserError(f"SubwordSampling.variants={self.variants}: must be 0 (off) to 64")
        if not 0 < self.alpha <= 1:
            raise UserError(f"SubwordSampling.alpha={self.alpha}: must be above 0 and at most 1")

    @property
    def stored(self) -> int:
        """Segmentations that a cache stores for every pair."""
        return max(1, self.variants)


class Chunk(NamedTuple):
    """A tokenised chunk of pairs."""

    counts: Counter[str]  # pairs dropped by each rule, and `changed_lines`
    ids: list[bytes]  # for every variant, all token ids
    lengths: list[np.ndarray]  # for every variant, int32 [pairs, 2]


class Encoder:
    """Cleans and tokenises numbered chunks of pairs: a pure function of number and pairs."""

    def __init__(
        self,
        model: bytes,
        languages: Sequence[str],
        subword: SubwordSampling,
        rules: PairRules,
        pair_languages: tuple[str, str],
    ):
        """For the pairs of one corpus.

        Args:
          model: the vocabulary's SentencePiece model.
          languages: the vocabulary's languages.
          subword: how many segmentations of every pair.
          rules: which pairs are dropped.
          pair_languages: languages of the two sides.

        Raises:
          UserError: as `pair_rules`.
        """
        self.arguments = (model, languages, subword, rules, pair_languages)
        self._vocabulary = Vocabulary.from_model(model, languages)
        self._rules = pair_rules(rules, pair_languages)
        self._subword = subword
        self.variants = subword.stored
        self.dtype = np.dtype("<u2" if self._vocabulary.size <= 1 << 16 else "<i4")

    def encode(self, number: int, pairs: Sequence[tuple[str, str]]) -> Chunk:
        """Cleans and tokenises chunk `number` of a corpus."""
        counts: Counter[str] = Counter()
        lines: list[str] = []
        for source, target in pairs:
            cleaned = clean_line(source), clean_line(target)
            counts["changed_lines"] += (cleaned[0] != source) + (cleaned[1] != target)
            against = next((rule.name for rule in self._rules if rule.drops(cleaned)), None)
            if against is None:
                lines += cleaned
            else:
                counts[against] += 1
        variants = [self._segment(lines, number, variant) for variant in range(self.variants)]
        ids = [np.concatenate([*sides, np.zeros(0, np.int32)]).astype(self.dtype).tobytes() for sides in variants]
        lengths = [np.array([len(side) for side in sides], dtype=np.int32).reshape(-1, 2) for sides in variants]
        return Chunk(counts, ids, lengths)

    def _segment(self, lines: Sequence[str], number: int, variant: int) -> list[np.ndarray]:
        if not self._subword.variants:
            return self._vocabulary.encode(lines)
        seed = int.from_bytes(hashlib.sha256(f"{number}/{variant}".encode()).digest()[:4], "little")
        return self._vocabulary.sample(lines, self._subword.alpha, seed)
