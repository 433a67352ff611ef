"""Where the wall time of a run goes, over all its restarts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SECTIONS = ("start", "compile", "data", "step", "evaluate", "save", "lost", "other")
"""Parts of the wall time, in the order in which they are told.

`start`: reading data and weights before the loop. `compile`: of the training step. `data`: waiting for a batch.
`step`: the device computes, or the host hands it work. `evaluate`, `save`: while the loop stands still for it. `lost`:
updates that were made and thrown away, by a crash after the last checkpoint or by going back. `other`: the rest.
"""


class Clock:
    """Wall seconds by section; `now` can be replaced in tests.

    Attributes:
      seconds: by section.
      earlier: seconds that passed before this clock was started, by clocks of the same run.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now = now
        self.seconds: dict[str, float] = {}
        self.earlier = 0.0
        self._start = now()
        self._inner: list[float] = []  # seconds spent inside sections within each running section

    def add(self, seconds: Mapping[str, float]) -> None:
        """Counts what earlier clocks of the same run have split, before a restart."""
        self.earlier += sum(seconds.values())
        for name, spent in seconds.items():
            if name != "other":  # it is the rest
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Adds the time spent inside the block to a section, less that of sections inside it."""
        start = self.now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = self.now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

    def total(self) -> float:
        """Wall seconds of the run."""
        return self.earlier + self.now() - self._start

    def split(self) -> dict[str, float]:
        """Wall seconds by section; they add up to `total()`."""
        rest = self.total() - sum(self.seconds.values())
        return {**self.seconds, "other": max(rest, 0.0)}


def describe_split(seconds: Mapping[str, float]) -> dict[str, Any]:
    """Seconds of all sections and their share of the whole, as they stand in `results.json`."""
    total = max(sum(seconds.values()), 1e-9)
    rounded = {name: round(seconds.get(name, 0.0), 3) for name in SECTIONS}
    shares = {name: round(seconds.get(name, 0.0) / total, 4) for name in SECTIONS}
    return {"seconds": rounded, "fractions": shares}
