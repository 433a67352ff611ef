"""Locks held by live, dead and far processes; and races in which one wins."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.storage import locks
from t5x_ext.storage.hosts import is_alive, started
from t5x_ext.storage.locks import Lock

HOLDING = """
import os, sys, time
from t5x_ext.storage.locks import Lock
with Lock.of_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `run` until its input ends or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def write_lock(folder: Path, **changes) -> Path:
    """A lock file as its holder leaves it that is not this process."""
    with Lock.of_folder(folder):
        fields = json.loads((folder / ".lock").read_text())
    path = folder / ".lock"
    path.write_text(json.dumps({**fields, "token": "other", **changes}))
    return path


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_it_names_its_holder_and_is_gone_afterwards(tmp_path):
    lock = Lock.of_folder(tmp_path / "new" / "run")
    assert not lock.is_held
    with lock:
        assert lock.is_held
        fields = json.loads((tmp_path / "new" / "run" / ".lock").read_text())
        assert (fields["host"], fields["process"]) == (os.uname().nodename, os.getpid())
        assert abs(fields["since"] - time.time()) < 60
    assert not lock.is_held
    assert list((tmp_path / "new" / "run").iterdir()) == []
    with lock:  # again
        assert lock.is_held


def test_the_lock_of_an_output_is_beside_it(tmp_path):
    with Lock.of_file(tmp_path / "out.txt"):
        assert [path.name for path in tmp_path.iterdir()] == [".out.txt.lock"]
        with Lock.of_file(tmp_path / "other.txt"):
            pass
        with pytest.raises(UserError, match=r"out\.txt is in use by process"):
            Lock.of_file(tmp_path / "out.txt").acquire()


def test_an_error_in_the_block_frees_it(tmp_path):
    with pytest.raises(RuntimeError), Lock.of_folder(tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_live_process_keeps_it(tmp_path, holder):
    age(tmp_path / "run" / ".lock", 10_000)  # of a process here, its silence says nothing
    with pytest.raises(UserError) as caught:
        Lock.of_folder(tmp_path / "run").acquire()
    assert re.fullmatch(
        rf"{tmp_path}/run is in use by process {holder.pid} on {os.uname().nodename} since "
        r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:]{8} \S+ \(last sign of life 10\d\d\d s ago\); wait until it ends, stop it, "
        rf"or name another place; if it is certain that it no longer runs, delete {tmp_path}/run/\.lock",
        str(caught.value),
    )
    holder.communicate("")
    with Lock.of_folder(tmp_path / "run") as lock:
        assert lock.is_held


def test_the_lock_of_a_dead_process_is_taken_over_with_one_line(tmp_path, holder, caplog):
    holder.send_signal(signal.SIGKILL)
    # Nobody has waited for it yet: a zombie does not run either.
    while is_alive(holder.pid):
        time.sleep(0.01)
    with caplog.at_level(logging.INFO), Lock.of_folder(tmp_path / "run") as lock:
        assert lock.is_held
    [said] = caplog.messages
    assert said.startswith(
        f"{tmp_path}/run: took over the lock of process {holder.pid} on {os.uname().nodename} since "
    )
    assert said.endswith(", which no longer runs")


def test_an_id_that_was_given_to_another_process_since_counts_as_dead(tmp_path, caplog):
    write_lock(tmp_path, process=os.getppid(), started="1")
    with Lock.of_folder(tmp_path) as lock:
        assert lock.is_held
    write_lock(tmp_path, process=os.getppid(), started=started(os.getppid()))
    with pytest.raises(UserError, match="in use"):
        Lock.of_folder(tmp_path).acquire()


@pytest.mark.parametrize("elsewhere", [{"host": "gpu17"}, {"space": "another container"}])
def test_a_process_elsewhere_counts_as_alive_while_it_gives_signs_of_life(tmp_path, caplog, elsewhere):
    path = write_lock(tmp_path, process=2**22 + 1, **elsewhere)
    age(path, locks.STALE_SECONDS - 20)
    with pytest.raises(UserError, match=rf"process {2**22 + 1} on .* \(last sign of life 1\d\d s ago\)"):
        Lock.of_folder(tmp_path).acquire()
    age(path, locks.STALE_SECONDS + 1)
    with Lock.of_folder(tmp_path) as lock:
        assert lock.is_held
    assert re.search(r"took over .*, which has given no sign of life for 12\d s$", caplog.text.strip())


def test_a_holder_gives_signs_of_life(tmp_path):
    with Lock.of_folder(tmp_path, stale_seconds=0.8):
        age(tmp_path / ".lock", 100)
        until = time.monotonic() + 10
        while time.time() - (tmp_path / ".lock").stat().st_mtime > 50:
            assert time.monotonic() < until
            time.sleep(0.02)


