from __future__ import annotations

import json
import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from t5x_ext.contracts import UserError
from t5x_ext.corpora import PairRules
from t5x_ext.corpora.filters import rules as rules_module
from t5x_ext.data import SubwordSampling, TokenCache, build_cache, cache_files, train_vocabulary
from t5x_ext.data import cache as cache_module
from t5x_ext.storage.folders import local_copies


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir()) if root.exists() else []


@pytest.fixture
def small_pieces(monkeypatch):
    """Chunks and shards of a few records, so that small corpora have several."""
    monkeypatch.setattr(cache_module, "CHUNK_PAIRS", 16)
    monkeypatch.setattr(cache_files, "RECORDS_PER_SHARD", 30)


def test_records_hold_both_sides_in_order(make_corpus, vocabulary, tmp_path, small_pieces):
    corpus = make_corpus(100)
    cache = build_cache(corpus, vocabulary, tmp_path)
    sources, targets = cache.read(range(100))
    assert list(zip(vocabulary.decode(sources), vocabulary.decode(targets))) == list(corpus.lines)
    assert {ids.dtype for ids in sources + targets} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(cache.lengths, [(len(s), len(t)) for s, t in zip(sources, targets)])
    assert (cache.name, cache.languages, cache.num_pairs, cache.variants) == ("list", ("en", "de"), 100, 1)
    assert len(cache.manifest["shards"]) == 4
    assert cache.manifest["tokens"] == cache.lengths.sum(axis=0).tolist()


def test_records_are_read_in_any_order(make_corpus, vocabulary, tmp_path, small_pieces):
    cache = build_cache(make_corpus(100), vocabulary, tmp_path)
    order = np.random.default_rng(0).integers(0, 100, 250)
    sources, targets = cache.read(order)
    all_sources, all_targets = cache.read(range(100))
    for place, record in enumerate(order):
        np.testing.assert_array_equal(sources[place], all_sources[record])
        np.testing.assert_array_equal(targets[place], all_targets[record])
    assert cache.read([]) == ([], [])


def test_empty_lines_are_dropped_in_pairs_and_counted(list_corpus, vocabulary, tmp_path):
    lines = (("a", "b"), ("", "b"), ("a", " \u200b"), ("c\u00a0d", "e"), ("same", "same"), ("a b c d e f g h", "a"))
    cache = build_cache(list_corpus(lines), vocabulary, tmp_path)
    sources, _ = cache.read(range(cache.num_pairs))
    assert vocabulary.decode(sources) == ["a", "c d", "same", "a b c d e f g h"]
    assert cache.manifest["dropped"] == {"empty": 2}
    assert cache.manifest["changed_lines"] == 2
    assert (cache.manifest["pairs_read"], cache.manifest["pairs"]) == (6, 4)
    strict = build_cache(list_corpus(lines), vocabulary, tmp_path, PairRules(max_ratio=3.0, drop_copies=True))
    assert strict.manifest["dropped"] == {"copy": 1, "empty": 2, "ratio": 1}
    assert strict.num_pairs == 2


def test_any_number_of_processes_writes_the_same_bytes(make_corpus, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "CHUNK_PAIRS", 64)
    corpus, subword = make_corpus(150), SubwordSampling(variants=2)
    one, two = (
        build_cache(corpus, vocabulary, tmp_path / str(count), subword=subword, num_processes=count) for count in (1, 2)
    )
    assert files_of(one.path) == files_of(two.path)
    assert one.num_pairs == 150


def test_segmentations_are_stored_variant_by_variant(make_corpus, vocabulary, tmp_path, small_pieces):
    corpus = make_corpus(50)
    cache = build_cache(corpus, vocabulary, tmp_path, subword=SubwordSampling(variants=3, alpha=0.01))
    assert (cache.variants, cache.num_pairs, len(cache.lengths)) == (3, 50, 150)
    sources, targets = cache.read(range(150))
    assert list(zip(vocabulary.decode(sources), vocabulary.decode(targets))) == 3 * list(corpus.lines)
    assert any(sources[pair].tolist() != sources[50 + pair].tolist() for pair in range(50))


