"""Language identification by the model inside the package py3langid; nothing is downloaded."""

from __future__ import annotations

import functools
from typing import Any

from t5x_ext.contracts import UserError
from t5x_ext.corpora.filters.text import base_language, without_code

# Letters in UTF-8: 24 Latin letters are about as informative as 12 Cyrillic ones or 8 Chinese characters.
_ENOUGH_BYTES = 24
# Members of ISO 639-3's macrolanguages that the model distinguishes and corpora do not.
_MEMBERS = {
    "ar": ("ary", "arz"),
    "ku": ("sdh",),
    "lv": ("ltg",),
    "no": ("nn",),
    "nb": ("no", "nn"),
    "nn": ("no",),
    "uz": ("uzs",),
    "zh": ("wuu", "yue"),
}


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError(
            f"min_language_probability needs py3langid: pip install 't5x_ext[clean]', or set it to None ({error})"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class LanguageCheck:
    """Tests whether a line is in another language than the expected one."""

    def __init__(self, language: str, min_probability: float):
        """For lines of one language.

        Raises:
          UserError: if py3langid is not installed, or does not know the language.
        """
        base = base_language(language)
        self._labels = frozenset({base, *_MEMBERS.get(base, ())})
        self._identifier = _identifier()
        self._min_probability = min_probability
        if not self._labels & set(self._identifier.labels):
            raise UserError(
                f"min_language_probability: language identification does not know {language!r}; set it to None"
            )

    def is_other(self, line: str) -> bool:
        """Whether another language is the most probable one, and this one has too small a probability.

        False for lines with too few letters to tell.
        """
        # In lower case: headlines in capitals look like names from any language.
        line = without_code(line).lower()
        letters = "".join(filter(str.isalpha, line)).encode("utf-8", "surrogatepass")
        if len(letters) < _ENOUGH_BYTES or self._identifier.classify(line)[0] in self._labels:
            return False
        probabilities = dict(self._identifier.rank(line))
        return sum(probabilities.get(label, 0.0) for label in self._labels) < self._min_probability
