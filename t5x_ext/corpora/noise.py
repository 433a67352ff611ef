"""Noise for training text: word noise for back-translation, and typing errors.

The noise of a line is a function of the seed and the line's number. So it does not depend on the order in which lines
are processed, on how a text is split, or on the process.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from t5x_ext.contracts import UserError
from t5x_ext.corpora.filters.text import is_unsegmented

_Draw: TypeAlias = Callable[[], float]

_LATIN = "A-Za-z0-9À-ɏ"
_UNIT = re.compile(rf"[{_LATIN}]+|\S")
_BETWEEN_LATIN = re.compile(rf"(?<=[{_LATIN}])\n(?=[{_LATIN}])")


def _draws(seed: int, number: int) -> _Draw:
    """Numbers in [0, 1) for one line. Seeded with text, `random()` is the only sequence that Python keeps the same."""
    return random.Random(f"{seed}/{number}").random


def _check_probabilities(noise: object, *names: str) -> None:
    for name in names:
        value = getattr(noise, name)
        if not 0 <= value <= 1:
            raise UserError(f"{type(noise).__name__}.{name}={value}: must be 0 to 1")


@dataclass(frozen=True)
class WordNoise:
    """Noise for the sources of back-translation: words are moved, dropped, or replaced by a filler.

    After beam search this is "beam + noise", which trains as well as sampled translations. Words are separated by
    spaces; in Chinese and Japanese a word is a character, or a run of Latin letters and digits.

    First, words are sorted by i + u, where i is a word's position and u is sampled from [0, swap + 1), so that no word
    moves by more than `swap` positions. Then each word is dropped or kept, and each kept word is replaced or not,
    independently. A line with words keeps at least one.

    Attributes:
      drop: probability that a word is dropped.
      blank: probability that a kept word is replaced by `blank_token`.
      swap: most positions by which a word moves; 0: none does.
      blank_token: the filler, a word that does not occur in the text; it is encoded like any other.
      seed: of the random choices.

    Raises:
      UserError: for a value that is no probability, a negative `swap`, and a filler that is not one word.

    References:
      Edunov et al., arXiv 1808.09381, section 3, whose values are the defaults; the permutation is that of Lample et
      al., arXiv 1711.00043. They noise subwords; here it is words, before tokenisation.
    """

    drop: float = 0.1
    blank: float = 0.1
    swap: int = 3
    blank_token: str = "_"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_probabilities(self, "drop", "blank")
        if self.swap < 0:
            raise UserError(f"WordNoise.swap={self.swap}: must be at least 0 positions")
        if self.blank_token.split() != [self.blank_token]:
            raise UserError(f"WordNoise.blank_token={self.blank_token!r}: must be one word")

    def __call__(self, line: str, number: int, language: str) -> str:
        """Line `number` of a text, with noise.

        >>> all_blank = WordNoise(drop=0, blank=1, swap=0)
        >>> all_blank("zwei Hunde", 0, "de"), all_blank("两只", 0, "zh")
        ('_ _', '__')
        """
        words = _UNIT.findall(line) if is_unsegmented(language) else line.split()
        noisy = self._noisy(words, _draws(self.seed, number)) if words else words
        return line if noisy == words else _joined(noisy, language)

    def _noisy(self, words: list[str], draw: _Draw) -> list[str]:
        if self.swap:
            keys = [index + draw() * (self.swap + 1) for index in range(len(words))]
            words = [words[index] for index in sorted(range(len(words)), key=keys.__getitem__)]
        chances = [draw() for _ in words]
        # If all would be dropped, the word with the largest number is kept.
        least = min(self.drop, max(chances))
        kept = [word for word, chance in zip(words, chances) if chance >= least]
        return [self.blank_token if draw() < self.blank else word for word in kept]


def _joined(words: list[str], language: str) -> str:
    """A line of words, without spaces in Chinese and Japanese but between Latin ones."""
    if not is_unsegmented(language):
        return " ".join(words)
    return _BETWEEN_LATIN.sub(" ", "\n".join(words)).replace("\n", "")


@dataclass(frozen=True)
class TypingNoise:
    """Typing errors.

    Attributes:
      swap: probability that a letter is swapped with the next one of its word (arXiv 1711.02173).
      drop: probability that a letter is dropped, unless it is the only one of its word.
      double: probability that a letter is typed twice.
      lower_case: probability that a line is in lower case.
      bare: probability that a line loses the punctuation at its end.
      seed: of the random choices.

    Raises:
      UserError: for a value that is no probability.
    """

    swap: float = 0.02
    drop: float = 0.02
    double: float = 0.02
    lower_case: float = 0.1
    bare: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        _check_probabilities(self, "swap", "drop", "double", "lower_case", "bare")

    def __call__(self, line: str, number: int) -> str:
        """Line `number` of a text, with typing errors.

        >>> TypingNoise(swap=0, drop=0, double=0, lower_case=1, bare=1)("Hello, Prague!", 0)
        'hello, prague'
        """
        draw = _draws(self.seed, number)
        if draw() < self.lower_case:
            line = line.lower()
        if draw() < self.bare:
            line = line.rstrip(".!?。！？…")
        return " ".join(self._typed(word, draw) for word in line.split(" "))

    def _typed(self, word: str, draw: _Draw) -> str:
        letters = list(word)
        index = 0
        while index < len(letters) - 1:
            if letters[index].isalpha() and letters[index + 1].isalpha() and draw() < self.swap:
                letters[index : index + 2] = letters[index + 1], letters[index]
                index += 1  # a swapped letter is not swapped again
            index += 1
        typed = "".join(letter * self._times(letter, draw) for letter in letters)
        return typed or word

    def _times(self, letter: str, draw: _Draw) -> int:
        if not letter.isalpha():
            return 1
        chance = draw()
        return 0 if chance < self.drop else 2 if chance < self.drop + self.double else 1