def test_the_hash_follows_content_only(make_corpus, vocabulary, tmp_path):
    base = build_cache(make_corpus(20), vocabulary, tmp_path).path
    assert build_cache(make_corpus(20), vocabulary, tmp_path, num_processes=1).path == base
    renamed = build_cache(make_corpus(20, name="Other name!"), vocabulary, tmp_path).path
    assert renamed.rsplit("-", 1)[1] == base.rsplit("-", 1)[1]
    assert Path(renamed).name.startswith("Other_name_-")
    other_vocabulary = train_vocabulary(["the cat", "das Katze"], 300, ("en", "de"))
    different = [
        build_cache(make_corpus(21), vocabulary, tmp_path),
        build_cache(make_corpus(20), other_vocabulary, tmp_path),
        build_cache(make_corpus(20), vocabulary, tmp_path, PairRules(drop_copies=True)),
        build_cache(make_corpus(20), vocabulary, tmp_path, subword=SubwordSampling(2)),
        build_cache(make_corpus(20), vocabulary, tmp_path, subword=SubwordSampling(2, alpha=0.2)),
    ]
    assert len({base, *(cache.path for cache in different)}) == 6
    assert build_cache(make_corpus(20), vocabulary, tmp_path, subword=SubwordSampling(0, alpha=0.2)).path == base


def test_names_of_caches_without_rules_never_change(monkeypatch, tmp_path):
    """The names were computed by the code of commit b556cdd, before rules had names."""
    corpus = SimpleNamespace(name="tiny en-de", languages=("en", "de"), fingerprint=lambda: "f" * 64)
    vocabulary = SimpleNamespace(fingerprint=lambda: "v" * 64)
    monkeypatch.setattr(cache_module, "TokenCache", Path)

    def name_of(cleaning, subword=None):
        monkeypatch.setattr(Path, "exists", lambda path: True)
        return build_cache(corpus, vocabulary, tmp_path, cleaning, subword).name

    assert name_of(None) == name_of(PairRules()) == "tiny_en-de-e3ead79021bd6060"
    assert name_of(PairRules(), SubwordSampling(4)) == "tiny_en-de-f48e5fc708a69618"
    with_rules = [
        name_of(rules)
        for rules in (
            PairRules(drop_copies=True),
            PairRules(max_ratio=3.0),
            PairRules(max_ratio=2.0),
            PairRules(max_length=3.0),
            PairRules(min_script_share=0.5),
        )
    ]
    assert len({name_of(None), *with_rules}) == 6
    # A rule's verdicts depend on its library's version; other caches do not.
    monkeypatch.setattr(rules_module, "version", lambda library: "99")
    assert name_of(PairRules(min_script_share=0.5)) != with_rules[-1]
    assert [name_of(None), name_of(PairRules(max_length=3.0))] == ["tiny_en-de-e3ead79021bd6060", with_rules[-2]]


def test_a_finished_cache_is_reused(make_corpus, vocabulary, tmp_path, monkeypatch):
    first = build_cache(make_corpus(20), vocabulary, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in Path(first.path).iterdir()}
    monkeypatch.setattr(cache_module, "_build", None)
    again = build_cache(make_corpus(20), vocabulary, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in Path(again.path).iterdir()} == before


def test_an_interrupted_build_leaves_nothing(make_corpus, list_corpus, vocabulary, tmp_path, monkeypatch, small_pieces):
    class Interrupted(list_corpus):
        reads = 0

        def pairs(self):
            Interrupted.reads += 1
            for number, pair in enumerate(self.lines):
                if Interrupted.reads == 2 and number == 70:
                    raise KeyboardInterrupt
                yield pair

    corpus = Interrupted(make_corpus(100).lines)
    with pytest.raises(KeyboardInterrupt):
        build_cache(corpus, vocabulary, tmp_path)
    assert folders(tmp_path) == []
    assert build_cache(corpus, vocabulary, tmp_path).num_pairs == 100


