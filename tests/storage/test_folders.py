"""Folders that take their place whole; copies of remote folders are tested with the token cache."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.storage.folders import fetch_folder, upload_folder, whole_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_at_the_end(tmp_path):
    place = tmp_path / "deep" / "place"
    with whole_folder(place, "last") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        (folder / "last").write_text("y")
        assert not place.exists()
        assert folder.parent == place.parent
    assert names(place) == ["last", "sub"]
    assert names(place.parent) == ["place"]


def test_all_of_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def watched(descriptor):
        synced.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), (tmp_path / "place").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with whole_folder(tmp_path / "place", "file") as folder:
        (folder / "file").write_text("x")
        own = folder.name
    assert synced == [("file", False), (own, False), (tmp_path.name, True)]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(NotADirectoryError), whole_folder(tmp_path / "place", "file") as folder:
        (folder / "file" / "file").write_text(str((folder / "file").write_text("x")))
    assert names(tmp_path) == []


@pytest.mark.parametrize("last_file", ["file", None])
def test_what_is_in_the_place_stays(tmp_path, last_file):
    place = tmp_path / "place"
    place.mkdir()
    (place / "other").write_text("x")
    message = r"place: is in the way of a statue; remove it$"
    with pytest.raises(UserError, match=message), whole_folder(place, last_file, "a statue") as folder:
        (folder / "file").write_text("y")
    assert names(place) == ["other"]
    (place / "file").write_text("z")
    # Another process was first with the same content, where there is such a thing.
    if last_file:
        with whole_folder(place, last_file) as folder:
            (folder / "file").write_text("y")
        assert (place / "file").read_text() == "z"
    assert names(tmp_path) == ["place"]


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "place").mkdir()
    with whole_folder(tmp_path / "place", None) as folder:
        (folder / "file").write_text("y")
    assert names(tmp_path / "place") == ["file"]


LEAVING = """
import os, signal, sys
from pathlib import Path
from t5x_ext.storage.folders import whole_folder
with whole_folder(Path(sys.argv[1]), "file") as folder:
    (folder / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_processes_left_is_deleted_and_what_live_ones_write_is_not(tmp_path):
    subprocess.run([sys.executable, "-c", LEAVING, str(tmp_path / "place")])
    assert len(names(tmp_path)) == 1
    with whole_folder(tmp_path / "place", "file") as first:
        assert names(tmp_path) == [first.name]
        with whole_folder(tmp_path / "place", "file") as second:
            assert names(tmp_path) == sorted([first.name, second.name])
            (second / "file").write_text("second")
        (first / "file").write_text("first")
    assert (tmp_path / "place" / "file").read_text() == "second"
    assert names(tmp_path) == ["place"]


def test_copies_there_and_back(tmp_path):
    with whole_folder(tmp_path / "here", "b") as folder:
        for name in "ab":
            (folder / name).write_text(name)
    upload_folder(tmp_path / "here", str(tmp_path / "there"), ["a", "b"])
    upload_folder(tmp_path / "here", str(tmp_path / "there"), ["a", "b"])
    fetch_folder(str(tmp_path / "there"), tmp_path / "copy", ["a", "b"])
    assert [(path.name, path.read_text()) for path in sorted((tmp_path / "copy").iterdir())] == [("a", "a"), ("b", "b")]
    (tmp_path / "there" / "a").unlink()
    with pytest.raises(UserError, match="there: not whole"):
        fetch_folder(str(tmp_path / "there"), tmp_path / "again", ["a", "b"])
    assert not (tmp_path / "again").exists()
