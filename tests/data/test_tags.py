from __future__ import annotations

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.data import TagPolicy


@pytest.mark.parametrize(
    ("policy", "source", "target"),
    [
        (TagPolicy(), (), ()),
        (TagPolicy(encoder="source"), ("en",), ()),
        (TagPolicy(encoder="target"), ("de",), ()),
        (TagPolicy(decoder="target"), (), ("de",)),
        (TagPolicy(encoder="source", decoder="target"), ("en",), ("de",)),
    ],
)
def test_prefixes(vocabulary, policy, source, target):
    tags = {language: vocabulary.tag_id(language) for language in ("en", "de")}
    assert policy.source_prefix(vocabulary, "en", "de") == tuple(tags[language] for language in source)
    assert policy.target_prefix(vocabulary, "de") == tuple(tags[language] for language in target)


def test_unknown_language_names_the_known(vocabulary):
    with pytest.raises(UserError, match=r"'fr' has no tag in the vocabulary; known languages: en, de, zh"):
        TagPolicy(decoder="target").target_prefix(vocabulary, "fr")
    assert TagPolicy().target_prefix(vocabulary, "fr") == ()


def test_wrong_places_are_refused():
    with pytest.raises(UserError, match="allowed are 'none', 'source', 'target'"):
        TagPolicy(encoder="src")
    with pytest.raises(UserError, match="allowed are 'none', 'target'"):
        TagPolicy(decoder="source")
