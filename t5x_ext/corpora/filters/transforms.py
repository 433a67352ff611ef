"""What is done to every line before rules look at it: named changes, again and again until nothing changes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

from t5x_ext.corpora.cleaning import clean_line
from t5x_ext.corpora.filters.config import FilterConfig
from t5x_ext.corpora.filters.text import compose, normalize_punctuation, unescape_entities

TRANSFORMS = ("spaces", "unicode", "entities", "punctuation")
"""Names of what changes lines, in this order, again and again until nothing changes."""


class LineTransform:
    """The changes that a configuration asks for in text of one language."""

    def __init__(self, config: FilterConfig, language: str):
        """For lines of one language."""
        self._transforms: dict[str, Callable[[str], str]] = {"spaces": clean_line, "unicode": compose}
        if config.unescape_entities:
            self._transforms["entities"] = unescape_entities
        if config.normalize_punctuation:
            self._transforms["punctuation"] = functools.partial(normalize_punctuation, language=language)

    def __call__(self, line: str, changed: Counter[str]) -> str:
        """The line as it is kept; what has changed it is counted by name."""
        changes = set()
        # One may make work for another, as an entity that stands for an odd space: what comes out has none left.
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
