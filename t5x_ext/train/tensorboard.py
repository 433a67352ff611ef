"""Scalars for TensorBoard, written at once.

tensorboardX's own writer hands events to a thread, through a queue of ten: where the disk is full the thread dies, and
the eleventh event waits for ever.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

logger = logging.getLogger(__name__)


class TensorBoard:
    """One file of events; where it cannot be written, a warning tells that it ends.

    Args:
      folder: a local folder, made if there is none.
      start: updates already done; what other files of the folder tell of later ones counts no more.
    """

    def __init__(self, folder: epath.Path, start: int):
        self._writer: EventsWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A run that goes back may open two files in a second, after which they are named.
            self._writer = EventsWriter(str(folder / "events"), f".{start}")
            self._write(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
        except OSError as error:
            self._give_up(error)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of an update."""
        try:
            scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._write(Event(step=step, summary=Summary(value=scalars)))
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None

    def _write(self, event: Event) -> None:
        if self._writer is not None:
            event.wall_time = time.time()
            self._writer.write_event(event)
            self._writer.flush()

    def _give_up(self, error: OSError) -> None:
        logger.warning("TensorBoard's file ends here: %s", error.strerror)
        self.close()
