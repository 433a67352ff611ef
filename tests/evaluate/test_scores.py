"""Whole evaluations, by domain, compared and printed."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.evaluate import Scores, bleu, chrf, evaluate_domains, evaluate_texts, format_table, paired_test, ter

WORDS = ("the", "a", "cat", "dog", "house", "tree", "runs", "sleeps", "green", "old", "in", "on", "under", "today")


def noisy(lines, rate, seed):
    """The lines with some words replaced."""
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) if rng.random() < rate else word for word in line.split()) for line in lines]


@pytest.fixture(scope="module")
def references():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=10)) for _ in range(60)]


def test_evaluation_holds_the_single_scores(references):
    hypotheses = noisy(references, 0.2, 1)
    scores = evaluate_texts(hypotheses, references, "en", with_ter=True)
    assert (scores.bleu, scores.chrf) == (bleu(hypotheses, references), chrf(hypotheses, references))
    assert scores.ter == ter(hypotheses, references)
    assert scores.exact_match == 100 * sum(map(str.__eq__, hypotheses, references)) / 60
    assert scores.num_lines == 60


def test_language_and_override_pick_the_tokenizer():
    lines = ["東京は日本の首都です。"]
    assert "tok:ja-mecab" in evaluate_texts(lines, lines, "ja").bleu.signature
    assert "tok:char" in evaluate_texts(lines, lines, "ja", tokenizer="char").bleu.signature
    assert "tok:zh" in evaluate_texts(lines, lines, "zh").bleu.signature


def test_json_is_what_results_files_hold(references):
    fields = evaluate_texts(references, references, "en").to_json()
    assert {"bleu", "chrf", "exact_match", "signature"} <= set(fields)
    assert json.loads(json.dumps(fields)) == fields
    assert fields["exact_match"] == 100.0
    assert set(evaluate_texts(references, references, "en", with_ter=True).to_json()) - set(fields) == {
        "ter",
        "ter_signature",
    }


def test_one_domain_is_everything_and_domains_keep_their_lines(references):
    hypotheses = noisy(references, 0.3, 2)
    whole = evaluate_texts(hypotheses, references, "en")
    assert evaluate_domains(hypotheses, references, ["news"] * 60, "en") == {"news": whole}

    labels = ["news" if index % 3 else "chat" for index in range(60)]
    by_domain = evaluate_domains(hypotheses, references, labels, "en")
    assert list(by_domain) == ["chat", "news"]
    assert by_domain["chat"] == evaluate_texts(hypotheses[::3], references[::3], "en")
    weighted = sum(scores.exact_match * scores.num_lines for scores in by_domain.values()) / 60
    assert weighted == pytest.approx(whole.exact_match)


def test_domains_with_several_references(references):
    hypotheses, second = noisy(references, 0.3, 3), noisy(references, 0.1, 4)
    labels = ["a"] * 30 + ["b"] * 30
    by_domain = evaluate_domains(hypotheses, [references, second], labels, "en")
    assert by_domain["b"] == evaluate_texts(hypotheses[30:], [references[30:], second[30:]], "en")


def test_one_label_a_line():
    with pytest.raises(UserError, match="2 hypotheses but 1 domain labels"):
        evaluate_domains(["a", "b"], ["a", "b"], ["x"], "en")


@pytest.mark.parametrize("kind", ["bootstrap", "approximate_randomization"])
def test_a_clear_difference_is_significant_and_a_small_one_is_not(references, kind):
    good, alike, bad = noisy(references, 0.3, 5), noisy(references, 0.3, 6), noisy(references, 0.6, 7)
    clear = paired_test(bad, good, references, "en", kind=kind, num_samples=200)["BLEU"]
    close = paired_test(alike, good, references, "en", kind=kind, num_samples=200)["BLEU"]
    assert clear.p_value < 0.02 < close.p_value
    assert clear.difference == clear.system - clear.baseline > 0
    assert clear.system == bleu(good, references).value
    assert clear.to_json()["difference"] == clear.difference


def test_randomization_agrees_with_its_definition(references):
    """Swap lines at random, score both halves again: an independent computation of the p value."""
    first, second = noisy(references, 0.35, 15), noisy(references, 0.38, 115)  # far from certain: p is near 0.24
    result = paired_test(first, second, references, "en", kind="approximate_randomization", num_samples=2000)["BLEU"]
    rng, difference, larger = np.random.default_rng(0), abs(result.difference), 0
    for _ in range(150):
        swap = rng.integers(2, size=60)
        halves = [[(a, b)[s ^ flip] for a, b, s in zip(first, second, swap)] for flip in (0, 1)]
        larger += abs(bleu(halves[0], references).value - bleu(halves[1], references).value) > difference
    assert 0.1 < result.p_value < 0.4
    assert result.p_value == pytest.approx(larger / 150, abs=0.1)


def test_seed_decides_and_signs(references):
    systems = noisy(references, 0.3, 10), noisy(references, 0.33, 11)

    def p_values(seed):
        return [
            result.p_value for result in paired_test(*systems, references, "en", num_samples=100, seed=seed).values()
        ]

    assert p_values(1) == p_values(1) != p_values(2)
    signature = paired_test(*systems, references, "en", num_samples=100, seed=7)["BLEU"].signature
    assert "bs:100|seed:7" in signature


@pytest.mark.parametrize("before", [None, "99"])
def test_environment_is_left_as_it_was(references, monkeypatch, before):
    if before is None:
        monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    else:
        monkeypatch.setenv("SACREBLEU_SEED", before)
    paired_test(references, references, references, "en", num_samples=2)
    assert os.environ.get("SACREBLEU_SEED") == before


@pytest.mark.parametrize("kind", ["bootstrap", "approximate_randomization"])
def test_equal_systems_are_not_significantly_different(references, kind):
    results = paired_test(references, references, references, "en", kind=kind, num_samples=50, with_ter=True)
    assert {name: result.p_value for name, result in results.items()} == {"BLEU": 1.0, "chrF2": 1.0, "TER": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bootstrapp"}, "one of bootstrap, approximate_randomization"),
        ({"seed": 0}, "seed=0"),
        ({"num_samples": 0}, "num_samples=0"),
    ],
)
def test_paired_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        paired_test(["a"], ["a"], ["a"], "en", **options)


def test_paired_systems_of_other_lengths():
    with pytest.raises(UserError, match="1 hypotheses but 2 lines"):
        paired_test(["a", "b"], ["a"], ["a", "b"], "en")


def test_table_of_directions():
    lines, other = ["a b c d", "e f g h"], ["a b c d", "e f g x"]  # 7/8, 5/6, 3/4 and 1/2 of the n-grams match
    table = format_table({"en-de": evaluate_texts(lines, lines, "de"), "de-en": evaluate_texts(other, lines, "en")})
    version = evaluate_texts(lines, lines, "de").bleu.signature.rpartition(":")[2]
    assert table.splitlines() == [
        "direction  lines    BLEU    chrF  exact %",
        "-----------------------------------------",
        "en-de          2  100.00  100.00   100.00",
        "de-en          2   72.31   73.96    50.00",
        "-----------------------------------------",
        "mean           4   86.16   86.98    75.00",
        "",
        f"BLEU  nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}",
        f"chrF  nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}",
    ]


def test_table_names_the_rows_of_a_signature_where_they_differ():
    lines = ["a b c d"]
    scores = {"en-zh": evaluate_texts(lines, lines, "zh"), "zh-en": evaluate_texts(lines, lines, "en", with_ter=True)}
    table = format_table(scores, label="way")
    assert table.startswith("way    lines    BLEU    chrF   TER  exact %\n")
    assert "tok:zh|smooth:exp" in table
    assert [line for line in table.splitlines() if line.endswith("[en-zh]")]
    assert "mean       2  100.00  100.00     -   100.00" in table.splitlines()


def test_table_of_one_row_has_no_mean():
    assert "mean" not in format_table({"en-de": evaluate_texts(["a"], ["a"], "de")})
    with pytest.raises(UserError, match="no scores"):
        format_table({})


def test_scores_are_frozen():
    scores = evaluate_texts(["a"], ["a"], "de")
    assert isinstance(scores, Scores)
    with pytest.raises(AttributeError):
        scores.exact_match = 1.0
