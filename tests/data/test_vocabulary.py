from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t5x_ext.contracts import UserError
from t5x_ext.corpora import clean_line
from t5x_ext.data import Vocabulary, VocabularyConfig, train_vocabulary

LINES = [f"the quick brown fox {number} jumps over the lazy dog" for number in range(200)]


def own_model(**options) -> bytes:
    """A model as a user of SentencePiece would train it, with its own defaults."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        minloglevel=2,
        **{"vocab_size": 60, "hard_vocab_limit": False, **options},
    )
    return model.getvalue()


def test_ids_are_laid_out_as_documented(vocabulary):
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
    assert [processor.id_to_piece(index) for index in range(7)] == [
        "<pad>",
        "</s>",
        "<unk>",
        "__en__",
        "__de__",
        "__zh__",
        "<0x00>",
    ]
    assert (vocabulary.eos_id, vocabulary.unk_id, vocabulary.size) == (1, 2, processor.get_piece_size())
    assert vocabulary.languages == ("en", "de", "zh")
    assert [vocabulary.tag_id(language) for language in vocabulary.languages] == [3, 4, 5]


def test_tags_are_user_defined_symbols_in_the_stored_model(vocabulary):
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
    assert "__de__" in processor.encode("a __de__ b", out_type=str), "what plain SentencePiece makes of it"


@pytest.mark.parametrize("text", ["__de__", "a __de__ b", "__de____en__", "x__zh__", "</s>", "<pad> <unk>", "<0x41>"])
def test_text_never_becomes_a_tag_or_a_control_piece(vocabulary, text):
    (ids,) = vocabulary.encode([text])
    special = {0, vocabulary.eos_id, vocabulary.unk_id, *map(vocabulary.tag_id, vocabulary.languages)}
    assert not special & set(ids.tolist())
    assert vocabulary.decode([ids]) == [text]
    (sampled,) = vocabulary.sample([text], alpha=0.5, seed=1)
    assert not special & set(sampled.tolist())


# U+2581 is how SentencePiece writes a space, so that it reads it back as one.
@given(st.text().map(clean_line).filter(lambda text: "\u2581" not in text))
@example("你好，世界！（１２３）“引号”")
@example("\U0001f469\u200d\U0001f52c ñ ﬁ ½ İ")
@settings(max_examples=200)
def test_any_cleaned_text_survives(vocabulary, text):
    (ids,) = vocabulary.encode([text])
    assert ids.dtype == np.int32
    assert vocabulary.unk_id not in ids
    assert vocabulary.decode([ids]) == [text]


def test_lines_are_cleaned_before_they_are_encoded(vocabulary):
    raw, clean = vocabulary.encode([" the\u00a0\u200b cat\t", "the cat"])
    np.testing.assert_array_equal(raw, clean)


def test_decoding_stops_at_end_of_sentence_and_drops_tags(vocabulary):
    (ids,) = vocabulary.encode(["the cat"])
    tag, eos = vocabulary.tag_id("de"), vocabulary.eos_id
    assert vocabulary.decode([[tag, *ids, eos, *ids], [eos, *ids], [], np.array([tag])]) == ["the cat", "", "", ""]
    assert vocabulary.decode([]) == []


def test_training_is_deterministic_and_samples_by_seed():
    same = [train_vocabulary(LINES, 300, ("en",)).fingerprint() for _ in range(2)]
    assert same[0] == same[1]
    sampled = [train_vocabulary(LINES, 300, ("en",), seed=seed, max_lines=20).fingerprint() for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert train_vocabulary(LINES, 300, ("en", "de")).fingerprint() != same[0]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_small_text_gives_fewer_pieces_and_says_so(caplog, model_type):
    with caplog.at_level("INFO"):
        vocabulary = train_vocabulary(LINES, 5000, ("en",), model_type=model_type)
    assert vocabulary.size < 5000
    assert f"{vocabulary.size} subwords instead of 5000" in caplog.text


def test_repeated_lines_cost_no_time():
    """SentencePiece alone takes 10 s for 800 repetitions of this text and quadratic time for more."""
    rare = ["".join(chr(0x4E00 + number * 10 + offset) for offset in range(10)) for number in range(15)]
    start = time.process_time()
    train_vocabulary(["the cat sat on the mat"] * 5000 + rare, 450, (), character_coverage=1.0)
    assert time.process_time() - start < 2


def test_training_is_silent(capfd):
    train_vocabulary(LINES, 300, ("en",))
    assert capfd.readouterr() == ("", "")


def test_digits_are_split_on_request():
    lines = [f"in the year {1990 + number % 30}" for number in range(60)]
    whole, split = (train_vocabulary(lines, 320, (), split_digits=split) for split in (False, True))
    assert len(whole.encode(["2019"])[0]) < len(split.encode(["2019"])[0])
    assert split.decode(split.encode(["2019 2020"])) == ["2019 2020"]


def test_rare_characters_go_to_bytes_when_there_are_many():
    frequent = ["the cat sat on the mat"] * 20_000
    rare = ["".join(chr(0x4E00 + number * 10 + offset) for offset in range(10)) for number in range(15)]
    automatic, full = (train_vocabulary(frequent + rare, 450, (), character_coverage=share) for share in (None, 1.0))
    assert full.decode(full.encode(rare)) == automatic.decode(automatic.encode(rare)) == rare
    assert sum(map(len, full.encode(rare))) < sum(map(len, automatic.encode(rare)))
    roomy = train_vocabulary(frequent + rare, 800, ())
    assert sum(map(len, roomy.encode(rare))) <= sum(map(len, full.encode(rare)))


@pytest.mark.parametrize(
    ("lines", "size", "message"),
    [([], 300, "no text"), (["", "\u200b"], 300, "no text"), (LINES, 100, r"size 100 is too small: .* \d+ pieces")],
)
def test_training_mistakes(lines, size, message):
    with pytest.raises(UserError, match=message):
        train_vocabulary(lines, size, ("en",))


@pytest.mark.parametrize(
    ("field", "value"), [("model_type", "word"), ("size", 0), ("max_lines", 0), ("character_coverage", 0.5)]
)
def test_config_mistakes(field, value):
    with pytest.raises(UserError, match=f"VocabularyConfig.{field}={value!r}"):
        VocabularyConfig(**{field: value})


def test_subword_sampling_is_deterministic_lossless_and_varied(vocabulary):
    lines = ["the garden the window", "das Fenster", "窗户 x\U0001f600y", "7"] * 20
    first, again, other = (vocabulary.sample(lines, alpha=0.02, seed=seed) for seed in (1, 1, 2))
    assert [ids.tolist() for ids in first] == [ids.tolist() for ids in again]
    assert [ids.tolist() for ids in first] != [ids.tolist() for ids in other]
    assert vocabulary.decode(first) == vocabulary.decode(other) == lines
    assert len({tuple(ids) for ids in first[::4]}) > 5
    assert {ids.dtype for ids in first} == {np.dtype(np.int32)}


def test_subword_sampling_is_the_same_in_another_process(vocabulary, tmp_path):
    vocabulary.save(str(tmp_path))
    program = (
        "import sys; from t5x_ext.data import Vocabulary;"
        "print([ids.tolist() for ids in Vocabulary.load(sys.argv[1]).sample(['the garden window'] * 5, 0.1, 3)])"
    )
    there = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str([ids.tolist() for ids in vocabulary.sample(["the garden window"] * 5, 0.1, 3)])


def test_segmentations_are_drawn_by_their_probability(vocabulary):
    """Against enumeration: every way to cut a word into pieces, weighted by the model's scores."""
    processor, word, alpha = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model), "cat", 0.3
    text = f"\u2581{word}"

    def cuts(start: int) -> Iterator[list[int]]:
        if start == len(text):
            yield []
        for stop in range(start + 1, len(text) + 1):
            piece = processor.piece_to_id(text[start:stop])
            if piece != processor.unk_id():
                yield from ([piece, *rest] for rest in cuts(stop))

    weights = {tuple(ids): math.exp(alpha * sum(map(processor.get_score, ids))) for ids in cuts(0)}
    assert 2 <= len(weights) <= 32
    count = 20_000
    drawn = Counter(tuple(ids.tolist()) for ids in vocabulary.sample([word] * count, alpha, seed=0))
    for ids, weight in weights.items():
        assert drawn[ids] / count == pytest.approx(weight / sum(weights.values()), abs=0.015)


