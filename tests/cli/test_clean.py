from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from t5x_ext.cli.main import main

PAIR = "--source=a.en --target=a.de --source_language=en --target_language=de"


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.en").write_text("".join(f"the cat “number” {n % 50}\n" for n in range(60)), encoding="utf-8")
    (tmp_path / "a.de").write_text("".join(f"die Katze „Nummer“ {n % 50}\n" for n in range(60)), encoding="utf-8")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_files(texts, capsys):
    assert main(f"clean {PAIR} --output_dir=out --gin.FilterConfig.near_duplicate_similarity=None".split()) == 0
    out = capsys.readouterr().out.splitlines()
    assert [row.split() for row in out if not row.endswith(" 0")] == [
        ["a.en-de"], ["read", "60"], ["duplicate", "10"], ["kept", "50"], ["kept", "%", "83.33"],
    ]  # fmt: skip
    assert (texts / "out/a.en-de.de").read_text(encoding="utf-8").startswith('die Katze "Nummer" 0\n')


def test_text_of_one_language_and_json(texts, capsys):
    assert main(["clean", "--source=a.de", "--source_language=de", "--output_dir=out", "--json_out=-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((texts / "out/report.json").read_text())
    assert result["corpora"][0]["files"] == ["a.de"]


def test_held_out_text_is_dropped(texts, capsys):
    (texts / "test.de").write_text("Die Katze Nummer 7!\nnoch eine\n", encoding="utf-8")
    (texts / "test.en.gz").write_bytes(gzip.compress(b"THE cat 'number' 8\nthe cat number 9\n"))
    options = "--output_dir=out --gin.FilterConfig.near_duplicate_similarity=None"
    assert main(f"clean {PAIR} {options} --held_out=test.de --held_out=test.en.gz".split()) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    # Three of the fifty, two of which come twice.
    assert [row for row in rows if row[0] in ("held_out", "duplicate", "kept") and row[1] != "%"] == [
        ["held_out", "6"], ["duplicate", "7"], ["kept", "47"],
    ]  # fmt: skip
    assert not {"7", "8", "9"} & {line.split()[-1] for line in (texts / "out/a.en-de.de").read_text().splitlines()}


GIN = """
from __gin__ import dynamic_registration
from t5x_ext import corpora
from t5x_ext import data
from t5x_ext.corpora import filters

filters.Filtering.corpora = (@corpora.aligned_files(), @german/corpora.monolingual_text())
filters.Filtering.config = @filters.FilterConfig()
filters.FilterConfig.duplicates = ('source',)
filters.FilterConfig.near_duplicate_similarity = None
corpora.aligned_files.directory = '.'
corpora.aligned_files.stem = 'a'
corpora.aligned_files.source_language = 'en'
corpora.aligned_files.target_language = 'de'
german/corpora.monolingual_text.path = 'a.de'
german/corpora.monolingual_text.language = 'de'
"""


def test_a_gin_file_by_processes_and_by_a_runner(texts, capsys):
    (texts / "clean.gin").write_text(GIN)
    assert main(["clean", "--gin_file=clean.gin", "--output_dir=out", "--num_processes=1"]) == 0
    here = capsys.readouterr().out
    assert here.split()[:2] == ["a.en-de", "a"]
    assert "duplicate_source" in here
    if pytest.importorskip("apache_beam"):
        options = "--runner=DirectRunner --runner_option=--direct_num_workers=1"
        assert main(f"clean --gin_file=clean.gin --output_dir=beam {options}".split()) == 0
        assert capsys.readouterr().out == here
        assert contents(texts / "beam") == contents(texts / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--source is missing: "),
        ("--source=a.en --target=a.de --target=b.de --source_language=en", "--source is given 1 times, --target 2"),
        ("--source=a.en", "--source_language is missing: "),
        ("--source=a.en --source_language=en --target_language=de", "--target_language goes with --target, which is"),
        ("--source_language=en", "--source_language goes with --source, which is not given"),
        (f"{PAIR} --target_language=german", "unknown language 'german'; did you mean de (German)?"),
        (f"{PAIR} --target_language=en", "--source_language and --target_language are both en"),
        (f"{PAIR} --target=nowhere.de --source=nowhere.en", "nowhere.en: no such file"),
        (f"{PAIR} --held_out=test.txt", "unknown language 'txt'"),
        (f"{PAIR} --held_out=a.en --held_out=a.fr", "held-out text a.fr-fr is in fr; the corpora are in en, de"),
        (f"{PAIR} --held_out=nowhere.de", "nowhere.de: no such file"),
        (f"{PAIR} --gin.FilterConfig.max_lenth=3", "did you mean max_length?"),
        (f"{PAIR} --gin.FilterConfig.max_length=0", "FilterConfig.max_length=0: must be 1 or more"),
        (f"{PAIR} --gin.FilterConfig.duplicates=pair", "duplicates"),
        (f"{PAIR} --runner_option=--region=r", "--runner_option goes with --runner, which is not given"),
        (f"{PAIR} --runner=DirectRunner --num_processes=2", "--num_processes is for work without --runner"),
        (f"{PAIR} --output_dir=a.en", "--output_dir=a.en: "),
        (f"{PAIR} --output_dir=gs://bucket/out", "a remote folder is for filtering on a runner"),
    ],
)
def test_mistakes(texts, capsys, options, message):
    before = sorted(texts.rglob("*"))
    place = "" if "--output_dir" in options else "--output_dir=out"
    assert main(f"clean {options} {place}".split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(texts.rglob("*")) == before
