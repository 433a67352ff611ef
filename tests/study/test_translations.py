"""BLEU as sums over lines is sacreBLEU's; exact match is counted; speed is of the stage's own search."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu

from t5x_ext.contracts import UserError
from t5x_ext.decode import DecodeConfig, Greedy
from t5x_ext.pipeline import Translate, Workspace
from t5x_ext.pipeline.artefact import Artefact, Model, TextFiles, Weights
from t5x_ext.pipeline.stage_folder import FORMAT
from t5x_ext.storage.files import write_json
from t5x_ext.study import Arm, DecodingSpeed, ExactMatch, MeasuredRun, TranslationBleu, translations
from t5x_ext.study.statistics import resampled
from t5x_ext.study.translations import bleu_of_counts, counts_of

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
    write_json(
        tmp_path / "stage/artefact.json",
        {"format": FORMAT, "artefact": Artefact("corpora", tuple(texts)).to_json(), "outputs": {}},
    )
    values = TranslationBleu()(MeasuredRun(tmp_path, Arm("a", part="stage"), 0, None, ""))
    expected = [sacrebleu.corpus_bleu(text, [REFERENCES]).score for text in (WORSE, BETTER)]
    assert values == pytest.approx({"bleu": np.mean(expected), "bleu/en-de": expected[0], "bleu/de-en": expected[1]})
    exact = ExactMatch()(MeasuredRun(tmp_path, Arm("a", part="stage"), 0, None, ""))
    shares = [100 * np.mean(np.array(text) == np.array(REFERENCES)) for text in (WORSE, BETTER)]
    assert 0 < shares[1] < 100
    assert exact == pytest.approx(
        {"exact_match": np.mean(shares), "exact_match/en-de": shares[0], "exact_match/de-en": shares[1]}
    )
    with pytest.raises(UserError, match="stage 'none'"):
        TranslationBleu()(MeasuredRun(tmp_path, Arm("a", part="none"), 0, None, ""))


def test_speed_is_that_of_warm_batches_of_the_stages_own_search(tmp_path, monkeypatch):
    """By a clock on which a translation takes a second and 0.1 for each line, and the first one of a batch a minute."""
    lines = [f"line {number}" for number in range(9)]
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in lines))
    text = TextFiles("t", ("en", "de"), ("in", "hyp"), len(lines), reference="ref")
    model = Model(("en-de",), (Weights("run", 3),))
    for stage, artefact in {"m": Artefact("models", models=(model,)), "out": Artefact("corpora", (text,))}.items():
        (tmp_path / stage).mkdir()
        write_json(
            tmp_path / stage / "artefact.json", {"format": FORMAT, "artefact": artefact.to_json(), "outputs": {}}
        )
    decode, seen, now = DecodeConfig(Greedy()), [], [0.0]

    class Timed:
        def translate(self, batch, source, target, config):
            now[0] += (1 if batch in seen else 60) + 0.1 * len(batch)
            seen.append(batch)
            assert (source, target, config) == ("en", "de", decode)

    monkeypatch.setattr(Workspace, "open", lambda workspace, opened: Timed() if opened == model else None)
    monkeypatch.setattr(translations.time, "perf_counter", lambda: now[0])
    stages = [Translate("out", "m", ("t",), decode=decode)]
    run = MeasuredRun(tmp_path, Arm("a", part="out"), 0, SimpleNamespace(stages=stages), "")
    speed = DecodingSpeed(single=2, full=6, repeats=2)
    assert speed(run) == pytest.approx({"speed/single": 1 / 1.1, "speed/full": 6 / 1.6})
    assert seen == [[lines[0]], [lines[1]]] * 3 + [lines[:6]] * 3
    with pytest.raises(UserError, match=r"'m' .* is no stage that translates"):
        speed(run._replace(arm=Arm("a", part="m")))
