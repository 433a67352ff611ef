from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_ext.corpora import clean_line


@pytest.mark.parametrize(
    ("line", "cleaned"),
    [
        ("plain text", "plain text"),
        ("  ends  and\tgaps \u00a0", "ends and gaps"),
        ("Zürich\u202f–\u3000東京", "Zürich – 東京"),
        ("a\x00b\u200bc\ufeff\u00add\u202e", "abcd"),
        ("你好，世界！（测试）", "你好，世界！（测试）"),
        ("می\u200cخواهم 👩\u200d🔬", "می\u200cخواهم 👩\u200d🔬"),
        ("\u200b \t", ""),
    ],
)
def test_clean_line(line, cleaned):
    assert clean_line(line) == cleaned


@given(st.text())
def test_cleaning_is_idempotent_and_keeps_the_visible(line):
    cleaned = clean_line(line)
    assert clean_line(cleaned) == cleaned
    assert [c for c in cleaned if c.isprintable() and c != " "] == [c for c in line if c.isprintable() and c != " "]
