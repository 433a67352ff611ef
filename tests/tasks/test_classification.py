"""Classification: a task that can be learned is learned, its folder opens, mistakes are one line."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import t5x_ext
from t5x_ext.checkpoints import RunFolder
from t5x_ext.contracts import UserError
from t5x_ext.corpora import LabelledText
from t5x_ext.data import RowConfig
from t5x_ext.parallel import make_mesh
from t5x_ext.tasks import TextClassifier
from t5x_ext.train import EvaluationConfig, execute, make_program


def test_words_that_decide_are_found_and_the_folder_predicts(classification_run, tmp_path):
    results = execute(classification_run(60), str(tmp_path / "run"))
    assert results["examples"] == 40
    assert results["accuracy"] >= 0.95
    assert set(results) >= {"accuracy", "f1", "matthews"}
    classifier = t5x_ext.load(str(tmp_path / "run"))
    assert classifier.classes == ("bad", "good")
    assert classifier.predict(["the film was lovely", "a very dull plot"]) == ["good", "bad"]
    test = (tmp_path / "test.tsv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split("\t") for line in test), strict=True)
    agreed = np.mean([a == b for a, b in zip(classifier.predict(texts), labels, strict=True)])
    assert agreed == pytest.approx(results["accuracy"])
    probabilities = classifier.probabilities(texts)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-5)
    # What a text gets does not depend on what is computed beside it.
    np.testing.assert_allclose(classifier.probabilities(texts[:1]), probabilities[:1], rtol=1e-4, atol=1e-6)
    assert classifier.predict([]) == []
    record = RunFolder(tmp_path / "run").read_record()
    assert (record["task"], record["classes"], record["texts"]) == ("classification", ["bad", "good"], 1)
    with pytest.raises(UserError, match="line 0 has 2 texts; this model classifies single texts"):
        classifier.predict([("a", "b")])


def test_pairs_of_texts(classification_run, tmp_path):
    lines = [f"the film\tit was {'good' if i % 2 else 'bad'}\t{i % 2}" for i in range(24)]
    (tmp_path / "pairs.tsv").write_text("first\tsecond\tlabel\n" + "\n".join(lines) + "\n")
    pairs = LabelledText(str(tmp_path / "pairs.tsv"), ("first", "second"))
    run = classification_run(
        2, task={"train": pairs, "valid": None, "test": None}, evaluation=EvaluationConfig(every=0)
    )
    execute(run, str(tmp_path / "run"))
    classifier = t5x_ext.load(str(tmp_path / "run"), "last")
    assert classifier.predict([("the film", "it was good")])[0] in ("0", "1")
    with pytest.raises(UserError, match="line 0 has 1 texts; this model classifies pairs of texts"):
        classifier.predict(["the film"])


def test_shapes_of_rows_do_not_change_scores(classification_run, tmp_path):
    """Packed rows give each example what a row of its own gives it."""
    found = []
    for shape in (RowConfig(4, 24, 3), RowConfig(4, 12, 1)):
        for pooling in ("first", "mean"):
            run = classification_run(1, task={"batch": shape, "pooling": pooling})
            task = run.task.starting_from(RunFolder(run.init_from.run_dir))
            prepared = task.prepare(RunFolder(tmp_path / "run"), None, 0)
            program = make_program(run, prepared.sizes, make_mesh(run.mesh))
            params = program.definition.init(jax.random.key(0))
            found.append(prepared.scores(program, params, prepared._test))
    assert found[0] == found[2]
    assert found[1] == found[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("bad", "fine")}, r"train.tsv, line 3: the label 'good' is none of the classes of this task"),
        ({"classes": ("good",)}, r"'good'; two classes are the least"),
        ({"batch": RowConfig(4, 64, 1)}, r"RowConfig.length is 64, but the model has 24 positions"),
    ],
)
def test_mistakes_are_one_line(classification_run, tmp_path, changes, message):
    def prepare():
        run = classification_run(1, task=changes)
        run.task.starting_from(RunFolder(run.init_from.run_dir)).prepare(RunFolder(tmp_path / "run"), None, 0)

    with pytest.raises(UserError, match=message) as caught:
        prepare()
    assert "\n" not in str(caught.value)


def test_a_label_of_held_out_examples_that_training_has_not_is_named(classification_run, tmp_path):
    (tmp_path / "odd.tsv").write_text("sentence\tkind\nthe film\tgood\nthe plot\tugly\n")
    run = classification_run(1)
    odd = dataclasses.replace(run.task.test, path=str(tmp_path / "odd.tsv"))
    task = dataclasses.replace(run.task, test=odd).starting_from(RunFolder(run.init_from.run_dir))
    with pytest.raises(UserError, match=r"odd.tsv, line 3: the label 'ugly' is none of the classes"):
        task.prepare(RunFolder(tmp_path / "run"), None, 0)


def test_a_tokenizer_is_needed(classification_run, tmp_path):
    with pytest.raises(UserError, match=r"Classification.tokenizer is missing: give a folder with tokenizer.json"):
        classification_run(1).task.prepare(RunFolder(tmp_path / "run"), None, 0)


def test_another_folder_is_told_apart(encoder, tmp_path):
    with pytest.raises(UserError, match="is a run of the task 'encoder', which classifies no texts"):
        TextClassifier.from_run(encoder)
