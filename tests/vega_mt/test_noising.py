"""`NoisyDev`: which side of a pair is noisy, and what it is called."""

from __future__ import annotations

import pytest
from stand_ins import Given, read

from t5x_ext.contracts import UserError
from t5x_ext.corpora.noise import TypingNoise
from t5x_ext.pipeline import Pipeline, TextFiles, execute
from t5x_ext.vega_mt import NoisyDev

LINE = "Prague has 1,300,000 inhabitants."


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


def test_a_direction_without_a_pair_is_refused(tmp_path):
    texts = Given("dev", texts=(("d", ("en", "cs"), (("a", "b"),)),))
    with pytest.raises(UserError, match="there is no pair for en-de"):
        execute(Pipeline((texts, NoisyDev("noisy", ("dev",), directions=("en-de",)))), tmp_path)
