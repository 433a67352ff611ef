"""Each rule on pairs made by hand: one that it drops, and one nearby that it keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.corpora import read_lines
from t5x_ext.corpora.filters import DUPLICATE_RULES, RULES, ChunkFilter, FilterConfig, identification
from t5x_ext.corpora.filters.rules import PAIR_RULES, pair_rules

SENTENCES_OF = Path(__file__).resolve().parents[4] / "shared/data/multi/wmt22_6way"
SENTENCES = {
    "en": "The children are playing in the garden behind the old house.",
    "de": "Die Kinder spielen im Garten hinter dem alten Haus.",
    "cs": "Děti si hrají na zahradě za starým domem.",
    "ru": "Дети играют в саду за старым домом.",
    "zh": "孩子们正在老房子后面的花园里玩耍。",
    "ja": "子どもたちは古い家の裏の庭で遊んでいます。",
}


def verdict(config: FilterConfig, languages: tuple[str, ...], *lines: str) -> str:
    """The name of the rule that drops a pair, or `kept`."""
    chunk = ChunkFilter(config, languages)([lines])
    assert len(chunk.kept) + chunk.dropped.total() == 1
    return next(iter(chunk.dropped), "kept")


@pytest.mark.parametrize(
    ("expected", "languages", "source", "target"),
    [
        ("kept", "en-de", SENTENCES["en"], SENTENCES["de"]),
        ("empty", "en-de", "A house.", " \u200b\u3000 "),
        ("length", "en-de", "so " * 251, "so " * 250),
        ("length", "zh-en", "".join(chr(0x4E00 + n) for n in range(451)), "a b " * 100),
        ("kept", "zh-en", "".join(chr(0x4E00 + n) for n in range(450)), " ".join(f"the number {n}" for n in range(83))),
        ("ratio", "en-de", "one two three four five six seven", "zwei Worte"),
        ("kept", "en-de", "one two three four five six", "zwei Worte"),
        # 24 English words and 17 Chinese characters, nine and a half words, are even.
        ("kept", "en-zh", f"{SENTENCES['en']} And yes, so are their parents, who came later today.", SENTENCES["zh"]),
        ("ratio", "en-zh", f"{SENTENCES['en']} " * 3, SENTENCES["zh"]),
        # Too short to tell; and names in other letters are words among Chinese characters.
        ("kept", "en-zh", "Twice.", "而且是两次。"),
        ("ratio", "en-de", "one two three four five", "Wort"),
        ("kept", "en-de", "one two three four", "Wort"),
        (
            "kept",
            "en-zh",
            "Maroochydore then defeated Caboolture.",
            "马鲁基多尔 (Maroochydore) 随后击败了卡布尔彻 (Caboolture)。",
        ),
        ("copy", "en-de", "Hello, Berlin!", "HELLO, Ｂerlin!"),
        ("kept", "en-de", "Hello, Berlin!", "Hallo, Berlin!"),
        ("markup", "en-de", "Click <b>here</b>.", "Klicke hier."),
        ("markup", "en-de", "Click here.", "Klicke &lt;b&gt;hier&lt;/b&gt;."),
        ("markup", "en-de", "See [[Berlin]].", "Siehe Berlin."),
        ("markup", "en-de", "Of {{lang}}.", "Von {{lang}}."),
        ("markup", "en-de", "A <!-- thing --> here.", "Ein Ding hier."),
        ("kept", "en-de", "I <3 you if a < b > c; Q&A [sic] &co.", "Ich <3 dich, wenn a < b > c; Q&A [sic] &co."),
        ("repetition", "en-de", "no " * 10, "nein, das geht so nicht, auf keinen Fall, nie."),
        ("kept", "en-de", "no " * 9, "nein, das geht so nicht, auf keinen Fall."),
        ("repetition", "en-de", "Chapter one .......... 5", "Kapitel eins, Seite 5"),
        ("kept", "en-de", "Chapter one ......... 5", "Kapitel eins, Seite 5"),
        ("repetition", "en-zh", "Ha ha ha, how funny.", "哈哈哈哈哈哈哈哈哈哈"),
        ("repetition", "zh-en", "好的好的好的好的好的好的", "Okay, fine, all right."),
        ("script", "ru-de", "Die Kinder spielen im Garten", "Kinder im alten Garten"),
        ("script", "en-de", "The house", "το σπίτι"),
        ("script", "ja-de", "ok yes мир", "ja und nein"),
        ("kept", "ja-de", "カーテンを閉める", "den Vorhang schließen"),
        # One Latin word counts as one character against Chinese.
        ("kept", "en-zh", "your account is anjahoehn.", "您的帐户是 anjahoehn。"),
        # What is no language is in none.
        (
            "kept",
            "ru-en",
            "Добавлен {name} (до %(max_length)s): https://example.org/a",
            "Added {name} (up to %(max_length)s).",
        ),
        ("kept", "zh-en", "总共 %(full_result_count)s", "%(full_result_count)s total"),
        ("script", "ru-en", "%(name)s view", "%(name)s view of it"),
        (
            "kept",
            "en-de",
            "Data Centre Fire Delays Mail In Malmo",
            "Brand im Rechenzentrum verzögert die Post in Malmö",
        ),
        ("kept", "en-de", "12:30 - 14:00", "12.30 bis 14"),
        ("language", "en-de", SENTENCES["en"], "Les enfants jouent dans le jardin derrière la vieille maison."),
        ("language", "zh-en", SENTENCES["ja"][:3] + "は古い家の裏の庭で遊んで", SENTENCES["en"]),
        ("kept", "en-de", "Bonjour", "Guten Tag"),
    ],
)
def test_rules(expected, languages, source, target):
    config = FilterConfig(min_script_share=None) if expected == "language" else FilterConfig()
    assert verdict(config, tuple(languages.split("-")), source, target) == expected
    if expected not in ("ratio", "copy", "kept", "empty"):
        side = [verdict(config, (code,), line) for code, line in zip(languages.split("-"), (source, target))]
        assert expected in side


def test_sentences_are_in_their_language_and_in_no_other():
    for language in SENTENCES:
        check = ChunkFilter(FilterConfig(min_script_share=None), (language,))
        assert [kept[0] for kept in check([(line,) for line in SENTENCES.values()]).kept] == [SENTENCES[language]]


@pytest.mark.realdata
@pytest.mark.skipif(not SENTENCES_OF.is_dir(), reason=f"needs sentences of WMT22 in six languages in {SENTENCES_OF}")
def test_what_people_have_written_is_kept():
    """Each rule by itself drops next to nothing of every fourth sentence of a test set in six languages."""
    texts = {code: list(read_lines(str(SENTENCES_OF / f"wmt22.{code}")))[::4] for code in SENTENCES}
    for language in texts:
        languages = ("en", language) if language != "en" else ("en",)
        lines = list(zip(*(texts[code] for code in languages)))
        for rule in pair_rules(FilterConfig(), languages):
            dropped = [line for line in lines if rule.drops(line)]
            assert len(dropped) <= 0.005 * len(lines), (rule.name, language, dropped)
        # Of sentences that do not belong together much more is found.
        if language != "en":
            mixed = [(source, target) for (source, _), (_, target) in zip(lines, lines[::-1])]
            dropped = ChunkFilter(FilterConfig(), languages)(mixed).dropped
            assert dropped["ratio"] > 0.1 * len(mixed)


@pytest.mark.parametrize(
    ("rule", "change", "languages", "lines"),
    [
        ("length", {"max_length": None}, ("en", "de"), ("1 2 3 4 " * 70, "1 2 3 4 " * 70)),
        ("ratio", {"max_ratio": None}, ("en", "de"), ("one two three four five six seven", "zwei Worte")),
        ("copy", {"drop_copies": False}, ("en", "de"), ("Berlin", "Berlin")),
        ("markup", {"drop_markup": False}, ("en", "de"), ("<b>here</b>", "hier")),
        ("repetition", {"max_repetition": None}, ("en", "de"), ("aaaaaaaaaa", "b")),
        ("script", {"min_script_share": None}, ("en", "de"), ("house", "дом")),
        ("language", {"min_language_probability": None}, ("en", "de"), (SENTENCES["de"], SENTENCES["en"])),
    ],
)
def test_rules_are_switched_off_one_by_one(rule, change, languages, lines):
    others = {"max_repetition": None, "drop_copies": False} if rule == "length" else {}
    assert verdict(FilterConfig(**others), languages, *lines) == rule
    assert verdict(FilterConfig(**{**others, **change}), languages, *lines) == "kept"
    assert rule not in [found.name for found in pair_rules(FilterConfig(**change), languages)]


def test_text_of_one_language_has_no_rules_that_compare_sides():
    nothing = frozenset()
    names = [rule.name for rule in pair_rules(FilterConfig(), ("en",), (nothing,))]
    assert names == [name for name in PAIR_RULES if name not in ("ratio", "copy")]
    assert [rule.name for rule in pair_rules(FilterConfig(), ("en", "de"), (nothing, nothing))] == list(PAIR_RULES)
    without = [rule.name for rule in pair_rules(FilterConfig(), ("en", "de"))]
    assert without == [name for name in PAIR_RULES if name != "held_out"]
    assert (*PAIR_RULES, *DUPLICATE_RULES) == RULES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 0}, "FilterConfig.max_length=0: must be 1 or more, or None to switch the rule off"),
        ({"max_ratio": 0.5}, "FilterConfig.max_ratio=0.5: must be 1 or more"),
        ({"max_repetition": 1.5}, "FilterConfig.max_repetition=1.5: must be 0 to 1"),
        ({"min_script_share": -1}, "FilterConfig.min_script_share=-1: must be 0 to 1"),
        ({"min_language_probability": 2}, "FilterConfig.min_language_probability=2: must be 0 to 1"),
        ({"near_duplicate_similarity": 1.0}, "FilterConfig.near_duplicate_similarity=1.0: must be 0.5 to 0.98"),
        ({"duplicates": ("sorce",)}, "'sorce' is none of pair, source, target"),
    ],
)
def test_mistakes_in_the_configuration(arguments, message):
    with pytest.raises(UserError) as caught:
        FilterConfig(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ("qaa", "min_script_share: the script of 'qaa' is unknown; write it as qaa_Latn"),
        ("en_Abcd", "Unicode has no script Abcd"),
        ("qaa_Latn", "language identification does not know 'qaa_Latn'; set it to None"),
    ],
)
def test_languages_that_a_rule_does_not_know(language, message):
    with pytest.raises(UserError, match=message):
        ChunkFilter(FilterConfig(), (language,))


@pytest.mark.parametrize(
    ("library", "rule"),
    [
        ("py3langid.langid", "min_language_probability"),
        ("regex", "min_script_share"),
        ("datasketch", "near_duplicate_similarity"),
    ],
)
def test_a_rule_without_its_library_says_what_to_install(library, rule, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    identification._identifier.cache_clear()
    message = rf"{rule} needs \w+: pip install 't5x_ext\[clean\]', or set it to None"
    with pytest.raises(UserError, match=message):
        ChunkFilter(FilterConfig(), ("en", "de"))
    assert verdict(FilterConfig(**{rule: None}), ("en", "de"), "a house", "ein Haus") == "kept"
