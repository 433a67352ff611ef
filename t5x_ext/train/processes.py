"""What one process does for all: writing records, and making shared files before the others read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


def is_primary() -> bool:
    """Whether this is the process that writes what belongs to the whole run."""
    return jax.process_index() == 0


@contextmanager
def primary_first(name: str) -> Iterator[None]:
    """Process 0 runs the block, then all others do, which find what it has made."""
    if not is_primary():
        multihost_utils.sync_global_devices(f"{name} made")
    yield
    if is_primary():
        multihost_utils.sync_global_devices(f"{name} made")
