"""Which paths are remote."""

from __future__ import annotations

import os


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address in a bucket or on another machine, such as `gs://bucket/folder`.

    >>> is_remote("gs://bucket/folder"), is_remote("/disk/folder")
    (True, False)
    """
    return "://" in str(path)
