"""The rules for single pairs: each has a name and a test."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, NamedTuple

from t5x_ext.contracts import UserError
from t5x_ext.corpora.filters.config import PairRules
from t5x_ext.corpora.filters.held_out import HeldOut, held_out_hash
from t5x_ext.corpora.filters.identification import LanguageCheck
from t5x_ext.corpora.filters.text import duplicate_key, is_unsegmented, length, units, without_code

_LIBRARIES = {"min_script_share": ("babel", "regex"), "min_language_probability": ("py3langid",)}

PAIR_RULES = ("empty", "held_out", "length", "ratio", "copy", "markup", "repetition", "script", "language")
"""Names of the rules for one pair, in the order in which they are tried."""

_MARKUP = re.compile(
    r"</?[A-Za-z][^<>]{0,300}>|<!--|&(?:[A-Za-z]{2,8}|\#[0-9]{1,7}|\#[xX][0-9A-Fa-f]{1,6});|\{\{|\}\}|\[\[|\]\]|\[/[a-z]+\]"
)
_SAME_CHARACTER = re.compile(r"(\S)\1{9}")
_MIN_REPETITION_UNITS = 10
# "Twice." and "而且是两次。" belong together. Of 795 strings of an interface, English and Japanese, the rule drops 1;
# without this limit it would drop 15. Of WMT22 sentences paired at random it drops 21 % either way.
_MIN_RATIO_WORDS = 5
# Script codes that stand for several Unicode scripts.
_SCRIPTS = {"Hans": ("Hani",), "Hant": ("Hani",), "Jpan": ("Hani", "Hira", "Kana"), "Kore": ("Hang", "Hani")}


class Rule(NamedTuple):
    """A rule: its name, and a test that is true for the lines of a pair (or a single line) that it drops."""

    name: str
    drops: Callable[[Sequence[str]], bool]


def pair_rules(config: PairRules, languages: Sequence[str], held_out: HeldOut = ()) -> tuple[Rule, ...]:
    """The rules that a configuration switches on, in the order of `PAIR_RULES`.

    Args:
      config: which rules are on.
      languages: one code a side: two, or one for text of one language, which has no rules that compare sides.
      held_out: from `hold_out`, for these languages; empty: nothing is held out.

    Raises:
      UserError: if a rule's library is not installed, or does not know a language.
    """
    two_sides = len(languages) == 2
    rules = [
        Rule("empty", lambda lines: not all(lines)),
        # First, so that its count is that of all held-out lines, not of those that other rules keep.
        bool(held_out) and Rule("held_out", _any_line([_is_among(hashes) for hashes in held_out])),
        config.max_length is not None and Rule("length", _length_rule(languages, config.max_length)),
        two_sides and config.max_ratio is not None and Rule("ratio", _ratio_rule(languages, config.max_ratio)),
        two_sides and config.drop_copies and Rule("copy", lambda lines: len(set(map(duplicate_key, lines))) == 1),
        config.drop_markup and Rule("markup", lambda lines: any(map(_MARKUP.search, lines))),
        config.max_repetition is not None
        and Rule("repetition", _any_side(functools.partial(_is_repetitive, config.max_repetition), languages)),
        config.min_script_share is not None
        and Rule("script", _any_line([_ScriptCheck(code, config.min_script_share).is_other for code in languages])),
        config.min_language_probability is not None
        and Rule(
            "language",
            _any_line([LanguageCheck(code, config.min_language_probability).is_other for code in languages]),
        ),
    ]
    return tuple(rule for rule in rules if rule)


def rules_identity(config: PairRules) -> dict[str, Any]:
    """What the rules' decisions depend on, as JSON: fields that differ from their defaults, and versions.

    The versions are those of Unicode and of the libraries that the active rules use.
    """
    used = {field.name: getattr(config, field.name) for field in fields(config)}
    changed = {field.name: used[field.name] for field in fields(config) if used[field.name] != field.default}
    libraries = [library for name, asked in _LIBRARIES.items() if used[name] is not None for library in asked]
    return {
        "rules": changed,
        "unicode": unicodedata.unidata_version,
        "libraries": {library: library_version(library) for library in libraries},
    }


def library_version(library: str) -> str | None:
    """The version of an installed library; None if it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _is_among(hashes: frozenset[bytes]) -> Callable[[str], bool]:
    return lambda line: held_out_hash(line) in hashes


