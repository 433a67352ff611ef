from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora import BeamRunner, ParallelText, monolingual_text
from t5x_ext.corpora.filters import ChunkFilter, FilterConfig, chunks, duplicates, filter_corpora

CONFIG = FilterConfig(duplicates=("pair", "target"), min_language_probability=None)
"""Language identification, tested elsewhere, would drop the made-up sentences."""


def noisy_pairs(make_corpus) -> list[tuple[str, str]]:
    """60 pairs of which every kind of rule drops some, in the order in which they come."""
    pairs = [*make_corpus(60, ("en", "de"), seed=3).lines]
    pairs[5], pairs[17], pairs[18] = ("", "leer"), ("<b>x</b>", "fett"), (" a\u00a0 house ", "ein „Haus“")
    pairs[20] = pairs[3]  # a duplicate in another chunk
    pairs[33] = (pairs[2][0].upper(), pairs[2][1])
    pairs[41] = (f"{pairs[7][0]} again", pairs[7][1])  # target side only
    long = " ".join(f"word{n} {n}" for n in range(40))
    pairs[30], pairs[50] = (long, long.replace("word", "Wort")), (long + " more", long.replace("word", "Wort") + " x")
    pairs[55] = ("copy", "copy")
    return pairs


@pytest.fixture
def corpora(make_corpus, write) -> list[ParallelText]:
    """Two files, two gzipped files, and text of one language."""
    pairs = noisy_pairs(make_corpus)
    sides = ["".join(f"{pair[side]}\n" for pair in pairs).encode() for side in (0, 1)]
    plain = [write(f"text.{code}", side) for code, side in zip(("en", "de"), sides)]
    zipped = [write(f"zipped.{code}.gz", gzip.compress(side)) for code, side in zip(("en", "de"), sides)]
    return [ParallelText(*plain, "en", "de"), ParallelText(*zipped, "en", "de"), monolingual_text(plain[1], "de")]


@pytest.fixture
def held_out(corpora, list_corpus) -> list[Corpus]:
    """The lines of two pairs, in either order, and one German line."""
    pairs = list(corpora[0].pairs())
    return [
        list_corpus((pairs[1], (pairs[36][0].upper(), "etwas anderes"))),
        list_corpus(((f" {pairs[52][1]} !", "not the English of it"),), ("de", "en")),
    ]


@pytest.fixture
def small_pieces(monkeypatch):
    """Chunks and partitions of a few lines, so that small corpora have several."""
    monkeypatch.setattr(chunks, "CHUNK_PAIRS", 16)
    monkeypatch.setattr(duplicates, "KEYS_PER_PARTITION", 20)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_and_counted(corpora, tmp_path, small_pieces):
    report = filter_corpora(corpora, str(tmp_path / "out"), CONFIG)
    assert contents(tmp_path / "out").keys() == {
        *("text.en-de.en", "text.en-de.de", "zipped.en-de.en", "zipped.en-de.de", "text.de", "report.json")
    }
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    parallel, zipped, german = report.corpora
    assert (parallel.read, parallel.kept, sum(parallel.dropped.values())) == (60, 53, 7)
    expected = {"empty": 1, "markup": 1, "copy": 1, "duplicate": 2, "duplicate_target": 1, "near_duplicate": 1}
    assert {rule: count for rule, count in parallel.dropped.items() if count} == expected
    assert list(parallel.dropped) == ["empty", "length", "ratio", "copy", "markup", "repetition", "script", *DUPLICATES]
    assert zipped.dropped == parallel.dropped
    assert german.languages == ("de",)
    assert german.kept + sum(german.dropped.values()) == 60
    lines = (tmp_path / "out/text.en-de.de").read_text().splitlines()
    assert 'ein "Haus"' in lines
    assert len(lines) == 53
    table = report.table().splitlines()
    assert table[1].split() == ["read", "60", "60", "60"]
    assert len({len(row) for row in table}) == 1


DUPLICATES = ("duplicate", "duplicate_target", "near_duplicate")


