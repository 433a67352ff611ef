"""Held-out text: by a search of every line among all of it, in every form in which a line can be written."""

from __future__ import annotations

import random
import unicodedata
from itertools import product

import pytest

from t5x_ext.corpora.filters import ChunkFilter, FilterConfig, filter_corpora, hold_out

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
TEST = {
    "en": "Don't panic — “they” said: it's 3.5 km!",
    "de": "Schöne Straße, nicht wahr?",
    "ru": "Ёлка стоит в углу.",
    "zh": "他说：“好的，ＯＫ”。",
    "ja": "ガラスを見た。「はい」",
}
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


def forms(line: str) -> set[str]:
    """Ways to write the same line."""
    return {
        line,
        line.upper().replace("SS", "ß"),
        line.lower(),
        line.translate(FULL_WIDTH),
        f"\ufeff  {line.replace(' ', chr(0x3000))}\t",
        line.replace(" ", " \u200b\u00a0 "),
        unicodedata.normalize("NFD", line),
        unicodedata.normalize("NFKC", line),
        line.replace("'", "’").replace("“", "„").replace("—", "-"),
        line.replace("'", "&apos;").replace("“", "&ldquo;"),
        line.rstrip(".!?。"),
        f"- {line}",
    }


def compact(line: str) -> str:
    return unicodedata.normalize("NFKC", line).casefold().replace(" ", "")


def verdicts(held_out, languages, pairs, config=BARE) -> list[bool]:
    """For every pair whether it is dropped."""
    check = ChunkFilter(config, languages, hold_out(held_out, config, languages))
    return [check([pair]).dropped == {"held_out": 1} for pair in pairs]


@pytest.mark.parametrize(("language", "config"), list(product(TEST, (BARE, FilterConfig()))))
def test_a_held_out_line_is_found_in_every_form(language, config, list_corpus):
    """With all other rules on, too: it is counted as held out, whatever else speaks against it."""
    ways = sorted(forms(TEST[language]))
    assert len(ways) >= 4
    for way in ways:
        held_out = [list_corpus(((way, "x"),), (language, "en"))]
        assert all(verdicts(held_out, (language,), [(other,) for other in ways], config))


def test_other_lines_stay(list_corpus):
    held_out = [list_corpus((("Yes.", "Ja."), ("3.5 km", "..."), ("", "a b"), ("C#", "रवि")), ("en", "de"))]
    pairs = [("Yes, yes.", "Jaja"), ("3.5 kg", "…!"), ("!", "ac"), ("C++", "रवी"), ("ja", "yes"), ("the a b", "x")]
    assert verdicts(held_out, ("en", "de"), pairs) == [False] * len(pairs)
    pairs = [("YES", "x"), ("x", "ja!"), ("35km", "x"), ("x", "…"), ("x", "AB"), ("(c#)", "x"), ("x", "रवि।")]
    assert verdicts(held_out, ("en", "de"), pairs) == [True] * len(pairs)


def test_languages_are_told_apart_and_their_variants_are_not(list_corpus):
    held_out = [list_corpus((("chat", "猫"),), ("fr", "zh"))]
    assert verdicts(held_out, ("en", "zh_TW"), [("chat", "狗"), ("cat", "猫")]) == [False, True]
    assert verdicts(held_out, ("fr_CA",), [("Chat",)]) == [True]
    assert hold_out(held_out, BARE, ("en", "de")) == (frozenset(), frozenset())


def test_against_a_search_of_every_line_among_all(list_corpus, tmp_path):
    """Pairs of few short lines, so that many are held out, on one side or on both."""
    draw = random.Random(5)
    words = {"en": ["A", "b", "a", "!", "Ü", "u"], "zh": ["一", "。", " ", "Ａ", "a", "ü"]}
    line = lambda code: " ".join(draw.choices(words[code], k=draw.randint(1, 4)))
    pairs = tuple((line("en"), line("zh")) for _ in range(400))
    held_out = tuple((line("zh"), line("en")) for _ in range(12))
    report = filter_corpora([list_corpus(pairs, ("en", "zh"))], str(tmp_path / "out"), BARE, held_out=[
        list_corpus(held_out, ("zh", "en")),
    ]).corpora[0]  # fmt: skip

    def is_same(one: str, other: str) -> bool:
        bare = [compact(text) for text in (one, other)]
        words_only = ["".join(char for char in text if char.isalnum()) for text in bare]
        return words_only[0] == words_only[1] if any(words_only) else bare[0] == bare[1]

    expected = [
        (en, zh)
        for en, zh in pairs
        if en.strip() and zh.strip() and not any(is_same(en, test) or is_same(zh, other) for other, test in held_out)
    ]
    empty = sum(not en.strip() or not zh.strip() for en, zh in pairs)
    assert (report.dropped["empty"], report.dropped["held_out"]) == (empty, 400 - empty - len(expected))
    assert 50 < len(expected) < 350
    kept = zip(*((tmp_path / "out" / file).read_text("utf-8").splitlines() for file in report.files))
    assert [tuple(map(compact, pair)) for pair in kept] == [tuple(map(compact, pair)) for pair in expected]
