"""Locks on run folders and outputs, so that two processes do not write the same thing at once.

A lock is a file that names its holder: host, process, since when. It is made with O_EXCL, and replaced or deleted only
under `flock` of that file, so that of several processes that find a stale lock one takes it over. Its holder touches it
every few seconds. A lock is stale

* if its holder was a process of this machine that no longer runs, or
* if its holder is elsewhere (another host or container) and has not touched it for `stale_seconds`, by the clock of the
  file system.

Remote paths are not locked: what gives access to object stores here has neither O_EXCL nor `flock`. On network file
systems without `flock` the takeover of a stale lock is not exclusive; making a new one still is.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from t5x_ext.storage.files import draft_path, to_disk, write_bytes
from t5x_ext.storage.hosts import host_name, is_alive, process_space, started
from t5x_ext.storage.remote import is_remote

logger = logging.getLogger(__name__)

STALE_SECONDS = 120.0
"""For how long a holder on another host may give no sign of life before its lock is taken over."""

_BEATS = 8  # signs of life a holder gives in that time

_WRITING_SECONDS = 1.0  # for as long a new lock file may have no content yet

_FOLDER_LOCK = ".lock"


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as the lock file says in JSON.

    Attributes:
      host: name of its machine.
      process: its id there.
      since: when it took the lock, in seconds since 1970.
      space: where its id is valid, see `hosts.process_space`.
      started: when the process started, see `hosts.started`.
      token: random; no other lock has the same.
    """

    host: str
    process: int
    since: float
    space: str = ""
    started: str = ""
    token: str = ""

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
        return f"process {self.process} on {self.host} since {since}"


