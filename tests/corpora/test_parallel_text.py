from __future__ import annotations

import gzip

import pytest

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora import ParallelText, aligned_files, monolingual_text, parallel_text, read_lines


def test_aligned_files_give_pairs_in_order(write):
    corpus = ParallelText(write("a.en", b"one\ntwo\n"), write("a.de", "eins\nzwö\n".encode()), "en", "de")
    assert isinstance(corpus, Corpus)
    assert list(corpus.pairs()) == [("one", "eins"), ("two", "zwö")]
    assert list(corpus.pairs()) == [("one", "eins"), ("two", "zwö")], "pairs can be read again"
    assert corpus.languages == ("en", "de")
    assert corpus.name == "a.en-de"


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\nb\n", ["a", "b"]),
        (b"\n\na\n", ["", "", "a"]),
        ("a\u2028b\n\x0cc\x85d\re\n".encode(), ["a\u2028b", "\x0cc\x85d\re"]),
        ("\ufeffa\n\ufeffb\n".encode(), ["a", "\ufeffb"]),
    ],
    ids=["no last line end", "carriage returns", "byte order mark", "empty lines", "other breaks", "mark inside"],
)
def test_only_line_feeds_end_lines(write, content, lines):
    assert list(read_lines(write("text", content))) == lines
    assert list(read_lines(write("text.packed", gzip.compress(content)))) == lines


def test_gzip_is_told_by_content_not_by_name(write):
    source, target = write("a.en", gzip.compress(b"one\n")), write("a.de.gz", b"eins\n")
    assert list(ParallelText(source, target, "en", "de").pairs()) == [("one", "eins")]


def test_table_columns(write):
    path = write("t.tsv", b"1\tone\teins\tx\n2\ttwo\tzwei\n")
    corpus = ParallelText(tsv_path=path, source_column=2, target_column=1, source_language="de", target_language="en")
    assert list(corpus.pairs()) == [("eins", "one"), ("zwei", "two")]
    assert corpus.name == "t.de-en"


def test_fingerprint_follows_content_and_languages_only(write):
    source, target, other = write("a", b"one\n"), write("b", b"eins\n"), write("c", b"zwei\n")
    original = ParallelText(source, target, "en", "de").fingerprint()
    assert ParallelText(write("d", gzip.compress(b"one\n")), target, "en", "de", name="x").fingerprint() == original
    assert ParallelText(source, other, "en", "de").fingerprint() != original
    assert ParallelText(source, target, "en", "nl").fingerprint() != original
    assert ParallelText(target, source, "en", "de").fingerprint() != original
    table = write("t", b"one\teins\n")
    forward = ParallelText(tsv_path=table, source_language="en", target_language="de")
    swapped = ParallelText(tsv_path=table, source_column=1, target_column=0, source_language="en", target_language="de")
    assert forward.fingerprint() != swapped.fingerprint()


def test_fingerprint_sees_where_one_file_ends(write):
    one = ParallelText(write("a", b"x\ny\n"), write("b", b"z\n"), "en", "de").fingerprint()
    other = ParallelText(write("c", b"x\n"), write("d", b"y\nz\n"), "en", "de").fingerprint()
    assert one != other


def test_aligned_files_are_found_plain_or_gzipped(write, tmp_path):
    write("train.en", b"one\n")
    write("train.de.gz", gzip.compress(b"eins\n"))
    assert list(aligned_files(str(tmp_path), "train", "de", "en").pairs()) == [("eins", "one")]
    absent = aligned_files(str(tmp_path), "train", "en", "fr")
    with pytest.raises(UserError, match=r"train\.fr: no such file"):
        list(absent.pairs())


@pytest.mark.parametrize(("source_lines", "target_lines"), [(2, 3), (3, 2)])
def test_unequal_line_counts_name_both(write, source_lines, target_lines):
    corpus = ParallelText(write("a.en", b"x\n" * source_lines), write("a.de", b"y\n" * target_lines), "en", "de")
    with pytest.raises(UserError, match=rf"a\.en has {source_lines} lines but .*a\.de has {target_lines}"):
        list(corpus.pairs())


def test_bytes_that_are_not_utf8_name_file_and_line(write):
    corpus = ParallelText(write("a.en", b"x\ny\n"), write("a.de", b"gut\nf\xfcr\n"), "en", "de")
    with pytest.raises(UserError, match=r"a\.de, line 2: not UTF-8"):
        list(corpus.pairs())


def test_surrogates_are_not_utf8(write):
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        list(read_lines(write("a", b"\xed\xa0\x80\n")))


def test_empty_and_missing_files_and_folders(write, tmp_path):
    with pytest.raises(UserError, match=r"empty\.en: the file is empty"):
        list(read_lines(write("empty.en", b"")))
    with pytest.raises(UserError, match=r"empty\.gz: the file is empty"):
        list(read_lines(write("empty.gz", gzip.compress(b""))))
    with pytest.raises(UserError, match=r"absent\.en: no such file"):
        list(read_lines(str(tmp_path / "absent.en")))
    with pytest.raises(UserError, match="is a folder"):
        list(read_lines(str(tmp_path)))
    with pytest.raises(UserError, match=r"absent\.en: no such file"):
        ParallelText(str(tmp_path / "absent.en"), str(tmp_path / "absent.de"), "en", "de").fingerprint()


