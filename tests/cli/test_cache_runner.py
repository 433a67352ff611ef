from __future__ import annotations

from pathlib import Path

import pytest

from t5x_ext.cli.main import main

TEXT = "--train_source=a.en --train_target=a.de --source_language=en --target_language=de --vocab_size=300"


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.en").write_text("".join(f"the cat number {n}\n" for n in range(60)))
    (tmp_path / "a.de").write_text("".join(f"die Katze Nummer {n}\n" for n in range(60)))
    return tmp_path


def cache_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_runner_writes_what_processes_write(texts, capsys):
    pytest.importorskip("apache_beam")
    assert main(f"cache {TEXT} --run_dir=here".split()) == 0
    here = capsys.readouterr().out
    options = "--runner=DirectRunner --runner_option=--direct_num_workers=1"
    assert main(f"cache {TEXT} --run_dir=beam {options}".split()) == 0
    assert capsys.readouterr().out == here
    assert cache_files(texts / "beam") == cache_files(texts / "here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--runner=Beam", "--runner=Beam: "),
        ("--runner_option=--region=r", "--runner_option goes with --runner, which is not given"),
        ("--runner=DirectRunner --num_processes=2", "--num_processes is for work without --runner"),
    ],
)
def test_flags_that_do_not_fit(texts, capsys, options, message):
    assert main(f"cache {TEXT} --run_dir=out {options}".split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (texts / "out").exists()
