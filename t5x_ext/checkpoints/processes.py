"""What several processes must agree on while they save and load together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jax
from jax._src import distributed

TIMEOUT_SECONDS = 3600
"""How long the processes wait for the slowest of them to read, write or digest its part."""

_numbers = itertools.count()  # of what was gathered; all processes gather the same things in the same order


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
        """The text of each process, in their order; from one thread only.

        It goes through JAX's coordination service, not through the devices, whose collectives give up when a process
        is busy for minutes, as it is with digests of large files.

        Raises:
          jax.errors.JaxRuntimeError: when a process does not come in time, or has died.
        """
        if self.count == 1:
            return [text]
        client, number = _client(), next(_numbers)
        client.key_value_set(_key(number, self.index), text)
        barrier(_key(number))
        texts = [client.blocking_key_value_get(_key(number, index), 60_000) for index in range(self.count)]
        if number:
            # Whoever is at this barrier has read what was gathered before.
            client.key_value_delete(_key(number - 1, self.index))
        return texts


ALONE = Processes(0, 1)
"""This process by itself, whatever the others do."""


def barrier(name: str) -> None:
    """Waits until every process is here; from any thread.

    Raises:
      jax.errors.JaxRuntimeError: when one does not come in time, or has died.
    """
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"t5x_ext/checkpoints/{name}", TIMEOUT_SECONDS * 1000)


def _client() -> Any:
    """JAX's line to the other processes."""
    return distributed.global_state.client


def _key(*parts: int) -> str:
    return "/".join(("t5x_ext/checkpoints/gather", *map(str, parts)))
