"""Files that commands read and write: checked before work begins, written whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from t5x_ext.cli.messages import UsageError
from t5x_ext.storage.files import whole_file
from t5x_ext.storage.remote import is_remote


def check_absent(path: str, flag: str) -> None:
    """Raises UsageError where something is already at `path`: nothing is overwritten by accident."""
    _check_local(path, flag)
    if Path(path).is_file() or (Path(path).is_dir() and any(Path(path).iterdir())):
        raise UsageError(f"{flag}={path} exists already; name another place, or remove it")


def check_writable(path: str | None, flag: str) -> None:
    """Raises UsageError where a file at `path` could not be written."""
    if not path or path == "-":
        return
    _check_local(path, flag)
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise UsageError(f"{flag}={path} is a folder; name a file")
    if not folder.is_dir():
        raise UsageError(f"{flag}={path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{flag}={path}: the folder {folder} cannot be written to")


def check_folder(path: str, flag: str) -> None:
    """Raises UsageError where a folder at `path` could not be made or written to."""
    if is_remote(path):
        return
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"{flag}={path}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{flag}={path}: the folder {folder} cannot be written to")


def _check_local(path: str, flag: str) -> None:
    # A bucket knows neither renaming nor appending, on which whole and restartable files rest.
    if is_remote(path):
        raise UsageError(f"{flag}={path}: give a local path; only run folders and texts may be remote")


@contextmanager
def output_text(path: str) -> Iterator[TextIO]:
    """Standard output for `-`, else a `whole_file`."""
    if path == "-":
        yield sys.stdout
        sys.stdout.flush()
    else:
        with whole_file(path) as file:
            yield file


def report(text: str, result: Any, json_out: str | None) -> None:
    """Prints what was found for people and, where asked, writes it as JSON for programs."""
    if json_out:
        with output_text(json_out) as file:
            file.write(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if text and json_out != "-":
        print(text)