def test_what_a_killed_build_left_is_removed_not_read(make_corpus, vocabulary, tmp_path):
    cache = build_cache(make_corpus(20), vocabulary, tmp_path)
    name = Path(cache.path).name
    process = os.fork()
    if not process:
        os._exit(0)
    os.waitpid(process, 0)
    abandoned = tmp_path / f".{name}-{socket.gethostname()}-{process}-x"
    Path(cache.path).rename(abandoned)
    running = tmp_path / f".{name}-{socket.gethostname()}-{os.getppid()}-x"
    running.mkdir()
    assert build_cache(make_corpus(20), vocabulary, tmp_path).num_pairs == 20
    assert folders(tmp_path) == [running.name, name]


def test_two_builders_of_the_same_content_agree(make_corpus, vocabulary, tmp_path, monkeypatch):
    corpus = make_corpus(20)
    elsewhere = build_cache(corpus, vocabulary, tmp_path / "other").path
    place = tmp_path / "caches" / Path(elsewhere).name
    original = cache_module.work_in_order

    def overtaken(*arguments):
        yield from original(*arguments)
        shutil.copytree(elsewhere, place)

    monkeypatch.setattr(cache_module, "work_in_order", overtaken)
    assert build_cache(corpus, vocabulary, tmp_path / "caches").num_pairs == 20
    assert folders(tmp_path / "caches") == [place.name]


def test_disk_space_is_estimated_and_checked_first(make_corpus, vocabulary, tmp_path, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")
    with caplog.at_level("INFO"):
        cache = build_cache(make_corpus(5000), vocabulary, tmp_path / "roomy")
    estimate = float(caplog.text.split("about ")[1].split(" MiB")[0]) * 2**20
    written = sum(path.stat().st_size for path in Path(cache.path).iterdir())
    assert estimate == pytest.approx(written, rel=0.25)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"the cache of list needs about \d+ MiB but 0 MiB are free"):
        build_cache(make_corpus(5000), vocabulary, tmp_path / "full")
    assert folders(tmp_path / "full") == []


def test_refused_corpora_leave_nothing(list_corpus, vocabulary, tmp_path):
    for lines, message in (((), "list: the corpus is empty"), ((("", "a"),), "cleaning keeps no pair")):
        with pytest.raises(UserError, match=message):
            build_cache(list_corpus(lines), vocabulary, tmp_path)
    assert folders(tmp_path) == []


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    """A folder that counts as remote; local copies go to `machine-1`."""
    bucket = tmp_path / "bucket"
    monkeypatch.setattr(cache_module, "is_remote", lambda path: str(path).startswith(str(bucket)))
    monkeypatch.setattr(cache_module, "local_copies", lambda: tmp_path / "machine-1")
    return bucket


def test_remote_caches_are_built_uploaded_and_read_from_copies(
    make_corpus, vocabulary, tmp_path, bucket, monkeypatch, small_pieces
):
    corpus = make_corpus(100)
    local = build_cache(corpus, vocabulary, tmp_path / "local")
    first = build_cache(corpus, vocabulary, bucket)
    name = Path(local.path).name
    assert first.path == str(tmp_path / "machine-1" / name)
    assert files_of(bucket / name) == files_of(first.path) == files_of(local.path)
    monkeypatch.setattr(cache_module, "local_copies", lambda: tmp_path / "machine-2")
    monkeypatch.setattr(cache_module, "_build", None)
    second = build_cache(corpus, vocabulary, bucket)
    assert second.path == str(tmp_path / "machine-2" / name)
    assert files_of(second.path) == files_of(local.path)
    assert folders(tmp_path / "machine-2") == [name]
    shutil.rmtree(bucket)
    assert build_cache(corpus, vocabulary, bucket).num_pairs == 100, "the copy is enough"


