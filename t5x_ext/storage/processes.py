"""Coordination of the processes of a run: barriers, running in order, broadcasting and gathering texts.

It uses the key-value store of JAX's coordination service, not the devices, whose collectives time out if a process is
busy for minutes, as with digests of large files. JAX is imported on first use.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from t5x_ext.contracts import UserError

TIMEOUT_SECONDS = 3600
"""How long the processes wait for the slowest of them to read, write or digest its part of a checkpoint."""

_LOOK_MILLISECONDS = 5000
"""Time between checks whether another process has failed, while waiting for one."""

_FAILED = "t5x_ext/failed"

_visits: collections.Counter[str] = collections.Counter()
_gathered = itertools.count()  # all processes gather the same things in the same order


def coordination_client() -> Any:
    """JAX's client of the coordination service, with a key-value store; None if there is one process.

    JAX's public functions wait by a computation on all devices instead.
    """
    import jax
    from jax._src import distributed

    return distributed.global_state.client if jax.process_count() > 1 else None


def is_primary() -> bool:
    """Whether this is process 0, which writes what a run writes once."""
    return _index() == 0


def barrier(name: str, timeout_seconds: float | None = None) -> None:
    """Waits until every process has called it; returns at once if there is only one. From any thread.

    Args:
      name: of the occasion; barriers of one name are passed in the same order by all processes.
      timeout_seconds: how long to wait; None: without a timeout.

    Raises:
      UserError: if another process has failed in `failing_together`.
      jax.errors.JaxRuntimeError: if a process has died, or does not arrive in time.
    """
    client = coordination_client()
    if client is None:
        return
    key = _once("barrier", name)
    if is_primary():
        for index in range(1, _count()):
            _wait_for(client, f"{key}/{index}", timeout_seconds)
        client.key_value_set(f"{key}/open", "")
    else:
        client.key_value_set(f"{key}/{_index()}", "")
        _wait_for(client, f"{key}/open", timeout_seconds)


@contextmanager
def primary_first(name: str) -> Iterator[None]:
    """Process 0 runs the block first, then the others, which find its results.

    Raises:
      UserError: in the others if process 0 failed, with its message.
    """
    client = coordination_client()
    if client is None:
        yield
        return
    key = _once("first", name)
    if is_primary():
        failure = "it was stopped"
        try:
            yield
            failure = ""
        except BaseException as error:
            failure = _in_words(error)
            raise
        finally:
            client.key_value_set(key, failure)
    else:
        failure = _wait_for(client, key)
        if failure:
            raise _OtherFailed(f"process 0, {name}: {failure}")
        yield


def from_primary(name: str, text: str = "") -> str:
    """Broadcasts a text from process 0; the others wait for it without a timeout.

    Args:
      name: of the occasion.
      text: what process 0 sends; ignored in the others.

    Raises:
      UserError: in the others if a process has failed in `failing_together`.
    """
    client = coordination_client()
    if client is None:
        return text
    key = _once("said", name)
    if is_primary():
        client.key_value_set(key, text)
        return text
    return _wait_for(client, key)


@contextmanager
def failing_together() -> Iterator[None]:
    """If a process fails in the block, the others fail too when they wait for it by functions of this module.

    Without it JAX tells them half a minute after the process has ended, and ends them like a crash.
    """
    try:
        yield
    except _OtherFailed:
        raise
    except BaseException as error:
        client = coordination_client()
        if client is not None:
            client.key_value_set(f"{_FAILED}/{_index()}", _in_words(error), allow_overwrite=True)
        raise


@dataclass(frozen=True)
class Processes:
    """The processes that do something together: all of a run, or one.

    Attributes:
      index: of this process, from 0.
      count: number of processes.
    """

    index: int
    count: int

    @classmethod
    def all(cls) -> Processes:
        """Every process of the run; each of them must take part."""
        return cls(_index(), _count())

    def gather(self, text: str) -> list[str]:
        """The text of each process, in their order; from one thread only.

        Raises:
          UserError: if another process has failed in `failing_together`.
          jax.errors.JaxRuntimeError: if one does not arrive within `TIMEOUT_SECONDS`, or has died.
        """
        if self.count == 1:
            return [text]
        client, number = coordination_client(), next(_gathered)
        client.key_value_set(_gather_key(number, self.index), text)
        texts = [_wait_for(client, _gather_key(number, index), TIMEOUT_SECONDS) for index in range(self.count)]
        if number:
            # A process writes this text only after it has read all texts gathered before.
            client.key_value_delete(_gather_key(number - 1, self.index))
        return texts


ALONE = Processes(0, 1)
"""This process by itself, independent of the others."""


class _OtherFailed(UserError):
    """Another process has failed, and so does this one."""


def _wait_for(client: Any, key: str, timeout_seconds: float | None = None) -> str:
    """The value of a key, as soon as a process has set it; fails if another process has failed."""
    import jax

    end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while True:
        try:
            return client.blocking_key_value_get(key, _LOOK_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED") or (end is not None and time.monotonic() > end):
                raise
        for name, failure in client.key_value_dir_get(_FAILED):
            raise _OtherFailed(f"process {name.rpartition('/')[2]}: {failure}")


def _index() -> int:
    import jax

    return jax.process_index()


def _count() -> int:
    import jax

    return jax.process_count()


def _in_words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _once(kind: str, name: str) -> str:
    """A key that every process makes in the same order, and none makes twice."""
    key = f"t5x_ext/{kind}/{name}"
    _visits[key] += 1
    return f"{key}/{_visits[key]}"


def _gather_key(number: int, index: int) -> str:
    return f"t5x_ext/gather/{number}/{index}"
