"""Scores of random texts against their definitions, written out without sacreBLEU, and what must not change them."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.contracts import UserError
from t5x_ext.evaluate import (
    CometTexts,
    bleu,
    chrf,
    comet_scores,
    evaluate_domains,
    evaluate_texts,
    exact_match,
    format_table,
    scores_from_json,
    ter,
)

LINE = st.lists(st.sampled_from("abcd"), min_size=1, max_size=7).map(" ".join)
PAIRS = st.lists(st.tuples(LINE, LINE), min_size=1, max_size=4).map(lambda pairs: tuple(map(list, zip(*pairs))))
TRIPLES = st.lists(st.tuples(LINE, LINE, LINE), min_size=1, max_size=4).map(lambda found: tuple(map(list, zip(*found))))


def ngrams(tokens, order):
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def defined_bleu(hypotheses, *sets):
    """Papineni et al. 2002, with sacreBLEU's exponential smoothing of orders that have no match."""
    matches, totals, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for hypothesis, *references in zip(hypotheses, *sets):
        words, others = hypothesis.split(), [reference.split() for reference in references]
        length += len(words)
        reference_length += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for order in range(1, 5):
            most = Counter()
            for other in others:
                most |= ngrams(other, order)
            matches[order - 1] += (ngrams(words, order) & most).total()
            totals[order - 1] += ngrams(words, order).total()
    if not all(totals) or not any(matches):
        return 0.0
    logarithm, smoothing = 0.0, 1
    for match, total in zip(matches, totals):
        smoothing *= 1 if match else 2
        logarithm += math.log(match / total if match else 1 / (smoothing * total)) / 4
    return 100 * math.exp(min(0.0, 1 - reference_length / length) + logarithm)


def defined_chrf(hypotheses, references, beta=2):
    """Popović 2015: the mean precision and recall of the orders that both sides have."""
    precisions, recalls = [], []
    for order in range(1, 7):
        counts = [
            (ngrams(one.replace(" ", ""), order), ngrams(other.replace(" ", ""), order))
            for one, other in zip(hypotheses, references)
        ]
        match = sum((one & other).total() for one, other in counts)
        # sacreBLEU does not count a line's own n-grams of an order for which its reference is too short.
        ours = sum(one.total() for one, other in counts if other)
        theirs = sum(other.total() for _, other in counts)
        if ours and theirs:
            precisions.append(match / ours)
            recalls.append(match / theirs)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if not precision or not recall:
        return 0.0
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def edits(one, other):
    """Levenshtein's distance in words."""
    row = list(range(len(other) + 1))
    for place, word in enumerate(one, start=1):
        before, row[0] = row[:], place
        for index, against in enumerate(other, start=1):
            row[index] = min(before[index] + 1, row[index - 1] + 1, before[index - 1] + (word != against))
    return row[-1]


@settings(max_examples=30)
@given(TRIPLES)
def test_bleu_is_its_definition_of_one_and_of_two_references(texts):
    hypotheses, first, second = texts
    assert bleu(hypotheses, first).value == pytest.approx(defined_bleu(hypotheses, first), abs=1e-9)
    assert bleu(hypotheses, [first, second]).value == pytest.approx(defined_bleu(hypotheses, first, second), abs=1e-9)


@settings(max_examples=30)
@given(PAIRS)
def test_chrf_is_its_definition(texts):
    assert chrf(*texts).value == pytest.approx(defined_chrf(*texts), abs=1e-9)


@settings(max_examples=25)
@given(PAIRS)
def test_ter_is_between_the_missing_words_and_the_edit_distance(texts):
    """Moving a block saves edits, so the distance without moves is an upper bound; words cannot be moved into being."""
    pairs = [(hypothesis.split(), reference.split()) for hypothesis, reference in zip(*texts)]
    words = sum(len(reference) for _, reference in pairs)
    most = sum(edits(*pair) for pair in pairs)
    least = sum(max(len(one), len(other)) - (Counter(one) & Counter(other)).total() for one, other in pairs)
    assert 100 * least / words <= ter(*texts).value + 1e-9
    assert ter(*texts).value <= 100 * most / words + 1e-9
    assert (ter(*texts).value == 0) == (texts[0] == texts[1])


@settings(max_examples=25)
@given(TRIPLES)
def test_exact_match_is_the_share_of_lines_that_are_among_their_references(texts):
    hypotheses, first, second = texts
    hits = sum(one in others for one, *others in zip(hypotheses, first, second))
    assert exact_match(hypotheses, [first, second]) == pytest.approx(100 * hits / len(hypotheses))
    holes = [None if one == other else other for one, other in zip(first, second)]
    assert exact_match(hypotheses, [first, holes]) == exact_match(hypotheses, [first, second])


