from __future__ import annotations

import json

import pytest
from stand_ins import Given, Lines, StandIn, opener, read

from t5x_ext.contracts import UserError
from t5x_ext.corpora.filters import FilterConfig
from t5x_ext.evaluate import evaluate_texts, paired_test
from t5x_ext.pipeline import Clean, Evaluate, Pipeline, TextFiles, Texts, Translate, audit, execute
from t5x_ext.vega_mt import widen_as_released

ROWS = tuple((f"this is line number {n} of all", f"这 是 第 {n} 行 , 好 .") for n in range(8))
TEST = Given("test", texts=(("t", ("en", "zh"), ROWS), ("m", ("zh",), (("x",),))))
MODEL = Given("model", directions=("en-zh", "zh-en"))
BACK = {pair[side]: pair[1 - side] for pair in ROWS for side in (0, 1)}


def pipeline(*stages):
    return Pipeline((TEST, MODEL, Given("other", directions=("en-zh", "zh-en")), *stages))


def good(source, target, line):
    return BACK[line]


def bad(source, target, line):
    return BACK[line] if line[-1] == "." else "坏 ."


def test_both_sides_are_translated_and_finished_in_the_way_of_their_language(tmp_path):
    stage = Translate("out", "model", ("test",))
    made = execute(pipeline(stage), tmp_path, opener=opener(model=StandIn(good)))["out"]
    assert made.corpora == (
        TextFiles(
            "t.en-zh", ("en", "zh"), ("test/t.en", "out/t.en-zh.zh"), 8, "target", one_way=True, reference="test/t.zh"
        ),
        TextFiles(
            "t.zh-en", ("zh", "en"), ("test/t.zh", "out/t.zh-en.en"), 8, "target", one_way=True, reference="test/t.en"
        ),
    )
    assert read(tmp_path, "out/t.en-zh.zh")[3] == "这 是 第 3 行，好。"
    assert read(tmp_path, "out/t.zh-en.en") == [row[0] for row in ROWS]


def test_what_is_translated_gets_the_punctuation_of_what_was_learned_from(tmp_path):
    quoted = Given("test", texts=(("t", ("en", "zh"), (("“one” – two &amp; …", "x"),)),))
    seen = []
    model = StandIn(lambda source, target, line: (seen.append(line), "y")[1])
    for name, normalize in (("plain", True), ("raw", False)):
        stage = Translate("out", "model", ("test",), directions=("en-zh",), normalize=normalize)
        made = execute(Pipeline((quoted, MODEL, stage)), tmp_path / name, opener=opener(model=model))["out"]
        # What is kept beside the translation is what there was.
        assert read(tmp_path / name, made.corpora[0].files[0]) == ["“one” – two &amp; …"]
    assert seen == ['"one" - two & ...', "“one” – two &amp; …"]


@pytest.mark.parametrize(("name", "line"), [("none", ROWS[0][1]), (widen_as_released, "这是第0行，好．")])
def test_other_ways_to_finish(tmp_path, name, line):
    stage = Translate("out", "model", ("test",), directions=("en-zh",), postprocess=name)
    execute(pipeline(stage), tmp_path, opener=opener(model=StandIn(good)))
    assert read(tmp_path, "out/t.en-zh.zh")[0] == line


def test_scores_are_those_of_the_texts_and_tests_are_against_the_baseline(tmp_path):
    stages = (
        Translate("one", "model", ("test",)),
        Translate("two", "other", ("test",)),
        Evaluate("scores", ("one", "two"), baseline="one", tokenizers={"zh": "char"}),
    )
    made = execute(pipeline(*stages), tmp_path, opener=opener(model=StandIn(good), other=StandIn(bad)))["scores"]
    hypotheses, references = read(tmp_path, "two/t.en-zh.zh"), read(tmp_path, "test/t.zh")
    expected = evaluate_texts(hypotheses, references, "zh", tokenizer="char").to_json()
    found = made.scores["two"]["t.en-zh"]
    assert {name: found[name] for name in expected} == expected
    test = paired_test(read(tmp_path, "one/t.en-zh.zh"), hypotheses, references, "zh", tokenizer="char")["BLEU"]
    assert found["tests"]["BLEU"] == test.to_json()
    assert found["tests"]["BLEU"]["difference"] < 0
    assert made.scores["two"]["t.zh-en"]["bleu"] == pytest.approx(100)
    assert "tests" not in made.scores["one"]["t.en-zh"]
    assert json.loads((tmp_path / "scores/scores.json").read_text()) == made.scores
    table = (tmp_path / "scores/scores.txt").read_text()
    assert "one  t.en-zh" in table
    assert "against one, paired bootstrap:\ntwo  t.en-zh: BLEU -" in table
    assert audit(tmp_path)[0].stage == "scores"


