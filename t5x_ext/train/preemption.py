"""Stopping on a signal: on every process after the same update, with the weights on disk.

SIGTERM is what Kubernetes and Slurm send, what a virtual machine sends that is taken away, and what the maintenance
notice of Cloud TPU is (docs.cloud.google.com/tpu/docs/autocheckpoint; for machines made with --autocheckpoint-enabled,
it comes five minutes ahead). SIGUSR1 is what `sbatch --signal=USR1@60` sends, SIGINT is Ctrl-C.
"""

from __future__ import annotations

import itertools
import json
import signal
import time
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5x_ext.storage.processes import coordination_client
from t5x_ext.train.loop import Hook, Loop
from t5x_ext.train.signals import listening

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_numbers = itertools.count()  # of the ballots of this process; processes train the same runs in the same order


class Interrupted(Exception):
    """An evaluation was given up because the run was told to stop; the message says by what."""


class _Request(NamedTuple):
    """A signal that came."""

    at: float  # seconds since 1970
    reason: str


class _Ballot:
    """Processes agree on the update after which they stop, without waiting for a device.

    A process that was told to stop after update n asks all to stop after update n + 2, through the key-value store of
    JAX's coordination service. That is late enough: a process fetches the metrics of update m - 1 before it runs its
    hooks after update m, and they exist only when every process has dispatched update m - 1; so nobody has passed its
    hooks after update n + 1 when the request is written, and everybody reads it after update n + 2. Of several
    requests the earliest holds, by the same argument.
    """

    LEAD = 2

    def __init__(self) -> None:
        self._client: Any = coordination_client()
        self._folder = f"t5x_ext/stop/{next(_numbers)}"
        self._asked = False

    def ask(self, step: int, request: _Request) -> None:
        """Asks all processes to stop; once."""
        if not self._asked:
            self._asked = True
            value = json.dumps([step + self.LEAD, *request])
            self._client.key_value_set(f"{self._folder}/{jax.process_index()}", value)

    def due(self, step: int) -> _Request | None:
        """The request for which all stop after this update, if there is one."""
        values = (json.loads(value) for _, value in self._client.key_value_dir_get(self._folder))
        last_step, *request = min(values, default=(step + 1,))
        return _Request(*request) if last_step <= step else None


class StopOnSignal(Hook):
    """Ends the loop on SIGTERM, SIGINT or SIGUSR1, so that the weights are saved.

    Use it as a context manager. With one process, training stops after the current update. With several, any process
    may receive the signal; all stop together two updates later. While the run is being saved, Ctrl-C ends the process
    at once; the SIGTERM that Slurm sends some time after SIGUSR1 does not.

    Attributes:
      received_at: when the signal came to whichever process got it, in seconds since 1970; None before.
    """

    def __init__(self) -> None:
        self.received_at: float | None = None
        self._request: _Request | None = None
        self._ballot = _Ballot() if jax.process_count() > 1 else None
        self._stack = ExitStack()

    def __enter__(self) -> StopOnSignal:
        self._stack.enter_context(listening(SIGNALS, self._handle))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _handle(self, number: int, frame: object) -> None:
        if self._request is None:
            self._request = _Request(time.time(), f"{signal.Signals(number).name} received")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def after_step(self, loop: Loop) -> None:
        """Asks the loop to stop once a signal has come."""
        request = self._request
        if self._ballot is not None:
            if request:
                self._ballot.ask(loop.step, request)
            request = self._ballot.due(loop.step)
        if request:
            self.received_at, loop.stop = request
            loop.interrupted = True

    def check(self) -> None:
        """Gives an evaluation up once a signal has come; all processes call it at the same places.

        Raises:
          Interrupted: on all processes, if any of them was told to stop.
        """
        request = self._request
        if self._ballot is not None:
            # Devices know no 64-bit numbers: seconds, and their thousandths.
            at = divmod(round(1000 * request.at), 1000) if request else (np.iinfo(np.int32).max, 0)
            second, thousandths = min(multihost_utils.process_allgather(np.asarray(at, np.int32)).tolist())
            if second < np.iinfo(np.int32).max:
                request = _Request(second + thousandths / 1000, "a signal received during an evaluation")
        if request:
            self.received_at = request.at
            raise Interrupted(request.reason)
