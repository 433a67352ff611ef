"""Noise for text to learn from: of back-translation, word by word, and of typing, letter by letter.

What happens to a line follows from the seed and the number of the line alone, so that it does not matter in which
order, in what portions, or by which process the lines of a text are treated.
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
    """Numbers in [0, 1) for one line: of a text seed `random()` is the one sequence that Python promises to keep."""
    return random.Random(f"{seed}/{number}").random


def _check_probabilities(noise: object, *names: str) -> None:
    for name in names:
        value = getattr(noise, name)
        if not 0 <= value <= 1:
            raise UserError(f"{type(noise).__name__}.{name}={value}: must be 0 to 1")


@dataclass(frozen=True)
class WordNoise:
    """Noise for the sources of back-translation: words change places, are left out, or give way to a filler.

    With beam search for the translation itself this is "beam + noise", which teaches as much as sampling does. Words
    are what stands between spaces; in Chinese and Japanese characters, and runs of Latin letters and digits.

    First word i is sorted by i + u, u being drawn from [0, swap + 1), so that none moves by more than `swap` places.
    Then each is left out, and each that is left replaced, by itself. A line of at least one word keeps at least one.

    Attributes:
      drop: probability that a word is left out.
      blank: probability that a word that is left is replaced by `blank_token`.
      swap: most places by which a word moves; 0: none does.
      blank_token: text of the filler, a word that the text does not need; it is encoded like any other.
      seed: of all of it.

    Raises:
      UserError: for what is no probability, a negative number of places, and a filler that is not one word.

    References:
      Edunov et al., arXiv 1808.09381, section 3, whose values are the defaults; the permutation is that of Lample et
      al., arXiv 1711.00043. They noise pieces of words, here it is whole words, before there are pieces.
    """

    drop: float = 0.1
    blank: float = 0.1
    swap: int = 3
    blank_token: str = "_"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_probabilities(self, "drop", "blank")
        if self.swap < 0:
            raise UserError(f"WordNoise.swap={self.swap}: must be at least 0 places")
        if self.blank_token.split() != [self.blank_token]:
            raise UserError(f"WordNoise.blank_token={self.blank_token!r}: must be one word")

    def __call__(self, line: str, number: int, language: str) -> str:
        """The line, line `number` of its text, with noise; where nothing happens to a word, as it was.

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
        # Where none would stay, the one does that was nearest to it.
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
    """What happens to a line that is typed carelessly.

    Attributes:
      swap: probability that a letter changes places with the next one of its word (arXiv 1711.02173).
      drop: that it is left out, unless it is the only one of its word.
      double: that it is typed twice.
      lower_case: that a line is in lower case.
      bare: that a line has lost the punctuation at its end.
      seed: of all of it.

    Raises:
      UserError: for what is no probability.
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
        """The line, line `number` of its text, as it is typed.

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
                index += 1  # what has changed places stays there
            index += 1
        typed = "".join(letter * self._times(letter, draw) for letter in letters)
        return typed or word

    def _times(self, letter: str, draw: _Draw) -> int:
        if not letter.isalpha():
            return 1
        chance = draw()
        return 0 if chance < self.drop else 2 if chance < self.drop + self.double else 1