class Lock:
    """A lock that one process holds inside a `with` block.

    It is freed at the end of the block, or when its process is gone. It is not re-entrant: a second lock on the same
    thing is refused in the same process, too.

    Args:
      path: the lock file; its folder is made if it is missing. Remote: nothing is locked.
      guarded: what is locked, for messages.
      stale_seconds: see above; the same for all that lock one thing.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, Lock.of_folder(folder) as lock:
      ...     lock.is_held
      True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        guarded: str | os.PathLike[str] | None = None,
        *,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._path = None if is_remote(path) else Path(path)
        self._guarded = path if guarded is None else guarded
        self._stale_seconds = stale_seconds
        self._me: Holder | None = None
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str], *, stale_seconds: float = STALE_SECONDS) -> Lock:
        """A lock on a folder: the file `.lock` in it; the folder is made if it is missing."""
        return cls(os.path.join(folder, _FOLDER_LOCK), folder, stale_seconds=stale_seconds)

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], *, stale_seconds: float = STALE_SECONDS) -> Lock:
        """A lock on an output that need not exist: the file `.NAME.lock` beside it."""
        folder, name = os.path.split(os.fspath(path))
        return cls(os.path.join(folder, f".{name}.lock"), path, stale_seconds=stale_seconds)

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock: not if the file was deleted, or another process took it over."""
        if self._me is None or self._path is None or self._me.process != os.getpid():
            return False
        try:
            return _parse(self._path.read_bytes()) == self._me
        except OSError:
            return False

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock; a stale one is taken over, which is logged.

        Raises:
          UserError: if a live process holds it; says which, since when, and what to do.
          OSError: if the lock file cannot be written.
        """
        if self._path is None:
            return
        process, token = os.getpid(), os.urandom(8).hex()
        me = Holder(host_name(), process, time.time(), process_space(), started(process), token)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not _create(self._path, me) and not self._take_over(self._path, me):
            pass  # it was freed, or taken over by another process, while it was looked at
        self._me = me
        self._ended.clear()
        self._heart = threading.Thread(target=self._beat, args=(self._path, me), name="lock", daemon=True)
        self._heart.start()

    def release(self) -> None:
        """Frees the lock if this process holds it; what goes wrong is logged, since the work is done."""
        me, self._me = self._me, None
        if me is None or self._path is None or me.process != os.getpid():  # a forked child has no part in it
            return
        self._ended.set()
        if self._heart:
            self._heart.join()
        try:
            with _examined(self._path) as seen:
                if seen is not None and seen[0] == me:
                    self._path.unlink()
        except OSError as error:
            logger.warning("%s cannot be deleted: %s", self._path, error.strerror or error)

    def _take_over(self, path: Path, me: Holder) -> bool:
        """Replaces a stale lock; False if it is no longer the one that was opened."""
        with _examined(path) as seen:
            if seen is None:
                return False
            holder, touched = seen
            silent = _file_system_time(path) - touched
            if holder is None and silent < _WRITING_SECONDS:
                time.sleep(_WRITING_SECONDS / 20)
                return False
            death = self._sign_of_death(holder, silent)
            if death is None:
                self._refuse(path, holder, silent)
            write_bytes(path, _to_bytes(me))
        logger.warning("%s: took over the lock of %s, %s", self._guarded, holder or "an unknown process", death)
        return True

    def _sign_of_death(self, holder: Holder | None, silent: float) -> str | None:
        """Why a lock is stale; None if its holder may be alive."""
        if holder is not None and (holder.host, holder.space) == (host_name(), process_space()):
            runs = is_alive(holder.process) and holder.started == started(holder.process)
            return None if runs else "which no longer runs"
        return f"which has given no sign of life for {silent:.0f} s" if silent > self._stale_seconds else None

    def _refuse(self, path: Path, holder: Holder | None, silent: float) -> None:
        from t5x_ext.contracts import UserError

        who = f"is in use by {holder}" if holder else f"is in use by a process that has not said which: see {path}"
        raise UserError(
            f"{self._guarded} {who} (last sign of life {max(silent, 0):.0f} s ago); wait until it ends, stop it, or "
            f"name another place; if it is certain that it no longer runs, delete {path}"
        )

    def _beat(self, path: Path, me: Holder) -> None:
        """Gives signs of life, in a thread of its own, until the lock is freed or lost."""
        while not self._ended.wait(self._stale_seconds / _BEATS):
            try:
                if _parse(path.read_bytes()) != me:
                    raise FileNotFoundError
                os.utime(path)
            except FileNotFoundError:
                if not self._ended.is_set():
                    logger.error("%s: the lock %s was deleted or taken over by another process", self._guarded, path)
                return
            except OSError as error:  # a network file system that is away for a moment
                logger.debug("%s cannot be touched: %s", path, error)


def _create(path: Path, me: Holder) -> bool:
    """Makes the lock file; False if there is one."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_to_bytes(me))
            to_disk(file)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


@contextmanager
def _examined(path: Path) -> Iterator[tuple[Holder | None, float] | None]:
    """Holder of a lock (None: not readable) and when it was last touched; inside nobody else replaces or deletes it.

    None if it is gone, or was replaced before it could be kept from that.
    """
    try:
        file = _open(path)
    except FileNotFoundError:
        yield None
        return
    with file:
        _flock(file.fileno())
        opened = os.fstat(file.fileno())
        try:
            same = os.path.samestat(opened, os.stat(path))
        except FileNotFoundError:
            same = False
        yield (_parse(file.read()), opened.st_mtime) if same else None


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("r+b")  # NFS gives exclusive locks only on files that are open for writing
    except PermissionError:
        return path.open("rb")


def _flock(descriptor: int) -> None:
    with suppress(ImportError, OSError):  # not on this platform, or not on this file system
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _file_system_time(path: Path) -> float:
    """Now, by the clock that dates the file: on a network file system the server's."""
    draft = draft_path(path)
    try:
        with draft.open("wb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _to_bytes(holder: Holder) -> bytes:
    return (json.dumps(asdict(holder), indent=1) + "\n").encode()


def _parse(content: bytes) -> Holder | None:
    try:
        fields = json.loads(content)
        rest = (str(fields.get(name, "")) for name in ("space", "started", "token"))
        holder = Holder(str(fields["host"]), int(fields["process"]), float(fields["since"]), *rest)
        str(holder)  # fails for a time that is none
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, OSError):
        return None
    return holder
