"""A profile of a few updates, asked for while the run continues."""

from __future__ import annotations

import logging
import signal
from contextlib import ExitStack

import jax
from etils import epath

from t5x_ext.storage.remote import is_remote
from t5x_ext.train.loop import Hook, Loop
from t5x_ext.train.signals import listening

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_REMOTE_LOOKS = 60.0  # asking a bucket takes a tenth of a second


class Profile(Hook):
    """Traces the next updates when a file `profile` appears in the run folder, or on SIGUSR2.

    The trace goes to `profiles/step_N` of the run folder, for TensorBoard's profile page or Perfetto; the file is
    removed. Process 0 looks for the file; SIGUSR2 makes the process that gets it trace itself.

    Args:
      folder: the run folder.
      updates: how many updates a trace covers.
      looks: whether this process looks for the file.
    """

    def __init__(self, folder: epath.Path, *, updates: int = 5, looks: bool = True):
        self._request, self._profiles = folder / "profile", folder / "profiles"
        self._updates, self._looks = updates, looks
        self._seconds_between_looks = _SECONDS_BETWEEN_REMOTE_LOOKS if is_remote(folder) else _SECONDS_BETWEEN_LOOKS
        self._asked = False
        self._last_update: int | None = None  # of the trace under way
        self._next_look = float("-inf")
        self._stack = ExitStack()

    def __enter__(self) -> Profile:
        self._stack.enter_context(listening((signal.SIGUSR2,), self._handle))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
        self._stack.close()

    def _handle(self, number: int, frame: object) -> None:
        self._asked = True

    def after_step(self, loop: Loop) -> None:
        """Begins a trace that was asked for; ends one that has its updates."""
        if self._last_update is None:
            if self._is_asked(loop.clock.now()):
                self._asked = False
                folder = self._profiles / f"step_{loop.step}"
                jax.profiler.start_trace(str(folder))
                self._last_update = loop.step + self._updates
                logger.info("tracing updates %d to %d: %s", loop.step + 1, self._last_update, folder)
        elif loop.step >= self._last_update:
            loop.settle()
            self._stop()

    def at_end(self, loop: Loop) -> None:
        """Ends a trace that is under way."""
        self._stop()

    def _is_asked(self, now: float) -> bool:
        if self._looks and now >= self._next_look:
            self._next_look = now + self._seconds_between_looks
            if self._request.exists():
                self._request.unlink()
                return True
        return self._asked

    def _stop(self) -> None:
        if self._last_update is not None:
            self._last_update = None
            jax.profiler.stop_trace()
