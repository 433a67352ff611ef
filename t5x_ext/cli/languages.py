"""Language codes that users type: checked against the languages that Unicode CLDR knows."""

from __future__ import annotations

import difflib
import re

from babel import Locale, localedata

from t5x_ext.cli.messages import UsageError

_PRIVATE = re.compile(r"q[a-t][a-z]")  # reserved by ISO 639-2 for local use


def known_language(code: str) -> str:
    """The code itself, if it names a language: `de`, `zh`, `pt_BR`, or a private one from `qaa` to `qtz`.

    Raises:
      UsageError: otherwise, with the nearest code; the English name of a language leads to its code.

    >>> known_language("pt_BR")
    'pt_BR'
    """
    names = Locale("en").languages
    if _is_known(code) or _PRIVATE.fullmatch(code):
        return code
    near = _nearest(code)
    hint = f"did you mean {near} ({names.get(near, near)})?" if near else "known are codes such as en, de, zh, pt_BR"
    raise UsageError(f"unknown language '{code}'; {hint}")


def _is_known(code: str) -> bool:
    return code in Locale("en").languages or code in localedata.locale_identifiers()


def _nearest(code: str) -> str | None:
    """A known code for something that is not quite one: other case or hyphens, a language's name, a slip."""
    language, *parts = re.split("[-_]", code)
    spelled = "_".join([language.lower(), *(part.title() if len(part) == 4 else part.upper() for part in parts)])
    if _is_known(spelled):
        return spelled
    names = Locale("en").languages
    by_name = {name.lower(): known for known, name in names.items()}
    for name in difflib.get_close_matches(code.lower(), by_name, n=1, cutoff=0.8):
        return by_name[name]
    # Of equally near codes the one that begins alike is meant: eng is en, not ng.
    near = sorted(difflib.get_close_matches(code, names, n=5), key=lambda known: known[:2] != code[:2])
    return near[0] if near else None
