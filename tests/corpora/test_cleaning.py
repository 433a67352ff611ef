from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_ext.contracts import UserError
from t5x_ext.corpora import CleaningConfig, clean_line


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


def test_rules_in_order():
    cleaning = CleaningConfig(drop_copies=True, max_length_ratio=2)
    assert cleaning.rule_against("", "") == "empty"
    assert cleaning.rule_against("a", "") == "empty"
    assert cleaning.rule_against("same", "same") == "copy"
    assert cleaning.rule_against("abcd", "ab") is None
    assert cleaning.rule_against("abcde", "ab") == cleaning.rule_against("ab", "abcde") == "length_ratio"
    assert CleaningConfig().rule_against("same", "same") is None
    with pytest.raises(UserError, match=r"max_length_ratio=0\.5"):
        CleaningConfig(max_length_ratio=0.5)
