"""Which checkpoints are kept: the newest, the best, and those that a rule keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from t5x_ext.contracts import UserError


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: a step among the newest or the best, or one that a rule keeps.

    Attributes:
      keep_last: number of newest steps to keep, at least 1.
      keep_best: number of best steps to keep as well, by `metric`; 0 for none.
      metric: name of the metric, among those given to `save`; None: no selection.
      mode: whether the largest (`max`) or the smallest (`min`) value is best.
      keep: whether a step is kept for good; None: no such steps.
    """

    keep_last: int = 3
    keep_best: int = 1
    metric: str | None = None
    mode: Literal["max", "min"] = "max"
    keep: Callable[[int], bool] | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise UserError(f"keep_last = {self.keep_last} must be at least 1: a run without a checkpoint is lost")
        if self.keep_best < 0:
            raise UserError(f"keep_best = {self.keep_best} must not be negative")
        if self.mode not in ("max", "min"):
            raise UserError(f"mode = {self.mode!r} must be 'max' or 'min'")

    def ranked(self, values: Mapping[int, float | None]) -> list[int]:
        """Steps from best to worst, without those that have no finite value; of equal ones the newer comes first."""
        sign = -1.0 if self.mode == "max" else 1.0
        finite = [(sign * value, -step) for step, value in values.items() if value is not None and math.isfinite(value)]
        return [-negative for _, negative in sorted(finite)]

    def kept(self, values: Mapping[int, float | None]) -> set[int]:
        """Of the given steps (with their value of the metric), those to keep.

        >>> sorted(Retention(keep_last=2, keep_best=1, metric="bleu").kept({1: 30.0, 2: 10.0, 3: 20.0, 4: None}))
        [1, 3, 4]
        """
        for_good = {step for step in values if self.keep is not None and self.keep(step)}
        return set(sorted(values)[-self.keep_last :]) | set(self.ranked(values)[: self.keep_best]) | for_good
