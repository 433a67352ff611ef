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
    if code in names or code in localedata.locale_identifiers() or _PRIVATE.fullmatch(code):
        return code
    by_name = {name.lower(): known for known, name in names.items()}
    parts = re.split("[-_]", code)
    spelled = "_".join([parts[0].lower(), *(part.title() if len(part) == 4 else part.upper() for part in parts[1:])])
    if spelled in names or spelled in localedata.locale_identifiers():
        near = spelled
    else:
        near_names = difflib.get_close_matches(code.lower(), by_name, n=1, cutoff=0.8)
        near_codes = difflib.get_close_matches(code, names, n=1)
        near = by_name[near_names[0]] if near_names else (near_codes or [""])[0]
    hint = f"did you mean {near} ({names.get(near, near)})?" if near else "known are codes such as en, de, zh, pt_BR"
    raise UsageError(f"unknown language '{code}'; {hint}")
