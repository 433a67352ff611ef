from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.corpora import BeamRunner, PairRules, ParallelText
from t5x_ext.data import SubwordSampling, beam_cache, build_cache, cache_files
from t5x_ext.data import cache as cache_module

pytest.importorskip("apache_beam")


def files_of(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def small_pieces(monkeypatch):
    """Chunks and shards of a few records, so that small corpora have several."""
    for module in (cache_module, beam_cache):
        monkeypatch.setattr(module, "CHUNK_PAIRS", 16)
    for module in (cache_files, beam_cache):
        monkeypatch.setattr(module, "RECORDS_PER_SHARD", 30)


@pytest.fixture
def as_files(tmp_path, make_corpus):
    """The text of a corpus in files of two kinds, with lines to drop and lines to change."""
    lines = [*make_corpus(150).lines]
    lines[20], lines[33], lines[70] = ("", "leer"), ("same", "same"), (" a\u00a0 b ", "c")
    lines[96:112] = [("", "")] * 16

    def make(kind: str) -> ParallelText:
        paths = []
        for language, side in zip(("en", "de"), zip(*lines)):
            content = "\n".join(side).encode() + b"\n"
            path = tmp_path / f"text.{language}"
            path.write_bytes(gzip.compress(content, mtime=0) if kind == "gzip" else content)
            paths.append(str(path))
        return ParallelText(*paths, "en", "de")

    return make


@pytest.mark.parametrize("kind", ["plain", "gzip"])
def test_beam_writes_the_same_bytes(as_files, vocabulary, tmp_path, small_pieces, kind):
    corpus, cleaning, subword = as_files(kind), PairRules(drop_copies=True), SubwordSampling(variants=2)
    local = build_cache(corpus, vocabulary, tmp_path / "local", cleaning, subword)
    beam = build_cache(corpus, vocabulary, tmp_path / "beam", cleaning, subword, beam=BeamRunner())
    assert len(local.manifest["shards"]) == 10
    assert local.manifest["dropped"] == {"copy": 1, "empty": 17}
    assert files_of(beam.path) == files_of(local.path)
    assert [path.name for path in (tmp_path / "beam").iterdir()] == [Path(beam.path).name]


def test_any_corpus_and_runner_option(make_corpus, vocabulary, tmp_path, small_pieces):
    runner = BeamRunner("DirectRunner", ("--direct_num_workers=2", "--direct_running_mode=multi_threading"))
    local = build_cache(make_corpus(100), vocabulary, tmp_path / "local")
    beam = build_cache(make_corpus(100), vocabulary, tmp_path / "beam", beam=runner)
    assert files_of(beam.path) == files_of(local.path)


def test_workers_write_to_a_remote_folder(as_files, vocabulary, tmp_path, small_pieces, monkeypatch):
    remote = tmp_path / "bucket"
    for module in (cache_module, beam_cache):
        monkeypatch.setattr(module, "is_remote", lambda path: str(path).startswith(str(remote)))
    monkeypatch.setattr(cache_module, "local_copies", lambda: tmp_path / "copies")
    local = build_cache(as_files("plain"), vocabulary, tmp_path / "local")
    beam = build_cache(as_files("plain"), vocabulary, remote, beam=BeamRunner())
    assert Path(beam.path).parent == tmp_path / "copies"
    assert files_of(remote / Path(beam.path).name) == files_of(beam.path) == files_of(local.path)


def test_mistakes_in_the_text_are_told_in_one_line(tmp_path, vocabulary, small_pieces):
    for name, content in (("a.en", b"a\n" * 40 + b"\xe4\n" + b"a\n" * 40), ("a.de", b"b\n" * 81)):
        (tmp_path / name).write_bytes(content)
    corpus = ParallelText(str(tmp_path / "a.en"), str(tmp_path / "a.de"), "en", "de")
    with pytest.raises(UserError, match=r"a\.en, line 41: not UTF-8"):
        build_cache(corpus, vocabulary, tmp_path / "beam", beam=BeamRunner())
    assert list((tmp_path / "beam").iterdir()) == []


def test_refused_corpora_leave_nothing(list_corpus, vocabulary, tmp_path):
    for lines, message in (((), "list: the corpus is empty"), ((("", "a"),), "cleaning keeps no pair")):
        with pytest.raises(UserError, match=message):
            build_cache(list_corpus(lines), vocabulary, tmp_path, beam=BeamRunner())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("runner", "message"),
    [
        (BeamRunner(options=("--no_such_option=3",)), "DirectRunner: Beam has no pipeline option --no_such_option"),
        (BeamRunner(options=("--direct_num_workers=many",)), "DirectRunner: Beam refuses its options: .*many"),
        (BeamRunner("DataflowRunner", ("--region=r",)), "DataflowRunner: .*project"),
    ],
)
def test_mistakes_in_options(make_corpus, vocabulary, tmp_path, runner, message):
    with pytest.raises(UserError, match=message):
        build_cache(make_corpus(5), vocabulary, tmp_path, beam=runner)
    assert list(tmp_path.iterdir()) == []


def test_without_beam(make_corpus, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 't5x_ext\[beam\]'"):
        build_cache(make_corpus(5), vocabulary, tmp_path, beam=BeamRunner())
