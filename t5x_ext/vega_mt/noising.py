"""`NoisyDev`: copies of development text as people type it in a hurry, to tune a model for more than clean text."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.vega_mt.artefact import Artefact, TextFiles
from t5x_ext.vega_mt.workspace import Workspace

_Draw: TypeAlias = Callable[[], float]


@dataclass(frozen=True)
class TypingNoise:
    """What happens to a line that is typed carelessly, always the same for the same seed and line number.

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
        for name in ("swap", "drop", "double", "lower_case", "bare"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"TypingNoise.{name}={getattr(self, name)}: must be 0 to 1")

    def __call__(self, line: str, number: int) -> str:
        """The line, line `number` of its text, as it is typed.

        >>> TypingNoise(swap=0, drop=0, double=0, lower_case=1, bare=1)("Hello, Prague!", 0)
        'hello, prague'
        """
        # `random()` of a text seed is the one sequence that Python promises to keep.
        draw = random.Random(f"{self.seed}/{number}").random
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


@dataclass(frozen=True)
class NoisyDev:
    """Pairs whose source has typing noise and whose target has not, in each direction.

    Attributes:
      name: of the stage.
      texts: stages of pairs.
      noise: what is done to a source.
      directions: those that get a noisy copy; empty: both of every pair.
    """

    name: str
    texts: tuple[str, ...]
    noise: TypingNoise = field(default_factory=TypingNoise)
    directions: tuple[str, ...] = ()

    def inputs(self) -> tuple[str, ...]:
        """The texts."""
        return self.texts

    def sources(self) -> tuple[Corpus, ...]:
        """Nothing from outside."""
        return ()

    def make(self, workspace: Workspace) -> Artefact:
        """Writes the noisy sources."""
        found = []
        changed = 0
        for text in workspace.corpora(self.texts):
            for order in ((0, 1), (1, 0)) if text.is_pair else ():
                source, target = (text.languages[side] for side in order)
                direction = f"{source}-{target}"
                if self.directions and direction not in self.directions:
                    continue
                clean, kept = (text.files[side] for side in order)
                name = f"{text.name}.noisy.{direction}"
                noisy = workspace.own(f"{name}.{source}")
                lines = [(line, self.noise(line, number)) for number, line in enumerate(workspace.lines(clean))]
                workspace.write_lines(noisy, (typed for _, typed in lines))
                changed += sum(line != typed for line, typed in lines)
                found.append(TextFiles(name, (source, target), (noisy, kept), text.lines, one_way=True))
        if not found:
            raise UserError(
                f"stage {self.name!r}: there is no pair for {', '.join(self.directions) or 'any direction'}"
            )
        return Artefact(
            "corpora", tuple(found), counts={"lines": sum(text.lines for text in found), "changed": changed}
        )
