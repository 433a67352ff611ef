"""Translation directions over corpora and over their caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from t5x_ext.contracts import Corpus, Direction
from t5x_ext.corpora.special_pieces import MARKERS, Side
from t5x_ext.data.cache import TokenCache


@dataclass(frozen=True)
class TextDirection:
    """A corpus read in one direction, as raw text for decoding and scoring.

    Attributes:
      corpus: the aligned lines.
      reverse: translate from the corpus' second language into its first.
    """

    corpus: Corpus
    reverse: bool = False

    @property
    def direction(self) -> Direction:
        """Its languages."""
        return Direction(*self.corpus.languages[:: -1 if self.reverse else 1])

    @property
    def source_language(self) -> str:
        """The language translated from."""
        return self.direction.source_language

    @property
    def target_language(self) -> str:
        """The language translated into."""
        return self.direction.target_language

    @property
    def name(self) -> str:
        """As in `en-de`."""
        return self.direction.name

    def texts(self) -> tuple[list[str], list[str]]:
        """All source lines and reference lines, in the order of the corpus."""
        pairs = list(self.corpus.pairs())
        return [pair[self.reverse] for pair in pairs], [pair[not self.reverse] for pair in pairs]


def text_directions(corpora: Sequence[Corpus], bidirectional: bool) -> tuple[TextDirection, ...]:
    """Every corpus forward, and after each its reverse if `bidirectional`."""
    ways = (False, True) if bidirectional else (False,)
    return tuple(TextDirection(corpus, reverse) for corpus in corpora for reverse in ways)


@dataclass(frozen=True)
class Stream:
    """A cache read in one direction; both directions share one cache.

    Attributes:
      cache: the token cache.
      reverse: translate from the cache's second language into its first.
      synthetic: the side of the cache that a model has written, if the encoder gets a marker for it; None: no marker.
    """

    cache: TokenCache
    reverse: bool = False
    synthetic: Side | None = None

    @property
    def direction(self) -> Direction:
        """Its languages."""
        return Direction(*self.cache.languages[:: -1 if self.reverse else 1])

    @property
    def source_language(self) -> str:
        """The language translated from."""
        return self.direction.source_language

    @property
    def target_language(self) -> str:
        """The language translated into."""
        return self.direction.target_language

    @property
    def name(self) -> str:
        """As in `en-de`."""
        return self.direction.name

    @property
    def marker(self) -> str | None:
        """`BT` if the source is synthetic, `FT` if the target is, None without `synthetic`."""
        if self.synthetic is None:
            return None
        return MARKERS["source" if (self.synthetic == "source") != self.reverse else "target"]

    @property
    def lengths(self) -> Int[np.ndarray, "records 2"]:
        """Source and target tokens of every record, without tags and end of sentence."""
        return self.cache.lengths[:, ::-1] if self.reverse else self.cache.lengths
