"""What process 0, which makes the stages, asks the other processes to do with it."""

from __future__ import annotations

import json
from typing import NamedTuple

from t5x_ext.parallel import from_primary
from t5x_ext.pipeline.decoding import Decoding


class SharedWork(NamedTuple):
    """Work that all processes do together.

    Attributes:
      stage: the stage that needs it.
      decoding: the file that is decoded; None: the stage itself, which is a `SharedStage`.
    """

    stage: str
    decoding: Decoding | None = None


def ask(work: SharedWork | None) -> None:
    """Asks the other processes to share in this work, which the caller then does as well; None: all is done.

    With one process this does nothing.
    """
    record = None
    if work is not None:
        record = [work.stage, None if work.decoding is None else work.decoding.to_json()]
    from_primary("work", json.dumps(record))


def asked() -> SharedWork | None:
    """What process 0 asks for next, waiting until it does; None once all is done.

    Raises:
      UserError: if process 0 has failed.
    """
    record = json.loads(from_primary("work"))
    if record is None:
        return None
    stage, decoding = record
    return SharedWork(stage, None if decoding is None else Decoding.from_json(decoding))
