"""Text that models are tested on, by hashes of its lines: what is learned from must have none of them on either side.

A line is held out where its letters and digits are those of a held-out line of the same language: neither letter case,
width and compatibility forms (NFKC) nor punctuation and spaces make a difference. What a line means does not matter: a
held-out "Yes." drops every "yes!", which is what keeps a score honest and costs next to nothing.
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
"""For every side of a corpus the hashes of the lines that are held out in its language, about 100 bytes a line."""

_FILE = "held_out.pickle"
_HASH_BYTES = 16


def held_out_hash(line: str) -> bytes:
    """The hash of a transformed line: 16 bytes (BLAKE2b) of `letters_key`, too many for a collision."""
    return hashlib.blake2b(letters_key(line).encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES).digest()


def hold_out(corpora: Iterable[Corpus], config: FilterConfig, languages: Sequence[str]) -> HeldOut:
    """Hashes of the lines of held-out corpora, whichever side they are on, for text of these languages.

    Lines are transformed first as those of the text are. Chinese as `zh` is held out in text of `zh_TW`, too. Empty
    lines are not held out: there is a rule of their own for them.

    Raises:
      UserError: for what a corpus raises.
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
    """Puts the hashes where every worker finds them."""
    (scratch / _FILE).write_bytes(pickle.dumps(held_out))


def read_held_out(scratch: str) -> HeldOut:
    """What `write_held_out` wrote; nothing where it wrote nothing."""
    path = epath.Path(scratch) / _FILE
    return pickle.loads(path.read_bytes()) if path.exists() else ()
