"""Vega-MT's released postprocessing of Chinese, to compare with."""

from __future__ import annotations

import string

from t5x_ext.corpora.filters.text import base_language

_TO_FULL_WIDTH = 0xFEE0
"""From an ASCII character to its full-width form."""


def widen_as_released(line: str, language: str) -> str:
    """What the script released with Vega-MT does to Chinese, including its quirks; other languages are unchanged.

    All spaces are deleted, and all ASCII punctuation becomes full-width unless it is next to a digit; the first
    character counts as being next to the last one. A full stop becomes U+FF0E, which does not end Chinese sentences.
    It is given as `Translate.postprocess`; the default there is `pipeline.widen_punctuation`.

    References:
      JDEA-NLP/Vega-MT at de34970, scripts/symbol_half2full.py.

    >>> widen_as_released("版本 3.5 OK.", "zh")
    '版本3.5OK．'
    """
    if base_language(language) != "zh":
        return line
    line = line.replace(" ", "")
    around = [(line[index - 1], line[index + 1 : index + 2]) for index in range(len(line))]
    return "".join(
        chr(ord(char) + _TO_FULL_WIDTH)
        if char in string.punctuation and not before.isdigit() and not after.isdigit()
        else char
        for char, (before, after) in zip(line, around)
    )
