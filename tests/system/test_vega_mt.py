"""The whole of Vega-MT at toy size, as a user starts it: every stage runs, and each can be made again as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from t5x_ext.cli.main import main
from t5x_ext.data import Vocabulary

STAGES = (
    *("bitext", "english", "others", "past", "dev", "test", "clean", "clean_mono", "clean_past"),
    *("pretrain", "lm", "cycle", "round1"),
    *("retrain1", "finetune", "past_lm", "near_past", "noisy", "generalise", "average", "best"),
    *("pretrained_test", "best_test", "scores"),
)
# One of the four directions to the end.
RUN = [
    *("pipeline", "--gin_file=runs/vega_mt_tiny.gin", "--output_dir=out"),
    *(f"--gin.{stage}/Train.directions=['en-zh']" for stage in ("finetune", "generalise")),
]


def artefacts() -> dict[str, str]:
    return {stage: Path(f"out/{stage}/artefact.json").read_text() for stage in STAGES}


def test_every_stage_runs_and_a_score_can_be_followed_to_its_texts(tmp_path, monkeypatch, capsys):
    """One test: what follows the whole run needs what it has made, wherever tests are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    all_stages_run(capsys)
    stages_that_are_lost_are_made_as_they_were()
    a_changed_stage_is_refused_by_name(capsys)


def all_stages_run(capsys):
    assert main([*RUN, "--stages=bitext,past,dev,test,clean"]) == 0
    assert main([*RUN, "--json_out=made.json"]) == 0
    made = json.loads(Path("made.json").read_text())
    assert tuple(made) == STAGES
    # Three texts of 60 lines, from English in two directions, and in two roles; what a model has written is marked.
    assert made["round1"]["counts"]["lines"] == 8 * 60
    assert {text["synthetic"] for text in made["round1"]["corpora"]} == {"source", "target"}
    assert {text["synthetic"] for text in made["cycle"]["corpora"]} == {"source"}
    assert made["near_past"]["counts"]["kept"] == pytest.approx(0.3 * made["near_past"]["counts"]["read"], abs=2)
    assert [model["directions"] for model in made["finetune"]["models"]] == [["en-zh"]]
    assert Vocabulary.load("out/generalise/en-zh/vocabulary").markers == ("BT", "FT")
    for choice in made["best"]["counts"].values():
        assert choice["bleu"] == sorted(choice["bleu"])
    assert set(made["scores"]["scores"]["best_test"]) == {"cldr_test.en-zh.en-zh"}
    assert len(made["scores"]["scores"]["pretrained_test"]) == 4
    assert "against pretrained_test, paired bootstrap" in capsys.readouterr().out
    assert main(["pipeline", "--output_dir=out", "--audit", "--json_out=audit.json"]) == 0
    assert [stage["stage"] for stage in json.loads(Path("audit.json").read_text())] == list(STAGES[::-1])


def stages_that_are_lost_are_made_as_they_were():
    before = artefacts()
    # As a process leaves them that is killed in the midst of the first, and before the end of the others.
    shutil.rmtree("out/round1")
    for stage in ("cycle", "near_past", "best_test", "scores"):
        Path(f"out/{stage}/artefact.json").unlink()
    Path("out/best_test/cldr_test.en-zh.en-zh.zh").unlink()
    assert main(RUN) == 0
    assert artefacts() == before


def a_changed_stage_is_refused_by_name(capsys):
    before = artefacts()
    assert main([*RUN, "--gin.CycleTranslate.tau=0.5"]) == 2
    error = capsys.readouterr().err
    assert "stage 'cycle' in out was made from something else: " in error
    assert "CycleTranslate.tau" in error
    assert "--stages=cycle,retrain1,finetune,generalise,average,best,best_test,scores" in error
    assert artefacts() == before


DATA = Path(__file__).resolve().parents[3] / "shared/data/multi"
SIX = ("en", "de", "cs", "ru", "zh", "ja")


@pytest.mark.realdata
@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs aligned text in six languages in {DATA}")
def test_six_languages_of_real_text_are_cleaned_and_learned_from_in_ten_directions(tmp_path, monkeypatch):
    """With all filters, on fewer lines, as far as models that are just begun; other stages know no languages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    small = {"PRETRAIN_STEPS": 2, "bitext/Texts.stop": 160, "past/Texts.stop": 1310, "dev/Texts.stop": 910}
    options = [f"--gin.{name}={value}" for name, value in (small | {"DATA_DIR": str(DATA)}).items()]
    texts = ["bitext", "english", "others", "past", "dev", "test", "clean", "clean_mono", "clean_past"]
    run = ["pipeline", "--gin_file=runs/vega_mt_six.gin", "--output_dir=out", *options]
    assert main([*run, f"--stages={','.join([*texts, 'pretrain'])}", "--json_out=made.json"]) == 0
    made = json.loads(Path("made.json").read_text())
    assert made["pretrain"]["models"][0]["directions"] == [
        direction for other in SIX[1:] for direction in (f"en-{other}", f"{other}-en")
    ]
    assert Vocabulary.load("out/pretrain/run/vocabulary").languages == SIX
    check_what_is_kept(made)
    test = {line for path in Path("out/test").glob("*.??") for line in path.read_text(encoding="utf-8").split("\n")}
    kept = {line for path in Path("out").glob("clean*/*.??") for line in path.read_text(encoding="utf-8").split("\n")}
    assert len(kept) > 3000
    assert test & kept == {""}


def check_what_is_kept(made):
    """Sentences stay in every language; of an interface go its repetitions and what is the same in both languages."""
    counts = {
        f"{stage}/{name}": count for stage in ("clean", "clean_mono") for name, count in made[stage]["counts"].items()
    }
    assert len(counts) == 14 + 6
    for name, count in counts.items():
        rules = sum(count.get(rule, 0) for rule in ("length", "ratio", "repetition", "script", "language", "markup"))
        assert rules <= 0.03 * count["read"], (name, count)
        if "django" not in name:
            assert count["kept"] >= 0.97 * count["read"], (name, count)
    # A customer's "Are you there?" is in the test text, too.
    assert sum(count["held_out"] for count in counts.values()) > 0