def test_remote_caches_that_are_not_whole(make_corpus, vocabulary, tmp_path, bucket, monkeypatch):
    corpus = make_corpus(20)
    remote = bucket / Path(build_cache(corpus, vocabulary, bucket).path).name
    (remote / "manifest.json").unlink()
    monkeypatch.setattr(cache_module, "local_copies", lambda: tmp_path / "machine-2")
    assert build_cache(corpus, vocabulary, bucket).num_pairs == 20
    assert (remote / "manifest.json").exists(), "an upload that was cut short is done again"
    (remote / "lengths.npy").unlink()
    monkeypatch.setattr(cache_module, "local_copies", lambda: tmp_path / "machine-3")
    with pytest.raises(UserError, match=r"not whole \(.*lengths.npy"):
        build_cache(corpus, vocabulary, bucket)
    assert folders(tmp_path / "machine-3") == []


def test_local_copies_need_disk_space(make_corpus, vocabulary, tmp_path, bucket, monkeypatch):
    build_cache(make_corpus(20), vocabulary, bucket)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(cache_module, "local_copies", lambda: tmp_path / "machine-2")
    with pytest.raises(UserError, match="0 MiB are free; set XDG_CACHE_HOME"):
        build_cache(make_corpus(20), vocabulary, bucket)


def test_where_local_copies_go(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_copies() == tmp_path / "t5x_ext" / "caches"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert local_copies() == Path.home() / ".cache" / "t5x_ext" / "caches"


def test_damaged_caches_are_refused(make_corpus, vocabulary, tmp_path, small_pieces):
    good = build_cache(make_corpus(50), vocabulary, tmp_path / "good").path

    def damaged(change) -> str:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        folder = Path(shutil.copytree(good, tmp_path / "bad"))
        change(folder)
        return str(folder)

    def rewrite(folder: Path, **changes) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    def swap_shards(folder: Path) -> None:
        first, second = sorted(folder.glob("*.array_record"))
        shutil.copy(second, first)

    def change_length(folder: Path) -> None:
        lengths = np.load(folder / "lengths.npy")
        lengths[17, 1] ^= 8
        np.save(folder / "lengths.npy", lengths)

    for change, message in (
        (change_length, r"lengths\.npy: damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not JSON"),
        (lambda folder: rewrite(folder, format=0), "not a token cache of format"),
        (lambda folder: rewrite(folder, pairs=49), "differ"),
        (lambda folder: (folder / "lengths.npy").unlink(), r"lengths\.npy: missing or damaged"),
        (lambda folder: next(folder.glob("*00001.array_record")).unlink(), "00001.array_record: missing or damaged"),
        (swap_shards, "20 records, the manifest says 30"),
    ):
        with pytest.raises(UserError, match=message):
            TokenCache(damaged(change))


def test_lengths_are_a_numpy_file(make_corpus, vocabulary, tmp_path, small_pieces):
    cache = build_cache(make_corpus(100), vocabulary, tmp_path, subword=SubwordSampling(variants=2))
    lengths = np.stack([list(map(len, side)) for side in cache.read(range(200))], axis=1).astype(np.int32)
    np.save(tmp_path / "lengths.npy", lengths)
    assert (Path(cache.path) / "lengths.npy").read_bytes() == (tmp_path / "lengths.npy").read_bytes()


def test_large_vocabularies_use_wider_numbers(make_corpus, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(type(vocabulary), "size", property(lambda self: 70_000))
    cache = build_cache(make_corpus(5), vocabulary, tmp_path)
    assert cache.manifest["dtype"] == "<i4"
    assert vocabulary.decode(cache.read([3])[0]) == [make_corpus(5).lines[3][0]]


@pytest.mark.parametrize(("field", "value"), [("variants", -1), ("variants", 65), ("alpha", 0.0), ("alpha", 1.5)])
def test_sampling_mistakes(field, value):
    with pytest.raises(UserError, match=f"SubwordSampling.{field}={value}"):
        SubwordSampling(**{field: value})
