"""Files that appear whole: killed at any moment, on full disks, in read-only folders, by many writers at once."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from t5x_ext.storage import files
from t5x_ext.storage.files import (
    append_text,
    delete_drafts,
    draft_path,
    tree_to_disk,
    whole_file,
    whole_files,
    write_bytes,
    write_json,
    write_text,
)
from t5x_ext.storage.remote import is_remote


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def files_of_at_most(limit: int):
    """As on a full disk, writing beyond the limit fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the operating system, in order: ("fsync", file or folder), ("rename", to)."""
    made = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor):
        made.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def watched_replace(self, target):
        made.append(("rename", Path(target)))
        return replace(self, target)

    monkeypatch.setattr(files.os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    return made


def test_remote_paths():
    assert all(map(is_remote, ("gs://bucket/file", "s3://bucket")))
    assert not any(map(is_remote, ("/a/b", "a:b", Path("a"), "")))


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "file.txt"
    write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_text(str(path), "žluťoučký\r\nkůň\n")
    assert path.read_bytes() == "žluťoučký\r\nkůň\n".encode()
    write_json(path, {"score": 1, "text": "žluť"})
    assert path.read_text() == '{\n "score": 1,\n "text": "žluť"\n}\n'
    with whole_file(path) as file:
        file.write("one\ntwo\n")
    assert path.read_bytes() == b"one\ntwo\n"
    assert names(tmp_path) == ["file.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_an_error_before_the_end_changes_nothing(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"score": object()})

    def interrupted(targets, error):
        with whole_files(targets) as sinks:
            for sink in sinks:
                sink.write("half")
            raise error

    for targets, error in (([path], KeyboardInterrupt), ([path, tmp_path / "new"], RuntimeError)):
        with pytest.raises(error):
            interrupted(targets, error)
    assert path.read_text() == "1\n"
    assert names(tmp_path) == ["file.json"]


def test_content_goes_to_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, calls):
    path = tmp_path / "file.txt"
    write_text(path, "content")
    (how, draft), *rest = calls
    assert how == "fsync"
    assert (draft.parent, draft.name[:10]) == (tmp_path, ".file.txt.")
    assert rest == [("rename", path), ("fsync", tmp_path)]


def test_none_of_several_files_is_renamed_before_all_are_on_the_disk(tmp_path, calls):
    targets = [tmp_path / "a", tmp_path / "b"]
    with whole_files(targets) as sinks:
        for sink in sinks:
            sink.write("content")
    assert [how for how, _ in calls] == ["fsync", "fsync", "rename", "rename", "fsync"]
    assert names(tmp_path) == ["a", "b"]


def test_a_tree_goes_to_the_disk_from_below(tmp_path, calls):
    (tmp_path / "top" / "deep").mkdir(parents=True)
    (tmp_path / "top" / "deep" / "file").write_text("x")
    (tmp_path / "top" / "other").write_text("y")
    tree_to_disk(tmp_path / "top")
    assert [path.name for _, path in calls] == ["file", "deep", "other", "top"]


def test_a_disk_that_fails_when_it_is_flushed_is_told(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_folders_that_cannot_be_flushed_are_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", refuse)
    write_text(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("write", [write_text, append_text])
def test_a_full_disk_leaves_the_old_content(tmp_path, write):
    path = tmp_path / "file.txt"
    write(path, "old")
    with files_of_at_most(10_000), pytest.raises(OSError, match="File too large"):
        write(path, "x" * 20_000)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_full_disk_while_lines_are_written(tmp_path):
    with files_of_at_most(100_000), pytest.raises(OSError, match="File too large"), whole_file(tmp_path / "f") as file:
        file.writelines(f"{number}\n" for number in range(100_000))
    assert names(tmp_path) == []


@pytest.mark.parametrize("write", [write_text, append_text])
def test_what_cannot_be_written_to_is_an_os_error(tmp_path, write):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "file", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "file" / "file", "x")
    with pytest.raises(IsADirectoryError):
        write(tmp_path, "x")


READ_ONLY = """
import os, sys
from t5x_ext.storage.files import write_text
os.chdir(sys.argv[1])
if os.getuid() == 0:  # root may write anywhere
    os.setuid(65534)
assert os.listdir(".") == ["file"]
try:
    write_text("file", "new")
except OSError as error:
    print(error.strerror)
