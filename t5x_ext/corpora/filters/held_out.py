"""Held-out test lines, by hash: training text must have none of them on either side.

A line is held out if it has the same letters and digits as a held-out line of the same language. Letter case, width,
compatibility forms (NFKC), punctuation and spaces are ignored. So a held-out "Yes." drops every "yes!", which costs
almost nothing and keeps test scores valid.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from etils import epath

from t5x_ext.contracts import Corpus
from t5x_ext.corpora.filters.config import FilterConfig
from t5x_ext.corpora.filters.text import base_language, letters_key
from t5x_ext.corpora.filters.transforms import LineTransform

HeldOut: TypeAlias = tuple[frozenset[bytes], ...]
"""For every side of a corpus the hashes of the held-out lines in its language; about 100 bytes of memory a line."""

_FILE = "held_out.pickle"
_HASH_BYTES = 16


def held_out_hash(line: str) -> bytes:
    """The hash of a normalised line: 16 bytes (BLAKE2b) of `letters_key`, enough to exclude collisions."""
    return hashlib.blake2b(letters_key(line).encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES).digest()


def hold_out(corpora: Iterable[Corpus], config: FilterConfig, languages: Sequence[str]) -> HeldOut:
    """Hashes of the lines of held-out corpora, on either side, for text of these languages.

    Lines are normalised as the text is. Chinese as `zh` is held out in text of `zh_TW` too. Empty lines are not held
    out; they have a rule of their own.

    Raises:
      UserError: if a corpus raises it.
    """
    corpora = tuple(corpora)
    return tuple(frozenset(map(held_out_hash, _lines(corpora, config, language))) for language in languages)


def _lines(corpora: Iterable[Corpus], config: FilterConfig, language: str) -> Iterable[str]:
    transform = LineTransform(config, language)
    for corpus in corpora:
        sides = [side for side, code in enumerate(corpus.languages) if base_language(code) == base_language(language)]
        for pair in corpus.pairs() if sides else ():
            yield from filter(None, (transform(pair[side], Counter()) for side in sides))


def write_held_out(held_out: HeldOut, scratch: epath.Path) -> None:
    """Writes the hashes to the scratch folder, for the workers."""
    (scratch / _FILE).write_bytes(pickle.dumps(held_out))


def read_held_out(scratch: str) -> HeldOut:
    """The hashes that `write_held_out` wrote; empty if there are none."""
    path = epath.Path(scratch) / _FILE
    return pickle.loads(path.read_bytes()) if path.exists() else ()
