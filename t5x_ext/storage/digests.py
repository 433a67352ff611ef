"""SHA-256 of files, of folders, and of parameters."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from t5x_ext.contracts import Params, path_name
from t5x_ext.storage.files import write_json

DIGESTS = "digests.json"
"""Name of the file that holds size and SHA-256 of every other file of a folder; a folder without it is not whole."""


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a local or remote file, in hexadecimal.

    Raises:
      OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def params_digest(params: Params) -> str:
    """SHA-256 of parameters, in hexadecimal: of their names, dtypes, shapes and numbers, on any devices.

    The leaves are taken in the order of their names. Each adds `/name dtype shape` in UTF-8, then its bytes in C order.
    The manifests of pipelines record this digest, so it must not change.

    Args:
      params: a tree of JAX or NumPy arrays, each of which this process can read as a whole.

    >>> import numpy as np
    >>> params_digest({"w": np.zeros((2, 3), np.float32)})[:16]
    '86c7cf09104dd201'
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for name, leaf in sorted(((f"/{path_name(path)}", leaf) for path, leaf in leaves), key=lambda named: named[0]):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def write_part_of_digests(folder: epath.Path, index: int, count: int) -> None:
    """Records the digests of every `count`-th file below `folder`, so that many processes share the reading."""
    names = _file_names(folder)[index::count]
    write_json(_part(folder, index), {name: _size_and_digest(folder / name) for name in names})


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
    files = {name: known.get(name) or _size_and_digest(folder / name) for name in _file_names(folder)}
    write_json(folder / DIGESTS, {"format": 1, "files": files})


def find_damage(
    folder: epath.Path, wanted: Callable[[str], bool] = lambda name: True, index: int = 0, count: int = 1
) -> str | None:
    """Why `folder` cannot be trusted, in a few words; None if every wanted file has its recorded digest.

    Of the files it reads every `count`-th only, beginning with number `index`: the others are for other processes.
    """
    if not folder.is_dir():
        return "it is not a folder"
    if not (folder / DIGESTS).exists():
        return f"it has no {DIGESTS}, so its save has not finished"
    expected = _recorded(folder)
    if not expected:
        return f"{DIGESTS} is damaged"
    for name in sorted(filter(wanted, expected))[index::count]:
        if damage := _file_damage(folder / name, *expected[name]):
            return f"{name} {damage}"
    return None


def recorded_files(folder: epath.Path) -> frozenset[str]:
    """The files below `folder` whose digests are recorded; none if the record is missing or damaged."""
    return frozenset(_recorded(folder))


def _recorded(folder: epath.Path) -> dict[str, tuple[int, str]]:
    try:
        files = json.loads((folder / DIGESTS).read_text())["files"]
        return {name: (int(length), str(digest)) for name, (length, digest) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _file_damage(path: epath.Path, length: int, digest: str) -> str | None:
    try:
        actual = path.stat().length
        if actual != length:
            return f"has {actual} bytes instead of {length}"
        return None if file_digest(path) == digest else "has changed (its SHA-256 differs)"
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


def _size_and_digest(path: epath.Path) -> list[int | str]:
    return [path.stat().length, file_digest(path)]
