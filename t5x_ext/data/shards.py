"""One file of a token cache, read at random, with errors if it is damaged."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from t5x_ext.contracts import UserError

logger = logging.getLogger(__name__)

# Groups of 16 records are read at random 1.8 times as fast as groups of 1 (256 records a read) and take half the space.
_WRITER_OPTIONS = "group_size:16,uncompressed"
# A network file system that fails over recovers within about half a minute.
_RETRY_SECONDS = (0.1, 1.0, 5.0, 20.0)
_DAMAGE = "Corrupted"


def open_writer(path: Path) -> Any:
    """An ArrayRecord writer with the options of every shard: `write(bytes)`, `close()`."""
    return array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)


class Shard:
    """Records of one ArrayRecord file, which is checked when it is opened; several threads may read it.

    A read that fails for reasons outside the file is retried after increasing pauses, with the file reopened.
    """

    def __init__(self, path: Path, records: int):
        """Opens a file with this number of records.

        Raises:
          UserError: if it is missing, damaged, or has another number of records.
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
            except Exception as error:  # array_record raises RuntimeError only; the reason is in its text
                if _DAMAGE in str(error):
                    raise self._damaged(str(error)) from error
                if pause is None:
                    raise UserError(
                        f"{self._path}: cannot be read, {len(_RETRY_SECONDS) + 1} times in a row ({error}); when it"
                        " can be read again, rerun the same command to resume"
                    ) from error
                logger.warning("%s: cannot be read (%s); trying again in %g s", self._path, error, pause)
                time.sleep(pause)
                self._reopen()
            else:
                # array_record silently gives empty records for a truncated file.
                if list(map(len, blobs)) != list(sizes):
                    raise self._damaged("records have other sizes than the cache's lengths")
                return blobs
        raise AssertionError("the last try returns or raises")

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"{self._path}: damaged ({reason}); delete the folder {self._path.parent} and rerun the same command: it"
            " rebuilds the folder and resumes"
        )

    def _reopen(self) -> None:
        """The file handle may be stale. If opening fails too, the next read with the old handle raises."""
        try:
            self._reader = array_record_module.ArrayRecordReader(str(self._path))
        except Exception as error:
            logger.warning("%s: cannot be opened (%s)", self._path, error)