def test_each_stage_is_tested_against_the_one_it_names(tmp_path):
    """Three models, of which the first and the third say the same: against it, the third makes no difference."""
    models = [Given(name, directions=("en-zh",)) for name in ("a", "b", "c")]
    names = ("one", "two", "three")
    stages = [Translate(name, model.name, ("test",)) for name, model in zip(names, models)]
    scores = Evaluate("scores", names, baseline={"two": "one", "three": "one"})
    before = Evaluate("before", names, baseline={"two": "one", "three": "two"})
    answers = opener(a=StandIn(good), b=StandIn(bad), c=StandIn(good))
    made = execute(Pipeline((TEST, *models, *stages, scores, before)), tmp_path, opener=answers)
    rows = {name: {stage: row["t.en-zh"] for stage, row in made[name].scores.items()} for name in ("scores", "before")}
    differences = {name: {stage: row["tests"]["BLEU"]["difference"] for stage, row in of.items() if "tests" in row}
                   for name, of in rows.items()}  # fmt: skip
    lost = differences["scores"]["two"]
    assert lost < 0
    assert differences == {"scores": {"two": lost, "three": 0}, "before": {"two": lost, "three": -lost}}
    assert [rows["before"][name]["against"] for name in ("two", "three")] == ["one", "two"]
    table = (tmp_path / "before/scores.txt").read_text()
    assert table.index("against one, paired bootstrap:\ntwo  ") < table.index("against two, paired bootstrap:\nthree  ")


def test_mistakes(tmp_path):
    for baseline in ({"one": "three"}, {"three": "one"}):
        with pytest.raises(UserError, match="baseline='three': must be one of one, two"):
            Evaluate("scores", ("one", "two"), baseline=baseline)
    with pytest.raises(UserError, match="baseline='three': must be one of one, two"):
        Evaluate("scores", ("one", "two"), baseline="three")
    with pytest.raises(UserError, match=r"tokenizer='zhh': one of .*did you mean 'zh'"):
        Evaluate("scores", ("one",), tokenizers={"zh": "zhh"})
    with pytest.raises(UserError, match="seed=-1: must be at least 0"):
        Evaluate("scores", ("one",), seed=-1)
    with pytest.raises(UserError, match=r"Translate.texts: there is no stage"):
        Translate("out", "model", ())
    with pytest.raises(UserError, match=r"Clean.corpora and Clean.texts are both empty"):
        Clean("out")
    with pytest.raises(UserError, match=r"m is de on both sides; .* Texts.side = 'source' or 'target'"):
        Texts("out", (Lines("m", ("de", "de"), ()),))
    with pytest.raises(UserError, match="there are none; give at least one stage"):
        Evaluate("scores", ())
    with pytest.raises(UserError, match="there is no pair for en-cs"):
        execute(pipeline(Translate("out", "model", ("test",), ("en-cs",))), tmp_path / "a", opener=opener())
    twice = (Given("again", texts=TEST.texts), Translate("out", "model", ("test", "again")))
    with pytest.raises(UserError, match=r"two texts are called 't\.en'"):
        execute(pipeline(*twice), tmp_path / "c", opener=opener())
    with pytest.raises(UserError, match="'test' makes no translations with a reference"):
        execute(pipeline(Evaluate("scores", ("test",))), tmp_path / "b", opener=opener())


def test_cleaning_keeps_what_the_rules_keep_and_counts(tmp_path):
    raw = (("one  line", "eine Zeile"), ("same", "same"), ("one line", "eine Zeile"), ("<b>x</b>", "y"))
    config = FilterConfig(min_script_share=None, min_language_probability=None, near_duplicate_similarity=None)
    texts = Given("raw", texts=(("a", ("en", "de"), raw), ("m", ("de",), (("Zeile",), ("Zeile",)))))
    made = execute(Pipeline((texts, Clean("clean", texts=("raw",), config=config))), tmp_path)["clean"]
    assert made.corpora == (
        TextFiles("a", ("en", "de"), ("clean/a.en", "clean/a.de"), 1),
        TextFiles("m", ("de",), ("clean/m.de",), 1),
    )
    assert read(tmp_path, "clean/a.en") == ["one line"]
    counts = made.counts["a"]
    assert (counts["read"], counts["kept"]) == (4, 1)
    assert sum(value for name, value in counts.items() if name not in ("read", "kept")) == 3
    assert made.counts["m.de"]["duplicate"] == 1
