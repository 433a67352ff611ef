from __future__ import annotations

import os
from pathlib import Path

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.data import shards
from t5x_ext.data.shards import Shard, open_writer

RECORDS = [bytes([number % 256]) * (number % 50) for number in range(20_000)]
SIZES = list(map(len, RECORDS))


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "tokens.array_record"
    writer = open_writer(path)
    for record in RECORDS:
        writer.write(record)
    writer.close()
    return path


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(shards.time, "sleep", pauses.append)
    return pauses


class Unsteady:
    """A reader that fails some times."""

    def __init__(self, reader, failures):
        self.reader, self.failures = reader, failures

    def read(self, records):
        if self.failures:
            raise self.failures.pop()
        return self.reader.read(records)


def unsteady(shard: Shard, failures, monkeypatch) -> Shard:
    shard._reader = reader = Unsteady(shard._reader, failures)
    monkeypatch.setattr(shards.array_record_module, "ArrayRecordReader", lambda path: reader)
    return shard


def test_records_come_in_any_order(path):
    numbers = [19_999, 0, 7, 7]
    assert Shard(path, 20_000).read(numbers, [SIZES[n] for n in numbers]) == [RECORDS[n] for n in numbers]
    assert Shard(path, 20_000).read([], []) == []


@pytest.mark.parametrize("failures", [1, 4])
def test_short_failures_are_waited_out(path, monkeypatch, pauses, caplog, failures):
    errors = [OSError("Stale file handle"), RuntimeError("read() failed: Input/output error")] * 2
    shard = unsteady(Shard(path, 20_000), errors[:failures], monkeypatch)
    assert shard.read([3], [3]) == [RECORDS[3]]
    assert pauses == [0.1, 1.0, 5.0, 20.0][:failures]
    assert f"{path}: cannot be read (" in caplog.text


def test_long_failures_end_in_one_line(path, monkeypatch, pauses):
    shard = unsteady(Shard(path, 20_000), [OSError("Input/output error")] * 5, monkeypatch)
    with pytest.raises(
        UserError, match=r"5 times in a row \(Input/output error\); when it can be read again, rerun the same command"
    ):
        shard.read([3], [3])
    assert len(pauses) == 4


def test_flipped_bytes_are_found_without_waiting(path, pauses):
    shard = Shard(path, 20_000)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 255]))
    with pytest.raises(UserError, match=r"tokens.array_record: damaged \(Corrupted .*delete the folder .*resumes"):
        shard.read(range(20_000), SIZES)
    assert pauses == []


@pytest.mark.parametrize("size", [0, 300_000])
def test_a_file_cut_short_is_found(path, pauses, size):
    shard = Shard(path, 20_000)
    os.truncate(path, size)
    with pytest.raises(UserError, match=r"tokens.array_record: damaged \(.*delete the folder"):
        shard.read(range(20_000), SIZES)
    with pytest.raises(UserError, match="delete its folder to rebuild it"):
        Shard(path, 20_000)


def test_a_file_that_is_gone_is_still_read(path):
    shard = Shard(path, 20_000)
    path.unlink()
    assert shard.read([5], [5]) == [RECORDS[5]]