def test_damaged_gzip_names_the_file(write):
    content = gzip.compress(b"".join(b"%d\n" % number for number in range(10_000)))
    path = write("cut.gz", content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.gz, after line \d+: the gzip file is damaged"):
        list(read_lines(path))
    with pytest.raises(UserError, match="damaged"):
        ParallelText(path, path, "en", "de").fingerprint()


def test_table_with_too_few_columns_names_the_line(write):
    path = write("t.tsv", b"one\teins\ntwo zwei\n")
    corpus = ParallelText(tsv_path=path, source_language="en", target_language="de")
    with pytest.raises(UserError, match=r"t\.tsv, line 2: 1 tab-separated column\(s\), 2 are needed"):
        list(corpus.pairs())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source_path": "a", "source_language": "en", "target_language": "de"}, "target_path"),
        ({"source_language": "en", "target_language": "de"}, "tsv_path"),
        ({"source_path": "a", "target_path": "b", "target_language": "de"}, "source_language is missing"),
        ({"source_path": "a", "target_path": "b", "source_language": "e n", "target_language": "de"}, "'e n'"),
        ({"tsv_path": "t", "source_path": "a", "source_language": "en", "target_language": "de"}, "not both"),
        ({"tsv_path": "t", "source_column": 1, "source_language": "en", "target_language": "de"}, "two different"),
        ({"tsv_path": "t", "source_column": -1, "source_language": "en", "target_language": "de"}, "counted from 0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(UserError, match=message):
        ParallelText(**arguments)


@pytest.mark.parametrize("last", [b"", b"\n"])
@pytest.mark.parametrize("scan_bytes", [3, 7, 1 << 20])
@pytest.mark.parametrize("count", [1, 2, 6, 7, 8, 12])
def test_spans_hold_every_pair_once_in_order(write, monkeypatch, count, scan_bytes, last):
    monkeypatch.setattr(parallel_text, "_SCAN_BYTES", scan_bytes)
    lines = [f"{'wörter ' * (n % 3)}{n}" for n in range(count)]
    source = write("a.en", b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + last)
    target = write("a.de", "\n".join(line.upper() for line in lines).encode() + last)
    table = write("a.tsv", "\n".join(f"x\t{line}\t{line.upper()}" for line in lines).encode() + last)
    for corpus in (
        ParallelText(source, target, "en", "de"),
        ParallelText(tsv_path=table, source_language="en", target_language="de", source_column=1, target_column=2),
    ):
        spans = corpus.spans(3)
        assert [span.pairs for span in spans] == [3] * (count // 3) + [count % 3] * (count % 3 > 0)
        assert [pair for span in spans for pair in corpus.read_span(span)] == list(corpus.pairs())


def test_empty_lines_at_the_end_are_lines_of_spans_too(write):
    corpus = ParallelText(write("a.en", b"a\n\n\n\n"), write("a.de", b"b\n\n\n\n"), "en", "de")
    spans = corpus.spans(2)
    assert [pair for span in spans for pair in corpus.read_span(span)] == list(corpus.pairs())
    assert len(spans) == 2


def test_spans_find_what_pairs_finds(write):
    good = write("good.de", b"a\nb\nc\n")
    assert ParallelText(write("a.en.gz", gzip.compress(b"a\nb\nc\n")), good, "en", "de").spans(2) is None
    with pytest.raises(UserError, match=r"has 2 lines but .*good.de has 3"):
        ParallelText(write("short.en", b"a\nb\n"), good, "en", "de").spans(2)
    with pytest.raises(UserError, match="the file is empty"):
        ParallelText(write("empty.en", b""), good, "en", "de").spans(2)
    latin = ParallelText(write("latin.en", b"a\nb\n\xe4\n"), good, "en", "de")
    with pytest.raises(UserError, match=r"latin.en, line 3: not UTF-8"):
        latin.read_span(latin.spans(2)[1])
    narrow = ParallelText(tsv_path=write("a.tsv", b"a\tb\na\tb\na\n"), source_language="en", target_language="de")
    with pytest.raises(UserError, match=r"a.tsv, line 3: 1 tab-separated"):
        narrow.read_span(narrow.spans(2)[1])


def test_a_monolingual_text_pairs_every_line_with_itself(tmp_path):
    (tmp_path / "news.de.gz").write_bytes(gzip.compress(b"eins\nzwei\n"))
    corpus = monolingual_text(str(tmp_path / "news.de.gz"), "de", name="news")
    assert list(corpus.pairs()) == [("eins", "eins"), ("zwei", "zwei")]
    assert (corpus.languages, corpus.name) == (("de", "de"), "news")
