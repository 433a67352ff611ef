"""Normalisation of lines before the rules: named transforms, repeated until nothing changes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

from t5x_ext.corpora.cleaning import clean_line
from t5x_ext.corpora.filters.config import FilterConfig
from t5x_ext.corpora.filters.text import compose, normalize_punctuation, unescape_entities

TRANSFORMS = ("spaces", "unicode", "entities", "punctuation")
"""Names of the transforms, in the order in which they are applied."""


class LineTransform:
    """The transforms that a configuration asks for, for text of one language."""

    def __init__(self, config: FilterConfig, language: str):
        """For lines of one language."""
        self._transforms: dict[str, Callable[[str], str]] = {"spaces": clean_line, "unicode": compose}
        if config.unescape_entities:
            self._transforms["entities"] = unescape_entities
        if config.normalize_punctuation:
            self._transforms["punctuation"] = functools.partial(normalize_punctuation, language=language)

    def __call__(self, line: str, changed: Counter[str]) -> str:
        """The normalised line; the transforms that changed it are counted in `changed`."""
        changes = set()
        # A transform may enable another, as an entity that is an unusual space does.
        before = None
        while line != before:
            before = line
            for name, transform in self._transforms.items():
                after = transform(line)
                if after != line:
                    changes.add(name)
                    line = after
        changed.update(changes)
        return line
