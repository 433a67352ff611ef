"""WordPiece: the pieces of small texts written out, pairs, truncation, files."""

from __future__ import annotations

import json

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.data.wordpiece import WordPiece

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat", "."]


def ids(tokenizer, *texts, max_length=20):
    (one,) = tokenizer.encode([texts], max_length)
    return one.ids.tolist(), one.types.tolist()


def test_pieces_of_a_text_and_of_a_pair():
    tokenizer = WordPiece.from_vocabulary(PIECES)
    assert ids(tokenizer, "The CATS sat.") == ([2, 4, 5, 6, 7, 8, 3], [0] * 7)
    assert ids(tokenizer, "the cat", "dog") == ([2, 4, 5, 3, 1, 3], [0, 0, 0, 0, 1, 1])
    assert ids(tokenizer, "") == ([2, 3], [0, 0])
    assert tokenizer.size == 9


def test_case_matters_where_it_is_kept():
    assert ids(WordPiece.from_vocabulary(PIECES, lowercase=False), "The cat")[0] == [2, 1, 5, 3]


def test_the_longer_text_is_truncated_first():
    tokenizer = WordPiece.from_vocabulary(PIECES)
    assert ids(tokenizer, "the cat sat the cat", "the", max_length=6) == ([2, 4, 5, 3, 4, 3], [0, 0, 0, 0, 1, 1])
    assert len(ids(tokenizer, "the cat sat the cat", max_length=20)[0]) == 7  # nothing is kept from the call before


def test_files_give_the_same_tokenizer(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    first = WordPiece.from_folder(tmp_path / "a")
    first.save(tmp_path / "b")
    second = WordPiece.from_folder(tmp_path / "b")
    assert ids(first, "The cats") == ids(second, "The cats") == ([2, 1, 5, 6, 3], [0] * 5)
    assert first.fingerprint() == second.fingerprint()


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer: neither tokenizer.json nor vocab.txt"):
        WordPiece.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer of the library tokenizers") as caught:
        WordPiece.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"vocab.txt has no piece \[CLS\]"):
        WordPiece.from_vocabulary(["[PAD]", "[UNK]"])