def test_likely_segmentations_are_the_best_ones(vocabulary):
    lines = ["the garden the window", "das Fenster"]
    for sampled, best in zip(vocabulary.sample(lines, alpha=1000, seed=0), vocabulary.encode(lines)):
        np.testing.assert_array_equal(sampled, best)


def test_subword_sampling_of_own_models():
    crossing = Vocabulary.from_model(own_model(split_by_whitespace=False, vocab_size=200))
    assert crossing.decode(crossing.sample(LINES[:5], alpha=0.1, seed=0)) == LINES[:5]
    with pytest.raises(UserError, match="needs a unigram vocabulary"):
        Vocabulary.from_model(own_model(model_type="bpe")).sample(LINES[:1], alpha=0.1, seed=0)


def test_save_and_load(vocabulary, tmp_path):
    vocabulary.save(str(tmp_path / "v"), {"size": 400})
    loaded = Vocabulary.load(str(tmp_path / "v"))
    assert loaded.fingerprint() == vocabulary.fingerprint()
    assert loaded.languages == vocabulary.languages
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == ["sentencepiece.model", "vocabulary.json"]


def test_own_model_gets_missing_tags_after_its_last_id(tmp_path):
    path = tmp_path / "own.model"
    path.write_bytes(own_model(user_defined_symbols=["__de__"]))
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    vocabulary = Vocabulary(str(path), ("en", "de", "fr"))
    assert vocabulary.tag_id("de") < size
    assert (vocabulary.tag_id("en"), vocabulary.tag_id("fr"), vocabulary.size) == (size, size + 1, size + 2)
    (ids,) = vocabulary.encode(["the __de__ fox"])
    assert not set(ids.tolist()) & set(map(vocabulary.tag_id, ("en", "de", "fr")))
    (plain,) = vocabulary.encode(["the fox"])
    assert vocabulary.decode([[size, *plain, vocabulary.eos_id]]) == ["the fox"]
    vocabulary.save(str(tmp_path / "v"))
    assert Vocabulary.load(str(tmp_path / "v")).tag_id("fr") == size + 1


