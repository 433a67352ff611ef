"""Text of seqio Tasks and Mixtures, from local TFDS data only."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora.seqio_mixture import SeqioMixture

NEEDED = {"seqio", "tensorflow", "tensorflow_datasets"}
TEXT = {
    "train": [
        ("Übergröße, „ganz“ schön.", "Plus size, quite nice."),
        ("日本語のテキスト", "Text in Japanese"),
        ("Приве́т, мир!", "Hello, world!"),
        ("", "An empty source stays."),
        ("žluťoučký kůň 🐎", "a yellowish horse 🐎"),
    ],
    "test": [("Ende.", "The end."), ("Wirklich.", "Really.")],
}


def run_program(folder):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    program = Path(__file__).with_name("seqio_program.py")
    done = subprocess.run([sys.executable, program, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the program found in its own process."""
    missing = sorted(name for name in NEEDED if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"the extra seqio is not installed: no {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("seqio")
    (folder / "text").mkdir()
    for split, pairs in TEXT.items():
        for side, language in enumerate(("de", "en")):
            lines = "".join(pair[side] + "\n" for pair in pairs)
            (folder / "text" / f"{language}.{split}.txt").write_text(lines, encoding="utf-8")
    return run_program(folder)


def lists(pairs):
    return [list(pair) for pair in pairs]


def test_text_is_that_of_the_files_in_their_order_without_loading_a_vocabulary(found):
    assert found["train"] == [lists(TEXT["train"])] * 2
    assert found["test"] == lists(TEXT["test"])


def test_features_of_the_source_itself(found):
    assert found["reversed"] == [[english, german] for german, english in TEXT["train"]]


def test_preprocessing_applies_up_to_a_tokenizer_of_ones_own(found):
    assert found["own"] == [[f"<{german}>", english] for german, english in TEXT["train"]]


def test_random_preprocessing_is_repeatable(found):
    first, second = found["random"]
    assert first == second
    assert len({text.removeprefix(german) for (text, _), (german, _) in zip(first, TEXT["train"])}) > 1


def test_a_mixture_gives_each_task_once_by_name(found):
    assert found["mixture"] == found["own"] + found["random"][0]


def test_line_ends_within_a_text_become_spaces(found):
    assert found["odd"] == [["a b c", "x"], ["d\u2028e", "y z"]]


def test_prepared_tfds_dataset(found):
    first, second = found["toy"]
    assert first == second
    assert sorted(first) == sorted([f"Zeile {number}", f"line {number}"] for number in range(3000))


def test_fingerprint_follows_content_and_languages(found):
    same, again, other_text, other_language = found["fingerprints"]
    assert same == again
    assert len({same, other_text, other_language}) == 3


def test_mistakes_are_one_line(found):
    name, split, feature, broken, absent = found["errors"]
    assert "no Task or Mixture 'folder_de_em'" in name
    assert "the nearest are folder_de_en" in name
    assert split == "'folder_de_en' has no split 'valid'; it has test, train"
    assert feature == (
        "'folder_de_en' has no text features 'source' and 'targets' at one step before tokenization; "
        "its text features are de, en, inputs, targets"
    )
    assert broken.startswith("bytes [broken] example 1, inputs is not UTF-8")
    assert absent == "the data of 'toy_absent' is not prepared: run `tfds build toy:1.0.0` once"


def test_wmt_tasks_and_mixtures_are_registered(found):
    pairs = {"wmt14": "cs de fr hi ru", "wmt17": "cs de fi lv ru tr zh", "wmt19": "cs de fi gu kk lt ru zh"}
    names = {f"{year}_translate_{language}_en" for year, languages in pairs.items() for language in languages.split()}
    assert set(found["registered"]) == {*names, "wmt19_translate_fr_de", "para_crawl_cs_en", "para_crawl_de_en"}
    assert found["mixtures"] == {
        "wmt22_translate_cs_en": ["para_crawl_cs_en", "wmt19_translate_cs_en"],
        "wmt22_translate_de_en": ["para_crawl_de_en", "wmt19_translate_de_en"],
        "wmt22_translate_ru_en": ["wmt19_translate_ru_en"],
        "wmt22_translate_zh_en": ["wmt19_translate_zh_en"],
    }
    assert found["wmt"] == [
        ["wmt14_translate/de-en:1.0.0", ["train", "validation", "test"], {"inputs": "string", "targets": "string"}],
        ["wmt19_translate/fr-de:1.0.0", ["train", "validation"], {"inputs": "string", "targets": "string"}],
    ]


def test_satisfies_the_corpus_contract():
    corpus = SeqioMixture("wmt14_translate_de_en", "test", "de", "en")
    assert isinstance(corpus, Corpus)
    assert (corpus.languages, corpus.name) == (("de", "en"), "wmt14_translate_de_en")


def test_importing_and_constructing_load_no_tensorflow():
    program = (
        "import sys; from t5x_ext.corpora.seqio_mixture import SeqioMixture;"
        "SeqioMixture('wmt14_translate_de_en', source_language='de', target_language='en').languages;"
        f"print(sorted({NEEDED!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqio", None)
    monkeypatch.delitem(sys.modules, "t5x_ext.corpora.seqio_tasks", raising=False)
    with pytest.raises(UserError, match=r"pip install 't5x_ext\[seqio\]'"):
        next(SeqioMixture("anything").pairs())


def test_equal_languages():
    with pytest.raises(UserError, match="both 'de'"):
        SeqioMixture("anything", source_language="de", target_language="de")
