"""Names of languages and of markers, and their vocabulary pieces."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

from t5x_ext.contracts import UserError

_LANGUAGE = r"[A-Za-z]{2,8}(?:[-_][A-Za-z0-9]{2,8})*"
_LANGUAGE_PATTERN = re.compile(_LANGUAGE)
_TAG_PATTERN = re.compile(f"__({_LANGUAGE})__")
_MARKER_PATTERN = re.compile("[A-Z][A-Z0-9]*")

Side: TypeAlias = Literal["source", "target"]
"""One side of a pair."""

MARKERS: dict[Side, str] = {"source": "BT", "target": "FT"}
"""Markers by the synthetic side: back-translation if it is the source, forward translation if it is the target."""


def check_language(language: str) -> str:
    """The code itself if it has the form of one.

    Raises:
      UserError: otherwise, as for a code with spaces.
    """
    if not _LANGUAGE_PATTERN.fullmatch(language):
        raise UserError(f"language code {language!r}: give a code such as 'en', 'zh' or 'pt_BR'")
    return language


def tag_piece(language: str) -> str:
    """The vocabulary piece of a language.

    >>> tag_piece("de")
    '__de__'
    """
    return f"__{check_language(language)}__"


def tag_language(piece: str) -> str | None:
    """The language whose piece this is, None for an ordinary piece.

    >>> tag_language("__de__"), tag_language("de")
    ('de', None)
    """
    match = _TAG_PATTERN.fullmatch(piece)
    return match.group(1) if match else None


def check_marker(marker: str) -> str:
    """The name of a marker itself if it has the form of one.

    Raises:
      UserError: otherwise.
    """
    if not _MARKER_PATTERN.fullmatch(marker):
        raise UserError(f"marker {marker!r}: give capital letters and digits, as BT for the piece <BT>")
    return marker
