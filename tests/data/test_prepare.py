from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.corpora.filters import FilterConfig
from t5x_ext.data import (
    BatchConfig,
    DataConfig,
    SubwordSampling,
    TagPolicy,
    Vocabulary,
    VocabularyConfig,
    batch_iterator,
    prepare,
)

BATCH = BatchConfig(rows=4, source_length=64, target_length=64)


@pytest.fixture(scope="module")
def config(make_corpus) -> DataConfig:
    """English with German and Chinese, both ways."""
    return DataConfig(
        train=(make_corpus(120, name="de"), make_corpus(60, ("en", "zh"), name="zh")),
        valid=(make_corpus(20, seed=9, name="valid"),),
        test=[make_corpus(10, seed=8, name="test")],
        bidirectional=True,
        tags=TagPolicy(decoder="target"),
        vocabulary=VocabularyConfig(size=400),
        batch=BATCH,
    )


@pytest.fixture(scope="module")
def prepared(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, prepare(config, str(run_dir), seed=3)


def test_everything_a_run_needs_is_there(prepared, config):
    run_dir, data = prepared
    assert data.directions == ("en-de", "de-en", "en-zh", "zh-en")
    assert [direction.name for direction in data.valid] == ["en-de", "de-en"]
    assert [direction.name for direction in data.test] == ["en-de", "de-en"]
    assert data.valid[1].texts()[0] == [target for _, target in config.valid[0].lines]
    assert data.plan.rates() == pytest.approx({"en-de": 1 / 3, "de-en": 1 / 3, "en-zh": 1 / 6, "zh-en": 1 / 6})
    assert Vocabulary.load(str(run_dir / "vocabulary")).fingerprint() == data.vocabulary.fingerprint()
    assert sorted(path.name.split("-")[0] for path in (run_dir / "cache").iterdir()) == ["de", "valid", "zh"]
    assert next(batch_iterator(data.batches))["target_labels"].shape == (4, 64)
    assert json.loads(json.dumps(data.description)) == data.description


def test_batches_hold_the_text(prepared, config):
    _, data = prepared
    pairs = {pair for corpus in config.train for pair in corpus.lines}
    previews = [data.batches.preview(index, 4) for index in range(data.plan.batches_per_epoch(0))]
    seen = {(e.source, e.target) for batch in previews for row in batch for e in row}
    assert seen == pairs | {pair[::-1] for pair in pairs}


def test_validation_is_one_unshuffled_pass(prepared, config):
    _, data = prepared
    batches = list(data.valid_batches())
    labels = [batch["target_labels"][batch["target_segment_ids"] > 0] for batch in batches]
    assert sum(int((part == data.vocabulary.eos_id).sum()) for part in labels) == 40
    first = data.valid_packed.preview(0, 1)[0]
    assert {(example.source, example.target) for example in first} <= {*config.valid[0].lines} | {
        pair[::-1] for pair in config.valid[0].lines
    }
    for whole, again, rows in zip(batches, data.valid_batches(), data.valid_batches(1, 3)):
        for key, array in whole.items():
            np.testing.assert_array_equal(array, again[key])
            np.testing.assert_array_equal(array[1:3], rows[key])


def test_preparing_again_changes_nothing(prepared, config):
    run_dir, data = prepared
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    again = prepare(config, str(run_dir), seed=3)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()} == before
    assert again.description == data.description
    for key, array in data.batches[5].items():
        np.testing.assert_array_equal(array, again.batches[5][key])


def test_the_description_tells_what_changed(prepared, config, tmp_path):
    run_dir, data = prepared
    for change in (
        {"batch": dataclasses.replace(BATCH, rows=8)},
        {"bidirectional": False},
        {"tags": TagPolicy(encoder="target")},
        {"subword": SubwordSampling(2)},
    ):
        other = prepare(dataclasses.replace(config, **change), str(run_dir), seed=3)
        assert {key for key in data.description if data.description[key] != other.description[key]} == {
            "caches" if "subword" in change else next(iter(change))
        }
    assert prepare(config, str(run_dir), seed=4).description["seed"] == 4


def test_no_validation(prepared, config):
    run_dir, _ = prepared
    data = prepare(dataclasses.replace(config, valid=(), test=()), str(run_dir))
    assert (data.valid_packed, list(data.valid_batches()), data.valid, data.test) == (None, [], (), ())


