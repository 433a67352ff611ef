"""Files that appear whole: a reader finds the old content or the new one, never a part, even after a power cut.

Local files are written as drafts beside their names, flushed to the disk, and renamed; then the folder is flushed, so
that the new content is still there after a power cut once the function has returned. A remote object appears whole or
not at all by itself. Whatever the operating system refuses (a full disk, a read-only folder) is raised as OSError; the
old content stays and the draft is deleted.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TextIO

from t5x_ext.storage.remote import is_remote

# As `draft_path` names them. Earlier versions gave drafts no random part, so their kinds are listed.
_DRAFT = re.compile(r"\..+\.[0-9]+\.[0-9a-f]{8}\.tmp|\..+\.(json|txt|gin)\.[0-9]+\.tmp")

_NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
"""How file systems answer that do not flush folders; they have nothing to flush, or no way to ask for it."""


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON as `write_bytes` does, indented, with a line end."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 as `write_bytes` does; line ends are kept as they are."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a local or remote file, which appears whole or not at all; any number of processes may write it at once.

    Raises:
      OSError: if it cannot be written; a local file is then as it was.
    """
    if is_remote(path):
        from etils import epath

        epath.Path(path).write_bytes(content)
        return
    with _drafts((path,), "wb") as (file,):
        file.write(content)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    r"""A local UTF-8 text file to write, with "\n" line ends, that appears when the block ends without an error.

    Raises:
      OSError: if it cannot be written; the file is then as it was.
      ValueError: for a remote path.
    """
    with whole_files((path,)) as (file,):
        yield file


@contextmanager
def whole_files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[list[TextIO]]:
    """Does the same with several files: none of them is renamed before all of them are on the disk."""
    with _drafts(paths, "w", encoding="utf-8", newline="\n") as files:
        yield files


@contextmanager
def _drafts(paths: Sequence[str | os.PathLike[str]], mode: str, **how: Any) -> Iterator[list[Any]]:
    if remote := [str(path) for path in paths if is_remote(path)]:
        raise ValueError(f"{remote[0]}: a remote file cannot be written piecemeal; use write_bytes")
    targets = [Path(path) for path in paths]
    # A device or a pipe, such as /dev/null, must not be replaced: it is written directly.
    drafts = {target: draft_path(target) for target in targets if target.is_file() or not target.exists()}
    with ExitStack() as stack:
        for draft in drafts.values():
            stack.callback(_discard, draft)
        files = [stack.enter_context(drafts.get(target, target).open(mode, **how)) for target in targets]
        yield files
        for target, file in zip(targets, files):
            if target in drafts:
                to_disk(file)
        for target, draft in drafts.items():
            draft.replace(target)
    for folder in dict.fromkeys(target.parent for target in drafts):
        folder_to_disk(folder)


def draft_path(path: Path) -> Path:
    """A new hidden name beside `path`, where its content is written before it is renamed.

    No other process or thread gets the same name, on no machine.
    """
    return path.parent / f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp"


def delete_drafts(folder: Path) -> None:
    """Deletes the drafts that killed processes have left in a local folder, into which nobody is writing now."""
    for path in folder.glob(".*.tmp"):
        if _DRAFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Appends UTF-8 to a file, or makes it; where that fails nothing is appended, so that no line is left half.

    It does not wait for the disk: a power cut may lose the end of the file. A remote file is written again as a whole.
    One process at a time appends.

    Raises:
      OSError: if it cannot be written; the file is then as it was.
    """
    if is_remote(path):
        from etils import epath

        target = epath.Path(path)
        target.write_text((target.read_text() if target.exists() else "") + text)
        return
    with open(path, "ab", buffering=0) as file:
        size, rest = file.tell(), memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def to_disk(file: IO[Any]) -> None:
    """Waits until what was written is on the disk: else a power cut could leave a new name on an empty file."""
    file.flush()
    os.fsync(file.fileno())


def folder_to_disk(folder: str | os.PathLike[str]) -> None:
    """Waits until the names in a local folder are on the disk: else a power cut could undo a renaming.

    Where the file system cannot do that, or the folder may not be read, it returns at once.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def tree_to_disk(folder: str | os.PathLike[str]) -> None:
    """Waits until all files and folders below a local folder, and its own names, are on the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        folder_to_disk(root)


def _discard(draft: Path) -> None:
    with suppress(OSError):
        draft.unlink(missing_ok=True)
