"""Folders that appear whole or not at all, and copies of remote ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from t5x_ext.contracts import UserError
from t5x_ext.storage.files import folder_to_disk, tree_to_disk
from t5x_ext.storage.hosts import host_name, is_alive


@contextmanager
def whole_folder(folder: Path, last_file: str | None, what: str = "a token cache") -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end, and is removed if anything fails.

    Its files are on the disk before it is renamed. What killed processes of this machine have left beside it is
    deleted.

    Args:
      folder: the place, local, free or an empty folder; its parent is made if it is missing.
      last_file: a file that whole folders have. If the place is taken by one that has it, that one stays: another
        process finished the same content first. None: no other process makes the same.
      what: what the folder is, for messages.

    Raises:
      UserError: if something else is in the place.
      OSError: if it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-{host_name()}-"
    _remove_abandoned(folder.parent.glob(f"{prefix}*"), prefix)
    temporary = folder.parent / f"{prefix}{os.getpid()}-{os.urandom(4).hex()}"
    temporary.mkdir()
    try:
        yield temporary
        tree_to_disk(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if last_file is None or not (folder / last_file).exists():
                raise UserError(f"{folder}: is in the way of {what}; remove it") from None
        else:
            folder_to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(folders: Iterable[Path], prefix: str) -> None:
    """Removes what processes of this machine left behind when they were killed."""
    for folder in folders:
        process = folder.name.removeprefix(prefix).split("-")[0]
        if process.isdigit() and not is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def local_copies() -> Path:
    """Where this machine keeps local copies of remote caches: `t5x_ext/caches` in the user's cache folder.

    That is `$XDG_CACHE_HOME`, by default `~/.cache`; set it to a disk that is large enough.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "t5x_ext" / "caches"


def fetch_folder(remote: str, folder: Path, files: Sequence[str]) -> None:
    """Copies these files of a remote folder to a local one, which then has the last of them last.

    Raises:
      UserError: for too little free disk space, and where a file is missing.
    """
    sources = [epath.Path(remote) / file for file in files]
    try:
        needed = sum(source.stat().length for source in sources)
    except FileNotFoundError as error:
        raise UserError(f"{remote}: not whole ({error}); delete it to rebuild it") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(
            f"{folder.parent}: the local copy of {remote} needs {needed / 2**20:.0f} MiB but {free / 2**20:.0f} MiB are"
            " free; set XDG_CACHE_HOME to a larger disk"
        )
    with whole_folder(folder, files[-1]) as temporary:
        for source in sources:
            source.copy(temporary / source.name)


def upload_folder(folder: Path, remote: str, files: Sequence[str]) -> None:
    """Copies these files of a local folder to a remote one, in this order; what is there is replaced."""
    target = epath.Path(remote)
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        epath.Path(folder / file).copy(target / file, overwrite=True)
