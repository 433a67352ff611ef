"""What hooks remember across restarts: part of every checkpoint, as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class LogSums:
    """Sums over the updates since the last log line.

    Attributes:
      updates: number of updates.
      finite: those of them that were not skipped.
      losses: [sum, weight] of the loss and of its metrics, by name.
      gradient_norm: sum over finite updates.
      extra: sums over finite updates of `StepMetrics.extra`, by name.
      model_flops: floating point operations of the model.
      clock: seconds by section of the run's clock when the line was written.
    """

    updates: int = 0
    finite: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    gradient_norm: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)
    model_flops: float = 0.0
    clock: dict[str, float] = field(default_factory=dict)


@dataclass
class Patience:
    """What `hooks.EarlyStop` has counted.

    Attributes:
      best: the best value of the metric so far.
      evaluations_without_gain: measurements since then.
    """

    best: float | None = None
    evaluations_without_gain: int = 0


@dataclass
class Memory:
    """The memory of a run.

    Attributes:
      evaluation_owed: the update after which an evaluation was due but did not take place, because the run was told to
        stop.
      early_stop: see `Patience`.
      skipped_in_row: updates skipped since the last one that was not.
      skipped_updates: updates skipped in all.
      rewinds: how often the run went back to an earlier checkpoint.
      target_tokens: sum of the loss weights of all updates: labels, for a translation.
      model_flops: floating point operations of the model in all updates.
      log: sums since the last log line.
      hooks: what hooks from outside keep, by a name of their own; JSON.
    """

    evaluation_owed: int | None = None
    early_stop: Patience = field(default_factory=Patience)
    skipped_in_row: int = 0
    skipped_updates: int = 0
    rewinds: int = 0
    target_tokens: float = 0.0
    model_flops: float = 0.0
    log: LogSums = field(default_factory=LogSums)
    hooks: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Memory:
        """The memory of a `to_json` record.

        In records of the first edition hooks from outside kept their entries beside the others.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        values = {name: value for name, value in record.items() if name in known}
        if "early_stop" in values:
            values["early_stop"] = Patience(**values["early_stop"])
        if "log" in values:
            values["log"] = LogSums(**values["log"])
        others = {name: value for name, value in record.items() if name not in known}
        values["hooks"] = {**values.get("hooks", {}), **others}
        return cls(**values)