def _any_line(checks: Sequence[Callable[[str], bool]]) -> Callable[[Sequence[str]], bool]:
    return lambda lines: any(check(line) for check, line in zip(checks, lines))


def _any_side(check: Callable[[str, str], bool], languages: Sequence[str]) -> Callable[[Sequence[str]], bool]:
    return lambda lines: any(map(check, lines, languages))


def _length_rule(languages: Sequence[str], most: float) -> Callable[[Sequence[str]], bool]:
    return lambda lines: max(map(length, lines, languages)) > most


def _ratio_rule(languages: Sequence[str], most: float) -> Callable[[Sequence[str]], bool]:
    def is_uneven(lines: Sequence[str]) -> bool:
        shorter, longer = sorted(map(length, lines, languages))
        return longer >= _MIN_RATIO_WORDS and longer > most * shorter

    return is_uneven


def _is_repetitive(most: float, line: str, language: str) -> bool:
    if _SAME_CHARACTER.search(line):
        return True
    words = units(line, language)
    if len(words) < _MIN_REPETITION_UNITS:
        return False
    pairs = len(words) - 1
    return pairs - len(set(pairwise(words))) > most * pairs


def scripts_of(language: str) -> tuple[str, ...]:
    """Unicode's four-letter codes of the scripts of a language, by CLDR's likely subtags.

    Raises:
      UserError: if CLDR knows no script and the code names none (as `sr_Latn` does).

    >>> scripts_of("ja"), scripts_of("sr"), scripts_of("sr_Latn")
    (('Hani', 'Hira', 'Kana'), ('Cyrl',), ('Latn',))
    """
    # Imported here, because importing `data` must stay cheap.
    from babel.core import get_global

    parts = re.split("[-_]", language)
    named = [part.title() for part in parts[1:] if len(part) == 4 and part.isalpha()]
    likely = get_global("likely_subtags")
    full = next((likely[code] for code in ("_".join(parts), parts[0].lower()) if code in likely), None)
    if not named and full is None:
        raise UserError(
            f"min_script_share: the script of {language!r} is unknown; write it as {parts[0]}_Latn, or set"
            " the rule to None"
        )
    script = (named or str(full).split("_")[1:])[0]
    return _SCRIPTS.get(script, (script,))


class _ScriptCheck:
    """Tests whether too few letters of a line belong to a script of its language."""

    def __init__(self, language: str, min_share: float):
        regex = _regex()
        scripts = scripts_of(language)
        within = "".join(rf"\p{{scx={script}}}" for script in scripts)
        word = "+" if is_unsegmented(language) else ""
        try:
            self._right = regex.compile(rf"[\p{{L}}&&[{within}]]", regex.V1)
            self._other = regex.compile(rf"[\p{{L}}--[{within}]]{word}", regex.V1)
        except regex.error:
            raise UserError(f"min_script_share: Unicode has no script {'/'.join(scripts)} for {language!r}") from None
        self._is_latin = scripts == ("Latn",)
        self._min_share = min_share

    def is_other(self, line: str) -> bool:
        """Whether the line is in another script; False for a line without letters."""
        if self._is_latin and line.isascii():
            return False
        line = without_code(line)
        other = len(self._other.findall(line))
        if not other:
            return False
        right = len(self._right.findall(line))
        return right < self._min_share * (right + other)


def _regex() -> Any:
    try:
        import regex
    except ImportError as error:
        raise UserError(
            f"min_script_share needs regex: pip install 't5x_ext[clean]', or set it to None ({error})"
        ) from error
    return regex