@settings(max_examples=12)
@given(PAIRS, st.randoms(use_true_random=False))
def test_neither_the_order_of_lines_nor_writing_them_twice_changes_a_score(texts, rng):
    order = list(range(len(texts[0]))) * 2
    rng.shuffle(order)
    twice = [[lines[index] for index in order] for lines in texts]
    for metric in (chrf, ter):
        assert metric(*twice).value == pytest.approx(metric(*texts).value)
    assert exact_match(*twice) == pytest.approx(exact_match(*texts))


@settings(max_examples=12)
@given(PAIRS)
def test_every_score_is_at_its_best_only_for_the_references_themselves(texts):
    best = evaluate_texts(texts[1], texts[1], "en", with_ter=True)
    assert (best.chrf.value, best.exact_match, best.ter.value) == (pytest.approx(100), 100, 0)
    scores = evaluate_texts(*texts, "en")
    assert 0 <= scores.bleu.value <= 100 + 1e-9
    assert 0 <= scores.chrf.value <= 100 + 1e-9


@settings(max_examples=25)
@given(PAIRS, st.booleans())
def test_scores_come_back_from_json(texts, with_ter):
    scores = evaluate_texts(*texts, "de", with_ter=with_ter)
    assert scores_from_json(json.loads(json.dumps(scores.to_json()))) == scores


@settings(max_examples=25)
@given(TRIPLES, st.data())
def test_domains_split_the_lines_and_are_in_the_order_of_their_first(texts, data):
    hypotheses, *references = texts
    labels = [data.draw(st.sampled_from("xyz")) for _ in hypotheses]
    found = evaluate_domains(hypotheses, references, labels, "en")
    assert list(found) == sorted(set(labels), key=labels.index)
    for label, scores in found.items():
        chosen = [index for index, other in enumerate(labels) if other == label]
        take = lambda lines, chosen=chosen: [lines[index] for index in chosen]
        assert scores == evaluate_texts(take(hypotheses), [take(lines) for lines in references], "en")


def test_a_domain_whose_lines_have_only_the_second_reference_is_scored_with_it():
    scores = evaluate_domains(["a b c d", "e f g h"], [["a b c d", None], [None, "e f g x"]], ["one", "two"], "en")
    assert scores["one"].bleu.value == pytest.approx(100)
    assert scores["two"] == evaluate_texts(["e f g h"], [[None], ["e f g x"]], "en")
    assert scores["two"].exact_match == 0


@settings(max_examples=15)
@given(st.dictionaries(st.text("ab-", min_size=1, max_size=12), PAIRS, min_size=1, max_size=4))
def test_the_table_has_a_row_of_equal_width_for_each_and_their_mean(texts):
    scores = {name: evaluate_texts(*pairs, "en") for name, pairs in texts.items()}
    lines = format_table(scores).splitlines()
    table = lines[: lines.index("")]
    assert len({len(line) for line in table}) == 1
    rows = [line.split() for line in table if not set(line) <= {"-"}]
    assert rows[0] == ["direction", "lines", "BLEU", "chrF", "exact", "%"]
    assert [row[0] for row in rows[1 : len(scores) + 1]] == list(scores)
    for row, one in zip(rows[1:], scores.values()):
        assert row[1:] == [str(one.num_lines), *(f"{x:.2f}" for x in (one.bleu.value, one.chrf.value, one.exact_match))]
    assert len(rows) == len(scores) + (1 if len(scores) == 1 else 2)
    if len(scores) > 1:
        mean = sum(one.chrf.value for one in scores.values()) / len(scores)
        assert float(rows[-1][3]) == pytest.approx(mean, abs=0.0051)


@pytest.mark.parametrize(
    ("texts", "counts"),
    [
        ((["a"], ["b", "c"], ["d"]), "1 sources, 2 hypotheses and 1 references"),
        ((["a", "b"], ["b", "c"], []), "2 sources, 2 hypotheses and 0 references"),
        (([], [], []), "0 sources, 0 hypotheses and 0 references"),
    ],
)
def test_comet_gets_as_many_lines_of_each_text(tmp_path, texts, counts):
    """Nothing is scored of the lines that happen to have a partner."""
    (tmp_path / "model.ckpt").write_text("")
    systems = [CometTexts(["a"], ["b"], ["c"]), CometTexts(*texts)]
    with pytest.raises(UserError) as error:
        comet_scores(tmp_path / "model.ckpt", systems, python="no-such-interpreter")
    assert str(error.value) == f"system output 2: {counts}; COMET needs as many of each, at least one"
