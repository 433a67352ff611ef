"""Noise of typing, and noise of back-translation: rates, bounds, and that seed and line number decide all of it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_ext.contracts import UserError
from t5x_ext.corpora.noise import TypingNoise, WordNoise

LINE = "Prague has 1,300,000 inhabitants, and the Vltava flows (slowly) through it."
NONE = {"swap": 0.0, "drop": 0.0, "double": 0.0, "lower_case": 0.0, "bare": 0.0}
NO_WORDS = {"swap": 0, "drop": 0.0, "blank": 0.0}

# Of words


@given(st.text(), st.integers(0, 10**9), st.sampled_from(["en", "zh", "ja"]))
def test_without_noise_every_line_stays(line, number, language):
    assert WordNoise(**NO_WORDS)(line, number, language) == line


@given(st.integers(1, 40), st.integers(0, 10**9), st.integers(1, 5))
def test_no_word_moves_further_than_it_may_and_none_is_lost(count, number, swap):
    words = [str(index) for index in range(count)]
    noise = WordNoise(**NO_WORDS | {"swap": swap})
    moved = noise(" ".join(words), number, "en").split()
    assert sorted(moved, key=int) == words
    assert max(abs(place - int(word)) for place, word in enumerate(moved)) <= swap


def test_words_move_as_far_as_they_may_in_both_directions():
    words = " ".join(map(str, range(100)))
    moved = [WordNoise(**NO_WORDS)(words, 0, "en"), WordNoise(**NO_WORDS | {"swap": 3})(words, 0, "en")]
    distances = [{place - int(word) for place, word in enumerate(line.split())} for line in moved]
    assert distances == [{0}, {-3, -2, -1, 0, 1, 2, 3}]


def test_two_words_change_places_as_often_as_theory_says():
    """u of [0, 2): 1 + v < u for independent u and v has probability 1/8."""
    noise = WordNoise(**NO_WORDS | {"swap": 1})
    swapped = sum(noise("a b", number, "en") == "b a" for number in range(4000))
    assert abs(swapped - 500) < 5 * (4000 / 8 * 7 / 8) ** 0.5


def test_rates_of_words_are_those_asked_for():
    line, count = " ".join(["word"] * 100), 20_000
    for drop, blank in ((0.1, 0.0), (0.0, 0.1), (0.3, 0.2), (0.1, 0.1)):
        noise = WordNoise(drop, blank)
        found = Counter(word for number in range(200) for word in noise(line, number, "en").split())
        lost = count - found.total()
        assert abs(lost - drop * count) <= 5 * (count * drop * (1 - drop)) ** 0.5
        rate = (1 - drop) * blank
        assert abs(found["_"] - rate * count) <= 5 * (count * rate * (1 - rate)) ** 0.5
        assert set(found) <= {"word", "_"}


def test_noise_follows_from_seed_and_number_whatever_came_before():
    noise = WordNoise()
    noisy = {number: noise(LINE, number, "en") for number in range(50)}
    assert noisy == {number: WordNoise()(LINE, number, "en") for number in reversed(range(50))}
    assert len(set(noisy.values())) > 40
    assert noisy != {number: WordNoise(seed=1)(LINE, number, "en") for number in range(50)}
    # In every process and on every machine.
    assert noise(LINE, 7, "en") == "has 1,300,000 Prague and the flows Vltava (slowly) through it."


@given(st.text(), st.integers(0, 10**9), st.sampled_from(["en", "zh"]))
def test_a_line_becomes_empty_only_where_it_is_and_an_empty_one_stays(line, number, language):
    noisy = WordNoise(drop=1.0, blank=0.0)(line, number, language)
    assert bool(noisy.strip()) == bool(line.strip())
    if not line.strip():
        assert noisy == line


def test_any_word_may_be_the_one_that_is_kept():
    kept = Counter(WordNoise(drop=1.0, blank=0.0)("a b c", number, "en") for number in range(3000))
    assert set(kept) == set("abc")
    assert all(abs(count - 1000) < 130 for count in kept.values())


def test_units_of_chinese_and_japanese_are_characters_and_runs_of_latin_letters():
    line = "我用 iPhone 15 拍了这张照片。"
    noisy = [WordNoise(**NO_WORDS | {"swap": 2})(line, number, "zh_TW") for number in range(20)]
    kept = Counter(line.replace(" ", ""))
    assert all(Counter(one.replace(" ", "")) == kept for one in noisy)
    assert all("iPhone" in one and "15" in one for one in noisy)
    assert len(set(noisy)) == 20
    assert WordNoise(drop=0, blank=1, swap=0)(line, 0, "zh") == "_" * 11
    assert WordNoise(drop=0, blank=1, swap=0)("Ich bin da.", 0, "de") == "_ _ _"
    # Latin words stay words of their own, whatever stands between them.
    assert WordNoise(drop=0, blank=0, swap=1)("São Paulo 好", 8, "ja") == "São好Paulo"
    assert WordNoise(drop=0, blank=0, swap=1)("São Paulo 好", 3, "ja") == "Paulo São好"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop": 1.1}, r"WordNoise\.drop=1\.1: must be 0 to 1"),
        ({"blank": -1}, r"WordNoise\.blank=-1"),
        ({"swap": -1}, r"WordNoise\.swap=-1: must be at least 0 positions"),
        ({"blank_token": "two words"}, r"WordNoise\.blank_token='two words': must be one word"),
        ({"blank_token": ""}, r"WordNoise\.blank_token=''"),
    ],
)
def test_what_is_no_noise_of_words(fields, message):
    with pytest.raises(UserError, match=message):
        WordNoise(**fields)


# Of typing


def test_without_noise_a_line_stays():
    noise = TypingNoise(**NONE)
    for line in (LINE, "", " two  spaces ", "你好。", "..."):
        assert noise(line, 3) == line


def test_the_same_line_is_typed_the_same_way_and_another_number_another():
    noise = TypingNoise()
    typed = [noise(LINE, number) for number in range(50)]
    assert typed == [TypingNoise()(LINE, number) for number in range(50)]
    assert len(set(typed)) > 40
    assert typed != [TypingNoise(seed=1)(LINE, number) for number in range(50)]


def test_swapping_keeps_the_letters_and_everything_else_in_its_place():
    noise = TypingNoise(**NONE | {"swap": 0.5})
    for number in range(50):
        typed = noise(LINE, number)
        assert Counter(typed) == Counter(LINE)
        assert [(i, char) for i, char in enumerate(typed) if not char.isalpha()] == [
            (i, char) for i, char in enumerate(LINE) if not char.isalpha()
        ]
        for word, other in zip(LINE.split(), typed.split()):
            # A letter moves by one place at most.
            assert all(letter in word[max(0, i - 1) : i + 2] for i, letter in enumerate(other))
    assert TypingNoise(**NONE | {"swap": 1.0})("abcde fg", 0) == "badce gf"


def test_rates_are_those_asked_for():
    text, letters = "abcdefghij " * 100, 1000
    for name, change in (("drop", -1), ("double", 1)):
        noise = TypingNoise(**NONE | {name: 0.1})
        counts = [sum(map(str.isalpha, noise(text, number))) - letters for number in range(30)]
        # 30,000 draws of probability 0.1: five standard deviations are 260.
        assert abs(sum(counts) - change * 3000) < 260
    lines = ["Yes!" if number % 2 else "No." for number in range(2000)]
    for name, share in (("lower_case", 0.25), ("bare", 0.5)):
        noise = TypingNoise(**NONE | {name: share})
        changed = sum(noise(line, number) != line for number, line in enumerate(lines))
        assert abs(changed - share * 2000) < 5 * (2000 * share * (1 - share)) ** 0.5


def test_no_word_disappears_and_digits_stay():
    noise = TypingNoise(drop=1.0, double=0.0)
    assert noise("a 12 b3.", 0).split()[1] == "12"
    assert len(noise("one two three", 0).split()) == 3


def test_what_is_no_noise_of_typing():
    with pytest.raises(UserError, match=r"TypingNoise\.swap=2: must be 0 to 1"):
        TypingNoise(swap=2)
