"""What happens to lines before they are tokenised, and which pairs are left out of training."""

from __future__ import annotations

import re
from dataclasses import dataclass

from t5x_ext.contracts import UserError

# Control characters, soft hyphens, zero-width spaces and direction marks: invisible, and noise to a model. The
# zero-width joiners U+200C and U+200D stay, because Persian, Indic scripts and emoji are spelt with them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
)

RULES = ("empty", "copy", "length_ratio")
"""Names of the reasons for which a pair is left out, in the order in which they are tried."""


def clean_line(line: str) -> str:
    r"""One line as the vocabulary sees it: invisible characters removed, each run of white space one space, ends bare.

    White space is Unicode's (no-break, ideographic and thin spaces included); nothing else is normalised, so that
    full-width Chinese punctuation survives.

    >>> clean_line(" a\u00a0 b\u200b c\t")
    'a b c'
    """
    if line.isprintable() and "  " not in line and line[:1] != " " and line[-1:] != " ":
        return line
    return " ".join(_INVISIBLE.sub("", line).split())


@dataclass(frozen=True)
class CleaningConfig:
    """Which pairs are left out of the cache, counted per rule; lines themselves are always cleaned by `clean_line`.

    Pairs with an empty side are always left out: they have nothing to learn from.

    Attributes:
      drop_copies: leave out pairs whose two sides are equal.
      max_length_ratio: leave out pairs whose longer side has more than this many times the characters of the other;
        None: keep them all. Mind scripts: a Chinese line has about a third of an English line's characters.
    """

    drop_copies: bool = False
    max_length_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.max_length_ratio is not None and self.max_length_ratio < 1:
            raise UserError(f"CleaningConfig.max_length_ratio={self.max_length_ratio}: must be at least 1, or None")

    def rule_against(self, source: str, target: str) -> str | None:
        """Which of `RULES` speaks against a cleaned pair; None to keep it."""
        if not source or not target:
            return "empty"
        if self.drop_copies and source == target:
            return "copy"
        if self.max_length_ratio is not None:
            shorter, longer = sorted((len(source), len(target)))
            if longer > self.max_length_ratio * shorter:
                return "length_ratio"
        return None
