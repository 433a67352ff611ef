"""Small files written atomically, and digests that prove that a folder is whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from etils import epath

DIGESTS = "digests.json"
"""Name of the file that holds size and SHA-256 of every other file of a folder; a folder without it is not whole."""

# As `write_text` names them, of the kinds of files that are ours in a folder which others may use, too.
_DRAFT = re.compile(r"\..+\.(json|txt|gin)\.[0-9]+\.tmp")


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes UTF-8 so that a reader finds the old file or the new one, never a part of it, even after a power cut."""
    path = epath.Path(path)
    if "://" in str(path):
        path.write_text(text)  # an object in a bucket appears whole or not at all
        return
    draft = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with draft.open("wb") as file:
            file.write(text.encode())
            to_disk(file)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def delete_drafts(folder: Path) -> None:
    """Deletes the drafts of records that killed processes have left in `write_text` to a local folder."""
    for path in folder.glob(".*.tmp"):
        if _DRAFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def to_disk(file: IO[Any]) -> None:
    """Waits until what was written is on the disk: else a power cut could leave a new name on an empty file."""
    file.flush()
    os.fsync(file.fileno())


def write_part_of_digests(folder: epath.Path, index: int, count: int) -> None:
    """Records the digests of every `count`-th file below `folder`, so that many processes share the reading."""
    names = _file_names(folder)[index::count]
    write_json(_part(folder, index), {name: _digest(folder / name) for name in names})


def write_digests(folder: epath.Path, parts: int = 0) -> None:
    """Records size and SHA-256 of every file below `folder`: from here on the folder counts as whole.

    Args:
      folder: the folder.
      parts: how many parts `write_part_of_digests` has left there; they are taken over and deleted.
    """
    known: dict[str, list[int | str]] = {}
    for index in range(parts):
        known |= json.loads(_part(folder, index).read_text())
        _part(folder, index).unlink()
    # A file that a process did not see yet, as may happen on a network file system, is in no part.
    files = {name: known.get(name) or _digest(folder / name) for name in _file_names(folder)}
    write_json(folder / DIGESTS, {"format": 1, "files": files})


def find_damage(
    folder: epath.Path, wanted: Callable[[str], bool] = lambda name: True, index: int = 0, count: int = 1
) -> str | None:
    """Why `folder` cannot be trusted, in a few words; None when every wanted file has its recorded digest.

    Of the files it reads every `count`-th only, beginning with number `index`: the others are for other processes.
    """
    if not folder.is_dir():
        return "it is not a folder"
    if not (folder / DIGESTS).exists():
        return f"it has no {DIGESTS}, so its save has not finished"
    try:
        files = json.loads((folder / DIGESTS).read_text())["files"]
        expected = {name: (int(length), str(digest)) for name, (length, digest) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{DIGESTS} is damaged"
    if not expected:
        return f"{DIGESTS} is damaged"
    for name in sorted(filter(wanted, expected))[index::count]:
        if damage := _file_damage(folder / name, *expected[name]):
            return f"{name} {damage}"
    return None


def _file_damage(path: epath.Path, length: int, digest: str) -> str | None:
    try:
        actual = path.stat().length
        if actual != length:
            return f"has {actual} bytes instead of {length}"
        return None if _sha256(path) == digest else "has changed (its SHA-256 differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _file_names(folder: epath.Path) -> list[str]:
    names = []
    pending = [folder]
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir():
                pending.append(path)
            elif DIGESTS not in path.name:  # nor the draft of another process's part
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def _part(folder: epath.Path, index: int) -> epath.Path:
    return folder / f"{DIGESTS}.{index}"


def _digest(path: epath.Path) -> list[int | str]:
    return [path.stat().length, _sha256(path)]


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