def test_order_is_kept_and_filtering_again_drops_nothing(corpora, tmp_path, small_pieces):
    report = filter_corpora(corpora[:1], str(tmp_path / "once"), CONFIG)
    clean = ChunkFilter(CONFIG, ("en", "de"))(corpora[0].pairs()).kept
    kept = list(ParallelText(*paths(tmp_path / "once", report), "en", "de").pairs())
    places = iter(clean)
    assert all(pair in places for pair in kept)
    again = ParallelText(*paths(tmp_path / "once", report), "en", "de", name="text.en-de")
    second = filter_corpora([again], str(tmp_path / "twice"), CONFIG).corpora[0]
    assert set(second.dropped.values()) | set(second.changed.values()) == {0}
    for file in report.corpora[0].files:
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / "once" / file).read_bytes()


def paths(folder: Path, report) -> list[str]:
    return [str(folder / file) for file in report.corpora[0].files]


def test_any_text_is_filtered_once_and_for_all(list_corpus, tmp_path_factory):
    line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=6) | st.sampled_from(
        ["a b", "A　b", "ab", "你好，", "<p>"]
    )

    @settings(max_examples=15, database=None)
    @given(st.lists(st.tuples(line, line), max_size=12))
    def check(lines):
        config = FilterConfig(duplicates=("source", "target"), near_duplicate_similarity=0.5)
        folder = tmp_path_factory.mktemp("any")
        lines = [*lines, ("this one stays", "und das bleibt")]
        report = filter_corpora([list_corpus(tuple(lines))], str(folder / "one"), config).corpora[0]
        assert report.read == len(lines) == report.kept + sum(report.dropped.values())
        sides = [(folder / "one" / file).read_text("utf-8").split("\n")[:-1] for file in report.files]
        assert [len(side) for side in sides] == [report.kept] * 2
        again = filter_corpora([list_corpus(tuple(zip(*sides)))], str(folder / "two"), config).corpora[0]
        assert again.kept == report.kept

    check()


