from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.corpora.cleaning import clean_line
from t5x_ext.corpora.filters import ChunkFilter, FilterConfig, duplicate_key, length, normalize_punctuation
from t5x_ext.corpora.filters.text import without_code

BARE = FilterConfig(
    max_length=None,
    max_ratio=None,
    drop_copies=False,
    drop_markup=False,
    max_repetition=None,
    min_script_share=None,
    min_language_probability=None,
    duplicates=(),
    near_duplicate_similarity=None,
)
"""No rule but that lines must not be empty."""

TRICKY = (
    "aZ9 ,.;:!?'\"`´«»„“”‘’‚…–—-()&;#amp<>ltquo"
    "\u0338\u0301\u00a0\u200b\u3000\u00adＡ９＆；，。、！？「」｢｡Ω\u2126\u037e\u1ffd文か"
)
LINES = st.text(
    st.sampled_from(TRICKY) | st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=30
)


def cleaned(line: str, language: str, config: FilterConfig = BARE) -> str:
    """The line as a filter keeps it, empty if it drops it."""
    kept = ChunkFilter(config, (language,))([(line, line)]).kept
    return kept[0][0] if kept else ""


@pytest.mark.parametrize("language", ["en", "fr", "zh", "ja"])
def test_cleaning_again_changes_nothing(language):
    @settings(max_examples=150, database=None)
    @given(LINES)
    def check(line):
        once = cleaned(line, language)
        assert cleaned(once, language) == once
        assert once == unicodedata.normalize("NFC", once) == clean_line(once)

    check()


@pytest.mark.parametrize(
    ("language", "line", "expected"),
    [
        ("en", "“Yes” – it’s “fine”…", '"Yes" - it\'s "fine"...'),
        ("en", "yes—no", "yes - no"),
        ("en", "（Ａ１，b）：全", "(A1,b):全"),
        ("en", "「a」、《b》。c", '"a", "b". c'),
        ("en", "A man , a dog . And ?", "A man, a dog. And?"),
        ("en", "smile :) and ... or .net", "smile :) and ... or .net"),
        ("en", "``so''", '"so"'),
        ("de", "„So“, ‚so‘, »so«, 5 %", '"So", \'so\', "so", 5 %'),
        ("cs", "„Ano“ – „ne“", '"Ano" - "ne"'),
        ("ru", "«Да» — «нет»", '"Да" - "нет"'),
        ("fr", "« Oui » : l’été !", '"Oui" : l\'été !'),
        ("fr", "Oui , non .", "Oui, non."),
        ("zh", "他说：“ＯＫ，１２！”……（好）", "他说：“OK，12！”……（好）"),
        ("zh", "｢好｣｡", "「好」。"),
        ("zh_TW", "「好」，『壞』。", "「好」，『壞』。"),
        ("ja", "「ＡＢ」、ｶﾅ･かな—～！", "「AB」、ｶﾅ・かな—～！"),
    ],
)
def test_punctuation_is_what_the_language_needs(language, line, expected):
    assert cleaned(line, language) == expected


@pytest.mark.parametrize("language", ["zh", "ja", "zh_TW"])
def test_full_width_punctuation_survives(language):
    line = "，。！？：；（）《》〈〉「」『』【】“”‘’…—、·～％＋－＝＆＜＞"
    assert cleaned(line, language) == line


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_compatibility_forms_are_kept(language):
    line = "ﬁ™①㌔²½ｶﾞ㎏Ⅳ"
    assert unicodedata.normalize("NFKC", line) != line
    assert cleaned(line, language) == line


def test_punctuation_and_entities_can_be_left_alone():
    line = "„a“ &amp; …， b"
    config = FilterConfig(**{**vars(BARE), "normalize_punctuation": False, "unescape_entities": False})
    assert cleaned(line, "en", config) == line
    assert cleaned(line, "en") == '"a" & ..., b'


def test_what_an_entity_stands_for_is_cleaned_too():
    assert cleaned("a&nbsp;&nbsp;b&#8203;c &amp;quot;d&#x201d; ＆lt；", "en") == 'a bc "d" <'


def test_every_transform_counts_the_lines_it_changes():
    pairs = [("plain", "eben"), (" two  spaces", "e\u0301"), ("&lt;", "„a“"), ("\u00a0„e\u0301“ ", "b")]
    changed = ChunkFilter(BARE, ("en", "de"))(pairs).changed
    assert changed == {"spaces": 2, "unicode": 2, "entities": 1, "punctuation": 2}


def test_length_is_in_words_everywhere():
    assert length("", "zh") == 0
    assert length("好", "zh") == 1
    assert length("一 二三四五六七八九", "zh_TW") == 9 / 1.8
    assert length("一二三四五六七八九十一二三", "ja") == 13 / 2.6
    assert length("three little words", "cs") == 3
    # “A”，是 B-2 的: four characters, three words of other letters, and quotes are of the characters.
    assert length("“A”，是 B-2 的 Ж", "zh") == 3 + 5 / 1.8
    # Punctuation between characters is a character; that of 3.5% and don't is of their words.
    assert length("ア(イ)、ウ, 3.5% don't ...", "ja") == 2 + 8 / 2.6
    assert length("A", "ja") == length("ア", "ja") == length("ｱ", "ja") == 1


def test_duplicate_keys_ignore_form_only():
    assert duplicate_key("ＯＫ， Straße") == duplicate_key("ok, STRASSE")
    assert duplicate_key("a b") != duplicate_key("ab")
    assert normalize_punctuation("，", "zh") != duplicate_key("，")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("请写信到foo@bar.org。谢谢", "请写信到 。谢谢"),
        ("見て：https://a.b/c?d=e、はい", "見て： 、はい"),
        ("mail <a.b@c.de>, now @home", "mail  , now @home"),
        ("пишите на почта@пример.рф !", "пишите на   !"),
    ],
)
def test_addresses_end_where_the_text_goes_on(line, expected):
    assert without_code(line) == expected


@pytest.mark.parametrize("unit", ["好", "QmFz", "a@"])
def test_a_line_without_spaces_takes_time_in_proportion(unit):
    """From every character to the end of the line it would be minutes."""
    start = time.process_time()
    without_code(unit * (200_000 // len(unit)))
    assert time.process_time() - start < 10