def test_a_vocabulary_of_other_settings_is_refused(prepared, config, make_corpus):
    run_dir, _ = prepared
    for change, message in (
        ({"vocabulary": VocabularyConfig(size=390)}, "other size"),
        ({"train": config.train[:1]}, "other languages, corpora"),
        ({"train": (make_corpus(121), *config.train[1:])}, "other corpora"),
    ):
        with pytest.raises(UserError, match=f"vocabulary: was trained with {message}; restore"):
            prepare(dataclasses.replace(config, **change), str(run_dir))


def test_a_given_vocabulary_as_file_or_folder(prepared, config, tmp_path):
    run_dir, trained = prepared
    file, folder = str(run_dir / "vocabulary" / "sentencepiece.model"), str(run_dir / "vocabulary")
    for number, path in enumerate((file, folder)):
        given = dataclasses.replace(config, vocabulary=VocabularyConfig(path=path))
        data = prepare(given, str(tmp_path / str(number)), cache_root=str(run_dir / "cache"))
        assert data.vocabulary.fingerprint() == trained.vocabulary.fingerprint()
        assert data.description["caches"] == trained.description["caches"], "caches are shared between runs"
        assert prepare(given, str(tmp_path / str(number)), cache_root=str(run_dir / "cache")).directions
    assert not (tmp_path / "0" / "cache").exists()
    with pytest.raises(UserError, match=r"holds a vocabulary that was given, not trained"):
        prepare(config, str(tmp_path / "0"))


def test_a_given_vocabulary_gets_tags_for_new_languages(prepared, config, make_corpus, tmp_path, list_corpus):
    run_dir, trained = prepared
    french = list_corpus((("the cat", "le chat"),) * 20, ("en", "fr"), "fr")
    given = dataclasses.replace(
        config, train=(french,), valid=(), vocabulary=VocabularyConfig(path=str(run_dir / "vocabulary"))
    )
    data = prepare(given, str(tmp_path))
    assert data.vocabulary.tag_id("fr") == trained.vocabulary.size
    assert data.batches.preview(0, 1)[0][0].direction in ("en-fr", "fr-en")
    other = dataclasses.replace(config, vocabulary=VocabularyConfig(path=str(run_dir / "vocabulary")))
    with pytest.raises(UserError, match="is not the vocabulary"):
        prepare(other, str(tmp_path))


def test_two_targets_need_a_tag(config, tmp_path):
    untagged = dataclasses.replace(config, tags=TagPolicy(encoder="source"))
    with pytest.raises(UserError, match="en is translated into de and zh, and no tag says which"):
        prepare(untagged, str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_no_training_corpus():
    with pytest.raises(UserError, match="no training corpus"):
        DataConfig(train=())


def test_a_cache_takes_rules_for_pairs_only(make_corpus):
    with pytest.raises(UserError, match="FilterConfig is for t5x_ext clean; a cache takes PairRules only"):
        DataConfig(train=make_corpus(3), cleaning=FilterConfig())


def test_a_corpus_alone_is_a_corpus(make_corpus):
    assert len(DataConfig(train=make_corpus(3)).train) == 1


def test_a_lost_cache_is_built_anew_the_same(prepared, config, tmp_path):
    run_dir, data = prepared
    shutil.copytree(run_dir / "vocabulary", tmp_path / "vocabulary")
    again = prepare(config, str(tmp_path), seed=3)
    for key, array in data.batches[2].items():
        np.testing.assert_array_equal(array, again.batches[2][key])
    for name in data.description["caches"]:
        for path in (run_dir / "cache" / name).iterdir():
            assert path.read_bytes() == (tmp_path / "cache" / name / path.name).read_bytes()


def test_importing_the_room_loads_no_heavy_library():
    program = (
        "import sys, t5x_ext.data; print([m for m in ('tensorflow', 'seqio', 'babel', 'gin') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_every_name_of_the_room_is_there():
    import t5x_ext.data as room

    assert all(getattr(room, name) is not None for name in room.__all__)
    assert Path(room.__file__).name == "__init__.py"
    with pytest.raises(AttributeError):
        room.Nothing  # noqa: B018
