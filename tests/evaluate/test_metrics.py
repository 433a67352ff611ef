"""Known answers: scores worked out by hand, and sacreBLEU's published numbers for WMT22."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.evaluate import TOKENIZERS, bleu, chrf, evaluate_texts, exact_match, ter, tokenizer_for

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

# Of JDExploreAcademy's outputs, with the reference set: the ten scores of its system paper.
WMT22 = {
    "zh-en": (33.51, "A"),
    "en-zh": (49.67, "A"),
    "de-en": (33.70, "A"),
    "en-de": (37.79, "A"),
    "cs-en": (54.94, "B"),
    "en-cs": (41.43, "B"),
    "ru-en": (45.06, "A"),
    "en-ru": (32.71, "A"),
    "ja-en": (25.61, "A"),
    "en-ja": (26.97, "A"),
}


def read_lines(path):
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def wmt22(direction, reference_set, system="JDExploreAcademy"):
    folder = DATA / "wmt22"
    if not folder.is_dir():
        pytest.skip(f"the shared data folder is not there: {folder}")
    target = direction[-2:]
    return (
        read_lines(folder / "system-outputs" / f"generaltest2022.{direction}.hyp.{system}.{target}"),
        read_lines(folder / "references" / f"generaltest2022.{direction}.ref.{reference_set}.{target}"),
    )


@pytest.mark.realdata
@pytest.mark.parametrize("direction", WMT22)
def test_wmt22_bleu(direction):
    score, reference_set = WMT22[direction]
    hypotheses, references = wmt22(direction, reference_set)
    assert bleu(hypotheses, references, tokenizer_for(direction[-2:])).value == pytest.approx(score, abs=0.005)


@pytest.mark.realdata
def test_wmt22_japanese_was_scored_by_characters():
    hypotheses, references = wmt22("en-ja", "A")
    score = bleu(hypotheses, references, tokenizer_for("ja", "char"))
    assert score.value == pytest.approx(41.50, abs=0.005)
    assert "tok:char" in score.signature


@pytest.mark.realdata
def test_wmt22_official_table_with_two_references_and_chrf():
    hypotheses, first = wmt22("de-en", "A")
    second = wmt22("de-en", "B")[1]
    assert bleu(hypotheses, [first, second]).value == pytest.approx(49.33030802184003)
    assert chrf(hypotheses, first).value == pytest.approx(58.54727820195846)


def test_bleu_by_hand():
    # 6 tokens each; matches 5/6, 3/5, 2/4, 1/3; no brevity penalty.
    score = bleu(["the cat sat on the mat"], ["the cat sat on a mat"])
    assert score.value == pytest.approx(100 * math.exp(sum(map(math.log, (5 / 6, 3 / 5, 2 / 4, 1 / 3))) / 4))
    assert score.name == "BLEU"
    assert score.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_brevity_penalty_by_hand():
    assert bleu(["a b c d e"], ["a b c d e f g"]).value == pytest.approx(100 * math.exp(1 - 7 / 5))


def test_chrf_by_hand():
    # Unigrams P=1, R=2/3; bigrams P=1, R=1/2; longer orders exist on one side only and do not count.
    f2 = 5 / (4 / ((2 / 3 + 1 / 2) / 2) + 1 / 1)
    assert chrf(["ab"], ["abc"]).value == pytest.approx(100 * f2)


def test_ter_by_hand():
    assert ter(["a b x d"], ["a b c d"]).value == pytest.approx(25.0)
    assert ter(["c d a b"], ["a b c d"]).value == pytest.approx(25.0)  # a block moves for one edit


def test_ter_counts_characters_where_words_have_no_spaces():
    assert ter(["我喜欢猫"], ["我喜欢狗"]).value == 100.0
    assert ter(["我喜欢猫"], ["我喜欢狗"], "zh").value == pytest.approx(25.0)


def test_exact_match_accepts_any_reference_and_ignores_outer_spaces():
    hypotheses = ["a ", "b", "c", "D"]
    assert exact_match(hypotheses, ["a", "b", "x", "d"]) == 50.0
    assert exact_match(hypotheses, [["a", "b", "x", "d"], [None, None, "c", "y"]]) == 75.0


def test_second_reference_can_only_help():
    hypotheses, first, second = ["the dog runs home now"], ["a dog is running home"], ["the dog runs home today"]
    assert bleu(hypotheses, [first, second]).value > bleu(hypotheses, first).value
    assert "nrefs:2" in bleu(hypotheses, [first, second]).signature
    assert "nrefs:var" in bleu(["a b"] * 2, [["a b"] * 2, [None, "a b"]]).signature


def test_order_of_lines_does_not_matter():
    hypotheses, references = ["a b c d e", "f g h i j k", "l"], ["a b c d x", "f g h i j", "l m"]
    for metric in (bleu, chrf, ter):
        assert metric(hypotheses, references).value == pytest.approx(metric(hypotheses[::-1], references[::-1]).value)


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("de", "13a"), ("zh", "zh"), ("zh_Hans_CN", "zh"), ("ZH-tw", "zh"), ("ja", "ja-mecab"), ("ja-JP", "ja-mecab")],
)
def test_tokenizer_by_language(language, tokenizer):
    assert tokenizer_for(language) == tokenizer


def test_every_tokenizer_works_offline_and_signs():
    for name in TOKENIZERS:
        assert f"tok:{name}" in bleu(["漢字 and words"], ["漢字 and words"], name).signature


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], ["a", "b"]), "1 hypotheses but 2 lines in the references"),
        ((["a"], [["a"], ["a", "b"]]), "1 hypotheses but 2 lines in reference set 2"),
        ((["a"], []), "1 hypotheses but 0 lines"),
        (([], []), "no lines to score"),
        ((["a", "b"], [["a", None], ["a", None]]), "line 2 has no reference"),
        (("a", ["a"]), "not one string"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    for metric in (bleu, chrf, ter, exact_match):
        with pytest.raises(UserError, match=message) as error:
            metric(*arguments)
        assert "\n" not in str(error.value)


def test_unknown_tokenizer_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'ja-mecab'"):
        evaluate_texts(["a"], ["a"], "ja", tokenizer="jamecab")


def test_missing_dictionary_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    with pytest.raises(UserError, match=r"pip install 'sacrebleu\[ja\]'"):
        bleu(["猫"], ["猫"], "ja-mecab")


def test_score_as_json_and_text():
    score = bleu(["a b c d"], ["a b c d"])
    assert json.loads(json.dumps(score.to_json())) == {
        "name": "BLEU",
        "value": score.value,
        "signature": score.signature,
    }
    assert str(score) == f"BLEU 100.00 ({score.signature})"


def test_importing_the_room_does_not_import_sacrebleu():
    program = "import sys, t5x_ext.evaluate; print('sacrebleu' in sys.modules, 'tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
