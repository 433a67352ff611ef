"""What is done to translations before people read them, line by line.

A postprocessor is any function from a line and its language to the line that readers get. Those in `POSTPROCESSORS`
have a name; of any other the function itself is given, in gin as `@my_package.my_function`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

from t5x_ext.contracts import UserError
from t5x_ext.corpora.filters.text import base_language

Postprocessor: TypeAlias = Callable[[str, str], str]
"""From a line and its language to what readers get."""

_TO_FULL_WIDTH = 0xFEE0
"""From an ASCII character to its full-width form."""

# Ideographs, kana, and the punctuation that goes with them; not full-width letters and digits.
_WIDE = (
    "\u2e80-\u2fdf\u3001-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff9f\U00020000-\U0003ffff"
)
_CJK = re.compile(f"[{_WIDE}]")
_FINAL_STOP = re.compile(r"(?<!\.) ?\.([\"'”’)\]）】」』》 ]*)$")
_SPACES = re.compile(" +(?=[，、。？！：；（）])|(?<=[，、。？！：；（）]) +")
_SYMBOLS = {
    "zh": {",": "，", "?": "？", "!": "！", ":": "：", ";": "；"},
    "ja": {",": "、", "?": "？", "!": "！", ":": "：", ";": "；"},
}
_BRACKETS = re.compile(r"\(([^()]*)\)")


def widen_punctuation(line: str, language: str) -> str:
    """Full-width punctuation in Chinese or Japanese text, as readers and references write it.

    Lines of other languages are unchanged.

    Of ASCII punctuation only `, ? ! : ; ( )` change, and only next to a Chinese or Japanese character (brackets as a
    pair, also by what is inside them); and the full stop that ends a line with such a character, which becomes the
    ideographic one. Digits, punctuation between two digits, Latin text and the spaces between its words stay. A space
    beside wide punctuation is deleted, because wide punctuation brings its own.

    Half-width punctuation would have cost the Chinese output of Vega-MT at WMT22 4.9 BLEU (49.67 as submitted, 44.78
    narrowed).

    >>> widen_punctuation("你好,世界(World)! 版本 3.5 已发布.", "zh")
    '你好，世界（World）！版本 3.5 已发布。'
    >>> widen_punctuation("Hello, world.", "zh")
    'Hello, world.'
    """
    symbols = _SYMBOLS.get(base_language(language))
    if symbols is None or not _CJK.search(line):
        return line
    line = _FINAL_STOP.sub(r"。\1", _BRACKETS.sub(_widened_brackets, line))
    written = ""
    for index, char in enumerate(line):
        wide = symbols.get(char)
        if wide and (_CJK.match(written.rstrip(" ")[-1:]) or _CJK.match(line[index + 1 : index + 3].lstrip(" "))):
            char = wide
        written += char
    return _SPACES.sub("", written)


def _widened_brackets(match: re.Match[str]) -> str:
    """A pair of brackets in the width of what is next to either of them."""
    line, inside = match.string, match[1]
    beside = line[: match.start()].rstrip(" ")[-1:], line[match.end() :].lstrip(" ")[:1], inside[:1], inside[-1:]
    return f"（{inside}）" if any(map(_CJK.match, beside)) else match[0]


def narrow_punctuation(line: str) -> str:
    """Every full-width form of an ASCII character as that character; the ideographic stop and comma stay.

    It shows what the width of punctuation is worth.

    >>> narrow_punctuation("你好，世界！（３）。")
    '你好,世界!(3)。'
    """
    return "".join(chr(ord(char) - _TO_FULL_WIDTH) if "！" <= char <= "～" else char for char in line)


POSTPROCESSORS: dict[str, Postprocessor] = {
    "widths": widen_punctuation,
    "none": lambda line, language: line,
}
"""Postprocessors by name."""

_RETIRED = {"released": "t5x_ext.vega_mt.widen_as_released"}
"""Names that the table had once, and the function to give instead."""


def postprocessor(given: str | Postprocessor) -> Postprocessor:
    """The postprocessor with this name in `POSTPROCESSORS`, or the given function.

    Raises:
      UserError: for an unknown name.

    >>> postprocessor("none")("你好,世界", "zh")
    '你好,世界'
    """
    if callable(given):
        return given
    if given in _RETIRED:
        raise UserError(f"postprocess = {given!r} is no longer a name; give the function, @{_RETIRED[given]}")
    if given not in POSTPROCESSORS:
        names = ", ".join(map(repr, POSTPROCESSORS))
        raise UserError(f"postprocess = {given!r}: must be one of {names}, or a function (line, language) -> line")
    return POSTPROCESSORS[given]