def test_pieces_processes_and_runners_make_no_difference(corpora, held_out, tmp_path, monkeypatch):
    whole = filter_corpora(corpora, str(tmp_path / "whole"), CONFIG, held_out=held_out)
    assert [corpus.dropped["held_out"] for corpus in whole.corpora] == [3, 3, 2]
    monkeypatch.setattr(chunks, "CHUNK_PAIRS", 16)
    monkeypatch.setattr(duplicates, "KEYS_PER_PARTITION", 20)
    assert filter_corpora(corpora, str(tmp_path / "pieces"), CONFIG, held_out=held_out) == whole
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    output = str(tmp_path / "processes")
    report = filter_corpora(corpora[:1], output, CONFIG, num_processes=2, held_out=held_out).corpora[0]
    assert report == whole.corpora[0]
    for file in report.files:
        assert (tmp_path / "processes" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_beam_writes_the_same_bytes(corpora, held_out, tmp_path, small_pieces):
    pytest.importorskip("apache_beam")
    filter_corpora(corpora, str(tmp_path / "local"), CONFIG, held_out=held_out)
    filter_corpora(corpora, str(tmp_path / "beam"), CONFIG, beam=BeamRunner(), held_out=held_out)
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")


class Killed(BaseException):
    """Stops the work where it is, as a kill does, without a process of its own."""


def test_a_restart_anywhere_ends_with_the_same_bytes(corpora, held_out, tmp_path, small_pieces, monkeypatch):
    filter_corpora(corpora, str(tmp_path / "whole"), CONFIG, held_out=held_out)
    replace, left = os.replace, 0

    def limited(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return replace(*arguments)

    monkeypatch.setattr(os, "replace", limited)
    kills = 0
    while True:
        # A chunk is three files: every try gets further by one, if it finds what earlier ones have finished.
        left = 3
        try:
            filter_corpora(corpora, str(tmp_path / "killed"), CONFIG, held_out=held_out)
            break
        except Killed:
            kills += 1
            assert not (tmp_path / "killed/report.json").exists()
    assert kills == 14
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    filter_corpora(corpora, str(tmp_path / "killed"), CONFIG, held_out=held_out)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


PROGRAM = """
import os, signal, sys
from t5x_ext.corpora import ParallelText
from t5x_ext.corpora.filters import FilterConfig, chunks, filter_corpora
chunks.CHUNK_PAIRS = 16
write_bytes, left = chunks.write_bytes, [8]
def write(path, content):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    write_bytes(path, content)
chunks.write_bytes = write
source, target, output = sys.argv[1:]
config = FilterConfig(duplicates=("pair", "target"), min_language_probability=None)
filter_corpora([ParallelText(source, target, "en", "de")], output, config)
"""


def test_a_process_that_is_killed_is_gone_on_with(corpora, tmp_path, small_pieces):
    text, output = corpora[0], tmp_path / "killed"
    arguments = [sys.executable, "-c", PROGRAM, str(text.source_path), str(text.target_path), str(output)]
    assert subprocess.run(arguments, env=os.environ).returncode == -signal.SIGKILL
    (scratch,) = output.iterdir()
    assert {path.suffix for path in scratch.rglob("*.*")} >= {".chunk"}
    filter_corpora([text], str(output), CONFIG)
    filter_corpora([text], str(tmp_path / "whole"), CONFIG)
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (b"a\nb\n", b"c\n", "2 lines but"),
        (b"a\n\xe4\n", b"c\nd\n", "a.en, line 2: not UTF-8"),
        (b"", b"c\n", "a.en: the file is empty"),
        (b"same\nsame\n", b"same\nsame\n", "a.en-de: filtering keeps no pair (copy 2)"),
    ],
)
def test_mistakes_leave_nothing(write, tmp_path, source, target, message):
    corpus = ParallelText(write("a.en", source), write("a.de", target), "en", "de")
    with pytest.raises(UserError) as caught:
        filter_corpora([corpus], str(tmp_path / "out"), CONFIG)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_mistakes(list_corpus, make_corpus, corpora, tmp_path, monkeypatch):
    def refused(message, corpora, output="out", **options):
        with pytest.raises(UserError, match=message):
            filter_corpora(corpora, str(tmp_path / output), CONFIG, **options)

    one = make_corpus(5)
    refused("two corpora would be written to list.en", [one, one])
    refused("both sides are en; text of one language has one file", [ParallelText("a", "b", "en", "en")])
    refused("it becomes a file name", [list_corpus(one.lines, name="../x")])
    refused("the corpus is empty", [list_corpus(())])
    refused("the corpus is empty", [one], held_out=[list_corpus(())])
    refused("filtering keeps no pair .held_out 5", [one], held_out=[one])
    refused("Beam has no pipeline option --no_such", [one], beam=BeamRunner(options=("--no_such=1",)))
    with pytest.raises(UserError, match="a remote folder is for filtering on a runner"):
        filter_corpora([one], "gs://bucket/out", CONFIG)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(make_corpus, list_corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "list.en").write_text("mine")
    with pytest.raises(UserError, match=r"list.en exists already; name another folder"):
        filter_corpora([make_corpus(5)], str(out), CONFIG)
    assert contents(out) == {"list.en": b"mine"}
    (out / "list.en").unlink()
    (out / "report.json").write_text("{}")
    with pytest.raises(UserError, match="is no report of a filtering"):
        filter_corpora([make_corpus(5)], str(out), CONFIG)
    (out / "report.json").unlink()
    filter_corpora([make_corpus(5)], str(out), CONFIG)
    for corpus, config in ((make_corpus(6), CONFIG), (make_corpus(5), FilterConfig(max_ratio=2))):
        with pytest.raises(UserError, match="holds a filtering of other corpora or rules"):
            filter_corpora([corpus], str(out), config)
    with pytest.raises(UserError, match="holds a filtering of other corpora or rules"):
        filter_corpora([make_corpus(5)], str(out), CONFIG, held_out=[make_corpus(1)])
    (out / "list.de").unlink()
    with pytest.raises(UserError, match=r"holds a filtering without list.de"):
        filter_corpora([make_corpus(5)], str(out), CONFIG)


def test_what_another_configuration_left_is_removed(make_corpus, tmp_path):
    (tmp_path / "out/.filter-0123456789abcdef/x").mkdir(parents=True)
    filter_corpora([make_corpus(5)], str(tmp_path / "out"), CONFIG)
    assert contents(tmp_path / "out").keys() == {"list.en", "list.de", "report.json"}
