from __future__ import annotations

from collections import Counter

import pytest
from stand_ins import Given, read

from t5x_ext.contracts import UserError
from t5x_ext.vega_mt import NoisyDev, Pipeline, TextFiles, TypingNoise, execute

LINE = "Prague has 1,300,000 inhabitants, and the Vltava flows (slowly) through it."
NONE = {"swap": 0.0, "drop": 0.0, "double": 0.0, "lower_case": 0.0, "bare": 0.0}


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


def test_only_sources_are_noisy(tmp_path):
    rows = tuple((f"{LINE} {number}", f"Město číslo {number} je velké.") for number in range(20))
    texts = Given("dev", texts=(("d", ("en", "cs"), rows), ("m", ("cs",), (("x",),))))
    made = execute(Pipeline((texts, NoisyDev("noisy", ("dev",)))), tmp_path)["noisy"]
    assert made.corpora == (
        TextFiles("d.noisy.en-cs", ("en", "cs"), ("noisy/d.noisy.en-cs.en", "dev/d.cs"), 20, one_way=True),
        TextFiles("d.noisy.cs-en", ("cs", "en"), ("noisy/d.noisy.cs-en.cs", "dev/d.en"), 20, one_way=True),
    )
    assert read(tmp_path, "noisy/d.noisy.en-cs.en") == [TypingNoise()(row[0], n) for n, row in enumerate(rows)]
    clean = [line for row in rows for line in row]
    typed = [line for text in made.corpora for line in read(tmp_path, text.files[0])]
    assert made.counts == {"lines": 40, "changed": sum(line not in clean for line in typed)}


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"TypingNoise\.swap=2: must be 0 to 1"):
        TypingNoise(swap=2)
    texts = Given("dev", texts=(("d", ("en", "cs"), (("a", "b"),)),))
    with pytest.raises(UserError, match="there is no pair for en-de"):
        execute(Pipeline((texts, NoisyDev("noisy", ("dev",), directions=("en-de",)))), tmp_path)
