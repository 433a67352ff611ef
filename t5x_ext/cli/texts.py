"""Lines of text from files or standard input, all checked alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from t5x_ext.contracts import UserError
from t5x_ext.corpora import read_lines
from t5x_ext.decode.files import decode_lines


def read_text(path: str) -> list[str]:
    """All lines of a UTF-8 file, plain or gzipped, or of standard input for `-`, without line ends.

    Raises:
      UserError: where the file is missing, empty or not UTF-8.
    """
    if path == "-":
        return list(decode_lines(sys.stdin.buffer, "standard input"))
    return list(read_lines(path))


def read_aligned(paths: Sequence[str]) -> list[list[str]]:
    """The lines of several files that belong together line by line.

    Raises:
      UserError: as `read_text`, and where line counts differ.
    """
    texts = [read_text(path) for path in paths]
    for path, text in zip(paths[1:], texts[1:]):
        if len(text) != len(texts[0]):
            raise UserError(
                f"{paths[0]} has {len(texts[0])} lines but {path} has {len(text)}: line i must be the same everywhere"
            )
    return texts
