"""How every line is cleaned before it is filtered or tokenised."""

from __future__ import annotations

import re

# Control characters, soft hyphens, zero-width spaces and direction marks: invisible, and noise to a model. The
# zero-width joiners U+200C and U+200D are kept, because Persian, Indic scripts and emoji are spelt with them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
)


def clean_line(line: str) -> str:
    r"""A line without invisible characters, with runs of white space as one space and none at its ends.

    White space is Unicode's (no-break, ideographic and thin spaces included). Nothing else is normalised, so
    full-width Chinese punctuation is kept.

    >>> clean_line(" a\u00a0 b\u200b c\t")
    'a b c'
    """
    if line.isprintable() and "  " not in line and line[:1] != " " and line[-1:] != " ":
        return line
    return " ".join(_INVISIBLE.sub("", line).split())
