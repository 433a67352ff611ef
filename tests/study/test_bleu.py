"""BLEU as sums over lines is sacreBLEU's."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sacrebleu

from t5x_ext.checkpoints import write_json
from t5x_ext.contracts import UserError
from t5x_ext.pipeline.artefact import Artefact, TextFiles, describe
from t5x_ext.study import Arm, MeasuredRun, TranslationBleu
from t5x_ext.study.bleu import bleu_of_counts, counts_of
from t5x_ext.study.statistics import resampled

DRAW = random.Random(1)
REFERENCES = [" ".join(DRAW.choices("abcdefgh", k=9)) for _ in range(60)]
WORSE = [line[:-4] + DRAW.choice(("x y", "g h")) for line in REFERENCES]
BETTER = [one if number % 3 else two for number, (one, two) in enumerate(zip(REFERENCES, WORSE))]


@pytest.mark.parametrize("text", [WORSE, BETTER, REFERENCES, [line[:9] for line in REFERENCES]])
def test_the_sums_give_sacrebleus_score(text):
    counts = counts_of(text, REFERENCES, "en")
    assert bleu_of_counts(counts.sum(axis=0)) == pytest.approx(sacrebleu.corpus_bleu(text, [REFERENCES]).score)


def test_no_match_is_nothing():
    assert bleu_of_counts(counts_of(["x"], ["y z"], "en").sum(axis=0)) == 0


def test_better_translations_differ_by_an_interval_about_the_difference():
    worse, better = (counts_of(text, REFERENCES, "en") for text in (WORSE, BETTER))
    found = resampled({"en-de": [better]}, {"en-de": [worse]}, bleu_of_counts, "mean")["en-de"]
    assert 0 < found.low < found.difference < found.high < 100
    assert found.p_value < 0.01
    # As sacreBLEU's own test has it, whose samples are other ones.
    assert found.difference == pytest.approx(
        sacrebleu.corpus_bleu(BETTER, [REFERENCES]).score - sacrebleu.corpus_bleu(WORSE, [REFERENCES]).score
    )


def test_translations_of_a_stage_are_scored_by_direction(tmp_path):
    texts = []
    for pair, lines in {("en", "de"): WORSE, ("de", "en"): BETTER}.items():
        for side, text in (("hyp", lines), ("ref", REFERENCES)):
            (tmp_path / f"{side}.{pair[1]}").write_text("".join(f"{line}\n" for line in text))
        files = ("in", f"hyp.{pair[1]}")
        texts.append(TextFiles("t", pair, files, len(lines), reference=f"ref.{pair[1]}"))
    (tmp_path / "stage").mkdir()
    write_json(tmp_path / "stage/artefact.json", describe(tmp_path, "stage", Artefact("corpora", tuple(texts))))
    values = TranslationBleu()(MeasuredRun(tmp_path, Arm("a", part="stage"), 0, None, ""))
    expected = [sacrebleu.corpus_bleu(text, [REFERENCES]).score for text in (WORSE, BETTER)]
    assert values == pytest.approx({"bleu": np.mean(expected), "bleu/en-de": expected[0], "bleu/de-en": expected[1]})
    with pytest.raises(UserError, match="stage 'none'"):
        TranslationBleu()(MeasuredRun(tmp_path, Arm("a", part="none"), 0, None, ""))