"""


def test_a_read_only_folder_is_an_os_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    folder.chmod(0o555)
    try:
        command = [sys.executable, "-c", READ_ONLY, str(folder)]
        told = subprocess.run(command, capture_output=True, text=True)
        assert told.stdout == "Permission denied\n", told.stderr
    finally:
        folder.chmod(0o755)
    assert (folder / "file").read_text() == "old"
    assert names(folder) == ["file"]


KILLED = """
import os, signal, sys
from pathlib import Path
from t5x_ext.storage import files
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
path, moment = sys.argv[1:]
if moment == "rename":
    Path.replace = die
elif moment == "fsync":
    files.os.fsync = die
with files.whole_file(path) as file:
    file.write("new content")
    file.flush()
    if moment == "write":
        die()
"""


@pytest.mark.parametrize("moment", ["write", "fsync", "rename", "never"])
def test_killed_before_the_renaming_the_old_content_is_there(tmp_path, moment):
    path = tmp_path / "record.json"
    path.write_text("old content")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path), moment])
    assert ended.returncode == (0 if moment == "never" else -signal.SIGKILL)
    assert path.read_text() == ("new content" if moment == "never" else "old content")
    assert len(names(tmp_path)) == (1 if moment == "never" else 2)
    delete_drafts(tmp_path)
    assert names(tmp_path) == ["record.json"]


WRITER = """
import sys
from t5x_ext.storage.files import write_text
for turn in range(60):
    write_text(sys.argv[1], sys.argv[2] * 50_000)
"""


def test_a_reader_never_sees_a_mixture_of_concurrent_writers(tmp_path):
    path = tmp_path / "file"
    write_text(path, "a" * 50_000)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter]) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        content = path.read_text()
        assert len(content) == 50_000
        assert content in (content[0] * 50_000,)
        seen.add(content[0])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {"a", "b"}
    assert names(tmp_path) == ["file"]


def test_threads_have_drafts_of_their_own(tmp_path):
    drafts = {draft_path(tmp_path / "file") for _ in range(1000)}
    assert len(drafts) == 1000
    with whole_file(tmp_path / "file") as first, whole_file(tmp_path / "file") as second:
        first.write("first")
        second.write("second")
    # The outer block ends last.
    assert (tmp_path / "file").read_text() == "first"


def test_only_drafts_are_deleted(tmp_path):
    drafts = [draft_path(tmp_path / name) for name in ("record.json", "0000001.keys.npy", "žluťoučký")]
    drafts += [tmp_path / ".manifest.json.12.tmp"]  # as earlier versions named them
    others = [tmp_path / name for name in (".mine.tmp", ".12.tmp", ".a.json.12.tmp.old", ".a.12.0123456g.tmp", "a.tmp")]
    for path in (*drafts, *others):
        path.write_text("")
    (tmp_path / ".folder.12.01234567.tmp").mkdir()
    delete_drafts(tmp_path)
    assert names(tmp_path) == sorted([".folder.12.01234567.tmp", *(path.name for path in others)])


def test_devices_and_pipes_are_written_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with whole_file(pipe) as file:
        file.write("through the pipe")
    assert os.read(reader, 100) == b"through the pipe"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    write_text(os.devnull, "nothing")
    assert not Path(os.devnull).is_file()


def test_appended_lines_are_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    for number in range(3):
        append_text(path, json.dumps({"step": number, "text": "ž"}) + "\n")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


class Bucket:
    """A stand-in for `etils.epath`, in memory."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}

    def Path(self, name):
        bucket, name = self, str(name)

        class Remote:
            def exists(self):
                return name in bucket.objects

            def read_text(self):
                return bucket.objects[name].decode()

            def write_text(self, text):
                bucket.objects[name] = text.encode()

            def write_bytes(self, content):
                bucket.objects[name] = content

        return Remote()


def test_remote_files_are_written_in_one_piece(tmp_path, monkeypatch):
    import etils

    bucket = Bucket()
    monkeypatch.setattr(etils, "epath", bucket)
    write_json("gs://bucket/record.json", [1])
    append_text("gs://bucket/log", "one\n")
    append_text("gs://bucket/log", "two\n")
    assert bucket.objects == {"gs://bucket/record.json": b"[\n 1\n]\n", "gs://bucket/log": b"one\ntwo\n"}
    with pytest.raises(ValueError, match=r"^gs://bucket/text: a remote file cannot"), whole_file("gs://bucket/text"):
        pass


def test_files_and_remote_paths_need_no_jax():
    program = "import sys; import t5x_ext.storage.files, t5x_ext.storage.remote, t5x_ext.storage.locks; "
    program += "print(sorted({'jax', 'numpy', 'etils'} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"