DAMAGED = [
    "",
    "{",
    "[]",
    '{"host": 1}',
    '{"host": "a", "process": "x", "since": 1}',
    '{"host": "a", "process": 1, "since": 1e300}',
    '{"host": "a", "process": 1, "since": NaN}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_lock_counts_until_it_is_old(tmp_path, content, monkeypatch):
    monkeypatch.setattr(locks, "_WRITING_SECONDS", 0.1)
    path = tmp_path / ".lock"
    path.write_text(content)
    with pytest.raises(UserError, match=r"in use by a process that has not said which: see .*/\.lock"):
        Lock.of_folder(tmp_path).acquire()
    age(path, 1000)
    with Lock.of_folder(tmp_path) as lock:
        assert lock.is_held


def test_a_lock_that_is_lost_is_told_and_not_freed_for_its_new_holder(tmp_path, caplog):
    lock = Lock.of_folder(tmp_path, stale_seconds=0.1)
    with lock:
        path = write_lock_over(tmp_path)
        assert not lock.is_held
        until = time.monotonic() + 10
        while "deleted or taken over" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert json.loads(path.read_text())["token"] == "new"
    path.unlink()
    with Lock.of_folder(tmp_path):
        path.unlink()  # by hand; the end of the block does not mind
    assert caplog.text.count("deleted or taken over") == 1


def write_lock_over(folder: Path) -> Path:
    fields = json.loads((folder / ".lock").read_text())
    (folder / ".lock").write_text(json.dumps({**fields, "token": "new"}))
    return folder / ".lock"


def test_a_forked_child_does_not_free_it(tmp_path):
    with Lock.of_folder(tmp_path) as lock:
        process = lock._me.process
        lock._me = locks.Holder(**{**vars(lock._me), "process": process + 1})
        lock.release()  # as the child would
        assert (tmp_path / ".lock").exists()


def test_remote_paths_are_not_locked():
    with Lock.of_folder("gs://bucket/run") as one, Lock.of_folder("gs://bucket/run") as other:
        assert not one.is_held
        assert not other.is_held
    with Lock.of_file("gs://bucket/out.txt"):
        pass


def test_what_cannot_be_written_is_an_os_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises((NotADirectoryError, FileExistsError)):
        Lock.of_folder(tmp_path / "file").acquire()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(locks, "to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        Lock.of_folder(tmp_path).acquire()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


RACING = """
import sys, time
from pathlib import Path
from t5x_ext.contracts import UserError
from t5x_ext.storage.locks import Lock
folder, number = Path(sys.argv[1]), sys.argv[2]
(folder / f"ready{number}").write_text("")
while not (folder / "go").exists():
    pass
try:
    with Lock.of_folder(folder / "run"):
        print("won", flush=True)
        sys.stdin.read()
except UserError:
    print("lost", flush=True)
"""


@pytest.mark.parametrize("stale", [False, True])
def test_of_processes_that_race_one_wins(tmp_path, stale):
    (tmp_path / "run").mkdir()
    if stale:
        age(write_lock(tmp_path / "run", process=2**22 + 1), 1000)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACING, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    while len(list(tmp_path.glob("ready*"))) < len(racers):
        time.sleep(0.01)
    (tmp_path / "go").write_text("")
    assert sorted(racer.stdout.readline().strip() for racer in racers) == ["lost", "lost", "won"]
    for racer in racers:
        racer.communicate("")
    assert list((tmp_path / "run").iterdir()) == []


def test_of_threads_that_race_for_stale_locks_again_and_again_one_is_inside(tmp_path):
    """Some free the lock, some leave it as a dead process does; never are two inside at once."""
    count = 8
    inside, entered, refused = [], [], []
    start = threading.Barrier(count)
    dead = {"process": 2**22 + 1, "token": "dead"}

    def race(number):
        start.wait()
        for turn in range(40):
            lock = Lock.of_folder(tmp_path)
            try:
                lock.acquire()
            except UserError:
                refused.append(number)
                continue
            inside.append(number)
            assert inside == [number]
            entered.append(number)
            time.sleep(0.0005)
            inside.remove(number)
            if turn % 2:
                lock.release()
            else:  # killed
                lock._ended.set()
                fields = json.loads((tmp_path / ".lock").read_text())
                (tmp_path / ".left").write_text(json.dumps({**fields, **dead}))
                (tmp_path / ".left").replace(tmp_path / ".lock")

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(race, range(count)))
    assert entered
    assert len(entered) + len(refused) == count * 40
