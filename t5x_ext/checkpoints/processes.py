"""What several processes must agree on while they save and load together."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

_TEXT_BYTES = 1024
"""Room for one process's text: collectives move arrays of one shape."""

SAVE_TIMEOUT_SECONDS = 3600
"""How long the processes wait for the slowest of them to write and digest its part."""


@dataclass(frozen=True)
class Processes:
    """The processes that load a checkpoint together."""

    index: int
    count: int

    @classmethod
    def all(cls) -> Processes:
        """Every process of the run; each of them must take part."""
        return cls(jax.process_index(), jax.process_count())

    def gather(self, text: str) -> list[str]:
        """The text of each process, cut to 1 KiB. From the main thread only: it is a computation on the devices."""
        if self.count == 1:
            return [text]
        row = np.zeros(_TEXT_BYTES, np.uint8)
        encoded = text.encode()[:_TEXT_BYTES]
        row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        rows = multihost_utils.process_allgather(row)
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in np.asarray(rows)]


ALONE = Processes(0, 1)
"""This process by itself, whatever the others do."""


def barrier(name: str) -> None:
    """Waits until every process is here; from any thread, so not through the devices.

    Raises:
      jax.errors.JaxRuntimeError: when one does not come in time, or has died.
    """
    if jax.process_count() > 1:
        import orbax.checkpoint

        wait = orbax.checkpoint.multihost.get_barrier_sync_fn()
        wait(key=f"t5x_ext.checkpoints {name}", timeout_ms=SAVE_TIMEOUT_SECONDS * 1000)
