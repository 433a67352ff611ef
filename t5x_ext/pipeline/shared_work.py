"""What process 0 of a run, which makes the stages, asks the other processes to do with it."""

from __future__ import annotations

import json
from typing import NamedTuple

from t5x_ext.parallel import from_primary
from t5x_ext.pipeline.decoding import Decoding


class Task(NamedTuple):
    """Work that all processes do together."""

    stage: str
    """For which stage."""
    decoding: Decoding | None = None
    """The file that is decoded; None: the stage itself, which is a `SharedStage`."""


def ask(task: Task | None) -> None:
    """Asks the other processes for help with a task, which this one then does with them; None: all is done.

    Where there is one process only, nobody is asked.
    """
    record = None
    if task is not None:
        record = [task.stage, None if task.decoding is None else task.decoding.to_json()]
    from_primary("task", json.dumps(record))


def asked() -> Task | None:
    """What process 0 asks for next, as soon as it does; None once all is done.

    Raises:
      UserError: where process 0 has failed.
    """
    record = json.loads(from_primary("task"))
    if record is None:
        return None
    stage, decoding = record
    return Task(stage, None if decoding is None else Decoding.from_json(decoding))
