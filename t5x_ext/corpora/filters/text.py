"""Normal forms of lines, their length, and the keys by which lines are compared."""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections.abc import Mapping

CHARACTERS_PER_WORD: Mapping[str, float] = {"zh": 1.8, "ja": 2.6}
"""Characters of a line over the words of its English translation, for languages that are written without spaces.

Measured without words in other scripts, such as names: 1.69 and 2.62 on 1,833 sentences of WMT22's English test set and
their references, 1.86 on 997 sentences of FLORES into Chinese.
"""

# Characters of text that is written without spaces, and its punctuation. Runs of others are words in another script.
_UNSEGMENTED = (
    r"\u00b7\u2010-\u2027\u2030-\u205e\u2e80-\ua4cf\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
)
# Punctuation by itself counts as a character, not as a word, in any width.
_UNITS = re.compile(rf"([{_UNSEGMENTED}]|[^\w\s{_UNSEGMENTED}]+(?![^\s{_UNSEGMENTED}]))|[^\s{_UNSEGMENTED}]+")
# Addresses end at a character of text without spaces. The limit before the @ avoids quadratic time for a line without
# spaces.
_CODE = re.compile(
    r"%\(\w+\)[a-z]|%[sd]|\{\w*\}|</?[A-Za-z][^<>]{0,300}>"
    rf"|https?://[^\s{_UNSEGMENTED}]+|[^\s@{_UNSEGMENTED}]{{1,64}}@[^\s{_UNSEGMENTED}]+"
)

_ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,30}|\#[0-9]{1,7}|\#[xX][0-9A-Fa-f]{1,6});")
_FULL_WIDTH = {0xFF01 + offset: chr(0x21 + offset) for offset in range(94)}
# Half-width forms from old encodings; Chinese and Japanese punctuation is full-width otherwise.
_HALF_WIDTH_CJK = str.maketrans("｡｢｣､･", "。「」、・")
_WIDE = {code: plain for code, plain in _FULL_WIDTH.items() if plain.isalnum()} | _HALF_WIDTH_CJK
_NARROW = (
    _FULL_WIDTH
    | dict.fromkeys(map(ord, "“”„‟〝〞〟«»《》「」『』｢｣〈〉"), '"')
    | dict.fromkeys(map(ord, "‘’‚‛´`‹›"), "'")
    | dict.fromkeys(map(ord, "‐‑‒–−━"), "-")
    | dict.fromkeys(map(ord, "—―"), " - ")
    | str.maketrans("【】∶", "[]:")
    | {ord("…"): "...", ord("。"): ". ", ord("｡"): ". ", ord("、"): ", ", ord("､"): ", "}
)
_FRENCH = {ord("«"): '"\0', ord("»"): '\0"'}
_INSIDE_FRENCH = re.compile(" ?\0 ?")
_SPACE_BEFORE = re.compile(r"(?<=\w) (?=[,.;:!?](?: |$))")
# French sets a space before these.
_SPACE_BEFORE_IN_FRENCH = re.compile(r"(?<=\w) (?=[,.](?: |$))")


@functools.cache
def base_language(code: str) -> str:
    """The language of a code without script and territory.

    >>> base_language("zh_TW"), base_language("pt-BR")
    ('zh', 'pt')
    """
    return re.split("[-_]", code)[0].lower()


@functools.cache
def is_unsegmented(language: str) -> bool:
    """Whether the language is written without spaces between words, as Chinese and Japanese."""
    return base_language(language) in CHARACTERS_PER_WORD


def units(line: str, language: str) -> list[str]:
    """The words of a line; for Chinese and Japanese its characters, and words in other scripts.

    >>> units("IPv4 或 IPv6。", "zh")
    ['IPv4', '或', 'IPv6', '。']
    """
    return [found[0] for found in _UNITS.finditer(line)] if is_unsegmented(language) else line.split()


def length(line: str, language: str) -> float:
    """Length of a line in words; for Chinese and Japanese characters over `CHARACTERS_PER_WORD`, at least 1.

    >>> length("two words", "en"), length("一二三四五六七八九", "zh"), length("一二三 names 四五六 names 七八九", "zh")
    (2.0, 5.0, 7.0)
    """
    if not is_unsegmented(language):
        return float(len(line.split()))
    is_wide = [found[1] is not None for found in _UNITS.finditer(line)]
    words = is_wide.count(False) + is_wide.count(True) / CHARACTERS_PER_WORD[base_language(language)]
    return max(words, float(min(len(is_wide), 1)))


def without_code(line: str) -> str:
    """A line without placeholders, tags, URLs and mail addresses.

    >>> without_code("%(count)s von {all} <b>Seiten</b>: https://a.b/c").split()
    ['von', 'Seiten', ':']
    """
    return _CODE.sub(" ", line)


def compose(line: str) -> str:
    """A line in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", line)


def unescape_entities(line: str) -> str:
    """A line with HTML's entities replaced by characters; those without a semicolon are kept, as in addresses.

    >>> unescape_entities("Q&amp;A &copy=2 &#8220;")
    'Q&A &copy=2 “'
    """
    return _ENTITY.sub(lambda found: html.unescape(found[0]), line) if "&" in line else line


def normalize_punctuation(line: str, language: str) -> str:
    r"""A line with normalised punctuation, as Moses' two scripts do it.

    Chinese and Japanese: full-width letters and digits become ASCII, half-width 。「」、・ become full-width; the rest
    is unchanged (half-width punctuation costs 4.9 BLEU into Chinese). Other languages: full-width forms, ideographic
    punctuation, dashes and ellipses become ASCII, quotes become " or ', and spaces before , . ; : ! ? are removed
    (French keeps them before ; : ! ?).

    Unlike Moses' normalize-punctuation.perl it does not change the order of quotes and commas, decimal signs, and
    spaces inside numbers and around brackets.

    Args:
      line: without control characters.
      language: its code.

    >>> normalize_punctuation("„Ja“ – sagte sie …", "de"), normalize_punctuation("他说：“ＯＫ”。", "zh")
    ('"Ja" - sagte sie ...', '他说：“OK”。')
    """
    if is_unsegmented(language):
        return line.translate(_WIDE)
    is_french = base_language(language) == "fr"
    if is_french:
        line = _INSIDE_FRENCH.sub("", line.translate(_FRENCH))
    if not line.isascii():
        line = line.translate(_NARROW)
    line = line.replace("`", "'").replace("''", '"')
    return (_SPACE_BEFORE_IN_FRENCH if is_french else _SPACE_BEFORE).sub("", line)


class _WithoutPunctuation(dict[int, int | None]):
    """A table for `str.translate` that drops punctuation and spaces, filled on demand."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PZ" else code
        return self[code]


_WITHOUT_PUNCTUATION = _WithoutPunctuation()


def duplicate_key(line: str) -> str:
    """A key that is equal for lines that differ only in letter case, width and compatibility forms (NFKC).

    It is a key, not text: NFKC turns full-width Chinese punctuation into ASCII.

    >>> duplicate_key("ＯＫ，好") == duplicate_key("ok,好")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", line).casefold().split())


def letters_key(line: str) -> str:
    """`duplicate_key` without punctuation and spaces; with them if there is nothing else.

    >>> letters_key("他 说：“ＯＫ”。"), letters_key("Don't!") == letters_key("don’t"), letters_key("...")
    ('他说ok', True, '...')
    """
    key = duplicate_key(line)
    return key.translate(_WITHOUT_PUNCTUATION) or key
