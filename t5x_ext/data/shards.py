"""One file of a token cache: opened, read at random, and complained about when it is damaged."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from t5x_ext.contracts import UserError

logger = logging.getLogger(__name__)

# 16 records a group read at random 1.8 times as fast as 1 a group (256 records a read) and take half the space.
_WRITER_OPTIONS = "group_size:16,uncompressed"
# A network file system that fails over is back within about half a minute.
_RETRY_SECONDS = (0.1, 1.0, 5.0, 20.0)
_DAMAGE = "Corrupted"


def open_writer(path: Path) -> Any:
    """An ArrayRecord writer with the options of every shard: `write(bytes)`, `close()`."""
    return array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)


class Shard:
    """Records of one ArrayRecord file, which was whole when it was opened; reads may come from several threads.

    A read that fails for reasons outside the file is tried again with growing pauses, the file opened anew.
    """

    def __init__(self, path: Path, records: int):
        """Opens a file of so many records.

        Raises:
          UserError: if it is missing, damaged, or of another number of records.
        """
        self._path = path
        try:
            path.stat()
            self._reader = array_record_module.ArrayRecordReader(str(path))
            found = self._reader.num_records()
        except Exception:  # array_record raises different types for missing and for damaged files
            raise UserError(f"{path}: missing or damaged; delete its folder to rebuild it") from None
        if found != records:
            raise UserError(f"{path}: {found} records, the manifest says {records}; delete its folder to rebuild it")

    def read(self, records: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """The records with these numbers, which must have these sizes in bytes.

        Raises:
          UserError: if the file has been damaged since it was opened, or stays unreadable for half a minute.
        """
        for pause in (*_RETRY_SECONDS, None):
            try:
                blobs = self._reader.read(records)
            except Exception as error:  # array_record knows RuntimeError only, and says in words what it means
                if _DAMAGE in str(error):
                    raise self._damaged(str(error)) from error
                if pause is None:
                    raise UserError(
                        f"{self._path}: cannot be read, {len(_RETRY_SECONDS) + 1} times in a row ({error}); once it"
                        " can, the same command goes on"
                    ) from error
                logger.warning("%s: cannot be read (%s); trying again in %g s", self._path, error, pause)
                time.sleep(pause)
                self._reopen()
            else:
                # Of a file that was cut short array_record gives empty records without a word.
                if list(map(len, blobs)) != list(sizes):
                    raise self._damaged("records have other sizes than the cache's lengths say")
                return blobs
        raise AssertionError("the last try returns or raises")

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"{self._path}: damaged ({reason}); delete the folder {self._path.parent}, and the same command builds it"
            " anew and goes on"
        )

    def _reopen(self) -> None:
        """A file handle may be stale; where even opening fails, the next read with the old one says so."""
        try:
            self._reader = array_record_module.ArrayRecordReader(str(self._path))
        except Exception as error:
            logger.warning("%s: cannot be opened (%s)", self._path, error)