def test_own_model_without_padding_is_enough_without_end_of_sentence_not(tmp_path):
    path = tmp_path / "own.model"
    path.write_bytes(own_model())
    assert Vocabulary(str(path)).size == sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    path.write_bytes(own_model(eos_id=-1))
    with pytest.raises(UserError, match=r"own\.model: has no end-of-sentence piece"):
        Vocabulary(str(path))


def test_files_that_are_no_vocabulary(vocabulary, tmp_path):
    with pytest.raises(UserError, match=r"absent\.model: no such SentencePiece model file"):
        Vocabulary(str(tmp_path / "absent.model"))
    junk = tmp_path / "junk.model"
    junk.write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"junk\.model: not a SentencePiece model"):
        Vocabulary(str(junk))
    with pytest.raises(UserError, match=r"vocabulary\.json is missing"):
        Vocabulary.load(str(tmp_path))


def test_damaged_folders(vocabulary, tmp_path):
    vocabulary.save(str(tmp_path))
    description = Path(tmp_path / "vocabulary.json")
    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "languages": ["en", "de", "zh", "fr"]}))
    with pytest.raises(UserError, match="is not the model that"):
        Vocabulary.load(str(tmp_path))
    description.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(UserError, match="format 1"):
        Vocabulary.load(str(tmp_path))
    description.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Vocabulary.load(str(tmp_path))
